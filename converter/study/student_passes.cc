#include <algorithm>
#include <numeric>

#include "converter/study/paper_student.h"
#include "kernels/activation.h"
#include "kernels/base/error.h"
#include "kernels/exponential.h"
#include "kernels/gathered_rows.h"
#include "kernels/linear.h"
#include "kernels/product_top_k.h"
#include "kernels/top_k.h"

// Of 10,000 experts a batch of 1,024 tokens selects 8 to 256 each: dense products with all of them
// would be 40 to 1,200 times the work. So work is laid out twice over the same (token, place)
// pairs: by token, where a token's row is summed, and by expert, where an expert's row is read once
// for all of its tokens, and its gradient written by one thread.

namespace moesaic::converter::study {
namespace {

constexpr std::int64_t kTile = 1024;  // rows of x that predict() works on at a time
constexpr auto kPhi = kernels::Activation::GeluTanh;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

template <class T>
std::span<T> take(Context& ctx, std::int64_t n) {
  return ctx.workspace.take<T>(size(n));
}

Matrix take_matrix(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {take<float>(ctx, rows * cols).data(), rows, cols};
}

ConstMatrix view(const AlignedBuffer<float>& b, std::int64_t rows, std::int64_t cols) {
  return {b.data(), rows, cols};
}

Matrix view(AlignedBuffer<float>& b, std::int64_t rows, std::int64_t cols) {
  return {b.data(), rows, cols};
}

template <class Fn>
void for_ranges(Context& ctx, std::int64_t n, Fn&& fn) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range range = split(n, n_threads, thread);
    if (range.size() > 0) fn(range);
  });
}

// sums[j] = Σ_t m[t, j], threads splitting the columns.
void sum_rows(Context& ctx, ConstMatrix m, std::span<float> sums) {
  for_ranges(ctx, m.cols, [&](Range cols) {
    std::fill(sums.begin() + cols.begin, sums.begin() + cols.end, 0.0F);
    for (std::int64_t t = 0; t < m.rows; ++t) {
      const float* row = m.row(t);
      for (std::int64_t j = cols.begin; j < cols.end; ++j) sums[size(j)] += row[j];
    }
  });
}

// The selected (token, place) pairs of a batch in the order of their experts, tokens ascending.
struct ByExpert {
  std::span<std::int32_t> begin;  // [n_experts + 1] first pair of each expert
  std::span<std::int32_t> token;  // [n_pairs]
  std::span<std::int32_t> pair;   // [n_pairs] token · k + place

  Range of(std::int64_t expert) const { return {begin[size(expert)], begin[size(expert) + 1]}; }
};

// Everything of a forward pass that the backward pass needs. In workspace memory.
struct Tape {
  Matrix h, slope;              // shared neurons: φ and φ'  [m, n_shared]
  Matrix z;                     // V x  [m, router_rank], or both halves' [m, 2 router_rank]
  std::span<std::int32_t> ids;  // [m · k], ascending for each token
  std::span<float> gate;        // [m · k] softmax of the selected scores, or these
  std::span<float> value;       // [m · k] φ of the selected experts
  std::span<float> scaled;      // [m · k] gate · value
  ByExpert by_expert;
  std::span<float> expert_slope;  // φ' by expert  [m · k]
};

// The experts' part of `split`: borders where the pairs are about evenly shared.
Range expert_range(const ByExpert& by, std::int64_t n_experts, int n_threads, int thread) {
  const std::int64_t n_pairs = by.begin[size(n_experts)];
  const auto border = [&](int part) {
    if (part == 0) return std::int64_t{0};
    if (part == n_threads) return n_experts;
    // Rows without tokens cost a little too.
    const std::int64_t total = n_pairs + n_experts;
    const std::int64_t wanted = split(total, n_threads, part).begin;
    std::int64_t low = 0;
    std::int64_t high = n_experts;
    while (low < high) {
      const std::int64_t mid = (low + high) / 2;
      if (by.begin[size(mid)] + mid < wanted) {
        low = mid + 1;
      } else {
        high = mid;
      }
    }
    return low;
  };
  return {border(thread), border(thread + 1)};
}

template <class Fn>
void for_experts(Context& ctx, const ByExpert& by, std::int64_t n_experts, Fn&& fn) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range experts = expert_range(by, n_experts, n_threads, thread);
    for (std::int64_t i = experts.begin; i < experts.end; ++i) fn(i, by.of(i));
  });
}

ByExpert sort_by_expert(Context& ctx, std::span<const std::int32_t> ids, std::int64_t n_experts,
                        std::int64_t k) {
  const auto n_pairs = static_cast<std::int64_t>(ids.size());
  ByExpert by{take<std::int32_t>(ctx, n_experts + 1), take<std::int32_t>(ctx, n_pairs),
              take<std::int32_t>(ctx, n_pairs)};
  std::fill(by.begin.begin(), by.begin.end(), 0);
  for (const std::int32_t id : ids) ++by.begin[size(id) + 1];
  std::partial_sum(by.begin.begin(), by.begin.end(), by.begin.begin());
  auto next = take<std::int32_t>(ctx, n_experts);
  std::copy_n(by.begin.begin(), n_experts, next.begin());
  for (std::int64_t p = 0; p < n_pairs; ++p) {
    const auto at = size(next[size(ids[size(p)])]++);
    by.token[at] = static_cast<std::int32_t>(p / k);
    by.pair[at] = static_cast<std::int32_t>(p);
  }
  return by;
}

template <class T>
std::span<T> part(std::span<T> all, Range range) {
  return all.subspan(size(range.begin), size(range.size()));
}

// Columns [first, first + n) of all rows.
Matrix columns(Matrix m, std::int64_t first, std::int64_t n) {
  return {m.data + first, m.rows, n, m.stride};
}

// What the router says of all experts, or of the keys of both halves, without c.   [m, n_scores]
Matrix router_scores(Context& ctx, const PaperStudent& s, ConstMatrix x, Tape& tape) {
  const Matrix scores = take_matrix(ctx, x.rows, s.shape.n_scores());
  const std::int64_t rank = s.router_cols();
  const ConstMatrix u = view(s.router_u, scores.cols, rank);
  if (!s.shape.product_keys()) {
    const bool low_rank = s.shape.family == Family::LowRank;
    kernels::gemm(ctx, false, true, 1, low_rank ? ConstMatrix(tape.z) : x, u, 0, scores);
    return scores;
  }
  const std::int64_t n_keys = s.shape.n_keys();
  for (const std::int64_t half : {0, 1}) {
    kernels::gemm(ctx, false, true, 1, columns(tape.z, half * rank, rank),
                  u.slice(half * n_keys, n_keys), 0, columns(scores, half * n_keys, n_keys));
  }
  return scores;
}

// Who is selected for each token, by scores that c was added to; the gates become their scores.
void select(Context& ctx, const PaperStudent& s, Matrix scores, Tape& tape) {
  const std::int64_t k = s.shape.n_active;
  const bool product = s.shape.product_keys();
  const std::size_t n = size(product ? s.shape.n_keys() : s.shape.n_experts);
  const std::size_t n_candidates = product ? kernels::n_product_candidates(n, size(k)) : 0;
  const std::size_t n_ranks = product ? 2 * std::min(n, size(k)) : 0;
  const auto threads = static_cast<std::size_t>(ctx.pool.n_threads());
  const auto keys = ctx.workspace.take<std::uint32_t>(threads * n);
  const auto candidates = ctx.workspace.take<kernels::ProductCandidate>(threads * n_candidates);
  const auto values = ctx.workspace.take<float>(product ? threads * 2 * n : 0);
  const auto ranks = ctx.workspace.take<std::int32_t>(threads * n_ranks);
  ctx.pool.run([&](int thread) {
    const auto own = static_cast<std::size_t>(thread);
    const Range rows = split(scores.rows, ctx.pool.n_threads(), thread);
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      float* row = scores.row(t);
      for (std::int64_t i = 0; i < scores.cols; ++i) row[i] += s.router_bias[size(i)];
      const auto ids = tape.ids.subspan(size(t * k), size(k));
      const auto gate = tape.gate.subspan(size(t * k), size(k));
      if (product) {
        kernels::top_k_product({row, n}, {row + n, n}, ids,
                               {candidates.subspan(own * n_candidates, n_candidates),
                                values.subspan(own * 2 * n, 2 * n), keys.subspan(own * n, n),
                                ranks.subspan(own * n_ranks, n_ranks)});
        for (std::size_t j = 0; j < ids.size(); ++j) {
          gate[j] = row[size(ids[j]) / n] + row[n + size(ids[j]) % n];
        }
      } else {
        kernels::top_k({row, n}, ids, keys.subspan(own * n, n));
        for (std::size_t j = 0; j < ids.size(); ++j) gate[j] = row[ids[j]];
      }
    }
  });
}

// Selection and gates.
void route(Context& ctx, const PaperStudent& s, ConstMatrix x, Tape& tape) {
  const std::int64_t m = x.rows;
  const std::int64_t k = s.shape.n_active;
  tape.ids = take<std::int32_t>(ctx, m * k);
  tape.gate = take<float>(ctx, m * k);
  if (s.shape.router_rank > 0) {
    const std::int64_t rows = (s.shape.product_keys() ? 2 : 1) * s.shape.router_rank;
    tape.z = take_matrix(ctx, m, rows);
    kernels::gemm(ctx, false, true, 1, x, view(s.router_v, rows, s.shape.d_model), 0, tape.z);
  }
  const Workspace::Scope scope(ctx.workspace);
  select(ctx, s, router_scores(ctx, s, x, tape), tape);
  if (s.shape.family == Family::Sgatlin) return;
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const auto gate = tape.gate.subspan(size(t * k), size(k));
      const float sum =
          kernels::exponentials(gate, *std::max_element(gate.begin(), gate.end()), gate);
      for (float& g : gate) g /= sum;
    }
  });
}

// φ(a + b) over a, and its slope; b a value for all or one for each. Linear neurons: a itself, 1.
void activate(const PaperStudent& s, std::span<float> a, std::span<const float> b,
              std::span<float> slope) {
  if (s.shape.family == Family::Sgatlin) {
    std::fill(slope.begin(), slope.end(), 1.0F);
    return;
  }
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[b.size() == 1 ? 0 : i];
  kernels::activation_slope(kPhi, a, a, slope);
}

// ŷ, leaving on the tape what backward() needs.
void forward(Context& ctx, const PaperStudent& s, ConstMatrix x, Tape& tape, Matrix y) {
  const std::int64_t m = x.rows;
  const std::int64_t d = s.shape.d_model;
  const std::int64_t k = s.shape.n_active;
  tape.h = take_matrix(ctx, m, s.shape.n_shared);
  tape.slope = take_matrix(ctx, m, s.shape.n_shared);
  kernels::gemm(ctx, false, true, 1, x, view(s.shared_in, s.shape.n_shared, d), 0, tape.h);
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const std::size_t n_shared = size(s.shape.n_shared);
      activate(s, {tape.h.row(t), n_shared}, s.shared_bias.span(), {tape.slope.row(t), n_shared});
      std::copy_n(s.bias.data(), d, y.row(t));
    }
  });
  kernels::gemm(ctx, false, false, 1, tape.h, view(s.shared_out, s.shape.n_shared, d), 1, y);
  if (k == 0) return;

  route(ctx, s, x, tape);
  tape.by_expert = sort_by_expert(ctx, tape.ids, s.shape.n_experts, k);
  tape.value = take<float>(ctx, m * k);
  tape.scaled = take<float>(ctx, m * k);
  tape.expert_slope = take<float>(ctx, m * k);
  auto activation = take<float>(ctx, m * k);  // by expert
  const ByExpert& by = tape.by_expert;
  const ConstMatrix w_in = view(s.expert_in, s.shape.n_experts, d);
  for_experts(ctx, by, s.shape.n_experts, [&](std::int64_t i, Range pairs) {
    const std::span<float> a = part(activation, pairs);
    kernels::gathered_dots({w_in.row(i), size(d)}, x, part(by.token, pairs), a);
    const std::span<const float> all = s.expert_bias.span();
    activate(s, a, all.empty() ? all : all.subspan(size(i), 1), part(tape.expert_slope, pairs));
    for (std::int64_t e = pairs.begin; e < pairs.end; ++e) {
      tape.value[size(by.pair[size(e)])] = activation[size(e)];
    }
  });
  const ConstMatrix w_out = view(s.expert_out, s.shape.n_experts, d);
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const Range own{t * k, t * k + k};
      for (std::int64_t p = own.begin; p < own.end; ++p) {
        tape.scaled[size(p)] = tape.gate[size(p)] * tape.value[size(p)];
      }
      kernels::gathered_sum(part(tape.scaled, own), w_out, part(tape.ids, own), {y.row(t), size(d)},
                            true);
    }
  });
}

// From the gates' gradient [m · k], overwritten, to the selected scores'.
void backward_gate(Context& ctx, const PaperStudent& s, const Tape& tape, std::int64_t m,
                   std::span<float> d_gate) {
  if (s.shape.family == Family::Sgatlin) return;  // the gates are the scores
  const std::int64_t k = s.shape.n_active;
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const Range own{t * k, t * k + k};
      const std::span<float> ds = part(d_gate, own);
      const std::span<const float> gate = part(tape.gate, own);
      const float mean = std::inner_product(ds.begin(), ds.end(), gate.begin(), 0.0F);
      for (std::size_t j = 0; j < ds.size(); ++j) ds[j] = gate[j] * (ds[j] - mean);
    }
  });
}

// The gradients of U, c and V from the selected scores' [m · k]. Few scores for all experts: dense
// products.
void backward_product_keys(Context& ctx, const PaperStudent& s, ConstMatrix x, const Tape& tape,
                           std::span<const float> ds, PaperStudent& g) {
  const std::int64_t m = x.rows;
  const std::int64_t k = s.shape.n_active;
  const std::int64_t n_keys = s.shape.n_keys();
  const std::int64_t rank = s.shape.router_rank;
  const Matrix d_scores = take_matrix(ctx, m, 2 * n_keys);
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      float* row = d_scores.row(t);
      std::fill_n(row, 2 * n_keys, 0.0F);
      for (std::int64_t p = t * k; p < (t + 1) * k; ++p) {
        const std::int64_t id = tape.ids[size(p)];
        row[id / n_keys] += ds[size(p)];
        row[n_keys + id % n_keys] += ds[size(p)];
      }
    }
  });
  sum_rows(ctx, d_scores, g.router_bias.span());
  const Matrix dz = take_matrix(ctx, m, 2 * rank);
  const ConstMatrix u = view(s.router_u, 2 * n_keys, rank);
  const Matrix du = view(g.router_u, 2 * n_keys, rank);
  for (const std::int64_t half : {0, 1}) {
    const ConstMatrix own = columns(d_scores, half * n_keys, n_keys);
    kernels::gemm(ctx, true, false, 1, own, columns(tape.z, half * rank, rank), 0,
                  du.slice(half * n_keys, n_keys));
    kernels::gemm(ctx, false, false, 1, own, u.slice(half * n_keys, n_keys), 0,
                  columns(dz, half * rank, rank));
  }
  kernels::gemm(ctx, true, false, 1, dz, x, 0, view(g.router_v, 2 * rank, s.shape.d_model));
}

// The same of a router with one score an expert: of these only the selected.
void backward_scores(Context& ctx, const PaperStudent& s, ConstMatrix x, const Tape& tape,
                     std::span<const float> ds, PaperStudent& g) {
  const std::int64_t m = x.rows;
  const std::int64_t k = s.shape.n_active;
  const std::int64_t n_experts = s.shape.n_experts;
  const std::int64_t cols = s.router_cols();
  const bool low_rank = s.shape.family == Family::LowRank;
  const ConstMatrix u = view(s.router_u, n_experts, cols);
  const Matrix dz = low_rank ? take_matrix(ctx, m, cols) : Matrix();
  if (low_rank) {
    for_ranges(ctx, m, [&](Range rows) {
      for (std::int64_t t = rows.begin; t < rows.end; ++t) {
        const Range own{t * k, t * k + k};
        kernels::gathered_sum(part(ds, own), u, part(tape.ids, own), {dz.row(t), size(cols)},
                              false);
      }
    });
  }
  const ByExpert& by = tape.by_expert;
  auto ds_by_expert = take<float>(ctx, m * k);
  const ConstMatrix input = low_rank ? ConstMatrix(tape.z) : x;
  const Matrix du = view(g.router_u, n_experts, cols);
  for_experts(ctx, by, n_experts, [&](std::int64_t i, Range pairs) {
    const std::span<float> own = part(ds_by_expert, pairs);
    for (std::size_t e = 0; e < own.size(); ++e) {
      own[e] = ds[size(by.pair[size(pairs.begin) + e])];
    }
    kernels::gathered_sum(own, input, part(by.token, pairs), {du.row(i), size(cols)}, false);
    g.router_bias[size(i)] = std::accumulate(own.begin(), own.end(), 0.0F);
  });
  if (low_rank) {
    kernels::gemm(ctx, true, false, 1, dz, x, 0, view(g.router_v, cols, s.shape.d_model));
  }
}

void backward_experts(Context& ctx, const PaperStudent& s, ConstMatrix x, ConstMatrix dy,
                      const Tape& tape, PaperStudent& g) {
  const std::int64_t d = s.shape.d_model;
  const std::int64_t n_experts = s.shape.n_experts;
  const std::int64_t n_pairs = x.rows * s.shape.n_active;
  const ByExpert& by = tape.by_expert;
  auto d_gate = take<float>(ctx, n_pairs);  // by token
  auto d_scaled = take<float>(ctx, n_pairs);
  auto factor = take<float>(ctx, n_pairs);
  const ConstMatrix w_out = view(s.expert_out, n_experts, d);
  const Matrix d_in = view(g.expert_in, n_experts, d);
  const Matrix d_out = view(g.expert_out, n_experts, d);
  for_experts(ctx, by, n_experts, [&](std::int64_t i, Range pairs) {
    const auto tokens = part(by.token, pairs);
    const auto own = part(d_scaled, pairs);
    const auto f = part(factor, pairs);
    kernels::gathered_dots({w_out.row(i), size(d)}, dy, tokens, own);
    for (std::size_t e = 0; e < f.size(); ++e) {
      f[e] = tape.scaled[size(by.pair[size(pairs.begin) + e])];
    }
    kernels::gathered_sum(f, dy, tokens, {d_out.row(i), size(d)}, false);
    float sum = 0;
    for (std::size_t e = 0; e < f.size(); ++e) {
      const std::size_t at = size(pairs.begin) + e;
      const std::size_t p = size(by.pair[at]);
      d_gate[p] = own[e] * tape.value[p];
      f[e] = own[e] * tape.gate[p] * tape.expert_slope[at];
      sum += f[e];
    }
    kernels::gathered_sum(f, x, tokens, {d_in.row(i), size(d)}, false);
    if (!g.expert_bias.empty()) g.expert_bias[size(i)] = sum;
  });
  backward_gate(ctx, s, tape, x.rows, d_gate);
  if (s.shape.product_keys()) {
    backward_product_keys(ctx, s, x, tape, d_gate, g);
  } else {
    backward_scores(ctx, s, x, tape, d_gate, g);
  }
}

}  // namespace

void predict(Context& ctx, const PaperStudent& student, ConstMatrix x, Matrix y) {
  for (std::int64_t first = 0; first < x.rows; first += kTile) {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t rows = std::min(kTile, x.rows - first);
    Tape tape;
    forward(ctx, student, x.slice(first, rows), tape, y.slice(first, rows));
  }
}

double loss_and_gradient(Context& ctx, const PaperStudent& s, ConstMatrix x, ConstMatrix y,
                         PaperStudent& g) {
  require<ShapeError>(x.rows == y.rows && x.cols == s.shape.d_model && y.cols == s.shape.d_model &&
                          g.shape == s.shape,
                      "student of {}: inputs [{}, {}] and outputs [{}, {}]", s.shape.d_model,
                      x.rows, x.cols, y.rows, y.cols);
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t m = x.rows;
  const std::int64_t d = s.shape.d_model;
  const std::int64_t n_shared = s.shape.n_shared;
  Tape tape;
  const Matrix dy = take_matrix(ctx, m, d);
  forward(ctx, s, x, tape, dy);
  const double unit = 1 / static_cast<double>(m * d);
  auto by_row = take<double>(ctx, m);
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      double loss = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        const float gap = dy.row(t)[j] - y.row(t)[j];
        loss += static_cast<double>(gap) * gap;
        dy.row(t)[j] = static_cast<float>(2 * unit) * gap;
      }
      by_row[size(t)] = loss;
    }
  });

  sum_rows(ctx, dy, g.bias.span());
  kernels::gemm(ctx, true, false, 1, tape.h, dy, 0, view(g.shared_out, n_shared, d));
  kernels::gemm(ctx, false, true, 1, dy, view(s.shared_out, n_shared, d), 0, tape.h);
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      for (std::int64_t i = 0; i < n_shared; ++i) tape.h.row(t)[i] *= tape.slope.row(t)[i];
    }
  });
  kernels::gemm(ctx, true, false, 1, tape.h, x, 0, view(g.shared_in, n_shared, d));
  if (!g.shared_bias.empty()) sum_rows(ctx, tape.h, g.shared_bias.span());
  if (s.shape.n_active > 0) backward_experts(ctx, s, x, dy, tape, g);
  return std::accumulate(by_row.begin(), by_row.end(), 0.0) * unit;
}

}  // namespace moesaic::converter::study
