#include <algorithm>

#include "tests/cudasim/exec/memory_ops.h"
#include "tests/cudasim/exec/number.h"

namespace cudasim {
namespace {

// Fragment layouts are those of the PTX manual, section "Matrix Fragments for mma": lane = 4 g + t.

void need_whole_warp(const Warp& w, u32 mask, const char* what) {
  if (mask != kAllLanes) {
    throw Fault{Finding::WarpMask, -1,
                fmt::format("{} needs all 32 lanes of the warp; {:#010x} are here{}", what, mask,
                            w.live == kAllLanes ? "" : ", others have exited")};
  }
}

template <bool Transposed>
Step ldmatrix(Warp& w, const Ins& i, u32 mask) {
  if (mask != w.live) return Step::Wait;
  need_whole_warp(w, mask, "ldmatrix");
  alignas(64) u64 a[kLanes];
  addresses(w, i, a);
  for (u64& x : a) x -= x - kSharedWindow < kWindowBytes ? kSharedWindow : 0;
  alignas(64) std::array<std::byte, kLanes * 16> data{};
  const u32 rows = i.count == 4 ? kAllLanes : (1u << 8 * i.count) - 1;
  read_shared(w, rows, a, 16, data.data(), kPlain);
  const auto* element = reinterpret_cast<const u16*>(data.data());  // [matrix][8][8]
  for (int m = 0; m < i.count; ++m) {
    u32* d = w.lanes<u32>(i.more[m]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const u16* matrix = element + m * 64;
      const u32 low = Transposed ? matrix[column * 8 + row] : matrix[row * 8 + column];
      const u32 high = Transposed ? matrix[(column + 1) * 8 + row] : matrix[row * 8 + column + 1];
      d[l] = low | high << 16;
    }
  }
  return Step::Next;
}

template <bool Transposed>
Step stmatrix(Warp& w, const Ins& i, u32 mask) {
  if (mask != w.live) return Step::Wait;
  need_whole_warp(w, mask, "stmatrix");
  alignas(64) u64 a[kLanes];
  addresses(w, i, a);
  for (u64& x : a) x -= x - kSharedWindow < kWindowBytes ? kSharedWindow : 0;
  alignas(64) std::array<std::byte, kLanes * 16> data{};
  auto* element = reinterpret_cast<u16*>(data.data());
  for (int m = 0; m < i.count; ++m) {
    const u32* s = w.lanes<u32>(i.more[m]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      u16* matrix = element + m * 64;
      matrix[Transposed ? column * 8 + row : row * 8 + column] = static_cast<u16>(s[l]);
      matrix[Transposed ? (column + 1) * 8 + row : row * 8 + column + 1] =
          static_cast<u16>(s[l] >> 16);
    }
  }
  const u32 rows = i.count == 4 ? kAllLanes : (1u << 8 * i.count) - 1;
  write_shared(w, rows, a, 16, data.data(), kPlain);
  return Step::Next;
}

Step movmatrix(Warp& w, const Ins& i, u32 mask) {
  if (mask != w.live) return Step::Wait;
  need_whole_warp(w, mask, "movmatrix");
  const u32* s = w.lanes<u32>(i.op[1]);
  u16 matrix[8][8];
  for (int l = 0; l < kLanes; ++l) {
    matrix[l / 4][l % 4 * 2] = static_cast<u16>(s[l]);
    matrix[l / 4][l % 4 * 2 + 1] = static_cast<u16>(s[l] >> 16);
  }
  u32* d = w.lanes<u32>(i.op[0]);
  for (int l = 0; l < kLanes; ++l) {
    d[l] = matrix[l % 4 * 2][l / 4] | static_cast<u32>(matrix[l % 4 * 2 + 1][l / 4]) << 16;
  }
  return Step::Next;
}

// Elements per 32-bit register, and how one of them becomes a number.
struct OfBf16 {
  static constexpr int kPacked = 2;
  using Value = float;
  static float at(u32 bits, int k) { return to_float(Bf16{static_cast<u16>(bits >> 16 * k)}); }
};
struct OfHalf {
  static constexpr int kPacked = 2;
  using Value = float;
  static float at(u32 bits, int k) { return to_float(Half{static_cast<u16>(bits >> 16 * k)}); }
};
struct OfTf32 {
  static constexpr int kPacked = 1;
  using Value = float;
  // The low 13 bits are not read.
  static float at(u32 bits, int) { return std::bit_cast<float>(bits & 0xffffe000u); }
};
template <class T>
struct OfByte {
  static constexpr int kPacked = 4;
  using Value = i32;
  static i32 at(u32 bits, int k) { return static_cast<T>(bits >> 8 * k); }
};

enum class Result { Single, Half, Integer, SaturatedInteger };

// d [16, 8] = a [16, K] b [K, 8] + c. Registers of a, b, c, d by lane; a register of A holds
// kPacked neighbours of a row, of B of a column. K splits into slices of 4 · kPacked columns: two
// registers of A (rows g and g + 8) and one of B for each.
template <class A, class B, int K, Result R>
Step mma(Warp& w, const Ins& i, u32 mask) {
  if (mask != w.live) return Step::Wait;
  need_whole_warp(w, mask, "mma");
  constexpr int kSlice = 4 * A::kPacked, kSlices = K / kSlice;
  constexpr int kResults = R == Result::Half ? 2 : 4;
  using V = typename A::Value;
  const Place* d_place = i.more;
  const Place* a_place = d_place + kResults;
  const Place* b_place = a_place + 2 * kSlices;
  const Place* c_place = b_place + kSlices;
  alignas(64) V a[16][K];
  alignas(64) V b[K][8];
  alignas(64) V sum[16][8];
  for (int s = 0; s < kSlices; ++s) {
    for (int half = 0; half < 2; ++half) {
      const u32* from = w.lanes<u32>(a_place[2 * s + half]);
      for (int l = 0; l < kLanes; ++l) {
        for (int k = 0; k < A::kPacked; ++k) {
          a[l / 4 + 8 * half][s * kSlice + l % 4 * A::kPacked + k] = A::at(from[l], k);
        }
      }
    }
    const u32* from = w.lanes<u32>(b_place[s]);
    for (int l = 0; l < kLanes; ++l) {
      for (int k = 0; k < B::kPacked; ++k) {
        b[s * kSlice + l % 4 * B::kPacked + k][l / 4] = B::at(from[l], k);
      }
    }
  }
  for (int r = 0; r < kResults; ++r) {
    const u32* from = w.lanes<u32>(c_place[r]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      if constexpr (R == Result::Half) {
        sum[row + 8 * r][column] = OfHalf::at(from[l], 0);
        sum[row + 8 * r][column + 1] = OfHalf::at(from[l], 1);
      } else {
        sum[row + 8 * (r / 2)][column + r % 2] = std::bit_cast<V>(from[l]);
      }
    }
  }
  // The manual leaves the order and precision of the sum open; here: float32, k ascending.
  for (int row = 0; row < 16; ++row) {
    if constexpr (R == Result::SaturatedInteger) {
      for (int n = 0; n < 8; ++n) {
        i64 total = sum[row][n];
        for (int k = 0; k < K; ++k) total += static_cast<i64>(a[row][k]) * b[k][n];
        sum[row][n] = static_cast<i32>(std::clamp<i64>(total, INT32_MIN, INT32_MAX));
      }
    } else {
      alignas(32) V acc[8];
      std::memcpy(acc, sum[row], sizeof acc);
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < 8; ++n) {
          if constexpr (std::is_same_v<V, float>) {
            acc[n] = std::fma(a[row][k], b[k][n], acc[n]);
          } else {
            acc[n] =
                static_cast<i32>(static_cast<u32>(acc[n]) + static_cast<u32>(a[row][k] * b[k][n]));
          }
        }
      }
      std::memcpy(sum[row], acc, sizeof acc);
    }
  }
  for (int r = 0; r < kResults; ++r) {
    u32* to = w.lanes<u32>(d_place[r]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      if constexpr (R == Result::Half) {
        to[l] = to_half(sum[row + 8 * r][column]).bits |
                static_cast<u32>(to_half(sum[row + 8 * r][column + 1]).bits) << 16;
      } else {
        to[l] = std::bit_cast<u32>(sum[row + 8 * (r / 2)][column + r % 2]);
      }
    }
  }
  w.tally->mma_flops += 2ull * 16 * 8 * K;
  return Step::Next;
}

template <class A, class B, int K>
Handler integer_mma(bool saturated) {
  return saturated ? &mma<A, B, K, Result::SaturatedInteger> : &mma<A, B, K, Result::Integer>;
}

template <int K>
Handler byte_mma(bool a_signed, bool b_signed, bool saturated) {
  if (a_signed && b_signed) return integer_mma<OfByte<i8>, OfByte<i8>, K>(saturated);
  if (a_signed) return integer_mma<OfByte<i8>, OfByte<u8>, K>(saturated);
  if (b_signed) return integer_mma<OfByte<u8>, OfByte<i8>, K>(saturated);
  return integer_mma<OfByte<u8>, OfByte<u8>, K>(saturated);
}

}  // namespace

Handler ldmatrix_handler(bool transposed) {
  return transposed ? &ldmatrix<true> : &ldmatrix<false>;
}
Handler stmatrix_handler(bool transposed) {
  return transposed ? &stmatrix<true> : &stmatrix<false>;
}
Handler movmatrix_handler() { return &movmatrix; }

Handler mma_handler(const std::vector<std::string>& op) {
  // mma.sync.aligned.SHAPE.row.col[.satfinite].D.A.B.C
  if (op.size() < 10 || op[1] != "sync" || op[2] != "aligned" || op[4] != "row" || op[5] != "col") {
    return nullptr;
  }
  const bool saturated = op[6] == "satfinite";
  if (op.size() != (saturated ? 11u : 10u)) return nullptr;
  const std::size_t n = op.size();
  const std::string& shape = op[3];
  const std::string types = op[n - 4] + "." + op[n - 3] + "." + op[n - 2] + "." + op[n - 1];
  const bool a_signed = op[n - 3] == "s8", b_signed = op[n - 2] == "s8";
  const bool bytes = (a_signed || op[n - 3] == "u8") && (b_signed || op[n - 2] == "u8") &&
                     op[n - 4] == "s32" && op[n - 1] == "s32";
  if (bytes && shape == "m16n8k32") return byte_mma<32>(a_signed, b_signed, saturated);
  if (bytes && shape == "m16n8k16") return byte_mma<16>(a_signed, b_signed, saturated);
  if (saturated) return nullptr;
  if (shape == "m16n8k16") {
    if (types == "f32.bf16.bf16.f32") return &mma<OfBf16, OfBf16, 16, Result::Single>;
    if (types == "f32.f16.f16.f32") return &mma<OfHalf, OfHalf, 16, Result::Single>;
    if (types == "f16.f16.f16.f16") return &mma<OfHalf, OfHalf, 16, Result::Half>;
  }
  if (shape == "m16n8k8") {
    if (types == "f32.bf16.bf16.f32") return &mma<OfBf16, OfBf16, 8, Result::Single>;
    if (types == "f32.f16.f16.f32") return &mma<OfHalf, OfHalf, 8, Result::Single>;
    if (types == "f16.f16.f16.f16") return &mma<OfHalf, OfHalf, 8, Result::Half>;
    if (types == "f32.tf32.tf32.f32") return &mma<OfTf32, OfTf32, 8, Result::Single>;
  }
  if (shape == "m16n8k4" && types == "f32.tf32.tf32.f32") {
    return &mma<OfTf32, OfTf32, 4, Result::Single>;
  }
  return nullptr;
}

}  // namespace cudasim
