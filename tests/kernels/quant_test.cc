#include "kernels/quant.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cpu/target.h"

namespace moesaic::kernels {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::uint32_t bits(float v) { return std::bit_cast<std::uint32_t>(v); }

/// Runs fn on each instruction set of this machine.
template <class Fn>
void on_every_target(Fn&& fn) {
  for (const std::string_view target : simd_targets()) {
    SCOPED_TRACE(std::string(target));
    use_simd_target(target);
    fn();
  }
  use_simd_target("");
}

/// Packed blocks and what gguf's Python package makes of them (make_quant_fixtures.py).
struct Fixture {
  std::vector<std::byte> packed;
  std::vector<float> values;
};

Fixture load_fixture(DType dtype) {
  const std::string path = std::string(MOESAIC_SOURCE_DIR "/tests/data/quant/") +
                           std::string(traits(dtype).name) + ".bin";
  std::ifstream in(path, std::ios::binary);
  std::uint32_t n = 0;
  in.read(reinterpret_cast<char*>(&n), sizeof(n));
  Fixture f;
  f.packed.resize(static_cast<std::size_t>(row_bytes(dtype, n)));
  f.values.resize(n);
  in.read(reinterpret_cast<char*>(f.packed.data()), static_cast<std::streamsize>(f.packed.size()));
  in.read(reinterpret_cast<char*>(f.values.data()), static_cast<std::streamsize>(4 * n));
  EXPECT_TRUE(in.good()) << path;
  return f;
}

std::string dtype_name(const testing::TestParamInfo<DType>& info) {
  return std::string(traits(info.param).name);
}

std::vector<DType> dtypes(bool only_writable) {
  std::vector<DType> list;
  for (const DTypeTraits& t : kDTypes) {
    if (!only_writable || can_quantize(t.dtype)) list.push_back(t.dtype);
  }
  return list;
}

/// Nearest bfloat16 of a finite value, ties to even: the neighbour that is closer in double.
std::uint16_t nearest_bf16(float v) {
  const std::uint32_t below = bits(v) >> 16;
  const auto value = [](std::uint32_t b) {
    const float f = std::bit_cast<float>(b << 16);
    return std::isinf(f) ? std::copysign(0x1p128, f) : static_cast<double>(f);
  };
  const double to_below = std::abs(v - value(below));
  const double to_above = std::abs(v - value(below + 1));
  const bool up = to_above < to_below || (to_above == to_below && (below & 1) != 0);
  return static_cast<std::uint16_t>(up ? below + 1 : below);
}

/// Value of float16 bits by its definition; Inf and NaN too.
float f16_by_definition(std::uint16_t h) {
  const int exponent = h >> 10 & 31;
  const int mantissa = h & 0x3ff;
  const double sign = h >> 15 != 0 ? -1 : 1;
  if (exponent == 31) return mantissa != 0 ? kNan : static_cast<float>(sign) * kInf;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(sign * magnitude);
}

std::vector<float> normal_row(std::size_t n, unsigned seed, float scale) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> row(n);
  for (float& v : row) v = normal(rng);
  return row;
}

std::vector<std::byte> pack(DType dtype, std::span<const float> row,
                            std::span<const float> importance = {}) {
  std::vector<std::byte> packed(
      static_cast<std::size_t>(row_bytes(dtype, static_cast<std::int64_t>(row.size()))));
  quantize_row(dtype, row, packed.data(), importance);
  return packed;
}

std::vector<float> unpack(DType dtype, const std::vector<std::byte>& packed, std::size_t n) {
  std::vector<float> row(n);
  dequantize_row(dtype, packed.data(), row);
  return row;
}

class EveryDType : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Quant, EveryDType, testing::ValuesIn(dtypes(false)), dtype_name);

TEST_P(EveryDType, UnpacksWhatGgufUnpacksBitForBit) {
  const Fixture f = load_fixture(GetParam());
  on_every_target([&] {
    const std::vector<float> values = unpack(GetParam(), f.packed, f.values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(bits(values[i]), bits(f.values[i])) << i << ": " << values[i];
    }
  });
}

TEST_P(EveryDType, UnpacksToNearestBf16) {
  const Fixture f = load_fixture(GetParam());
  on_every_target([&] {
    std::vector<std::uint16_t> values(f.values.size());
    dequantize_row_bf16(GetParam(), f.packed.data(), values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(values[i], nearest_bf16(f.values[i])) << i << ": " << f.values[i];
    }
  });
}

TEST_P(EveryDType, UnpacksEachBlockAloneAndUnaligned) {
  const DType dtype = GetParam();
  const Fixture f = load_fixture(dtype);
  const auto elems = static_cast<std::size_t>(traits(dtype).block_elems);
  const auto bytes = static_cast<std::size_t>(traits(dtype).block_bytes);
  std::vector<std::byte> shifted(bytes + 1);
  std::vector<float> block(elems);
  for (std::size_t b = 0; b < f.values.size() / elems; ++b) {
    std::memcpy(shifted.data() + 1, f.packed.data() + b * bytes, bytes);
    dequantize_row(dtype, shifted.data() + 1, block);
    ASSERT_EQ(std::memcmp(block.data(), f.values.data() + b * elems, elems * sizeof(float)), 0);
  }
}

TEST_P(EveryDType, EmptyRowIsNothing) {
  dequantize_row(GetParam(), nullptr, {});
  dequantize_row_bf16(GetParam(), nullptr, {});
}

TEST_P(EveryDType, PartOfABlockIsAShapeError) {
  const std::int64_t elems = traits(GetParam()).block_elems;
  if (elems == 1) return;  // every length is whole
  std::vector<std::byte> packed(512);
  std::vector<float> row(static_cast<std::size_t>(elems - 1));
  EXPECT_THROW(dequantize_row(GetParam(), packed.data(), row), ShapeError);
  if (can_quantize(GetParam())) {
    EXPECT_THROW(quantize_row(GetParam(), row, packed.data()), ShapeError);
  }
}

TEST(QuantBf16, RowsLongerThanAChunkAreWhole) {
  // 1,024 values are unpacked at a time: 1,056 are one chunk and one block more.
  const std::vector<float> row = normal_row(1056, 5, 1);
  for (const DType dtype : {DType::Q8_0, DType::F32}) {
    const std::vector<std::byte> packed = pack(dtype, row);
    const std::vector<float> values = unpack(dtype, packed, row.size());
    std::vector<std::uint16_t> halves(row.size());
    dequantize_row_bf16(dtype, packed.data(), halves);
    for (std::size_t i = 0; i < row.size(); ++i) ASSERT_EQ(halves[i], nearest_bf16(values[i])) << i;
  }
}

TEST(QuantHalf, F16ToF32IsExactForAllBits) {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float expected = f16_by_definition(static_cast<std::uint16_t>(h));
    const float found = f16_to_f32(static_cast<std::uint16_t>(h));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(found)) << h;
    } else {
      ASSERT_EQ(bits(found), bits(expected)) << h;
    }
  }
}

TEST(QuantHalf, RowsOfAllF16AndBf16Bits) {
  std::vector<std::uint16_t> all(0x10000);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  const auto* packed = reinterpret_cast<const std::byte*>(all.data());
  std::vector<float> row(all.size());
  on_every_target([&] {
    dequantize_row(DType::F16, packed, row);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float expected = f16_by_definition(all[i]);
      ASSERT_TRUE(std::isnan(expected) ? std::isnan(row[i]) : bits(row[i]) == bits(expected)) << i;
    }
    dequantize_row(DType::BF16, packed, row);
    for (std::size_t i = 0; i < all.size(); ++i) ASSERT_EQ(bits(row[i]), i << 16);
  });
}

TEST(QuantHalf, F32ToF16RoundsToNearestEven) {
  // Each float16, the middle to the next one, and one float32 to either side of the middle.
  for (std::uint32_t h = 0; h < 0x7c00; ++h) {
    const auto low = static_cast<std::uint16_t>(h);
    const auto next = static_cast<std::uint16_t>(h + 1);
    const float a = f16_by_definition(low);
    const float b = next == 0x7c00 ? 65536.0f : f16_by_definition(next);
    const float middle = (a + b) / 2;
    ASSERT_EQ(f32_to_f16(a), low);
    ASSERT_EQ(f32_to_f16(-a), low | 0x8000);
    ASSERT_EQ(f32_to_f16(middle), (low & 1) == 0 ? low : next) << middle;
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 0.0f)), low);
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, kInf)), next);
  }
  EXPECT_EQ(f32_to_f16(kInf), 0x7c00);
  EXPECT_EQ(f32_to_f16(-kInf), 0xfc00);
  EXPECT_EQ(f32_to_f16(std::numeric_limits<float>::max()), 0x7c00);
  EXPECT_EQ(f32_to_f16(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(kNan))));
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(QuantHalf, F32ToBf16RoundsToNearestEvenAndKeepsNan) {
  std::mt19937 rng(1);
  for (int i = 0; i < 200000; ++i) {
    const float v = std::bit_cast<float>(static_cast<std::uint32_t>(rng()));
    if (!std::isfinite(v)) continue;
    ASSERT_EQ(f32_to_bf16(v), nearest_bf16(v)) << v;
  }
  EXPECT_EQ(f32_to_bf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // ties to even
  EXPECT_EQ(f32_to_bf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
  EXPECT_EQ(f32_to_bf16(-kInf), 0xff80);
  for (const std::uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu}) {
    EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(nan)))));
  }
}

TEST(QuantPack, KFormatsAreReadOnly) {
  const std::vector<float> row(256);
  std::vector<std::byte> packed(256);
  for (const DType dtype : {DType::Q4_K, DType::Q5_K, DType::Q6_K}) {
    EXPECT_FALSE(can_quantize(dtype));
    EXPECT_THROW(quantize_row(dtype, row, packed.data()), FormatError);
  }
}

/// Squared error of one block if the scale spans the data from end to end, as ggml's plain
/// quantisation takes it, with the scale kept in full precision.
double span_error(DType dtype, std::span<const float> x) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  const bool affine = dtype == DType::Q4_1 || dtype == DType::Q5_1;
  float extreme = 0;
  for (const float v : x) extreme = std::abs(v) > std::abs(extreme) ? v : extreme;
  double d = 0, m = 0, lo = 0, hi = 0;
  switch (dtype) {
    case DType::Q4_0:
      d = extreme / -8.0, lo = -8, hi = 7;
      break;
    case DType::Q5_0:
      d = extreme / -16.0, lo = -16, hi = 15;
      break;
    case DType::Q8_0:
      d = extreme / 127.0, lo = -127, hi = 127;
      break;
    default:
      hi = dtype == DType::Q4_1 ? 15 : 31;
      d = (static_cast<double>(*high) - *low) / hi;
  }
  if (affine) m = *low;
  double error = 0;
  for (const float v : x) {
    const double q = d == 0 ? 0 : std::clamp(std::round((v - m) / d), lo, hi);
    error += std::pow(v - (d * q + m), 2);
  }
  return error;
}

class Packed : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Quant, Packed, testing::ValuesIn(dtypes(true)), dtype_name);

TEST_P(Packed, ErrorIsWithinHalfAStep) {
  const DType dtype = GetParam();
  for (const float scale : {1.0f, 0.02f, 100.0f, 1e-4f}) {
    const std::vector<float> row = normal_row(32 * 64, 3, scale);
    const std::vector<float> back = unpack(dtype, pack(dtype, row), row.size());
    if (traits(dtype).block_elems == 1) {
      const double epsilon =
          dtype == DType::F32 ? 0 : (dtype == DType::F16 ? std::ldexp(1, -11) : std::ldexp(1, -8));
      for (std::size_t i = 0; i < row.size(); ++i) {
        // Half the spacing of values, which float16 keeps below 2^-14.
        const double bound =
            std::max(std::abs(row[i]) * epsilon, dtype == DType::F16 ? std::ldexp(1, -25) : 0.0);
        ASSERT_LE(std::abs(row[i] - back[i]), bound) << i;
      }
      continue;
    }
    for (std::size_t at = 0; at < row.size(); at += 32) {
      const std::span<const float> block(row.data() + at, 32);
      double error = 0, norm = 0;
      for (std::size_t i = 0; i < 32; ++i) {
        error += std::pow(block[i] - back[at + i], 2);
        norm += std::pow(block[i], 2);
      }
      // Scales are rounded to 11 bits: 2^-12 of each value at most, subnormal ones (spacing 2^-24)
      // 2^-25 per level.
      const double levels = dtype == DType::Q8_0 ? 127 : 31;
      const double rounding =
          std::ldexp(std::sqrt(norm), -12) + std::sqrt(32.0) * levels * std::ldexp(1, -25);
      ASSERT_LE(std::sqrt(error), std::sqrt(span_error(dtype, block)) + rounding) << at;
    }
  }
}

TEST_P(Packed, RepackingLosesNothing) {
  const DType dtype = GetParam();
  const Fixture f = load_fixture(dtype);
  // Rows that were packed by us, and by others: the fixture's last blocks are of a real file.
  const std::vector<float> row = normal_row(32 * 256, 11, 0.05f);
  const std::vector<float> once = unpack(dtype, pack(dtype, row), row.size());
  const std::vector<float> twice = unpack(dtype, pack(dtype, once), row.size());
  for (std::size_t i = 0; i < once.size(); ++i) ASSERT_EQ(once[i], twice[i]) << i;
  const bool real = dtype == DType::Q4_1 || dtype == DType::Q5_0 || dtype == DType::Q8_0;
  if (real) {
    const std::vector<float> tail(f.values.end() - 32 * 16, f.values.end());
    const std::vector<float> again = unpack(dtype, pack(dtype, tail), tail.size());
    for (std::size_t i = 0; i < tail.size(); ++i) ASSERT_EQ(tail[i], again[i]) << i;
  }
}

TEST_P(Packed, ZerosStayZero) {
  const std::vector<float> row(64, 0.0f);
  for (const float v : unpack(GetParam(), pack(GetParam(), row), 64)) EXPECT_EQ(v, 0.0f);
}

TEST_P(Packed, ConstantBlockKeepsItsValue) {
  // Up to the rounding of the scale to float16; without any where ±0.75 is a level.
  const double tolerance = GetParam() == DType::Q8_0 ? std::ldexp(0.75, -11) : 0;
  for (const float c : {0.75f, -0.75f}) {
    const std::vector<float> row(32, c);
    for (const float v : unpack(GetParam(), pack(GetParam(), row), 32)) {
      EXPECT_NEAR(v, c, tolerance);
    }
  }
}

TEST_P(Packed, TinyValuesBecomeSmallNotNan) {
  for (const float scale : {1e-7f, 1e-9f, 1e-30f, 1e-42f}) {
    const std::vector<float> row = normal_row(32, 9, scale);
    const std::vector<float> back = unpack(GetParam(), pack(GetParam(), row), 32);
    for (const float v : back) EXPECT_LE(std::abs(v), 8 * std::max(scale, 1e-7f));
  }
}

TEST_P(Packed, NanAndInfAreNamed) {
  for (const float bad : {kNan, kInf, -kInf}) {
    std::vector<float> row = normal_row(64, 1, 1);
    row[37] = bad;
    std::vector<std::byte> packed(64 * 4);
    try {
      quantize_row(GetParam(), row, packed.data());
      FAIL() << "packed " << bad;
    } catch (const FormatError& e) {
      EXPECT_NE(std::string(e.what()).find("value 37"), std::string::npos) << e.what();
    }
  }
}

TEST_P(Packed, ValuesBeyondTheScaleAreRefused) {
  const bool fits = GetParam() == DType::F32 || GetParam() == DType::BF16;
  std::vector<std::byte> packed(32 * 4);
  for (const float huge : {3e7f, 1e30f, 3e38f}) {
    std::vector<float> row = normal_row(32, 1, 1);
    row[3] = huge;
    row[4] = -huge;
    if (fits) {
      EXPECT_NO_THROW(quantize_row(GetParam(), row, packed.data()));
    } else {
      EXPECT_THROW(quantize_row(GetParam(), row, packed.data()), FormatError) << huge;
    }
  }
}

TEST_P(Packed, SameBytesOnEveryTarget) {
  const std::vector<float> row = normal_row(32 * 32, 21, 0.3f);
  std::vector<float> importance = normal_row(row.size(), 22, 1);
  for (float& w : importance) w = std::abs(w);
  const std::vector<std::byte> plain = pack(GetParam(), row);
  const std::vector<std::byte> weighted = pack(GetParam(), row, importance);
  on_every_target([&] {
    EXPECT_EQ(pack(GetParam(), row), plain);
    EXPECT_EQ(pack(GetParam(), row, importance), weighted);
  });
}

TEST_P(Packed, ImportanceLowersTheWeightedError) {
  if (traits(GetParam()).block_elems == 1) return;  // no scale to choose
  const std::vector<float> row = normal_row(32 * 64, 31, 1);
  std::vector<float> importance = normal_row(row.size(), 32, 1);
  for (float& w : importance) w = w * w * w * w;
  const std::vector<float> plain = unpack(GetParam(), pack(GetParam(), row), row.size());
  const std::vector<float> weighted =
      unpack(GetParam(), pack(GetParam(), row, importance), row.size());
  double plain_error = 0, weighted_error = 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    plain_error += importance[i] * std::pow(row[i] - plain[i], 2);
    weighted_error += importance[i] * std::pow(row[i] - weighted[i], 2);
  }
  EXPECT_LT(weighted_error, plain_error);
}

TEST_P(Packed, ImportanceOfZeroEverywhereCountsAsOne) {
  const std::vector<float> row = normal_row(32, 41, 1);
  const std::vector<float> zeros(32, 0.0f);
  EXPECT_EQ(pack(GetParam(), row, zeros), pack(GetParam(), row));
}

TEST_P(Packed, ImportanceHasToFit) {
  const std::vector<float> row(64, 1.0f);
  std::vector<std::byte> packed(64 * 4);
  std::vector<float> importance(63, 1.0f);
  EXPECT_THROW(quantize_row(GetParam(), row, packed.data(), importance), ShapeError);
  importance.push_back(-1);
  EXPECT_THROW(quantize_row(GetParam(), row, packed.data(), importance), FormatError);
  importance.back() = kNan;
  EXPECT_THROW(quantize_row(GetParam(), row, packed.data(), importance), FormatError);
}

TEST(QuantPack, SmallRangeFarFromZero) {
  // The minimum rounds to float16 by more than the range of the block; the step makes up for it.
  std::vector<float> row(32);
  for (std::size_t i = 0; i < 32; ++i) row[i] = 99.96f + 0.0005f * static_cast<float>(i);
  const std::vector<float> back = unpack(DType::Q4_1, pack(DType::Q4_1, row), 32);
  for (std::size_t i = 0; i < 32; ++i) EXPECT_NEAR(back[i], row[i], 0.02);
}

}  // namespace
}  // namespace moesaic::kernels
