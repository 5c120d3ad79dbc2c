#include "kernels/neurons.h"

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
  Byte codes[128];
  for (std::int64_t c = 0; c < cols; c += 128) {
    const std::int64_t n = cols - c < 128 ? cols - c : 128;  // 64 or 128
    for (std::int64_t u = 0; u < n / 32; ++u) {
      Byte unit[32];
      unit_codes(dtype, row, c / 32 + u, unit);
      std::memcpy(codes + 32 * u, unit, sizeof(unit));
    }
    if (dtype == DType::Q8_0) {
      std::memcpy(to + c, codes, static_cast<std::size_t>(n));
      continue;
    }
    for (std::int64_t i = 0; i < n / 2; ++i) {
      to[c / 2 + i] = static_cast<Byte>(codes[i] | codes[n / 2 + i] << 4);
    }
  }
}

void pack_out_codes(DType dtype, const Byte* row, std::int64_t cols, Byte* to) {
  for (std::int64_t u = 0; u < cols / 32; ++u) {
    Byte unit[32];
    unit_codes(dtype, row, u, unit);
    if (dtype == DType::Q8_0) {
      for (int i = 0; i < 32; ++i) to[32 * u + i] = unit[i] ^ 0x80;
      continue;
    }
    // Nibble s of word l of the group that column c is in.
    for (std::int64_t i = 0; i < 32; ++i) {
      const std::int64_t c = 32 * u + i;
      const std::int64_t group = c / 128 * 128;
      const std::int64_t word_bytes = cols - group < 128 ? 2 : 4;
      const std::int64_t s = (c - group) / 16;
      Byte& at = to[group / 2 + c % 16 * word_bytes + s / 2];
      at = static_cast<Byte>(s % 2 == 0 ? unit[i] : at | unit[i] << 4);
    }
  }
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
  const DTypeTraits& t = traits(rows.dtype);
  const auto units = static_cast<std::size_t>(rows.cols / 32);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    Byte* to = reinterpret_cast<Byte*>(neurons) + i * layout.neuron_bytes();
    for (int part = 0; part < 3; ++part, to += layout.row_bytes()) {
      const auto* row = reinterpret_cast<const Byte*>(rows.row(3 * i + part));
      if (rows.dtype == DType::BF16) {
        std::memcpy(to, row, static_cast<std::size_t>(layout.code_bytes));
        continue;
      }
      for (std::size_t u = 0; u < units; ++u) {
        const Byte* block = row + u * static_cast<std::size_t>(t.block_bytes);
        std::memcpy(to + 2 * u, block, 2);
        if (has_min(rows.dtype)) std::memcpy(to + 2 * (units + u), block + 2, 2);
      }
      Byte* codes = to + layout.scale_bytes;
      if (part < 2) {
        pack_in_codes(rows.dtype, row, rows.cols, codes);
      } else {
        pack_out_codes(rows.dtype, row, rows.cols, codes);
      }
    }
  }
}

}  // namespace moesaic::kernels
