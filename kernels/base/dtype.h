#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace moesaic {

/// Element and block formats of GGUF tensors (DESIGN.md section 4). The numbers are ggml's type
/// ids.
enum class DType : std::uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  BF16 = 30,
};

/// How a dtype packs elements: `block_elems` consecutive elements of a row share `block_bytes`
/// bytes.
struct DTypeTraits {
  DType dtype;
  std::string_view name;
  std::int64_t block_elems;
  std::int64_t block_bytes;
};

inline constexpr std::array<DTypeTraits, 11> kDTypes = {{
    {DType::F32, "F32", 1, 4},
    {DType::F16, "F16", 1, 2},
    {DType::BF16, "BF16", 1, 2},
    {DType::Q4_0, "Q4_0", 32, 18},
    {DType::Q4_1, "Q4_1", 32, 20},
    {DType::Q5_0, "Q5_0", 32, 22},
    {DType::Q5_1, "Q5_1", 32, 24},
    {DType::Q8_0, "Q8_0", 32, 34},
    {DType::Q4_K, "Q4_K", 256, 144},
    {DType::Q5_K, "Q5_K", 256, 176},
    {DType::Q6_K, "Q6_K", 256, 210},
}};

/// Traits of a dtype that the enum names.
constexpr const DTypeTraits& traits(DType dtype) {
  for (const DTypeTraits& t : kDTypes) {
    if (t.dtype == dtype) return t;
  }
  return kDTypes[0];
}

/// The dtype of a ggml type id, or nothing if moesaic does not read it.
constexpr std::optional<DType> dtype_from_ggml(std::uint32_t id) {
  for (const DTypeTraits& t : kDTypes) {
    if (static_cast<std::uint32_t>(t.dtype) == id) return t.dtype;
  }
  return std::nullopt;
}

/// The dtype with this name ("Q8_0", "BF16"), or nothing.
constexpr std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DTypeTraits& t : kDTypes) {
    if (t.name == name) return t.dtype;
  }
  return std::nullopt;
}

/// Bytes of a row of `n` elements; n must be a multiple of the block size.
constexpr std::int64_t row_bytes(DType dtype, std::int64_t n) {
  const DTypeTraits& t = traits(dtype);
  return n / t.block_elems * t.block_bytes;
}

}  // namespace moesaic
