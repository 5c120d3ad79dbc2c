#include "models/gguf_writer.h"

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "tests/models/gguf_bytes.h"

namespace moesaic::models {
namespace {

using testing::contains;
using testing::ends_with;
using testing::error_of;
using testing::GgufBytes;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

std::vector<std::byte> pattern(std::size_t n) {
  std::vector<std::byte> bytes(n);
  for (std::size_t i = 0; i < n; ++i) bytes[i] = static_cast<std::byte>(i * 7 + 1);
  return bytes;
}

GgufValue value_of(GgufType type, std::int64_t v) { return {type, v}; }
GgufValue value_of(GgufType type, std::uint64_t v) { return {type, v}; }

class Writer : public ::testing::Test {
 protected:
  std::string name() const { return path_.filename().string(); }
  TempFolder folder_;
  std::filesystem::path path_ = folder_.path() / "out.gguf";
};

TEST_F(Writer, WritesTheFormatByteForByte) {
  const std::vector<std::byte> a = pattern(3 * 4), b = pattern(2 * 34);
  GgufWriter w;
  w.set("general.architecture", GgufValue::string("llama"));
  w.set("n", GgufValue::u32(7));
  w.set("f", GgufValue::f32_array({0.5, -1}));
  w.set("s", GgufValue::string_array({"x", ""}));
  w.set("b", GgufValue::boolean(true));
  w.add_tensor("a", DType::F32, {3}, a);
  w.add_tensor("b", DType::Q8_0, {2, 32}, b);
  w.write(path_);

  GgufBytes expected(2, 5);
  expected.key("general.architecture", 8).text("llama");
  expected.key("n", 4).put<std::uint32_t>(7);
  expected.key("f", 9).put<std::uint32_t>(6).put<std::uint64_t>(2).put(0.5f).put(-1.0f);
  expected.key("s", 9).put<std::uint32_t>(8).put<std::uint64_t>(2).text("x").text("");
  expected.key("b", 7).put<std::uint8_t>(1);
  expected.tensor("a", {3}, 0, 0).tensor("b", {32, 2}, 8, 32).pad();
  const auto as_text = [](const std::vector<std::byte>& v) {
    return std::string(reinterpret_cast<const char*>(v.data()), v.size());
  };
  const std::string data = as_text(a) + std::string(20, '\0') + as_text(b) + std::string(28, '\0');
  EXPECT_EQ(read_bytes(path_), expected.str() + data);
  EXPECT_EQ(w.file_bytes(), static_cast<std::int64_t>(expected.str().size() + data.size()));
  EXPECT_EQ(folder_.n_files(), 1u);
}

TEST_F(Writer, EveryTypeComesBackAndWritesTheSameBytesAgain) {
  GgufWriter w;
  w.set("u8", value_of(GgufType::U8, std::uint64_t{255}));
  w.set("i8", value_of(GgufType::I8, std::int64_t{-128}));
  w.set("u16", value_of(GgufType::U16, std::uint64_t{65535}));
  w.set("i16", value_of(GgufType::I16, std::int64_t{-32768}));
  w.set("i32", value_of(GgufType::I32, std::int64_t{-1}));
  w.set("i64", value_of(GgufType::I64, std::numeric_limits<std::int64_t>::min()));
  w.set("u64", GgufValue::u64(~std::uint64_t{0}));
  w.set("f32", GgufValue::f32(0.1f));
  w.set("f64", GgufValue::f64(0.1));
  w.set("no", GgufValue::boolean(false));
  w.set("u32s", GgufValue::u32_array({1, 2, 3}));
  w.set("none", GgufValue::string_array({}));
  w.set("bools", {GgufType::Array, GgufArray{GgufType::Bool, std::vector<std::uint64_t>{1, 0}}});
  w.set("i16s", {GgufType::Array, GgufArray{GgufType::I16, std::vector<std::int64_t>{-5}}});
  const std::vector<std::byte> data = pattern(2 * 3 * 32 / 32 * 18);
  w.add_tensor("t", DType::Q4_0, {2, 3, 32}, data);
  w.write(path_);

  const auto f = GgufFile::open(path_);
  EXPECT_EQ(f->version(), 3u);
  EXPECT_EQ(f->get_int("i64"), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(f->get_float("f32"), static_cast<double>(0.1f));
  EXPECT_EQ(f->get_float("f64"), 0.1);
  EXPECT_TRUE(f->get_strings("none").empty());
  EXPECT_EQ(f->get_ints("u32s"), (std::vector<std::int64_t>{1, 2, 3}));
  ASSERT_NE(f->find_tensor("t"), nullptr);
  EXPECT_EQ(f->find_tensor("t")->dims, (std::vector<std::int64_t>{2, 3, 32}));
  EXPECT_EQ(std::memcmp(f->find_tensor("t")->data, data.data(), data.size()), 0);

  GgufWriter again;
  for (const auto& [key, value] : f->metadata()) again.set(key, value);
  for (const GgufTensor& t : f->tensors()) {
    again.add_tensor(t.name, t.dtype, t.dims, {t.data, static_cast<std::size_t>(t.bytes)});
  }
  const std::filesystem::path copy = folder_.path() / "copy.gguf";
  again.write(copy);
  EXPECT_EQ(read_bytes(copy), read_bytes(path_));
}

TEST_F(Writer, SettingAKeyAgainReplacesItInItsPlace) {
  GgufWriter w;
  w.set("a", GgufValue::u32(1));
  w.set("b", GgufValue::u32(2));
  w.set("a", GgufValue::string("x"));
  w.write(path_);
  const auto f = GgufFile::open(path_);
  ASSERT_EQ(f->metadata().size(), 2u);
  EXPECT_EQ(f->metadata()[0].first, "a");
  EXPECT_EQ(f->get_string("a"), "x");
}

TEST_F(Writer, AlignmentKeyIsObeyed) {
  const std::vector<std::byte> data = pattern(4);
  GgufWriter w;
  w.set("general.alignment", GgufValue::u32(256));
  w.add_tensor("a", DType::F32, {1}, data);
  w.add_tensor("b", DType::F32, {1}, data);
  w.write(path_);
  const auto f = GgufFile::open(path_);
  EXPECT_EQ(f->tensors()[1].data - f->tensors()[0].data, 256);
  EXPECT_EQ(w.file_bytes(), f->file_bytes());
  w.set("general.alignment", GgufValue::u32(48));
  EXPECT_THROW(w.file_bytes(), FormatError);
}

TEST_F(Writer, TensorsHaveToFitTheirDims) {
  const std::vector<std::byte> data = pattern(64);
  GgufWriter w;
  EXPECT_PRED2(ends_with, error_of<ShapeError>([&] { w.add_tensor("t", DType::F32, {15}, data); }),
               "t: 64 bytes given, expected 60 for [15] of F32");
  EXPECT_THROW(w.add_tensor("t", DType::F32, {}, data), ShapeError);
  EXPECT_THROW(w.add_tensor("t", DType::F32, {0}, {}), ShapeError);
  EXPECT_THROW(w.add_tensor("t", DType::F32, {1, 1, 1, 1, 16}, data), ShapeError);
  EXPECT_THROW(w.add_tensor("t", DType::Q8_0, {2, 16}, data), ShapeError);
  const std::int64_t big = std::int64_t{1} << 40;
  EXPECT_THROW(w.add_tensor("t", DType::F32, {big, big, 4}, data), ShapeError);
  w.add_tensor("t", DType::F32, {16}, data);
  EXPECT_THROW(w.add_tensor("t", DType::F32, {16}, data), FormatError);
}

TEST_F(Writer, ValuesHaveToFitTheirType) {
  const auto text = [&](GgufValue value) {
    GgufWriter w;
    w.set("k", std::move(value));
    return error_of<FormatError>([&] { w.write(path_); });
  };
  EXPECT_PRED2(contains, text(value_of(GgufType::U8, std::uint64_t{256})),
               "metadata key k: value 256 is out of range, expected 0 to 255");
  EXPECT_PRED2(contains, text(value_of(GgufType::U32, std::int64_t{-1})), "out of range");
  EXPECT_PRED2(contains, text(value_of(GgufType::F32, std::int64_t{1})), "does not have its type");
  EXPECT_PRED2(contains, text(value_of(GgufType::String, std::int64_t{1})), "type of a text");
  EXPECT_EQ(folder_.n_files(), 0u);
}

TEST_F(Writer, OverwritesTheFileItStillReads) {
  const std::vector<std::byte> data = pattern(64);
  GgufWriter w;
  w.add_tensor("a", DType::F32, {16}, data);
  w.write(path_);
  const auto old = GgufFile::open(path_);
  GgufWriter again;
  again.set("new", GgufValue::boolean(true));
  const GgufTensor& t = old->tensors()[0];
  again.add_tensor(t.name, t.dtype, t.dims, {t.data, static_cast<std::size_t>(t.bytes)});
  again.write(path_);
  EXPECT_EQ(std::memcmp(t.data, data.data(), 64), 0);
  const auto fresh = GgufFile::open(path_);
  EXPECT_TRUE(fresh->get_bool("new", false));
  EXPECT_EQ(std::memcmp(fresh->tensors()[0].data, data.data(), 64), 0);
  EXPECT_EQ(folder_.n_files(), 1u);
}

TEST_F(Writer, RelativePathWithoutFolder) {
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(folder_.path());
  write_file_atomically("plain.txt", "x");
  check_writable("other.txt", 10);
  std::filesystem::current_path(before);
  EXPECT_EQ(read_bytes(folder_.path() / "plain.txt"), "x");
  EXPECT_EQ(folder_.n_files(), 1u);
}

TEST_F(Writer, PathsThatCannotBeWritten) {
  const auto text = [](const std::filesystem::path& p) {
    const std::string first = error_of<IoError>([&] { write_file_atomically(p, "x"); });
    EXPECT_EQ(first, error_of<IoError>([&] { check_writable(p, 1); }));
    EXPECT_EQ(first, error_of<IoError>([&] { GgufWriter().write(p); }));
    return first;
  };
  EXPECT_PRED2(ends_with, text(folder_.path() / "no" / "x"),
               "no/x: cannot write: No such file or directory");
  EXPECT_PRED2(ends_with, text(folder_.path()), "cannot write: is a folder, expected a file");
  EXPECT_PRED2(contains, text("/dev/null"), "/dev/null: cannot write: is not a regular file");
  EXPECT_PRED2(contains, text("/dev/full"), "not a regular file");
  EXPECT_PRED2(contains, text(folder_.path() / ""), "cannot write");
  EXPECT_PRED2(contains, text(""), "expected a file name");
  EXPECT_PRED2(contains, text("/proc/moesaic.gguf"), "/proc/moesaic.gguf: cannot write: ");
  write_bytes(folder_.path() / "file", "x");
  EXPECT_PRED2(ends_with, text(folder_.path() / "file" / "x"), "cannot write: Not a directory");
}

TEST_F(Writer, FolderWithoutPermission) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write everywhere";
  ASSERT_EQ(::chmod(folder_.path().c_str(), 0500), 0);
  EXPECT_PRED2(ends_with, error_of<IoError>([&] { write_file_atomically(path_, "x"); }),
               "out.gguf: cannot write: Permission denied");
  ASSERT_EQ(::chmod(folder_.path().c_str(), 0700), 0);
}

TEST_F(Writer, CheckWritableCountsFreeSpace) {
  EXPECT_NO_THROW(check_writable(path_, 0));
  EXPECT_NO_THROW(check_writable(path_, 1000));
  const std::string text =
      error_of<IoError>([&] { check_writable(path_, std::numeric_limits<std::int64_t>::max()); });
  EXPECT_PRED2(contains, text,
               "out.gguf: cannot write: No space left on device (about "
               "9223372036854775807 bytes needed, ");
  EXPECT_EQ(folder_.n_files(), 0u);
}

TEST_F(Writer, FileSizeLimitLeavesNoFileAndKeepsTheOldOne) {
  write_bytes(path_, "old");
  const std::vector<std::byte> data = pattern(1 << 20);
  GgufWriter w;
  w.add_tensor("t", DType::F32, {1 << 18}, data);

  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 100000;  // in the middle of the tensor: a short write, then EFBIG
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string text = error_of<IoError>([&] { w.write(path_); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);

  EXPECT_PRED2(contains, text, "out.gguf: cannot write: File too large (");
  EXPECT_PRED2(contains, text, std::to_string(w.file_bytes()) + " bytes needed");
  EXPECT_EQ(read_bytes(path_), "old");
  EXPECT_EQ(folder_.n_files(), 1u);
}

/// A tmpfs of 256 KiB on a folder, where this process may mount one.
class SmallDisk {
 public:
  explicit SmallDisk(const std::filesystem::path& folder) : folder_(folder) {
    mounted_ = ::mount("tmpfs", folder.c_str(), "tmpfs", 0, "size=256k") == 0;
    error_ = errno;
  }
  ~SmallDisk() {
    if (mounted_) ::umount2(folder_.c_str(), MNT_DETACH);
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  bool mounted() const { return mounted_; }
  int error() const { return error_; }

 private:
  std::filesystem::path folder_;
  bool mounted_ = false;
  int error_ = 0;
};

TEST_F(Writer, FullDiskNamesBytesNeededAndLeavesNoFile) {
  const SmallDisk disk(folder_.path());
  if (!disk.mounted()) GTEST_SKIP() << "cannot mount a tmpfs: " << std::strerror(disk.error());
  const std::vector<std::byte> data = pattern(1 << 20);
  GgufWriter w;
  w.add_tensor("t", DType::F32, {1 << 18}, data);
  const std::string needed = std::to_string(w.file_bytes()) + " bytes needed";
  const std::string text = error_of<IoError>([&] { w.write(path_); });
  EXPECT_PRED2(contains, text, "out.gguf: cannot write: No space left on device (" + needed);
  EXPECT_EQ(folder_.n_files(), 0u);
  EXPECT_PRED2(contains, error_of<IoError>([&] { check_writable(path_, w.file_bytes()); }), needed);
  EXPECT_PRED2(contains, error_of<IoError>([&] { write_file_atomically(path_, data); }),
               "1048576 bytes needed");
  EXPECT_EQ(folder_.n_files(), 0u);
}

TEST_F(Writer, SmallFilesAreReplacedWhole) {
  write_file_atomically(path_, "first");
  write_file_atomically(path_, std::string_view());
  EXPECT_EQ(read_bytes(path_), "");
  write_file_atomically(path_, pattern(3));
  EXPECT_EQ(read_bytes(path_), std::string("\x01\x08\x0f"));
  EXPECT_EQ(folder_.n_files(), 1u);
}

}  // namespace
}  // namespace moesaic::models
