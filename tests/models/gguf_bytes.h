#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <type_traits>

namespace moesaic::models::testing {

/// The bytes of a GGUF file, put down one field after the other, right or wrong: made apart from
/// GgufWriter, so that one checks the other.
class GgufBytes {
 public:
  explicit GgufBytes(std::uint64_t n_tensors = 0, std::uint64_t n_keys = 0,
                     std::uint32_t version = 3) {
    bytes_ = "GGUF";
    put(version);
    put(n_tensors);
    put(n_keys);
  }

  template <class T>
  GgufBytes& put(T value) {
    static_assert(std::is_arithmetic_v<T>);
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    bytes_.append(raw, sizeof(T));
    return *this;
  }

  GgufBytes& text(std::string_view s) {
    put<std::uint64_t>(s.size());
    bytes_ += s;
    return *this;
  }

  /// Key and type of a metadata entry; the value is to follow.
  GgufBytes& key(std::string_view name, std::uint32_t type) {
    text(name);
    return put(type);
  }

  /// A tensor's entry; ne in the file's order, fastest first.
  GgufBytes& tensor(std::string_view name, std::initializer_list<std::uint64_t> ne,
                    std::uint32_t type, std::uint64_t offset) {
    text(name);
    put(static_cast<std::uint32_t>(ne.size()));
    for (const std::uint64_t n : ne) put(n);
    put(type);
    return put(offset);
  }

  GgufBytes& pad(std::size_t alignment = 32) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment, '\0');
    return *this;
  }

  GgufBytes& fill(std::size_t n, char value = 0) {
    bytes_.append(n, value);
    return *this;
  }

  const std::string& str() const { return bytes_; }

 private:
  std::string bytes_;
};

/// A folder of its own, removed with all it holds.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "moesaic-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::size_t n_files() const {
    std::size_t n = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path_)) ++n;
    return n;
  }

 private:
  std::filesystem::path path_;
};

inline std::filesystem::path write_bytes(const std::filesystem::path& path,
                                         std::string_view bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// For EXPECT_PRED2, which prints both texts.
inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}
inline bool ends_with(std::string_view text, std::string_view end) { return text.ends_with(end); }

/// What fn throws as an E, as text; "nothing thrown" if it does not throw.
template <class E, class Fn>
std::string error_of(Fn&& fn) {
  try {
    fn();
  } catch (const E& e) {
    return e.what();
  }
  return "nothing thrown";
}

}  // namespace moesaic::models::testing
