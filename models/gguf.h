#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kernels/base/view.h"

namespace moesaic::models {

/// Value types of GGUF metadata; the numbers are the file's.
enum class GgufType : std::uint32_t {
  U8 = 0,
  I8 = 1,
  U16 = 2,
  I16 = 3,
  U32 = 4,
  I32 = 5,
  F32 = 6,
  Bool = 7,
  String = 8,
  Array = 9,
  U64 = 10,
  I64 = 11,
  F64 = 12,
};

struct GgufValue;

/// A homogeneous array; numbers are widened (unsigned, signed → int64 / uint64, F32 → double),
/// `type` keeps what the file said.
struct GgufArray {
  GgufType type = GgufType::U32;
  std::variant<std::vector<std::int64_t>, std::vector<std::uint64_t>, std::vector<double>,
               std::vector<std::string>>
      items;
};

/// One metadata value with the type it has in the file.
struct GgufValue {
  GgufType type = GgufType::U32;
  std::variant<std::int64_t, std::uint64_t, double, bool, std::string, GgufArray> value;

  static GgufValue u32(std::uint32_t v);
  static GgufValue u64(std::uint64_t v);
  static GgufValue f32(float v);
  static GgufValue f64(double v);
  static GgufValue boolean(bool v);
  static GgufValue string(std::string v);
  static GgufValue f32_array(std::vector<double> v);
  static GgufValue u32_array(std::vector<std::uint64_t> v);
  static GgufValue string_array(std::vector<std::string> v);
};

/// One tensor of a file. `dims` slowest first (the reverse of GGUF's ne): [rows, cols] for a
/// matrix.
struct GgufTensor {
  std::string name;
  DType dtype = DType::F32;
  std::vector<std::int64_t> dims;
  const std::byte* data = nullptr;  // in the mapping
  std::int64_t bytes = 0;

  /// The tensor as rows × cols, all leading dimensions folded into rows. A vector is one row.
  WeightView matrix() const;
  std::int64_t n_elements() const;
};

/// A GGUF v2/v3 file, memory-mapped read-only. Views into it live as long as this object.
class GgufFile {
 public:
  /// Maps and checks the whole header: magic, version, counts against the file's size, string
  /// lengths, types, alignment, offsets, each tensor within the file, no two with one name. Throws
  /// FormatError("FILE: found …, expected …") or IoError; never reads past the end, never allocates
  /// more than the file's size warrants.
  static std::shared_ptr<const GgufFile> open(const std::filesystem::path& path);
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::int64_t file_bytes() const { return static_cast<std::int64_t>(size_); }
  std::uint32_t version() const { return version_; }
  /// In the order of the file.
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  const GgufValue* find(std::string_view key) const;           // nullptr if absent
  const GgufTensor* find_tensor(std::string_view name) const;  // nullptr if absent

  // Typed access. The first form throws FormatError("FILE: metadata key K is missing / is TYPE,
  // expected TYPE"); the second gives `fallback` where the key is absent and still throws on a
  // wrong type. Any integer width is accepted.
  std::string get_string(std::string_view key) const;
  std::string get_string(std::string_view key, std::string fallback) const;
  std::int64_t get_int(std::string_view key) const;
  std::int64_t get_int(std::string_view key, std::int64_t fallback) const;
  double get_float(std::string_view key) const;
  double get_float(std::string_view key, double fallback) const;
  bool get_bool(std::string_view key, bool fallback) const;
  std::vector<std::string> get_strings(std::string_view key) const;
  std::vector<double> get_floats(std::string_view key) const;
  std::vector<std::int64_t> get_ints(std::string_view key) const;

  /// The tensor, checked: throws FormatError("FILE: NAME is missing" or "FILE: NAME is [576, 1024],
  /// expected [576, 1536]"). dims slowest first.
  const GgufTensor& expect(std::string_view name, std::span<const std::int64_t> dims) const;

  /// Lets go of the memory that holds what was read so far; the tensors stay valid and come back
  /// from the file where they are read again.
  void drop_pages() const;

 private:
  GgufFile() = default;
  std::filesystem::path path_;
  const std::byte* map_ = nullptr;
  std::size_t size_ = 0;
  std::uint32_t version_ = 0;
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> key_index_;
  std::map<std::string, std::size_t, std::less<>> tensor_index_;
};

}  // namespace moesaic::models
