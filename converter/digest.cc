#include "converter/digest.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include <array>

#include "kernels/base/error.h"

namespace moesaic::converter {

std::string sha256(std::span<const std::byte> bytes) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  require<Error>(
      EVP_Digest(bytes.data(), bytes.size(), digest.data(), &size, EVP_sha256(), nullptr) == 1 &&
          size == 32,
      "libcrypto cannot compute SHA-256 here");
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) hex += fmt::format("{:02x}", digest[i]);
  return hex;
}

}  // namespace moesaic::converter
