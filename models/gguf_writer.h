#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "models/gguf.h"

namespace moesaic::models {

/// Writes a GGUF v3 file: collect metadata and tensors, then write() once. The bytes depend on what
/// was added and in which order, nothing else.
class GgufWriter {
 public:
  void set(std::string key, GgufValue value);  // replaces a key already set, in its place
  /// `data` is borrowed until write(). dims slowest first. Throws ShapeError if data.size() does
  /// not fit dims.
  void add_tensor(std::string name, DType dtype, std::vector<std::int64_t> dims,
                  std::span<const std::byte> data);
  /// Bytes that write() will produce.
  std::int64_t file_bytes() const;
  /// Writes to a temporary file beside `path`, fsync, rename, fsync of the folder: a reader never
  /// sees half a file, and on any error (disk full, no permission) no file is left. Throws
  /// IoError("PATH: cannot write: reason").
  void write(const std::filesystem::path& path) const;

 private:
  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> dims;
    std::span<const std::byte> data;
  };
  std::uint64_t alignment() const;  // metadata key general.alignment, 32 without it
  std::string header() const;       // everything before the tensors' data, padded

  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<Tensor> tensors_;
};

/// Writes any small file (report, state) by the same rule: temporary, fsync, rename. Throws
/// IoError.
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

/// Throws IoError unless a file can be created at `path`'s folder now and has room for `bytes`
/// (statvfs): asked before long work starts, not after.
void check_writable(const std::filesystem::path& path, std::int64_t bytes);

}  // namespace moesaic::models
