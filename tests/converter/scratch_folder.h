#pragma once

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

namespace moesaic::converter {

/// An empty folder of one test, gone with the object.
struct ScratchFolder {
  ScratchFolder() {
    static std::atomic<int> counter = 0;
    path = std::filesystem::temp_directory_path() /
           ("moesaic-converter-" + std::to_string(getpid()) + "-" + std::to_string(counter++));
    std::filesystem::create_directory(path);
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  std::filesystem::path path;
};

inline void write_text(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// The text of the exception of type E that fn throws; "" if it throws nothing.
template <class E, class Fn>
std::string thrown(Fn&& fn) {
  try {
    fn();
  } catch (const E& e) {
    return e.what();
  }
  return "";
}

}  // namespace moesaic::converter
