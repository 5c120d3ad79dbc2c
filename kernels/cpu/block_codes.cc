#include "kernels/cpu/block_codes.h"

namespace moesaic::kernels {
namespace {

using Byte = std::uint8_t;

void nibbles(const Byte* p, Byte (&codes)[32]) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = p[i] & 15;
    codes[16 + i] = p[i] >> 4;
  }
}

void fifth_bits(const Byte* p, Byte (&codes)[32]) {
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<Byte>((p[i / 8] >> (i % 8) & 1) << 4);
}

void nibbles_k(const Byte* q, int sub, Byte (&codes)[32]) {
  const Byte* p = q + 32 * (sub / 2);
  for (int i = 0; i < 32; ++i) codes[i] = sub % 2 == 0 ? p[i] & 15 : p[i] >> 4;
}

}  // namespace

void unit_codes(DType dtype, const std::uint8_t* row, std::int64_t unit,
                std::uint8_t (&codes)[32]) {
  const DTypeTraits& t = traits(dtype);
  const Byte* block = row + unit * 32 / t.block_elems * t.block_bytes;
  const auto sub = static_cast<int>(unit % (t.block_elems / 32));
  switch (dtype) {
    case DType::Q4_0:
      return nibbles(block + 2, codes);
    case DType::Q4_1:
      return nibbles(block + 4, codes);
    case DType::Q5_0:
      nibbles(block + 6, codes);
      return fifth_bits(block + 2, codes);
    case DType::Q5_1:
      nibbles(block + 8, codes);
      return fifth_bits(block + 4, codes);
    case DType::Q8_0:
      for (int i = 0; i < 32; ++i) codes[i] = block[2 + i] ^ 0x80;
      return;
    case DType::Q4_K:
      return nibbles_k(block + 16, sub, codes);
    case DType::Q5_K:
      nibbles_k(block + 48, sub, codes);
      for (int i = 0; i < 32; ++i) {
        codes[i] |= static_cast<Byte>((block[16 + i] >> sub & 1) << 4);
      }
      return;
    case DType::Q6_K: {
      const int half = sub / 4;
      const int group = sub % 4;
      const Byte* low = block + 64 * half + 32 * (group % 2);
      const Byte* high = block + 128 + 32 * half;
      for (int i = 0; i < 32; ++i) {
        const int nibble = group < 2 ? low[i] & 15 : low[i] >> 4;
        codes[i] = static_cast<Byte>(nibble | (high[i] >> (2 * group) & 3) << 4);
      }
      return;
    }
    default:
      return;  // no codes
  }
}

void crosswise_codes(DType dtype, const std::uint8_t (&codes)[32], std::int64_t first,
                     std::int64_t n, std::uint8_t* to) {
  const bool bytes = dtype == DType::Q8_0;
  const std::int64_t whole = bytes ? 64 : 128;  // codes of 64 bytes
  for (std::int64_t i = 0; i < 32; ++i) {
    const std::int64_t group = (first + i) / whole * whole;
    const std::int64_t in_group = first + i - group;
    const std::int64_t half = bytes || n - group >= 128 ? 64 : 32;
    const std::int64_t width = half / 4;  // consecutive codes
    const std::int64_t in = in_group % half;
    Byte& at = to[(bytes ? group : group / 2) + in % width / 4 * 16 + in / width * 4 + in % 4];
    at = static_cast<Byte>(in_group < half ? codes[i] : at | codes[i] << 4);
  }
}

}  // namespace moesaic::kernels
