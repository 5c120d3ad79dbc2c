#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace moesaic::converter {

/// SHA-256 in lower-case hex, by libcrypto.
std::string sha256(std::span<const std::byte> bytes);

}  // namespace moesaic::converter
