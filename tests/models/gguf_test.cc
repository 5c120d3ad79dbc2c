#include "models/gguf.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <bit>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/models/gguf_bytes.h"

namespace moesaic::models {
namespace {

using testing::contains;
using testing::ends_with;
using testing::error_of;
using testing::GgufBytes;
using testing::TempFolder;
using testing::write_bytes;

constexpr std::uint32_t kF32 = 0, kQ4_0 = 2, kQ8_0 = 8;
constexpr std::uint32_t kU8 = 0, kI8 = 1, kU16 = 2, kI16 = 3, kU32 = 4, kI32 = 5, kFloat = 6,
                        kBool = 7, kString = 8, kArray = 9, kU64 = 10, kI64 = 11, kDouble = 12;

/// Every metadata type and two tensors.
GgufBytes small_file(std::uint32_t version = 3) {
  GgufBytes b(2, 15, version);
  b.key("k.u8", kU8).put<std::uint8_t>(200);
  b.key("k.i8", kI8).put<std::int8_t>(-3);
  b.key("k.u16", kU16).put<std::uint16_t>(60000);
  b.key("k.i16", kI16).put<std::int16_t>(-300);
  b.key("k.u32", kU32).put<std::uint32_t>(4000000000u);
  b.key("k.i32", kI32).put<std::int32_t>(-70000);
  b.key("k.f32", kFloat).put(1.5f);
  b.key("k.bool", kBool).put<std::uint8_t>(1);
  b.key("k.string", kString).text("text");
  b.key("k.u64", kU64).put<std::uint64_t>(1ull << 63);
  b.key("k.i64", kI64).put<std::int64_t>(-(1ll << 40));
  b.key("k.f64", kDouble).put(0.1);
  b.key("k.strings", kArray).put(kString).put<std::uint64_t>(2).text("a").text("");
  b.key("k.floats", kArray).put(kFloat).put<std::uint64_t>(2).put(0.5f).put(-2.0f);
  b.key("k.ints", kArray).put(kI16).put<std::uint64_t>(3);
  b.put<std::int16_t>(-1).put<std::int16_t>(0).put<std::int16_t>(7);
  b.tensor("vector", {3}, kF32, 0);
  b.tensor("matrix", {32, 2}, kQ8_0, 32);
  b.pad();
  b.put(1.0f).put(2.0f).put(3.0f).pad();
  b.fill(68, '\1').pad();
  return b;
}

class Gguf : public ::testing::Test {
 protected:
  std::shared_ptr<const GgufFile> open(std::string_view bytes) {
    const std::filesystem::path path = folder_.path() / "x.gguf";
    std::filesystem::remove(path);  // ext4 flushes a file that is overwritten: 4 ms each
    return GgufFile::open(write_bytes(path, bytes));
  }
  std::shared_ptr<const GgufFile> open(const GgufBytes& b) { return open(b.str()); }
  template <class E = FormatError>
  std::string error(const GgufBytes& b) {
    return error_of<E>([&] { open(b); });
  }
  /// A file of one tensor entry.
  std::string tensor_error(std::initializer_list<std::uint64_t> ne, std::uint32_t type,
                           std::uint64_t offset = 0, std::size_t data_bytes = 256) {
    GgufBytes b(1, 0);
    b.tensor("blk.0.w", ne, type, offset).pad().fill(data_bytes);
    return error(b);
  }
  TempFolder folder_;
};

TEST_F(Gguf, ReadsEveryTypeOfMetadata) {
  const auto f = open(small_file());
  EXPECT_EQ(f->version(), 3u);
  EXPECT_EQ(f->file_bytes(), static_cast<std::int64_t>(small_file().str().size()));
  EXPECT_EQ(f->metadata().size(), 15u);
  EXPECT_EQ(f->metadata()[1].first, "k.i8");
  EXPECT_EQ(f->get_int("k.u8"), 200);
  EXPECT_EQ(f->get_int("k.i8"), -3);
  EXPECT_EQ(f->get_int("k.u16"), 60000);
  EXPECT_EQ(f->get_int("k.i16"), -300);
  EXPECT_EQ(f->get_int("k.u32"), 4000000000);
  EXPECT_EQ(f->get_int("k.i32"), -70000);
  EXPECT_EQ(f->get_int("k.i64"), -(std::int64_t{1} << 40));
  EXPECT_EQ(f->get_float("k.f32"), 1.5);
  EXPECT_EQ(f->get_float("k.f64"), 0.1);
  EXPECT_TRUE(f->get_bool("k.bool", false));
  EXPECT_EQ(f->get_string("k.string"), "text");
  EXPECT_EQ(f->get_strings("k.strings"), (std::vector<std::string>{"a", ""}));
  EXPECT_EQ(f->get_floats("k.floats"), (std::vector<double>{0.5, -2.0}));
  EXPECT_EQ(f->get_ints("k.ints"), (std::vector<std::int64_t>{-1, 0, 7}));
  EXPECT_EQ(f->find("k.u16")->type, GgufType::U16);
  EXPECT_EQ(f->find("nope"), nullptr);
}

TEST_F(Gguf, ReadsTensorsSlowestDimensionFirst) {
  const auto f = open(small_file());
  ASSERT_EQ(f->tensors().size(), 2u);
  const GgufTensor& vector = *f->find_tensor("vector");
  EXPECT_EQ(vector.dims, (std::vector<std::int64_t>{3}));
  EXPECT_EQ(vector.matrix().rows, 1);
  EXPECT_EQ(vector.matrix().cols, 3);
  EXPECT_EQ(reinterpret_cast<const float*>(vector.data)[2], 3.0f);
  const GgufTensor& matrix = *f->find_tensor("matrix");
  EXPECT_EQ(matrix.dims, (std::vector<std::int64_t>{2, 32}));
  EXPECT_EQ(matrix.bytes, 68);
  EXPECT_EQ(matrix.matrix().rows, 2);
  EXPECT_EQ(matrix.matrix().row(1)[0], std::byte{1});
  EXPECT_EQ(f->find_tensor("nope"), nullptr);
}

TEST_F(Gguf, FoldsLeadingDimensionsIntoRows) {
  GgufBytes b(1, 0);
  b.tensor("t", {4, 3, 2}, kF32, 0).pad().fill(96);
  const auto f = open(b);
  EXPECT_EQ(f->tensors()[0].dims, (std::vector<std::int64_t>{2, 3, 4}));
  EXPECT_EQ(f->tensors()[0].matrix().rows, 6);
  EXPECT_EQ(f->tensors()[0].matrix().cols, 4);
  EXPECT_EQ(f->tensors()[0].n_elements(), 24);
}

TEST_F(Gguf, Version2IsRead) { EXPECT_EQ(open(small_file(2))->version(), 2u); }

TEST_F(Gguf, NoTensorsNoKeysIsAFile) { EXPECT_TRUE(open(GgufBytes())->tensors().empty()); }

TEST_F(Gguf, OtherVersionsAreNamed) {
  EXPECT_PRED2(ends_with, error(GgufBytes(0, 0, 1)), "is GGUF version 1, expected 2 or 3");
  EXPECT_PRED2(ends_with, error(GgufBytes(0, 0, 4)), "is GGUF version 4, expected 2 or 3");
  EXPECT_PRED2(ends_with, error(GgufBytes(0, 0, 0)), "is GGUF version 0, expected 2 or 3");
  EXPECT_PRED2(contains, error(GgufBytes(0, 0, 0x03000000)), "big-endian");
}

TEST_F(Gguf, NotAGgufFile) {
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { open("#!/bin/sh\n"); }),
               "found 23 21 2f 62 at the start, expected \"GGUF\"");
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { open(""); }),
               "is empty, expected a GGUF file");
}

TEST_F(Gguf, FolderMissingFileAndFifoAreIoErrors) {
  const auto text = [](const std::filesystem::path& p) {
    return error_of<IoError>([&] { GgufFile::open(p); });
  };
  EXPECT_PRED2(ends_with, text(folder_.path()), "is a folder, expected a GGUF file");
  EXPECT_PRED2(ends_with, text(folder_.path() / "no"),
               "no: cannot open: No such file or directory");
  ASSERT_EQ(::mkfifo((folder_.path() / "fifo").c_str(), 0600), 0);
  EXPECT_PRED2(contains, text(folder_.path() / "fifo"), "not a regular file");
  EXPECT_PRED2(contains, text("/dev/zero"), "not a regular file");
}

TEST_F(Gguf, CutOffAtAnyByteIsAnErrorThatNamesTheFile) {
  const std::string whole = small_file().str();
  const std::size_t needed = whole.size() - 28;  // the padding after the last tensor may be missing
  for (std::size_t n = 0; n < needed; ++n) {
    const std::string text = error_of<FormatError>([&] { open(whole.substr(0, n)); });
    ASSERT_PRED2(contains, text, "x.gguf: ") << n;
  }
  EXPECT_NO_THROW(open(whole.substr(0, needed)));
}

TEST_F(Gguf, CorruptBytesNeverCrash) {
  const std::string whole = small_file().str();
  std::mt19937 rng(7);
  int opened = 0;
  const auto try_open = [&](const std::string& bytes) {
    try {
      const auto f = open(bytes);
      // What was accepted has to be readable to its last byte.
      unsigned sum = 0;
      for (const GgufTensor& t : f->tensors()) {
        std::vector<float> row(static_cast<std::size_t>(t.matrix().cols));
        for (std::int64_t r = 0; r < t.matrix().rows; ++r) {
          kernels::dequantize_row(t.dtype, t.matrix().row(r), row);
        }
        for (std::int64_t i = 0; i < t.bytes; ++i) sum += static_cast<unsigned>(t.data[i]);
      }
      opened += sum < ~0u ? 1 : 0;
    } catch (const FormatError& e) {
      ASSERT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  };
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const int value : {0x00, 0x01, 0x7f, 0x80, 0xff, static_cast<int>(rng() & 0xff)}) {
      std::string bytes = whole;
      bytes[i] = static_cast<char>(value);
      try_open(bytes);
    }
  }
  for (int i = 0; i < 3000; ++i) {
    std::string bytes = whole;
    for (int n = 0; n < 3; ++n) bytes[rng() % bytes.size()] = static_cast<char>(rng());
    // A whole 64-bit field of a large value: counts, lengths, offsets.
    if (i % 3 == 0) {
      const std::uint64_t huge = ~std::uint64_t{0} >> (rng() % 40);
      std::memcpy(bytes.data() + rng() % (bytes.size() - 8), &huge, 8);
    }
    try_open(bytes);
  }
  EXPECT_GT(opened, 0);
}

TEST_F(Gguf, CountsBeyondTheFileAreRefusedBeforeAllocating) {
  EXPECT_PRED2(contains, error(GgufBytes(0, ~std::uint64_t{0}).fill(64)), "metadata keys");
  EXPECT_PRED2(contains, error(GgufBytes(~std::uint64_t{0}, 0).fill(64)), "tensors");
  EXPECT_PRED2(contains, error(GgufBytes(0, 1).put(~std::uint64_t{0}).fill(64)), "a metadata key");
  for (const std::uint32_t type : {kU8, kBool, kString, kDouble}) {
    GgufBytes b(0, 1);
    b.key("k", kArray).put(type).put(std::uint64_t{1} << 61).fill(64);
    EXPECT_PRED2(contains, error(b), "truncated or corrupt");
  }
}

TEST_F(Gguf, MetadataOfUnknownTypeNestedArrayOrTwiceIsRefused) {
  EXPECT_PRED2(ends_with, error(GgufBytes(0, 1).key("k", 13).fill(32)),
               "metadata key k is of type 13, expected 0 to 12");
  EXPECT_PRED2(contains, error(GgufBytes(0, 1).key("k", kArray).put(kArray).fill(32)),
               "array of arrays");
  GgufBytes twice(0, 2);
  twice.key("k", kU8).put<std::uint8_t>(0).key("k", kU8).put<std::uint8_t>(1);
  EXPECT_PRED2(ends_with, error(twice), "metadata key k is there twice");
  EXPECT_PRED2(ends_with, error(GgufBytes(0, 1).key("", kU8).fill(32)),
               "metadata key 0 has no name");
  EXPECT_PRED2(contains, error(GgufBytes(0, 1).key("k", kBool).put<std::uint8_t>(2)),
               "expected 0 or 1");
}

TEST_F(Gguf, NamesInErrorsStayOnOneLine) {
  EXPECT_PRED2(contains, error(GgufBytes(0, 1).key("a\nb", 13).fill(32)), "key a\\x0ab is");
  EXPECT_LT(error(GgufBytes(0, 1).key(std::string(100000, 'k'), 13).fill(32)).size(), 300u);
}

TEST_F(Gguf, TensorTypeThatIsNotReadIsNamed) {
  EXPECT_PRED2(ends_with, tensor_error({256}, 16),
               "blk.0.w is of type IQ2_XXS (16), expected one of F32, F16, BF16, Q4_0, "
               "Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K");
  EXPECT_PRED2(contains, tensor_error({256}, 4), "blk.0.w is of type 4, expected");
  EXPECT_PRED2(contains, tensor_error({256}, 0xffffffff), "is of type 4294967295, expected");
}

TEST_F(Gguf, DimensionsAreChecked) {
  EXPECT_PRED2(ends_with, tensor_error({}, kF32), "blk.0.w has 0 dimensions, expected 1 to 4");
  EXPECT_PRED2(contains, tensor_error({1, 1, 1, 1, 1}, kF32), "has 5 dimensions");
  EXPECT_PRED2(contains, tensor_error({4, 0}, kF32), "has dimension 1 of size 0");
  EXPECT_PRED2(ends_with, tensor_error({48, 2}, kQ4_0),
               "is [2, 48] of Q4_0, expected rows of a multiple of 32 elements");
  const std::uint64_t big = std::uint64_t{1} << 32;
  EXPECT_PRED2(contains, tensor_error({big, big}, kF32), "fewer than 2^63 elements");
  EXPECT_PRED2(contains, tensor_error({~std::uint64_t{0}}, kF32), "fewer than 2^63 elements");
  EXPECT_PRED2(contains, tensor_error({big, big >> 1, 1}, kF32), "fewer than 2^63");
  EXPECT_PRED2(contains, tensor_error({big, big >> 2}, kF32), "fewer than 2^63 bytes");
}

TEST_F(Gguf, DataHasToLieInTheFile) {
  EXPECT_PRED2(ends_with, tensor_error({64}, kF32, 0, 255),
               "blk.0.w takes 256 bytes from offset 0 of the data, found 255 bytes of data "
               "(truncated or corrupt)");
  EXPECT_EQ(tensor_error({64}, kF32, 0, 256), "nothing thrown");
  EXPECT_PRED2(contains, tensor_error({8}, kF32, 256), "from offset 256");
  EXPECT_PRED2(contains, tensor_error({8}, kF32, ~std::uint64_t{31}), "truncated or corrupt");
  EXPECT_PRED2(ends_with, tensor_error({8}, kF32, 4), "is at offset 4, expected a multiple of 32");
}

TEST_F(Gguf, OverlappingOrTwiceNamedTensorsAreRefused) {
  GgufBytes overlap(2, 0);
  overlap.tensor("a", {16}, kF32, 32).tensor("b", {16}, kF32, 0).pad().fill(256);
  EXPECT_PRED2(ends_with, error(overlap), "b and a overlap");
  GgufBytes twice(2, 0);
  twice.tensor("a", {8}, kF32, 32).tensor("a", {8}, kF32, 0).pad().fill(256);
  EXPECT_PRED2(ends_with, error(twice), "tensor a is there twice");
  GgufBytes apart(2, 0);
  apart.tensor("a", {8}, kF32, 32).tensor("b", {8}, kF32, 0).pad().fill(256);
  EXPECT_NO_THROW(open(apart));
  EXPECT_PRED2(ends_with, error(GgufBytes(1, 0).tensor("", {8}, kF32, 0).pad().fill(64)),
               "tensor 0 has no name");
}

TEST_F(Gguf, AlignmentKeyIsObeyed) {
  GgufBytes b(1, 1);
  b.key("general.alignment", kU32).put<std::uint32_t>(256);
  b.tensor("a", {1}, kF32, 0).pad(256).put(7.0f);
  EXPECT_EQ(*reinterpret_cast<const float*>(open(b)->tensors()[0].data), 7.0f);
  for (const std::uint32_t bad : {0u, 1u, 4u, 48u, 0x80000000u}) {
    GgufBytes wrong(0, 1);
    wrong.key("general.alignment", kU32).put(bad);
    EXPECT_PRED2(contains, error(wrong), "expected a power of two from 8 to 2^30") << bad;
  }
  GgufBytes text(0, 1);
  text.key("general.alignment", kString).text("32");
  EXPECT_PRED2(ends_with, error(text), "general.alignment is of type string, expected an integer");
}

TEST_F(Gguf, TypedAccessNamesKeyFoundAndExpected) {
  const auto f = open(small_file());
  const auto text = [](auto&& fn) { return error_of<FormatError>(fn); };
  EXPECT_PRED2(ends_with, text([&] { f->get_int("no.such"); }),
               "x.gguf: metadata key no.such is missing");
  EXPECT_PRED2(ends_with, text([&] { f->get_int("k.f32"); }),
               "metadata key k.f32 is of type f32, expected an integer");
  EXPECT_PRED2(contains, text([&] { f->get_int("k.u64"); }), "expected less than 2^63");
  EXPECT_PRED2(ends_with, text([&] { f->get_string("k.i8"); }), "of type i8, expected string");
  EXPECT_PRED2(ends_with, text([&] { f->get_float("k.i8"); }), "expected f32 or f64");
  EXPECT_PRED2(ends_with, text([&] { f->get_bool("k.u8", true); }), "of type u8, expected bool");
  EXPECT_PRED2(ends_with, text([&] { f->get_strings("k.ints"); }),
               "of type array of i16, expected array of string");
  EXPECT_PRED2(contains, text([&] { f->get_floats("k.strings"); }), "array of string, expected");
  EXPECT_PRED2(ends_with, text([&] { f->get_ints("k.i8"); }),
               "of type i8, expected array of integers");
  EXPECT_PRED2(contains, text([&] { f->get_int("k.string", 1); }), "expected an integer");
  EXPECT_EQ(f->get_int("no.such", 5), 5);
  EXPECT_EQ(f->get_float("no.such", 0.5), 0.5);
  EXPECT_EQ(f->get_string("no.such", "x"), "x");
  EXPECT_FALSE(f->get_bool("no.such", false));
}

TEST_F(Gguf, ExpectNamesTheShape) {
  const auto f = open(small_file());
  const std::vector<std::int64_t> right = {2, 32}, wrong = {32, 2}, longer = {1, 2, 32};
  EXPECT_EQ(&f->expect("matrix", right), f->find_tensor("matrix"));
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { f->expect("matrix", wrong); }),
               "x.gguf: matrix is [2, 32], expected [32, 2]");
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { f->expect("matrix", longer); }),
               "matrix is [2, 32], expected [1, 2, 32]");
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { f->expect("gone", right); }),
               "gone is missing, expected [2, 32]");
}

/// A tensor of a real checkpoint; make_quant_fixtures.py printed these with gguf's dequantisation.
struct RealTensor {
  const char* file;
  const char* tensor;
  DType dtype;
  std::uint64_t checksum;  // Σ (i + 1) · bits(value i) modulo 2^64
};
void PrintTo(const RealTensor& t, std::ostream* out) { *out << t.file << ' ' << t.tensor; }

class RealCheckpoint : public ::testing::TestWithParam<RealTensor> {};
constexpr char kSmol[] = "SmolLM2-135M-Instruct.Q4_1.gguf";
constexpr char kGemma[] = "gemma-3-270m-Q4_K_M.gguf";
INSTANTIATE_TEST_SUITE_P(
    Gguf, RealCheckpoint,
    ::testing::Values(
        RealTensor{kSmol, "blk.0.attn_norm.weight", DType::F32, 0x000132a306ab0000ull},
        RealTensor{kSmol, "blk.0.ffn_down.weight", DType::Q4_1, 0xbd98bbca6bff7600ull},
        RealTensor{kGemma, "output_norm.weight", DType::F32, 0x0000cc6183408000ull},
        RealTensor{kGemma, "blk.0.attn_k.weight", DType::Q5_0, 0x772bf67d2ccc5000ull},
        RealTensor{kGemma, "blk.0.attn_output.weight", DType::Q4_K, 0x4eaaeb428b242838ull},
        RealTensor{kGemma, "blk.0.attn_v.weight", DType::Q8_0, 0x830aad9c34bada00ull},
        RealTensor{kGemma, "blk.0.ffn_down.weight", DType::Q6_K, 0xae2d365e7cb89a72ull}));

TEST_P(RealCheckpoint, WholeTensorUnpacksAsGguf) {
  const char* cache = std::getenv("MOESAIC_CACHE");
  const char* home = std::getenv("HOME");
  const std::filesystem::path folder =
      cache != nullptr ? std::filesystem::path(cache)
                       : std::filesystem::path(home != nullptr ? home : ".") / ".cache/moesaic";
  const std::filesystem::path path = folder / GetParam().file;
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path.string() << " is not there";
  const auto f = GgufFile::open(path);
  const GgufTensor* tensor = f->find_tensor(GetParam().tensor);
  ASSERT_NE(tensor, nullptr);
  EXPECT_EQ(tensor->dtype, GetParam().dtype);
  const WeightView w = tensor->matrix();
  std::vector<float> row(static_cast<std::size_t>(w.cols));
  std::uint64_t sum = 0, index = 0;
  for (std::int64_t r = 0; r < w.rows; ++r) {
    kernels::dequantize_row(w.dtype, w.row(r), row);
    for (const float v : row) sum += ++index * std::bit_cast<std::uint32_t>(v);
  }
  EXPECT_EQ(sum, GetParam().checksum);
}

}  // namespace
}  // namespace moesaic::models
