#include <algorithm>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/cooperative.cuh"
#include "kernels/cuda/base/last_block.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/sample.h"

namespace moesaic::cuda {
namespace {

using U64 = unsigned long long;  // what atomicAdd takes

constexpr int kThreads = 256;
constexpr int kIdBits = 24;
constexpr int kDigits = kThreads;          // of a search: each thread clears or fills one
constexpr std::int64_t kLeastPart = 2048;  // logits that are worth a block
constexpr int kMaxParts = kMaxSampleVocab / kLeastPart;
constexpr double kOne = 0x1p44;  // the likelihood of the largest logit; 2¹⁸ sum to 2⁶² at most
constexpr float kSteps = 8;      // to a factor e of likelihood
constexpr unsigned kListed = 4096;  // candidates that one block searches in shared memory
static_assert(kMaxParts <= kDigits);

// What the blocks of a row tell each other; whole sectors.
struct alignas(32) Row {
  // Zero between calls.
  U64 mass[kDigits];        // of the likelihoods in each step, or
  unsigned count[kDigits];  // how many there are
  U64 first;                // rank of the largest logit
  unsigned n_listed, done;
  // Written before they are read.
  U64 of_part[kMaxParts];  // sum of likelihoods
  float logits[kListed];   // the candidates, in any order
  std::int32_t ids[kListed];
};

struct Sampling {
  ConstMatrix logits;
  const kernels::Draw* draws;
  std::int32_t* ids;
  unsigned* arrived;
  Row* rows;
};

struct Shared {
  U64 mass[kDigits];
  unsigned count[kDigits];
  U64 rest, total, best;
  unsigned digit;
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

// Part `index` of a row's logits, for one block.
struct Part {
  const float* logits;  // [n], the row's
  int n, n_parts, index;
  kernels::Draw draw;
  Row* row;

  __device__ int size() const { return (n + n_parts - 1) / n_parts; }
  // Calls fn(logit, id) for the thread's share of it, ascending; not for NaN.
  template <class Fn>
  __device__ void each(Fn fn) const {
    const int end = min(n, (index + 1) * size());
    for (int i = index * size() + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const float logit = logits[i];
      if (!isnan(logit)) fn(logit, i);
    }
  }
};

// What a row's draw makes of its logits, once the largest is known.
struct Likelihood {
  kernels::Draw draw;
  int n;
  float largest;

  __device__ bool cuts_by_count() const { return draw.top_k > 0 && draw.top_k < n; }
  __device__ bool cuts() const { return cuts_by_count() || draw.top_p < 1; }

  // e^((logit − largest) / temperature), also where both are infinite.
  __device__ double at(float logit, double temperature) const {
    return logit == largest ? 1.0 : exp((static_cast<double>(logit) - largest) / temperature);
  }
  __device__ U64 plain(float logit) const {
    return static_cast<U64>(__double2ull_rn(at(logit, 1) * kOne));
  }
  __device__ U64 tempered(float logit) const {
    if (draw.min_p > 0 && at(logit, 1) < draw.min_p) return 0;
    return static_cast<U64>(__double2ull_rn(at(logit, draw.temperature) * kOne));
  }
  // From kDigits − 1 downwards; never higher for a smaller logit.
  __device__ unsigned step(float logit) const {
    const float below = logit == largest ? 0.0f : (largest - logit) * kSteps;
    return kDigits - 1 - static_cast<unsigned>(fminf(below, kDigits - 1));
  }

  // How much of a total each cut and the draw take, 1 at least.
  __device__ U64 top_k_of(U64 total) const { return min(static_cast<U64>(draw.top_k), total); }
  __device__ U64 top_p_of(U64 total) const {
    return at_least_one(ceil(static_cast<double>(draw.top_p) * static_cast<double>(total)), total);
  }
  __device__ U64 random_of(U64 total) const {
    return at_least_one(floor(draw.random * static_cast<double>(total)) + 1, total);
  }
  __device__ static U64 at_least_one(double wanted, U64 total) {
    return min(max(static_cast<U64>(wanted), U64{1}), total);
  }
};

// Logits among which tokens are searched: the row, or the list in shared memory.
struct Candidates {
  const float* logits;
  const std::int32_t* ids;  // null: 0, 1, 2, …
  int n;
  U64 cut;  // those of lower rank are out

  // Calls fn(logit, rank) for the thread's share of those that are in.
  template <class Fn>
  __device__ void each(Fn fn) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      const float logit = logits[i];
      const U64 rank = rank_of(logit, ids == nullptr ? i : ids[i]);
      if (rank != 0 && rank >= cut) fn(logit, rank);
    }
  }
};

__device__ void clear(Shared& s) {
  s.mass[threadIdx.x] = 0;
  s.count[threadIdx.x] = 0;
  __syncthreads();
}

// Between barriers: the digit at which the sum of masses, from the highest digit downwards, reaches
// wanted(sum of all), and what of that is left for this digit.
template <class Wanted>
__device__ void search_digit(Wanted wanted, Shared& s) {
  static_assert(kDigits == 8 * kWarp);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const unsigned lane = threadIdx.x, base = 8 * (kWarp - 1 - lane);
    U64 own = 0;
    for (unsigned i = 0; i < 8; ++i) own += s.mass[base + i];
    U64 above = own;
    for (unsigned offset = 1; offset < kWarp; offset *= 2) {
      const U64 other = __shfl_up_sync(kAllLanes, above, offset);
      if (lane >= offset) above += other;
    }
    const U64 total = __shfl_sync(kAllLanes, above, kWarp - 1);
    above -= own;
    const U64 rest = wanted(total);
    if (above < rest && above + own >= rest) {
      U64 left = rest - above;
      int digit = 7;
      while (s.mass[base + digit] < left) left -= s.mass[base + digit--];
      s.digit = base + digit;
      s.rest = left;
      s.total = total;
    }
  }
  __syncthreads();
}

// Rank of the first candidate, by rank, at which the sum of mass(logit) reaches wanted(sum of all),
// which is from 1 to that sum. Digits of 8 bits from the top; done as soon as one candidate is
// left.
template <class Mass, class Wanted>
__device__ U64 find(const Candidates& candidates, Mass mass, Wanted wanted, Shared& s) {
  constexpr int kTop = kIdBits + 24;
  U64 prefix = 0, rest = 0;
  for (int shift = kTop; shift >= 0; shift -= 8) {
    clear(s);
    candidates.each([&](float logit, U64 rank) {
      if (shift != kTop && (rank ^ prefix) >> (shift + 8) != 0) return;
      const U64 m = mass(logit);
      if (m == 0) return;
      const unsigned digit = static_cast<unsigned>(rank >> shift & (kDigits - 1));
      atomicAdd(&s.mass[digit], m);
      atomicAdd(&s.count[digit], 1u);
    });
    search_digit([&](U64 total) { return shift == kTop ? wanted(total) : rest; }, s);
    prefix |= static_cast<U64>(s.digit) << shift;
    rest = s.rest;
    if (s.count[s.digit] == 1 || shift == 0) {
      candidates.each([&](float logit, U64 rank) {
        if ((rank ^ prefix) >> shift == 0 && mass(logit) != 0) s.best = rank;
      });
      break;
    }
    __syncthreads();  // before the sums are written again
  }
  __syncthreads();
  return s.best;
}

// Combines one value per thread over the block, for thread 0.
template <class Combine>
__device__ U64 block_combined(U64 v, Combine combine, Shared& s) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = combine(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  if (threadIdx.x % kWarp == 0) s.mass[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (int w = 1; threadIdx.x == 0 && w < kThreads / kWarp; ++w) v = combine(v, s.mass[w]);
  return v;
}

__device__ void find_largest(const Part& part, Shared& s) {
  float best = 0;
  int id = -1;
  part.each([&](float logit, int i) {
    if (logit > best || id < 0) best = logit, id = i;
  });
  const U64 rank = block_combined(
      id < 0 ? 0 : rank_of(best, id), [](U64 a, U64 b) { return max(a, b); }, s);
  if (threadIdx.x == 0) atomicMax(&part.row->first, rank);
}

// For rows that are drawn from, all parts' largest logits being known: the sum of the part's
// likelihoods, or, where a cut comes first, how they are spread over steps.
__device__ void weigh(const Part& part, const Likelihood& of, Shared& s) {
  if (!of.cuts()) {
    U64 sum = 0;
    part.each([&](float logit, int) { sum += of.tempered(logit); });
    sum = block_combined(
        sum, [](U64 a, U64 b) { return a + b; }, s);
    if (threadIdx.x == 0) part.row->of_part[part.index] = sum;
    return;
  }
  clear(s);
  part.each([&](float logit, int) {
    if (of.cuts_by_count()) {
      atomicAdd(&s.count[of.step(logit)], 1u);
    } else if (const U64 m = of.plain(logit); m != 0) {
      atomicAdd(&s.mass[of.step(logit)], m);
    }
  });
  __syncthreads();
  const unsigned i = threadIdx.x;
  if (s.count[i] != 0) atomicAdd(&part.row->count[i], s.count[i]);
  if (s.mass[i] != 0) atomicAdd(&part.row->mass[i], s.mass[i]);
}

// Where a cut comes first: lists the part's logits down to the step in which it falls. Returns the
// total of which it takes its share.
__device__ U64 list(const Part& part, const Likelihood& of, Shared& s) {
  Row& row = *part.row;
  const U64* mass = &row.mass[threadIdx.x];
  s.mass[threadIdx.x] = of.cuts_by_count() ? U64{__ldcg(&row.count[threadIdx.x])} : __ldcg(mass);
  search_digit(
      [&](U64 total) { return of.cuts_by_count() ? of.top_k_of(total) : of.top_p_of(total); }, s);
  part.each([&](float logit, int i) {
    if (of.step(logit) < s.digit) return;
    const unsigned at = atomicAdd(&row.n_listed, 1u);
    if (at >= kListed) return;
    row.logits[at] = logit;
    row.ids[at] = i;
  });
  return s.total;
}

// By one block, from the list, or from the row if that was too short; `total` is list()'s.
__device__ std::int32_t drawn_by_rank(const Part& part, const Likelihood& of, U64 total,
                                      Shared& s) {
  const Row& row = *part.row;
  const unsigned n = __ldcg(&row.n_listed);
  Candidates in{part.logits, nullptr, part.n, 0};
  if (n <= kListed) {
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      s.logits[i] = __ldcg(&row.logits[i]);
      s.ids[i] = __ldcg(&row.ids[i]);
    }
    in = {s.logits, s.ids, static_cast<int>(n), 0};
    __syncthreads();
  }
  const bool by_count = of.cuts_by_count();
  if (by_count) {
    in.cut = find(
        in, [](float) { return U64{1}; }, [&](U64 all) { return of.top_k_of(all); }, s);
  }
  if (of.draw.top_p < 1) {
    in.cut = find(
        in, [&](float logit) { return of.plain(logit); },
        [&](U64 kept) { return of.top_p_of(by_count ? kept : total); }, s);
  }
  return id_of(find(
      in, [&](float logit) { return of.tempered(logit); },
      [&](U64 kept) { return of.random_of(kept); }, s));
}

// By one block, from the parts' sums: the part, then the run of it, and so on to one logit.
__device__ std::int32_t drawn_by_id(const Part& part, const Likelihood& of, Shared& s) {
  const int own = static_cast<int>(threadIdx.x);
  s.mass[kDigits - 1 - own] = own < part.n_parts ? __ldcg(&part.row->of_part[own]) : 0;
  search_digit([&](U64 total) { return of.random_of(total); }, s);
  int run = part.size();
  int begin = (kDigits - 1 - static_cast<int>(s.digit)) * run;
  while (run > 1) {
    const int end = min(part.n, begin + run);
    const U64 rest = s.rest;
    run = (run + kDigits - 1) / kDigits;
    U64 sum = 0;
    const int last = min(end, begin + (own + 1) * run);
    for (int i = begin + own * run; i < last; ++i) {
      const float logit = part.logits[i];
      if (!isnan(logit)) sum += of.tempered(logit);
    }
    s.mass[kDigits - 1 - own] = sum;
    search_digit([&](U64) { return rest; }, s);
    begin += (kDigits - 1 - static_cast<int>(s.digit)) * run;
  }
  return begin;
}

// By the block of a row that comes last: its token; then all is zero again. `total` is list()'s.
__device__ void finish(const Part& part, U64 total, std::int32_t& id, Shared& s) {
  Row& row = *part.row;
  if (!last_block(&row.done, static_cast<unsigned>(part.n_parts))) return;
  const U64 first = __ldcg(&row.first);
  std::int32_t drawn = first == 0 ? -1 : id_of(first);
  if (first != 0 && part.draw.temperature != 0) {
    const Likelihood of{part.draw, part.n, part.logits[id_of(first)]};
    drawn = of.cuts() ? drawn_by_rank(part, of, total, s) : drawn_by_id(part, of, s);
  }
  __syncthreads();  // before what all have read is written
  row.mass[threadIdx.x] = 0;
  row.count[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    row.first = 0;
    row.n_listed = 0;
    id = drawn;
  }
}

// Calls fn(part, row) for what is this block's; all blocks together have all parts of all rows.
template <class Fn>
__device__ void each_part(const Sampling& to, Fn fn) {
  const ConstMatrix& logits = to.logits;
  const std::int64_t most = (logits.cols + kLeastPart - 1) / kLeastPart;
  const std::int64_t n_parts = max(std::int64_t{1}, min(most, gridDim.x / logits.rows));
  for (std::int64_t item = blockIdx.x; item < logits.rows * n_parts; item += gridDim.x) {
    const std::int64_t r = item / n_parts;
    fn(Part{logits.data + r * logits.stride, static_cast<int>(logits.cols),
            static_cast<int>(n_parts), static_cast<int>(item % n_parts), to.draws[r], &to.rows[r]},
       r);
    __syncthreads();  // before shared memory is written again
  }
}

// Calls fn(likelihood) if the part's row, whose largest logit is known, is drawn from.
template <class Fn>
__device__ void if_drawn(const Part& part, Fn fn) {
  if (part.draw.temperature == 0) return;
  const U64 first = __ldcg(&part.row->first);
  if (first != 0) fn(Likelihood{part.draw, part.n, part.logits[id_of(first)]});
}

__global__ void __launch_bounds__(kThreads, min_blocks(kThreads / kWarp))
    sample_kernel(const Sampling to) {
  __shared__ Shared s;
  bool any = false;
  for (std::int64_t r = threadIdx.x; r < to.logits.rows; r += kThreads) {
    any |= to.draws[r].temperature != 0;
  }
  any = __syncthreads_or(any) != 0;
  each_part(to, [&](const Part& part, std::int64_t) { find_largest(part, s); });
  if (any) {
    grid_barrier(to.arrived);
    each_part(to, [&](const Part& part, std::int64_t) {
      if_drawn(part, [&](const Likelihood& of) { weigh(part, of, s); });
    });
    grid_barrier(to.arrived);
  }
  each_part(to, [&](const Part& part, std::int64_t r) {
    U64 total = 0;
    if (any) {
      if_drawn(part, [&](const Likelihood& of) {
        if (of.cuts()) total = list(part, of, s);
      });
    }
    finish(part, total, to.ids[r], s);
  });
}

constexpr std::size_t kHead = 256;  // of the workspace: the barrier's word

}  // namespace

std::size_t sample_workspace(std::int64_t n_rows) {
  return kHead + static_cast<std::size_t>(n_rows) * sizeof(Row);
}

void sample(ConstMatrix logits, const kernels::Draw* draws, std::int32_t* ids, std::byte* workspace,
            StreamHandle stream) {
  require<ShapeError>(logits.cols > 0 && logits.cols <= kMaxSampleVocab,
                      "sample: {} logits a row, expected 1 to {}", logits.cols, kMaxSampleVocab);
  if (logits.rows == 0) return;
  launch_cooperative("sample", sample_kernel, logits.rows * ceil_div(logits.cols, kLeastPart),
                     kThreads, stream,
                     Sampling{logits, draws, ids, reinterpret_cast<unsigned*>(workspace),
                              reinterpret_cast<Row*>(workspace + kHead)});
}

}  // namespace moesaic::cuda
