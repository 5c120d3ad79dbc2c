#include "tests/cudasim/nccl/reduce.h"

#include <algorithm>
#include <cstring>

#include "tests/cudasim/exec/number.h"

namespace cudasim::nccl {
namespace {

template <class T>
struct Plain {
  using Sum = T;
  static Sum load(T v) { return v; }
  static T store(Sum v) { return v; }
};
template <class T>
struct Halves {
  using Sum = float;
  static Sum load(T v) { return to_float(v); }
  static T store(Sum v) { return half_from<T>(v); }
};

template <class T, class As>
void combine_as(const std::vector<std::vector<std::byte>>& parts, std::size_t first,
                std::size_t count, ncclRedOp_t op, void* out) {
  using Sum = typename As::Sum;
  for (std::size_t i = 0; i < count; ++i) {
    Sum total{};
    for (std::size_t r = 0; r < parts.size(); ++r) {
      T element;
      std::memcpy(&element, parts[r].data() + (first + i) * sizeof(T), sizeof(T));
      const Sum v = As::load(element);
      if (r == 0) {
        total = v;
      } else if (op == ncclProd) {
        total = static_cast<Sum>(total * v);
      } else if (op == ncclMax) {
        total = std::max(total, v);
      } else if (op == ncclMin) {
        total = std::min(total, v);
      } else {
        total = static_cast<Sum>(total + v);
      }
    }
    if (op == ncclAvg) total = static_cast<Sum>(total / static_cast<Sum>(parts.size()));
    const T result = As::store(total);
    std::memcpy(static_cast<std::byte*>(out) + i * sizeof(T), &result, sizeof(T));
  }
}

}  // namespace

std::size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 0;
  }
}

void combine(const std::vector<std::vector<std::byte>>& parts, std::size_t first, std::size_t count,
             ncclDataType_t type, ncclRedOp_t op, void* out) {
  switch (type) {
    case ncclInt8:
      return combine_as<i8, Plain<i8>>(parts, first, count, op, out);
    case ncclUint8:
      return combine_as<u8, Plain<u8>>(parts, first, count, op, out);
    case ncclInt32:
      return combine_as<i32, Plain<i32>>(parts, first, count, op, out);
    case ncclUint32:
      return combine_as<u32, Plain<u32>>(parts, first, count, op, out);
    case ncclInt64:
      return combine_as<i64, Plain<i64>>(parts, first, count, op, out);
    case ncclUint64:
      return combine_as<u64, Plain<u64>>(parts, first, count, op, out);
    case ncclFloat16:
      return combine_as<Half, Halves<Half>>(parts, first, count, op, out);
    case ncclBfloat16:
      return combine_as<Bf16, Halves<Bf16>>(parts, first, count, op, out);
    case ncclFloat32:
      return combine_as<float, Plain<float>>(parts, first, count, op, out);
    case ncclFloat64:
      return combine_as<double, Plain<double>>(parts, first, count, op, out);
    default:
      return;
  }
}

}  // namespace cudasim::nccl
