#include "kernels/panels.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cpu/block_codes.h"

namespace moesaic::kernels {
namespace {

using Byte = std::uint8_t;

void pack_codes(DType dtype, const Byte (&codes)[kPanelRows][32], Byte* to) {
  if (dtype == DType::Q8_0) {
    for (int g = 0; g < 8; ++g) {
      for (int r = 0; r < kPanelRows; ++r) std::memcpy(to + 64 * g + 4 * r, &codes[r][4 * g], 4);
    }
    return;
  }
  for (int g = 0; g < 4; ++g) {
    for (int r = 0; r < kPanelRows; ++r) {
      for (int c = 0; c < 4; ++c) {
        const Byte low = codes[r][4 * g + c] & 15;
        const Byte high = codes[r][16 + 4 * g + c] & 15;
        to[64 * g + 4 * r + c] = static_cast<Byte>(low | high << 4);
      }
    }
  }
  to += 256;
  if (dtype == DType::Q5_0 || dtype == DType::Q5_1 || dtype == DType::Q5_K) {
    for (int g = 0; g < 8; ++g) {
      std::uint64_t bits = 0;
      for (int r = 0; r < kPanelRows; ++r) {
        for (int c = 0; c < 4; ++c) {
          bits |= std::uint64_t{codes[r][4 * g + c] >> 4 & 1u} << (4 * r + c);
        }
      }
      std::memcpy(to + 8 * g, &bits, sizeof(bits));
    }
  } else if (dtype == DType::Q6_K) {
    for (int g = 0; g < 8; ++g) {
      for (int r = 0; r < kPanelRows; ++r) {
        for (int c = 0; c < 4; ++c) {
          Byte& at = to[64 * (g / 4) + 4 * r + c];
          const int pair = codes[r][4 * g + c] >> 4 << (2 * (g % 4));
          at = static_cast<Byte>(g % 4 == 0 ? pair : at | pair);
        }
      }
    }
  }
}

// Six-bit scale and minimum of sub-block `sub` of a Q4_K or Q5_K block; `packed` are its 12 bytes.
void scale_and_min(const Byte* packed, int sub, Byte& scale, Byte& minimum) {
  if (sub < 4) {
    scale = packed[sub] & 63;
    minimum = packed[sub + 4] & 63;
  } else {
    scale = static_cast<Byte>((packed[sub + 4] & 15) | packed[sub - 4] >> 6 << 4);
    minimum = static_cast<Byte>(packed[sub + 4] >> 4 | packed[sub] >> 6 << 4);
  }
}

void pack_scales(DType dtype, const Byte* row, const PanelLayout& layout, int r, Byte* panel) {
  const DTypeTraits& t = traits(dtype);
  const std::int64_t units_per_block = t.block_elems / kUnitColumns;
  for (std::int64_t u = 0; u < layout.n_units; u += units_per_block) {
    const Byte* block = row + u / units_per_block * t.block_bytes;
    Byte* header = panel + layout.header_offset(u);
    switch (dtype) {
      case DType::Q4_0:
      case DType::Q5_0:
      case DType::Q8_0:
        std::memcpy(header + 32 * (u % 2) + 2 * r, block, 2);
        break;
      case DType::Q4_1:
      case DType::Q5_1:
        std::memcpy(header + 2 * r, block, 2);
        std::memcpy(header + 32 + 2 * r, block + 2, 2);
        break;
      case DType::Q4_K:
      case DType::Q5_K:
        std::memcpy(header + 2 * r, block, 2);
        std::memcpy(header + 32 + 2 * r, block + 2, 2);
        for (int sub = 0; sub < 8; ++sub) {
          scale_and_min(block + 4, sub, header[64 + 32 * sub + r], header[80 + 32 * sub + r]);
        }
        break;
      case DType::Q6_K:
        std::memcpy(header + 2 * r, block + 208, 2);
        for (int part = 0; part < 16; ++part) header[32 + 16 * part + r] = block[192 + part];
        break;
      default:
        break;  // no scales
    }
  }
}

}  // namespace

bool has_panels(DType dtype, std::int64_t cols) {
  if (dtype == DType::F32 || dtype == DType::F16) return false;
  return cols > 0 && cols % std::max(traits(dtype).block_elems, kUnitColumns) == 0;
}

PanelLayout panel_layout(DType dtype, std::int64_t cols) {
  const std::int64_t n = cols / kUnitColumns;
  switch (dtype) {
    case DType::BF16:
      return {.n_units = n, .strip_units = 1, .header_bytes = 0, .unit_bytes = 1024};
    case DType::Q4_0:
      return {.n_units = n, .strip_units = 2, .header_bytes = 64, .unit_bytes = 256};
    case DType::Q4_1:
      return {.n_units = n, .strip_units = 1, .header_bytes = 64, .unit_bytes = 256};
    case DType::Q5_0:
      return {.n_units = n, .strip_units = 2, .header_bytes = 64, .unit_bytes = 320};
    case DType::Q5_1:
      return {.n_units = n, .strip_units = 1, .header_bytes = 64, .unit_bytes = 320};
    case DType::Q8_0:
      return {.n_units = n, .strip_units = 2, .header_bytes = 64, .unit_bytes = 512};
    case DType::Q4_K:
      return {.n_units = n, .strip_units = 8, .header_bytes = 320, .unit_bytes = 256};
    case DType::Q5_K:
      return {.n_units = n, .strip_units = 8, .header_bytes = 320, .unit_bytes = 320};
    case DType::Q6_K:
      return {.n_units = n, .strip_units = 8, .header_bytes = 320, .unit_bytes = 384};
    default:
      return {};  // no panels
  }
}

std::int64_t panel_bytes(const WeightView& w) {
  return n_panels(w) * panel_layout(w.dtype, w.cols).panel_bytes();
}

void pack_panels(const WeightView& w, Range range, std::byte* panels) {
  require<ShapeError>(has_panels(w.dtype, w.cols), "panels: {} rows of {} elements",
                      traits(w.dtype).name, w.cols);
  const PanelLayout layout = panel_layout(w.dtype, w.cols);
  for (std::int64_t p = range.begin; p < range.end; ++p) {
    Byte* to = reinterpret_cast<Byte*>(panels) + p * layout.panel_bytes();
    std::memset(to, 0, static_cast<std::size_t>(layout.panel_bytes()));
    const auto n_rows = static_cast<int>(std::min(kPanelRows, w.rows - p * kPanelRows));
    const auto row = [&](int r) {
      return reinterpret_cast<const Byte*>(w.row(p * kPanelRows + r));
    };
    for (int r = 0; r < n_rows && layout.header_bytes > 0; ++r) {
      pack_scales(w.dtype, row(r), layout, r, to);
    }
    for (std::int64_t u = 0; u < layout.n_units; ++u) {
      Byte* unit = to + layout.unit_offset(u);
      if (w.dtype == DType::BF16) {
        for (int g = 0; g < 16; ++g) {
          for (int r = 0; r < n_rows; ++r) {
            std::memcpy(unit + 64 * g + 4 * r, row(r) + 64 * u + 4 * g, 4);
          }
        }
        continue;
      }
      Byte codes[kPanelRows][32] = {};
      for (int r = 0; r < n_rows; ++r) unit_codes(w.dtype, row(r), u, codes[r]);
      pack_codes(w.dtype, codes, unit);
    }
  }
}

}  // namespace moesaic::kernels
