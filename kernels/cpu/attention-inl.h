// The arithmetic of one attention unit, compiled once per instruction set by attention.cc through
// hwy/foreach_target.h, hence the toggled guard in place of #pragma once.
#if defined(MOESAIC_KERNELS_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOESAIC_KERNELS_CPU_ATTENTION_INL_H_
#undef MOESAIC_KERNELS_CPU_ATTENTION_INL_H_
#else
#define MOESAIC_KERNELS_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;

constexpr std::int64_t kLanes = hn::MaxLanes(Tag());
// Accumulators of the product: 6 rows × 4 vectors fill AVX-512's 32 registers together with the
// operands, 6 × 2 the 16 of the others.
constexpr int kPanelVecs = kLanes >= 16 || kLanes == 1 ? 4 : 2;
constexpr std::int64_t kPanel = kPanelVecs * kLanes;  // columns of one panel
static_assert(kTileKeys % kPanel == 0 && kWidthMultiple % kLanes == 0);

// C[m, :] = row_scale[m] C[m, :] + Σ_k A[m, k] B[k, :] for kRows rows and kVecs vectors of columns;
// with row_scale null, C is overwritten.
template <int kRows, int kVecs>
HWY_INLINE void multiply_block(const float* HWY_RESTRICT a, std::int64_t lda,
                               const float* HWY_RESTRICT b, std::int64_t ldb, std::int64_t depth,
                               const float* HWY_RESTRICT row_scale, float* HWY_RESTRICT c,
                               std::int64_t ldc) {
  const Tag d;
  Vec sum[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) sum[m][v] = hn::Zero(d);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec bk[kVecs];
    for (int v = 0; v < kVecs; ++v) bk[v] = hn::LoadU(d, b + k * ldb + v * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const Vec am = hn::Set(d, a[m * lda + k]);
      for (int v = 0; v < kVecs; ++v) sum[m][v] = hn::MulAdd(am, bk[v], sum[m][v]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + m * ldc + v * kLanes;
      if (row_scale != nullptr) {
        sum[m][v] = hn::MulAdd(hn::LoadU(d, out), hn::Set(d, row_scale[m]), sum[m][v]);
      }
      hn::StoreU(sum[m][v], d, out);
    }
  }
}

template <int kVecs>
void multiply(std::int64_t n_rows, const float* a, std::int64_t lda, const float* b,
              std::int64_t ldb, std::int64_t depth, const float* row_scale, float* c,
              std::int64_t ldc) {
  static_assert(kRowGroup == 6);
  switch (n_rows) {
    case 1:
      return multiply_block<1, kVecs>(a, lda, b, ldb, depth, row_scale, c, ldc);
    case 2:
      return multiply_block<2, kVecs>(a, lda, b, ldb, depth, row_scale, c, ldc);
    case 3:
      return multiply_block<3, kVecs>(a, lda, b, ldb, depth, row_scale, c, ldc);
    case 4:
      return multiply_block<4, kVecs>(a, lda, b, ldb, depth, row_scale, c, ldc);
    case 5:
      return multiply_block<5, kVecs>(a, lda, b, ldb, depth, row_scale, c, ldc);
    case 6:
      return multiply_block<6, kVecs>(a, lda, b, ldb, depth, row_scale, c, ldc);
    default:
      return;
  }
}

// Transposes the leading whole 4 × 4 blocks of 4 keys into rows kPanel apart; returns how many
// elements of a key it took.
HWY_INLINE std::int64_t transpose_four([[maybe_unused]] const float* keys,
                                       [[maybe_unused]] std::int64_t stride,
                                       [[maybe_unused]] std::int64_t head_dim,
                                       [[maybe_unused]] float* out) {
  std::int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Full128<float> d;
  const hn::Full128<double> dd;
  for (; i + 4 <= head_dim; i += 4, keys += 4, out += 4 * kPanel) {
    const auto k0 = hn::LoadU(d, keys), k1 = hn::LoadU(d, keys + stride);
    const auto k2 = hn::LoadU(d, keys + 2 * stride), k3 = hn::LoadU(d, keys + 3 * stride);
    const auto low01 = hn::BitCast(dd, hn::InterleaveLower(d, k0, k1));
    const auto low23 = hn::BitCast(dd, hn::InterleaveLower(d, k2, k3));
    const auto high01 = hn::BitCast(dd, hn::InterleaveUpper(d, k0, k1));
    const auto high23 = hn::BitCast(dd, hn::InterleaveUpper(d, k2, k3));
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, low01, low23)), d, out);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, low01, low23)), d, out + kPanel);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, high01, high23)), d, out + 2 * kPanel);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, high01, high23)), d, out + 3 * kPanel);
  }
#endif
  return i;
}

// Lays n keys out as panels [key / kPanel][head_dim][key % kPanel], so that the product reads them
// in order; the last panel is filled up with zeros.
void pack_keys(const float* keys, std::int64_t stride, std::int64_t n, std::int64_t head_dim,
               float* packed) {
  const std::int64_t n_padded = (n + kPanel - 1) / kPanel * kPanel;
  for (std::int64_t j = 0; j < n_padded; j += 4) {
    float* out = packed + j / kPanel * kPanel * head_dim + j % kPanel;
    const float* key = keys + j * stride;
    std::int64_t i = j + 4 <= n ? transpose_four(key, stride, head_dim, out) : 0;
    for (; i < head_dim; ++i) {
      for (std::int64_t l = 0; l < 4; ++l) {
        out[i * kPanel + l] = j + l < n ? key[l * stride + i] : 0.0f;
      }
    }
  }
}

// Sums of the lanes of four vectors.
template <class V>
HWY_INLINE void sums_of_lanes(V v0, V v1, V v2, V v3, float* sums) {
#if HWY_TARGET == HWY_SCALAR
  sums[0] = hn::GetLane(v0);
  sums[1] = hn::GetLane(v1);
  sums[2] = hn::GetLane(v2);
  sums[3] = hn::GetLane(v3);
#else
  const hn::DFromV<V> d;
  const hn::Repartition<double, decltype(d)> dd;
  const hn::Full128<float> d4;
  const auto s01 =
      hn::BitCast(dd, hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1)));
  const auto s23 =
      hn::BitCast(dd, hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3)));
  const V s = hn::Add(hn::BitCast(d, hn::InterleaveLower(dd, s01, s23)),
                      hn::BitCast(d, hn::InterleaveUpper(dd, s01, s23)));
  if constexpr (kLanes == 4) {
    hn::StoreU(s, d4, sums);
  } else {
    const hn::Half<decltype(d)> d2;
    const auto h = hn::Add(hn::LowerHalf(d2, s), hn::UpperHalf(d2, s));
    if constexpr (kLanes == 8) {
      hn::StoreU(h, d4, sums);
    } else {
      hn::StoreU(hn::Add(hn::LowerHalf(d4, h), hn::UpperHalf(d4, h)), d4, sums);
    }
  }
#endif
}

// Scores of kRows queries with n keys by dot products, for so few queries that packing the keys
// would cost more than it saves. Four keys at a time share the loads of the queries.
template <int kRows>
HWY_INLINE void dot_scores(const float* HWY_RESTRICT q, std::int64_t head_dim,
                           const float* HWY_RESTRICT keys, std::int64_t stride, std::int64_t n,
                           float* HWY_RESTRICT scores) {
  const Tag d;
  for (std::int64_t j = 0; j < n; j += 4) {
    // The last keys may stand in for those that are missing; their scores are not stored.
    const std::int64_t last = n - 1 - j;
    const float* k[4];
    for (std::int64_t l = 0; l < 4; ++l) k[l] = keys + (j + std::min(l, last)) * stride;
    Vec sum[kRows][4];
    for (int m = 0; m < kRows; ++m) {
      for (int l = 0; l < 4; ++l) sum[m][l] = hn::Zero(d);
    }
    std::int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
      Vec key[4];
      for (int l = 0; l < 4; ++l) key[l] = hn::LoadU(d, k[l] + i);
      for (int m = 0; m < kRows; ++m) {
        const Vec query = hn::LoadU(d, q + m * head_dim + i);
        for (int l = 0; l < 4; ++l) sum[m][l] = hn::MulAdd(query, key[l], sum[m][l]);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      float out[4];
      sums_of_lanes(sum[m][0], sum[m][1], sum[m][2], sum[m][3], out);
      for (std::int64_t l = 0; l < std::min<std::int64_t>(4, n - j); ++l) {
        float rest = 0;
        for (std::int64_t t = i; t < head_dim; ++t) rest += q[m * head_dim + t] * k[l][t];
        scores[m * kTileKeys + j + l] = out[l] + rest;
      }
    }
  }
}

void dot_scores_of(std::int64_t n_rows, const float* q, std::int64_t head_dim, const float* keys,
                   std::int64_t stride, std::int64_t n, float* scores) {
  static_assert(kMaxDotRows == 4);
  switch (n_rows) {
    case 1:
      return dot_scores<1>(q, head_dim, keys, stride, n, scores);
    case 2:
      return dot_scores<2>(q, head_dim, keys, stride, n, scores);
    case 3:
      return dot_scores<3>(q, head_dim, keys, stride, n, scores);
    case 4:
      return dot_scores<4>(q, head_dim, keys, stride, n, scores);
    default:
      return;
  }
}

// Turns the n scores of one row into exp(score − maximum), updates the row's running maximum and
// sum, and returns the factor by which what was summed so far shrinks.
HWY_INLINE float soften(float* scores, std::int64_t n, float& maximum, float& sum) {
  const Tag d;
  const float lowest = -std::numeric_limits<float>::infinity();
  // The maximum passes over NaN, whatever the instruction set; the exponential keeps it.
  Vec vmax = hn::Set(d, lowest);
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec s = hn::LoadU(d, scores + j);
    vmax = hn::IfThenElse(hn::Gt(s, vmax), s, vmax);
  }
  float now = std::max(maximum, hn::GetLane(hn::MaxOfLanes(d, vmax)));
  for (; j < n; ++j) now = scores[j] > now ? scores[j] : now;
  HWY_ALIGN float rest[kLanes];
  std::fill(rest, rest + kLanes, lowest);
  const std::int64_t n_whole = n / kLanes * kLanes;
  for (j = n_whole; j < n; ++j) rest[j - n_whole] = scores[j];
  const Vec shift = hn::Set(d, now == lowest ? 0.0f : now);
  Vec total = hn::Zero(d);
  for (j = 0; j < n_whole; j += kLanes) {
    const Vec p = exp_not_positive(d, hn::Sub(hn::LoadU(d, scores + j), shift));
    hn::StoreU(p, d, scores + j);
    total = hn::Add(total, p);
  }
  float tile_sum = hn::GetLane(hn::SumOfLanes(d, total));
  if (n_whole < n) {
    const Vec p = exp_not_positive(d, hn::Sub(hn::Load(d, rest), shift));
    hn::Store(p, d, rest);
    for (j = n_whole; j < n; ++j) {
      scores[j] = rest[j - n_whole];
      tile_sum += rest[j - n_whole];
    }
  }
  float shrink = 0.0f;
  if (maximum != lowest) {
    const Vec e = exp_not_positive(d, hn::Set(d, maximum - now));
    shrink = hn::GetLane(e);
  }
  maximum = now;
  sum = sum * shrink + tile_sum;
  return shrink;
}

// One unit of work: the queries of a block of tokens, for some heads of one key/value group.
void attend_impl(const AttentionJob& job, const AttentionScratch& s) {
  const std::int64_t head_dim = job.head_dim;
  const std::int64_t width = job.padded_dim;
  const std::int64_t n_rows = job.n_tokens * job.n_heads;
  for (std::int64_t t = 0; t < job.n_tokens; ++t) {
    const float* q = job.q + t * job.q_stride;
    float* row = s.q + t * job.n_heads * head_dim;
    for (std::int64_t i = 0; i < job.n_heads * head_dim; ++i) row[i] = q[i] * job.scale;
  }
  std::fill(s.out, s.out + n_rows * width, 0.0f);
  std::fill(s.maximum, s.maximum + n_rows, -std::numeric_limits<float>::infinity());
  std::fill(s.sum, s.sum + n_rows, 0.0f);

  const std::int64_t last = job.first_position + job.n_tokens - 1;
  const auto begin_of = [&](std::int64_t position) {
    return job.window == 0 ? 0 : std::max<std::int64_t>(0, position - job.window + 1);
  };
  const bool packed = n_rows > kMaxDotRows;
  // Tiles lie at multiples of kTileKeys, whatever the block: a query's sums do not depend on which
  // other queries share its block.
  for (std::int64_t tile = begin_of(job.first_position) / kTileKeys * kTileKeys; tile <= last;
       tile += kTileKeys) {
    // Keys [first, first + n_keys) of this tile are seen by some query of the block.
    const std::int64_t first = std::max(tile, begin_of(job.first_position));
    const std::int64_t n_keys = std::min(tile + kTileKeys, last + 1) - first;
    const float* keys = job.keys + first * job.kv_stride;
    const float* values = job.values + first * job.kv_stride;
    // The keys that the row sees, counted from `first`.
    const auto seen = [&](std::int64_t row) {
      const std::int64_t position = job.first_position + row / job.n_heads;
      return Range{std::max<std::int64_t>(0, begin_of(position) - first),
                   std::min(position + 1 - first, n_keys)};
    };
    // The keys that any row of the group sees: rows are in order of position.
    const auto seen_by_group = [&](std::int64_t group, std::int64_t rows) {
      return Range{seen(group).begin, seen(group + rows - 1).end};
    };

    if (packed) {
      pack_keys(keys, job.kv_stride, n_keys, head_dim, s.keys);
      for (std::int64_t panel = 0; panel < n_keys; panel += kPanel) {
        for (std::int64_t group = 0; group < n_rows; group += kRowGroup) {
          const std::int64_t rows = std::min(kRowGroup, n_rows - group);
          const Range range = seen_by_group(group, rows);
          if (range.begin >= panel + kPanel || range.end <= panel) continue;
          multiply<kPanelVecs>(rows, s.q + group * head_dim, head_dim, s.keys + panel * head_dim,
                               kPanel, head_dim, nullptr, s.scores + group * kTileKeys + panel,
                               kTileKeys);
        }
      }
    } else {
      dot_scores_of(n_rows, s.q, head_dim, keys, job.kv_stride, n_keys, s.scores);
    }

    for (std::int64_t group = 0; group < n_rows; group += kRowGroup) {
      const std::int64_t rows = std::min(kRowGroup, n_rows - group);
      const Range range = seen_by_group(group, rows);
      for (std::int64_t row = group; row < group + rows; ++row) {
        const Range own = seen(row);
        float* scores = s.scores + row * kTileKeys;
        if (own.begin >= own.end) {
          s.shrink[row] = 1.0f;
          if (range.begin < range.end) std::fill(scores + range.begin, scores + range.end, 0.0f);
          continue;
        }
        s.shrink[row] = soften(scores + own.begin, own.size(), s.maximum[row], s.sum[row]);
        std::fill(scores + range.begin, scores + own.begin, 0.0f);
        std::fill(scores + own.end, scores + range.end, 0.0f);
      }
    }

    std::int64_t value_stride = job.kv_stride;
    if (width != head_dim) {
      for (std::int64_t j = 0; j < n_keys; ++j) {
        std::copy_n(values + j * job.kv_stride, head_dim, s.values + j * width);
        std::fill(s.values + j * width + head_dim, s.values + (j + 1) * width, 0.0f);
      }
      values = s.values;
      value_stride = width;
    }
    for (std::int64_t column = 0; column < width;) {
      const bool whole = column + kPanel <= width;
      for (std::int64_t group = 0; group < n_rows; group += kRowGroup) {
        const std::int64_t rows = std::min(kRowGroup, n_rows - group);
        const Range range = seen_by_group(group, rows);
        if (range.begin >= range.end) continue;
        const auto product = whole ? multiply<kPanelVecs> : multiply<1>;
        product(rows, s.scores + group * kTileKeys + range.begin, kTileKeys,
                values + range.begin * value_stride + column, value_stride, range.size(),
                s.shrink + group, s.out + group * width + column, width);
      }
      column += whole ? kPanel : kLanes;
    }
  }

  for (std::int64_t t = 0; t < job.n_tokens; ++t) {
    for (std::int64_t h = 0; h < job.n_heads; ++h) {
      const std::int64_t row = t * job.n_heads + h;
      const float scale = 1.0f / s.sum[row];
      const float* from = s.out + row * width;
      float* to = job.out + t * job.out_stride + h * head_dim;
      for (std::int64_t i = 0; i < head_dim; ++i) to[i] = from[i] * scale;
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#endif
