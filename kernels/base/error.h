#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace moesaic {

/// Root of everything the libraries throw on purpose. The text is one line a user can act on: the
/// file, the tensor or flag, what was found and what was expected. Only tools/ turns it into a
/// message and an exit status.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that is not what it claims to be (truncated, wrong shape, unknown type or architecture).
class FormatError : public Error {
 public:
  using Error::Error;
};

/// Dimensions of tensors handed to an operation do not fit each other.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// The operating system refused (no such file, disk full, permission).
class IoError : public Error {
 public:
  using Error::Error;
};

/// A value given by the user is out of range or empty.
class InputError : public Error {
 public:
  using Error::Error;
};

/// The GPU or its driver refused: none there, out of its memory, a kernel that failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// The user asked to stop (Ctrl-C); state that can be resumed has been kept.
class Interrupted : public Error {
 public:
  using Error::Error;
};

/// Throws E with a formatted text unless `ok`.
template <class E, class... Args>
void require(bool ok, fmt::format_string<Args...> text, Args&&... args) {
  if (!ok) throw E(fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace moesaic
