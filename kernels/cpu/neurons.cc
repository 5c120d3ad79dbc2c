#include "kernels/neurons.h"

#include <algorithm>
#include <cstring>

#include "hwy/targets.h"
#include "kernels/base/error.h"
#include "kernels/cpu/block_codes.h"
#include "kernels/cpu/target.h"

namespace moesaic::kernels {
namespace {

using Byte = std::uint8_t;

bool has_min(DType dtype) { return dtype == DType::Q4_1; }

void pack_in_codes(DType dtype, const Byte* row, std::int64_t cols, Byte* to) {
  const bool bytes = dtype == DType::Q8_0;
  std::int64_t first = 0;
  for (; first + 512 <= cols; first += 512) {
    for (std::int64_t u = 0; u < 16; ++u) {
      Byte unit[32];
      unit_codes(dtype, row, first / 32 + u, unit);
      for (std::int64_t i = 0; i < (bytes ? 32 : 16); ++i) {
        const auto both = static_cast<Byte>(bytes ? unit[i] : unit[i] | unit[16 + i] << 4);
        to[(bytes ? first : first / 2) + i / 4 * 64 + 4 * u + i % 4] = both;
      }
    }
  }
  for (; first < cols; first += 128) {
    const std::int64_t n = std::min<std::int64_t>(cols - first, 128);  // 64 or 128
    Byte codes[128] = {};
    for (std::int64_t u = 0; u < n / 32; ++u) {
      Byte unit[32];
      unit_codes(dtype, row, first / 32 + u, unit);
      std::memcpy(codes + 32 * u, unit, sizeof(unit));
    }
    for (std::int64_t i = 0; i < (bytes ? n : n / 2); ++i) {
      to[(bytes ? first : first / 2) + i] =
          static_cast<Byte>(bytes ? codes[i] : codes[i] | codes[n / 2 + i] << 4);
    }
  }
}

void pack_out_codes(DType dtype, const Byte* row, std::int64_t cols, Byte* to) {
  for (std::int64_t u = 0; u < cols / 32; ++u) {
    Byte unit[32];
    unit_codes(dtype, row, u, unit);
    crosswise_codes(dtype, unit, 32 * u, cols, to);
  }
}

// Scales and codes of one row.
void pack_row(DType dtype, const Byte* row, std::int64_t cols, bool out, Byte* to) {
  const NeuronLayout layout = neuron_layout(dtype, cols);
  if (dtype == DType::BF16) {
    std::memcpy(to, row, static_cast<std::size_t>(layout.code_bytes));
    return;
  }
  const std::int64_t units = cols / 32;
  for (std::int64_t u = 0; u < units; ++u) {
    const Byte* block = row + u * traits(dtype).block_bytes;
    std::memcpy(to + 2 * u, block, 2);
    if (has_min(dtype)) std::memcpy(to + 2 * (units + u), block + 2, 2);
  }
  (out ? pack_out_codes : pack_in_codes)(dtype, row, cols, to + layout.scale_bytes);
}

}  // namespace

bool has_neurons(DType dtype, std::int64_t cols) {
#if defined(__x86_64__)
  obey_target_environment();
  const bool fast = (hwy::SupportedTargets() & HWY_AVX3) != 0 &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  const bool known =
      dtype == DType::Q4_0 || dtype == DType::Q4_1 || dtype == DType::Q8_0 || dtype == DType::BF16;
  return fast && known && cols > 0 && cols % 64 == 0;
#else
  return false;
#endif
}

NeuronLayout neuron_layout(DType dtype, std::int64_t cols) {
  if (dtype == DType::BF16) return {.scale_bytes = 0, .code_bytes = 2 * cols};
  return {.scale_bytes = cols / 32 * (has_min(dtype) ? 4 : 2),
          .code_bytes = dtype == DType::Q8_0 ? cols : cols / 2};
}

void pack_neurons(const WeightView& rows, Range range, std::byte* neurons) {
  const NeuronLayout layout = neuron_layout(rows.dtype, rows.cols);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    Byte* to = reinterpret_cast<Byte*>(neurons) + i * layout.neuron_bytes();
    for (int part = 0; part < 3; ++part, to += layout.row_bytes()) {
      const auto* row = reinterpret_cast<const Byte*>(rows.row(3 * i + part));
      pack_row(rows.dtype, row, rows.cols, part == 2, to);
    }
  }
}

void pack_in_rows(const WeightView& w, Range range, std::byte* to) {
  const NeuronLayout layout = neuron_layout(w.dtype, w.cols);
  for (std::int64_t r = range.begin; r < range.end; ++r) {
    pack_row(w.dtype, reinterpret_cast<const Byte*>(w.row(r)), w.cols, false,
             reinterpret_cast<Byte*>(to) + r * layout.single_row_bytes());
  }
}

}  // namespace moesaic::kernels
