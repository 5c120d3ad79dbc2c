#include "models/gguf_writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <system_error>
#include <type_traits>

#include "kernels/base/error.h"

namespace moesaic::models {
namespace {

constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint32_t kVersion = 3;

std::string reason(int error) { return std::generic_category().message(error); }

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

/// Bytes a user may still write in a folder, or nothing if the file system does not say.
std::optional<std::uint64_t> free_bytes(const std::filesystem::path& folder) {
  struct statvfs status {};
  if (::statvfs(folder.c_str(), &status) != 0) return std::nullopt;
  return static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize;
}

/// Renaming a file onto /dev/null as root would replace the device.
void check_target(const std::filesystem::path& path) {
  require<IoError>(path.has_filename(), "{}: cannot write: expected a file name", path.string());
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return;
  require<IoError>(!S_ISDIR(status.st_mode), "{}: cannot write: is a folder, expected a file",
                   path.string());
  require<IoError>(S_ISREG(status.st_mode),
                   "{}: cannot write: is not a regular file, expected one or a new name",
                   path.string());
}

/// A new file that takes the place of `path` on commit() and is removed without it.
class AtomicFile {
 public:
  /// `bytes`: what will be written, for the error when the disk is full.
  AtomicFile(const std::filesystem::path& path, std::uint64_t bytes) : path_(path), bytes_(bytes) {
    check_target(path);
    constexpr int kAttempts = 100;  // names left over by killed processes of the same id
    for (int i = 0; i < kAttempts && fd_ < 0; ++i) {
      temporary_ =
          folder_of(path) / fmt::format(".{}.{}.{}.tmp", path.filename().string(), ::getpid(), i);
      fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd_ < 0 && errno != EEXIST) break;
    }
    if (fd_ < 0) fail(errno);
  }

  ~AtomicFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(temporary_.c_str());
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      constexpr std::size_t kLargest = std::size_t{1} << 30;  // write() moves at most 2 GiB
      const ssize_t n = ::write(fd_, bytes.data(), std::min(bytes.size(), kLargest));
      if (n < 0) {
        if (errno == EINTR) continue;
        fail(errno);
      }
      bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
  }

  void commit() {
    while (::fsync(fd_) != 0) {
      if (errno != EINTR) fail(errno);
    }
    // Not repeated after EINTR: Linux has closed the descriptor then.
    const int closed = ::close(fd_);
    fd_ = -1;
    if (closed != 0 && errno != EINTR) fail(errno);
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(errno);
    committed_ = true;
    sync_folder();
  }

 private:
  [[noreturn]] void fail(int error) const {
    std::string text = fmt::format("{}: cannot write: {}", path_.string(), reason(error));
    if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
      text += fmt::format(" ({} bytes needed", bytes_);
      if (const auto free = free_bytes(folder_of(path_)); free && error == ENOSPC) {
        text += fmt::format(", {} free", *free);
      }
      text += ")";
    }
    throw IoError(text);
  }

  /// Makes the rename survive a power cut. Some file systems cannot sync a folder; the file is
  /// whole all the same, so this never fails.
  void sync_folder() const {
    const int folder = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    ::fsync(folder);
    ::close(folder);
  }

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::uint64_t bytes_;
  int fd_ = -1;
  bool committed_ = false;
};

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

template <class T>
void put(std::string& out, T value) {
  static_assert(std::endian::native == std::endian::little && std::is_arithmetic_v<T>);
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

void put_string(std::string& out, std::string_view text) {
  put<std::uint64_t>(out, text.size());
  out += text;
}

/// Writes a widened number in the width that the file gives its type.
template <class Wide>
void put_number(std::string& out, GgufType type, Wide value, std::string_view key) {
  const auto put_as = [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_floating_point_v<T> != std::is_floating_point_v<Wide>) {
      throw FormatError(
          fmt::format("metadata key {}: value {} does not have its type", key, value));
    } else {
      if constexpr (std::is_integral_v<T>) {
        require<FormatError>(std::in_range<T>(value),
                             "metadata key {}: value {} is out of range, expected {} to {}", key,
                             value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
      }
      put(out, static_cast<T>(value));
    }
  };
  switch (type) {
    case GgufType::U8:
      return put_as(std::uint8_t{});
    case GgufType::I8:
      return put_as(std::int8_t{});
    case GgufType::U16:
      return put_as(std::uint16_t{});
    case GgufType::I16:
      return put_as(std::int16_t{});
    case GgufType::U32:
      return put_as(std::uint32_t{});
    case GgufType::I32:
      return put_as(std::int32_t{});
    case GgufType::U64:
      return put_as(std::uint64_t{});
    case GgufType::I64:
      return put_as(std::int64_t{});
    case GgufType::F32:
      return put_as(float{});
    case GgufType::F64:
      return put_as(double{});
    case GgufType::Bool:
      return put_as(std::uint8_t{});  // items of a bool array
    case GgufType::String:
    case GgufType::Array:
      throw FormatError(fmt::format("metadata key {}: a number has the type of a text", key));
  }
}

void put_array(std::string& out, const GgufArray& array, std::string_view key) {
  put(out, static_cast<std::uint32_t>(array.type));
  std::visit(
      [&](const auto& items) {
        using Item = typename std::decay_t<decltype(items)>::value_type;
        put<std::uint64_t>(out, items.size());
        for (const Item& item : items) {
          if constexpr (std::is_same_v<Item, std::string>) {
            require<FormatError>(array.type == GgufType::String,
                                 "metadata key {}: an array of texts has the type of numbers", key);
            put_string(out, item);
          } else {
            put_number(out, array.type, item, key);
          }
        }
      },
      array.items);
}

void put_value(std::string& out, const GgufValue& value, std::string_view key) {
  put(out, static_cast<std::uint32_t>(value.type));
  std::visit(
      [&](const auto& v) {
        using V = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<V, std::string>) {
          put_string(out, v);
        } else if constexpr (std::is_same_v<V, GgufArray>) {
          put_array(out, v, key);
        } else if constexpr (std::is_same_v<V, bool>) {
          put<std::uint8_t>(out, v ? 1 : 0);
        } else {
          put_number(out, value.type, v, key);
        }
      },
      value.value);
}

std::uint64_t align_up(std::uint64_t n, std::uint64_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

}  // namespace

void GgufWriter::set(std::string key, GgufValue value) {
  const auto same = std::find_if(metadata_.begin(), metadata_.end(),
                                 [&](const auto& entry) { return entry.first == key; });
  if (same != metadata_.end()) {
    same->second = std::move(value);
  } else {
    metadata_.emplace_back(std::move(key), std::move(value));
  }
}

void GgufWriter::add_tensor(std::string name, DType dtype, std::vector<std::int64_t> dims,
                            std::span<const std::byte> data) {
  const DTypeTraits& t = traits(dtype);
  require<ShapeError>(!dims.empty() && dims.size() <= 4 &&
                          std::all_of(dims.begin(), dims.end(), [](auto d) { return d >= 1; }),
                      "{}: is [{}], expected 1 to 4 dimensions of at least 1", name,
                      fmt::join(dims, ", "));
  require<ShapeError>(dims.back() % t.block_elems == 0,
                      "{}: is [{}] of {}, expected rows of a multiple of {} elements", name,
                      fmt::join(dims, ", "), t.name, t.block_elems);
  std::int64_t bytes = row_bytes(dtype, dims.back());
  bool fits = true;
  for (std::size_t i = 0; i + 1 < dims.size(); ++i) {
    fits = fits && !__builtin_mul_overflow(bytes, dims[i], &bytes);
  }
  require<ShapeError>(fits && static_cast<std::uint64_t>(bytes) == data.size(),
                      "{}: {} bytes given, expected {} for [{}] of {}", name, data.size(), bytes,
                      fmt::join(dims, ", "), t.name);
  for (const Tensor& other : tensors_) {
    require<FormatError>(other.name != name, "{}: tensor added twice", name);
  }
  tensors_.push_back({std::move(name), dtype, std::move(dims), data});
}

std::uint64_t GgufWriter::alignment() const {
  for (const auto& [key, value] : metadata_) {
    if (key != "general.alignment") continue;
    const auto* alignment = std::get_if<std::uint64_t>(&value.value);
    require<FormatError>(alignment != nullptr && *alignment >= 8 &&
                             *alignment <= (std::uint64_t{1} << 30) &&
                             std::has_single_bit(*alignment),
                         "general.alignment: expected an unsigned power of two from 8 to 2^30");
    return *alignment;
  }
  return kDefaultAlignment;
}

std::string GgufWriter::header() const {
  std::string out = "GGUF";
  put(out, kVersion);
  put<std::uint64_t>(out, tensors_.size());
  put<std::uint64_t>(out, metadata_.size());
  for (const auto& [key, value] : metadata_) {
    put_string(out, key);
    put_value(out, value, key);
  }
  const std::uint64_t align = alignment();
  std::uint64_t offset = 0;
  for (const Tensor& t : tensors_) {
    put_string(out, t.name);
    put(out, static_cast<std::uint32_t>(t.dims.size()));
    for (auto d = t.dims.rbegin(); d != t.dims.rend(); ++d) {
      put(out, static_cast<std::uint64_t>(*d));
    }
    put(out, static_cast<std::uint32_t>(t.dtype));
    put(out, offset);
    offset = align_up(offset + t.data.size(), align);
  }
  out.resize(align_up(out.size(), align), '\0');
  return out;
}

std::int64_t GgufWriter::file_bytes() const {
  std::uint64_t bytes = header().size();
  for (const Tensor& t : tensors_) bytes += align_up(t.data.size(), alignment());
  return static_cast<std::int64_t>(bytes);
}

void GgufWriter::write(const std::filesystem::path& path) const {
  const std::string start = header();
  const std::uint64_t align = alignment();
  const std::vector<std::byte> zeros(align);
  AtomicFile file(path, static_cast<std::uint64_t>(file_bytes()));
  file.write(as_bytes(start));
  for (const Tensor& t : tensors_) {
    file.write(t.data);
    file.write(std::span(zeros).first(align_up(t.data.size(), align) - t.data.size()));
  }
  file.commit();
}

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  AtomicFile file(path, bytes.size());
  file.write(bytes);
  file.commit();
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  write_file_atomically(path, as_bytes(text));
}

void check_writable(const std::filesystem::path& path, std::int64_t bytes) {
  const auto needed = static_cast<std::uint64_t>(std::max<std::int64_t>(bytes, 0));
  { const AtomicFile trial(path, needed); }  // made and removed
  const auto free = free_bytes(folder_of(path));
  require<IoError>(!free || *free >= needed,
                   "{}: cannot write: {} (about {} bytes needed, {} free)", path.string(),
                   reason(ENOSPC), needed, free.value_or(0));
}

}  // namespace moesaic::models
