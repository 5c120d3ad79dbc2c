#pragma once

namespace cudasim {

// What lane instructions and reductions over a warp both compute of two operands.

struct And {
  template <class T>
  static T run(T a, T b) {
    return a & b;
  }
};

struct Or {
  template <class T>
  static T run(T a, T b) {
    return a | b;
  }
};

struct Xor {
  template <class T>
  static T run(T a, T b) {
    return a ^ b;
  }
};

struct Least {
  template <class T>
  static T run(T a, T b) {
    return a < b ? a : b;
  }
};

struct Greatest {
  template <class T>
  static T run(T a, T b) {
    return a > b ? a : b;
  }
};

}  // namespace cudasim
