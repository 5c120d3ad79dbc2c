#include "kernels/cpu/mixture_neurons.h"

// Machines without AVX2 take the portable code: two more instruction sets are not worth their
// compile time.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/mixture_neurons.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>

#include "kernels/cpu/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

constexpr std::int64_t kBatch = 16;    // neurons whose activations are held at once
constexpr std::int64_t kAhead = 8;     // neurons between a prefetch and its use
constexpr std::int64_t kTogether = 4;  // output rows added at once

// Where a neuron stands: its first row, and from one of its rows to the next.
struct Place {
  const std::uint8_t* first = nullptr;
  std::int64_t neuron = 0;
  std::int64_t expert_place = 0;
};

HWY_INLINE Place place_of(const MixtureNeurons& list, std::int64_t n_rows, std::int64_t row_bytes,
                          std::int64_t p) {
  const std::int64_t at = p / list.block;
  const std::int64_t expert = list.ids != nullptr ? list.ids[at] : at;
  const std::int64_t row = expert * n_rows * list.block + p % list.block;
  return {reinterpret_cast<const std::uint8_t*>(list.rows.data) + row * row_bytes,
          expert * list.block + p % list.block, at};
}

void neurons(const Context& ctx, const MixtureNeurons& list, Range range, const float* x,
             float* y) {
  const std::int64_t row_bytes = list.rows.row_bytes();
  const std::int64_t n_rows = rows_per_neuron(list.kind);
  const std::int64_t step = list.block * row_bytes;  // to the neuron's next row
  const auto cols = static_cast<std::size_t>(list.rows.cols);
  const float* const xs[1] = {x};
  visit_format(list.rows.dtype, [&](auto format) HWY_ATTR {
    for (std::int64_t first = range.begin; first < range.end; first += kBatch) {
      const std::int64_t n = std::min(kBatch, range.end - first);
      float h[kBatch];
      float up[kBatch];
      const std::uint8_t* out[kBatch];
      for (std::int64_t j = 0; j < n; ++j) {
        if (first + j + kAhead < range.end) {
          const Place soon = place_of(list, n_rows, row_bytes, first + j + kAhead);
          for (std::int64_t r = 0; r < n_rows; ++r) {
            for (std::int64_t i = 0; i < row_bytes; i += 64) {
              __builtin_prefetch(soon.first + r * step + i, 0, 2);
            }
          }
        }
        const Place at = place_of(list, n_rows, row_bytes, first + j);
        float product[1];
        dot(format, at.first, cols, xs, product);
        h[j] = product[0] + (list.bias != nullptr ? list.bias[at.neuron] : 0.0f);
        if (list.kind == ExpertKind::Glu) {
          dot(format, at.first + step, cols, xs, product);
          up[j] = product[0];
        }
        out[j] = at.first + (n_rows - 1) * step;
      }
      const std::span<float> values(h, static_cast<std::size_t>(n));
      if (list.kind == ExpertKind::Glu) {
        activation(list.phi, values, values);
        for (std::int64_t j = 0; j < n; ++j) h[j] *= up[j];
      } else if (list.kind == ExpertKind::Gelu) {
        activation(Activation::GeluTanh, values, values);
      }
      for (std::int64_t j = 0; j < n; ++j) {
        const Place at = place_of(list, n_rows, row_bytes, first + j);
        if (list.mean != nullptr) h[j] -= list.mean[at.neuron];
        if (list.gate != nullptr) h[j] *= list.gate[at.expert_place];
      }
      if (ctx.activations == Activations::BF16) round_bf16(h, static_cast<std::size_t>(n), h);
      std::int64_t j = 0;
      for (; j + kTogether <= n; j += kTogether) {
        const std::uint8_t* rows[kTogether];
        float scale[kTogether];
        std::copy_n(out + j, kTogether, rows);
        std::copy_n(h + j, kTogether, scale);
        add_scaled(format, rows, cols, scale, y);
      }
      for (; j < n; ++j) {
        const std::uint8_t* const rows[1] = {out[j]};
        const float scale[1] = {h[j]};
        add_scaled(format, rows, cols, scale, y);
      }
    }
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(neurons);

void add_mixture_neurons(const Context& ctx, const MixtureNeurons& list, Range range,
                         const float* x, float* y) {
  if (range.size() == 0) return;
  HWY_DYNAMIC_DISPATCH(neurons)(ctx, list, range, x, y);
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
