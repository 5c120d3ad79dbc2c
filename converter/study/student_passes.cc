#include <algorithm>
#include <numeric>

#include "converter/study/paper_student.h"
#include "kernels/activation.h"
#include "kernels/base/error.h"
#include "kernels/exponential.h"
#include "kernels/gathered_rows.h"
#include "kernels/linear.h"
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
  Matrix z;                     // V x  [m, router_rank]
  std::span<std::int32_t> ids;  // [m · k], ascending for each token
  std::span<float> gate;        // [m · k] softmax of the selected scores
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

// Selection and gates.
void route(Context& ctx, const PaperStudent& s, ConstMatrix x, Tape& tape) {
  const std::int64_t m = x.rows;
  const std::int64_t k = s.shape.n_active;
  const std::int64_t n_experts = s.shape.n_experts;
  const ConstMatrix u = view(s.router_u, n_experts, s.router_cols());
  tape.ids = take<std::int32_t>(ctx, m * k);
  tape.gate = take<float>(ctx, m * k);
  if (s.shape.family == Family::LowRank) {
    tape.z = take_matrix(ctx, m, s.shape.router_rank);
    kernels::gemm(ctx, false, true, 1, x, view(s.router_v, s.shape.router_rank, s.shape.d_model), 0,
                  tape.z);
  }
  const Workspace::Scope scope(ctx.workspace);
  Matrix scores = take_matrix(ctx, m, n_experts);
  kernels::gemm(ctx, false, true, 1, s.shape.family == Family::LowRank ? ConstMatrix(tape.z) : x, u,
                0, scores);
  const int n_threads = ctx.pool.n_threads();
  auto keys = take<std::uint32_t>(ctx, n_threads * n_experts);
  ctx.pool.run([&](int thread) {
    const Range rows = split(m, n_threads, thread);
    const auto own_keys = keys.subspan(size(thread * n_experts), size(n_experts));
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      float* row = scores.row(t);
      for (std::int64_t i = 0; i < n_experts; ++i) row[i] += s.router_bias[size(i)];
      const auto ids = tape.ids.subspan(size(t * k), size(k));
      const auto gate = tape.gate.subspan(size(t * k), size(k));
      kernels::top_k({row, size(n_experts)}, ids, own_keys);
      for (std::int64_t j = 0; j < k; ++j) gate[size(j)] = row[ids[size(j)]];
      const float sum =
          kernels::exponentials(gate, *std::max_element(gate.begin(), gate.end()), gate);
      for (float& g : gate) g /= sum;
    }
  });
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
      const std::span<float> h(tape.h.row(t), size(s.shape.n_shared));
      for (std::size_t i = 0; i < h.size(); ++i) h[i] += s.shared_bias[i];
      kernels::activation_slope(kPhi, h, h, {tape.slope.row(t), h.size()});
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
    for (float& v : a) v += s.expert_bias[size(i)];
    kernels::activation_slope(kPhi, a, a, part(tape.expert_slope, pairs));
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

// The gradient of everything that selects: scores, then U, c and V. `d_gate` [m · k] is overwritten
// by the scores' gradient.
void backward_router(Context& ctx, const PaperStudent& s, ConstMatrix x, const Tape& tape,
                     std::span<float> d_gate, PaperStudent& g) {
  const std::int64_t m = x.rows;
  const std::int64_t k = s.shape.n_active;
  const std::int64_t n_experts = s.shape.n_experts;
  const std::int64_t cols = s.router_cols();
  const bool low_rank = s.shape.family == Family::LowRank;
  const ConstMatrix u = view(s.router_u, n_experts, cols);
  const Matrix dz = low_rank ? take_matrix(ctx, m, cols) : Matrix();
  for_ranges(ctx, m, [&](Range rows) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const Range own{t * k, t * k + k};
      const std::span<float> ds = part(d_gate, own);
      const std::span<const float> gate = part(tape.gate, own);
      const float mean = std::inner_product(ds.begin(), ds.end(), gate.begin(), 0.0F);
      for (std::size_t j = 0; j < ds.size(); ++j) ds[j] = gate[j] * (ds[j] - mean);
      if (low_rank) {
        kernels::gathered_sum(ds, u, part(tape.ids, own), {dz.row(t), size(cols)}, false);
      }
    }
  });
  const ByExpert& by = tape.by_expert;
  auto ds_by_expert = take<float>(ctx, m * k);
  const ConstMatrix input = low_rank ? ConstMatrix(tape.z) : x;
  const Matrix du = view(g.router_u, n_experts, cols);
  for_experts(ctx, by, n_experts, [&](std::int64_t i, Range pairs) {
    const std::span<float> ds = part(ds_by_expert, pairs);
    for (std::size_t e = 0; e < ds.size(); ++e) {
      ds[e] = d_gate[size(by.pair[size(pairs.begin) + e])];
    }
    kernels::gathered_sum(ds, input, part(by.token, pairs), {du.row(i), size(cols)}, false);
    g.router_bias[size(i)] = std::accumulate(ds.begin(), ds.end(), 0.0F);
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
    g.expert_bias[size(i)] = sum;
  });
  backward_router(ctx, s, x, tape, d_gate, g);
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
  sum_rows(ctx, tape.h, g.shared_bias.span());
  if (s.shape.n_active > 0) backward_experts(ctx, s, x, dy, tape, g);
  return std::accumulate(by_row.begin(), by_row.end(), 0.0) * unit;
}

}  // namespace moesaic::converter::study
