#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace moesaic::converter {

/// SHA-256 in lower-case hex, by libcrypto.
std::string sha256(std::span<const std::byte> bytes);

/// The same of a file's contents, read in pieces. Throws IoError.
std::string sha256_file(const std::filesystem::path& path);

}  // namespace moesaic::converter
