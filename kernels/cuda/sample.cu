#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/sample.h"

namespace moesaic::cuda {
namespace {

using U64 = unsigned long long;  // what atomicAdd takes

constexpr int kThreads = 1024;
constexpr int kIdBits = 24;
constexpr double kOne = 0x1p44;  // the likelihood of the largest logit; 2¹⁸ sum to 2⁶² at most
constexpr unsigned kListed = 1024;  // candidates that are kept in shared memory

struct Shared {
  U64 mass[256];
  unsigned count[256];
  U64 rest, best;
  unsigned digit, n_in_digit, n_listed;
  float logits[kListed];
  std::int32_t ids[kListed];
};

// Larger for what comes earlier: larger logits, then lower ids; 0 for NaN. −0 equals 0.
__device__ U64 rank_of(float logit, std::int32_t id) {
  if (isnan(logit)) return 0;
  const std::uint32_t bits = __float_as_uint(logit + 0.0f);
  const std::uint32_t key = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<U64>(key) << kIdBits | static_cast<U64>((1 << kIdBits) - 1 - id);
}
__device__ std::int32_t id_of(U64 rank) {
  return (1 << kIdBits) - 1 - static_cast<std::int32_t>(rank & ((1 << kIdBits) - 1));
}

// Logits among which tokens are searched: the row, or the list in shared memory.
struct Candidates {
  const float* logits;
  const std::int32_t* ids;  // null: 0, 1, 2, …
  std::int64_t n;
  U64 cut;  // those of lower rank are out

  // Calls fn(logit, rank) for the thread's share of those that are in.
  template <class Fn>
  __device__ void each(Fn fn) const {
    for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
      const float logit = logits[i];
      const U64 rank = rank_of(logit, ids == nullptr ? static_cast<std::int32_t>(i) : ids[i]);
      if (rank != 0 && rank >= cut) fn(logit, rank);
    }
  }
};

// By one warp: the digit at which the sum of masses, from digit 255 downwards, reaches the rest,
// which at first is target(sum of all).
template <class Target>
__device__ void search_digit(bool first, U64 rest, Target target, Shared& s) {
  const unsigned lane = threadIdx.x % kWarp, base = 8 * (kWarp - 1 - lane);
  U64 own = 0;
  for (unsigned i = 0; i < 8; ++i) own += s.mass[base + i];
  U64 above = own;
  for (unsigned offset = 1; offset < kWarp; offset *= 2) {
    const U64 other = __shfl_up_sync(kAllLanes, above, offset);
    if (lane >= offset) above += other;
  }
  const U64 total = __shfl_sync(kAllLanes, above, kWarp - 1);
  above -= own;
  if (first) rest = target(total);
  if (above < rest && above + own >= rest) {
    U64 left = rest - above;
    int digit = 7;
    while (s.mass[base + digit] < left) left -= s.mass[base + digit--];
    s.digit = base + digit;
    s.rest = left;
    s.n_in_digit = s.count[base + digit];
  }
}

// Rank of the first candidate, by rank, at which the sum of mass(logit) reaches target(sum of all),
// which is from 1 to that sum; with by_id in the order of ids. Digits of 8 bits from the top; done
// as soon as one candidate is left.
template <class Mass, class Target>
__device__ U64 find(const Candidates& candidates, bool by_id, Mass mass, Target target, Shared& s) {
  const int top = by_id ? kIdBits - 8 : kIdBits + 24;
  const U64 order_bits = by_id ? (U64{1} << kIdBits) - 1 : ~U64{0};
  U64 prefix = 0, rest = 0;
  for (int shift = top; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) s.mass[i] = 0, s.count[i] = 0;
    __syncthreads();
    candidates.each([&](float logit, U64 rank) {
      const U64 order = rank & order_bits;
      if (shift != top && (order ^ prefix) >> (shift + 8) != 0) return;
      const U64 m = mass(logit);
      if (m == 0) return;
      const unsigned digit = static_cast<unsigned>(order >> shift & 255u);
      atomicAdd(&s.mass[digit], m);
      atomicAdd(&s.count[digit], 1u);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) search_digit(shift == top, rest, target, s);
    __syncthreads();
    prefix |= static_cast<U64>(s.digit) << shift;
    rest = s.rest;
    if (s.n_in_digit == 1 || shift == 0) {
      candidates.each([&](float logit, U64 rank) {
        if (((rank & order_bits) ^ prefix) >> shift == 0 && mass(logit) != 0) s.best = rank;
      });
      break;
    }
  }
  __syncthreads();
  return s.best;
}

// What is in, into shared memory, if there is room: later searches are short.
__device__ Candidates listed(const Candidates& candidates, Shared& s) {
  if (threadIdx.x == 0) s.n_listed = 0;
  __syncthreads();
  candidates.each([&](float logit, U64 rank) {
    const unsigned at = atomicAdd(&s.n_listed, 1u);
    if (at >= kListed) return;
    s.logits[at] = logit;
    s.ids[at] = id_of(rank);
  });
  __syncthreads();
  if (s.n_listed > kListed) return candidates;
  return {s.logits, s.ids, s.n_listed, candidates.cut};
}

__device__ U64 block_largest(U64 v, Shared& s) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  if (threadIdx.x % kWarp == 0) s.mass[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = s.mass[0];
  for (int w = 1; w < kThreads / kWarp; ++w) v = max(v, s.mass[w]);
  __syncthreads();  // s.mass may be written again
  return v;
}

// One block per row.
__global__ void __launch_bounds__(kThreads)
    sample_kernel(ConstMatrix logits, const kernels::Draw* draws, std::int32_t* ids) {
  __shared__ Shared s;
  const kernels::Draw draw = draws[blockIdx.x];
  Candidates in{logits.data + blockIdx.x * logits.stride, nullptr, logits.cols, 0};
  U64 first = 0;
  in.each([&](float, U64 rank) { first = max(first, rank); });
  first = block_largest(first, s);
  if (first == 0 || draw.temperature == 0) {
    if (threadIdx.x == 0) ids[blockIdx.x] = first == 0 ? -1 : id_of(first);
    return;
  }

  const float largest = in.logits[id_of(first)];
  // e^((logit − largest) / temperature), also where both are infinite.
  const auto likelihood = [&](float logit, double temperature) {
    return logit == largest ? 1.0 : exp((static_cast<double>(logit) - largest) / temperature);
  };
  const auto at_least_one = [](double target, U64 total) {
    return min(max(static_cast<U64>(target), U64{1}), total);
  };
  const bool by_rank = draw.top_p < 1 || (draw.top_k > 0 && draw.top_k < logits.cols);
  if (draw.top_k > 0 && draw.top_k < logits.cols) {
    in.cut = find(
        in, false, [](float) { return U64{1}; },
        [&](U64 total) { return min(static_cast<U64>(draw.top_k), total); }, s);
    in = listed(in, s);
  }
  if (draw.top_p < 1) {
    in.cut = find(
        in, false,
        [&](float logit) { return static_cast<U64>(__double2ull_rn(likelihood(logit, 1) * kOne)); },
        [&](U64 total) {
          return at_least_one(ceil(static_cast<double>(draw.top_p) * static_cast<double>(total)),
                              total);
        },
        s);
    if (in.ids == nullptr) in = listed(in, s);
  }
  const auto tempered = [&](float logit) {
    if (draw.min_p > 0 && likelihood(logit, 1) < draw.min_p) return U64{0};
    return static_cast<U64>(__double2ull_rn(likelihood(logit, draw.temperature) * kOne));
  };
  const U64 drawn = find(
      in, !by_rank, tempered,
      [&](U64 total) {
        return at_least_one(floor(draw.random * static_cast<double>(total)) + 1, total);
      },
      s);
  if (threadIdx.x == 0) ids[blockIdx.x] = id_of(drawn);
}

}  // namespace

void sample(ConstMatrix logits, const kernels::Draw* draws, std::int32_t* ids,
            StreamHandle stream) {
  require<ShapeError>(logits.cols > 0 && logits.cols <= kMaxSampleVocab,
                      "sample: {} logits a row, expected 1 to {}", logits.cols, kMaxSampleVocab);
  if (logits.rows == 0) return;
  sample_kernel<<<static_cast<unsigned>(logits.rows), kThreads, 0, stream>>>(logits, draws, ids);
  check_launch("sample");
}

}  // namespace moesaic::cuda
