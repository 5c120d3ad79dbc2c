#include "kernels/attention.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/row_split.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/attention-inl.h"

#if HWY_ONCE
namespace moesaic::kernels {
namespace {

HWY_EXPORT(attend_impl);

// Multiply-adds below which a second thread costs more than it saves (a few µs on one thread).
constexpr std::int64_t kMinParallelWork = 1 << 16;

void check_places(std::int64_t n_tokens, const TokenPlaces& places, const KvLayerView& cache) {
  require<ShapeError>(static_cast<std::int64_t>(places.slots.size()) == n_tokens &&
                          static_cast<std::int64_t>(places.positions.size()) == n_tokens,
                      "attention: {} slots and {} positions given, expected {}",
                      places.slots.size(), places.positions.size(), n_tokens);
  for (std::size_t t = 0; t < places.slots.size(); ++t) {
    require<ShapeError>(places.slots[t] >= 0 && places.slots[t] < cache.n_slots,
                        "attention: slot {} is outside the cache of {} slots", places.slots[t],
                        cache.n_slots);
    require<ShapeError>(places.positions[t] >= 0 && places.positions[t] < cache.capacity,
                        "attention: position {} is outside the cache of {} positions",
                        places.positions[t], cache.capacity);
  }
}

// Consecutive tokens of one sequence at consecutive positions.
struct Block {
  std::int64_t first_row = 0;
  std::int64_t n_tokens = 0;
  std::int64_t slot = 0;
  std::int64_t first_position = 0;
  std::int64_t first_key = 0;
  std::int64_t cost = 0;         // keys seen by all its tokens, per head
  std::int64_t cost_before = 0;  // of the blocks before it, per head

  std::int64_t n_keys() const { return first_position + n_tokens - first_key; }
};

std::int64_t first_key_of(std::int64_t position, std::int64_t window) {
  return window == 0 ? 0 : std::max<std::int64_t>(0, position - window + 1);
}

// Writes the blocks of a batch and returns how many there are.
std::int64_t make_blocks(const TokenPlaces& places, std::int64_t window, std::int64_t max_tokens,
                         std::span<Block> blocks) {
  std::int64_t n = 0;
  std::int64_t cost_before = 0;
  for (std::size_t t = 0; t < places.slots.size(); ++t) {
    const std::int64_t slot = places.slots[t];
    const std::int64_t position = places.positions[t];
    const std::int64_t first_key = first_key_of(position, window);
    Block* last = n > 0 ? &blocks[static_cast<std::size_t>(n - 1)] : nullptr;
    const bool goes_on = last != nullptr && last->slot == slot && last->n_tokens < max_tokens &&
                         last->first_position + last->n_tokens == position;
    if (!goes_on) {
      last = &blocks[static_cast<std::size_t>(n++)];
      *last = {static_cast<std::int64_t>(t), 0, slot, position, first_key, 0, cost_before};
    }
    last->n_tokens += 1;
    last->cost += position + 1 - first_key;
    cost_before += position + 1 - first_key;
  }
  return n;
}

std::int64_t rounded_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace

void store_kv(Context& ctx, ConstMatrix k, ConstMatrix v, const TokenPlaces& places,
              const KvLayerView& cache) {
  require<ShapeError>(
      k.cols == cache.row() && v.cols == cache.row() && k.rows == v.rows,
      "attention: keys are [{}, {}] and values [{}, {}], expected [n_tokens, {}] both", k.rows,
      k.cols, v.rows, v.cols, cache.row());
  check_places(k.rows, places, cache);
  for_rows(ctx, k.rows, 2 * k.cols, [&](Range rows, int) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const auto i = static_cast<std::size_t>(t);
      const std::int64_t at =
          (places.slots[i] * cache.capacity + places.positions[i]) * cache.row();
      std::copy_n(k.row(t), k.cols, cache.keys + at);
      std::copy_n(v.row(t), v.cols, cache.values + at);
    }
  });
}

void attention(Context& ctx, ConstMatrix q, const TokenPlaces& places, const KvLayerView& cache,
               int n_heads, float scale, std::int64_t window, Matrix out) {
  require<ShapeError>(cache.n_kv_heads > 0 && n_heads > 0 && n_heads % cache.n_kv_heads == 0,
                      "attention: {} heads given, expected a multiple of {} key/value heads",
                      n_heads, cache.n_kv_heads);
  const std::int64_t head_dim = cache.head_dim;
  require<ShapeError>(q.cols == n_heads * head_dim && out.cols == q.cols && out.rows == q.rows,
                      "attention: queries are [{}, {}] and output [{}, {}], expected [n_tokens, {}]"
                      " both",
                      q.rows, q.cols, out.rows, out.cols, n_heads * head_dim);
  require<ShapeError>(window >= 0, "attention: window is {}, expected 0 or more", window);
  check_places(q.rows, places, cache);
  if (q.rows == 0) return;

  const std::int64_t group = n_heads / cache.n_kv_heads;
  const std::int64_t max_tokens = std::min(q.rows, std::max<std::int64_t>(1, kUnitRows / group));
  const std::int64_t max_rows = max_tokens * group;
  const std::int64_t padded_dim = rounded_up(head_dim, kWidthMultiple);

  const Workspace::Scope scope(ctx.workspace);
  std::span<Block> blocks = ctx.workspace.take<Block>(static_cast<std::size_t>(q.rows));
  blocks = blocks.first(static_cast<std::size_t>(make_blocks(places, window, max_tokens, blocks)));
  const std::int64_t cost = (blocks.back().cost_before + blocks.back().cost) * n_heads;
  const bool parallel = cost * head_dim >= kMinParallelWork;
  const int n_threads = parallel ? ctx.pool.n_threads() : 1;

  const std::int64_t keys_size = max_rows > kMaxDotRows ? kTileKeys * head_dim : 0;
  const std::int64_t values_size = padded_dim != head_dim ? kTileKeys * padded_dim : 0;
  const std::int64_t per_thread =
      rounded_up(max_rows * (head_dim + padded_dim + kTileKeys + 3) + keys_size + values_size, 16);
  const std::span<float> scratch =
      ctx.workspace.take<float>(static_cast<std::size_t>(per_thread * n_threads));

  const auto attend = HWY_DYNAMIC_DISPATCH(attend_impl);
  const auto work = [&](int thread) {
    float* free = scratch.data() + thread * per_thread;
    const auto take = [&](std::int64_t n) {
      float* p = free;
      free += n;
      return p;
    };
    AttentionScratch s;
    s.keys = take(keys_size);
    s.values = take(values_size);
    s.scores = take(max_rows * kTileKeys);
    s.out = take(max_rows * padded_dim);
    s.q = take(max_rows * head_dim);
    s.maximum = take(max_rows);
    s.sum = take(max_rows);
    s.shrink = take(max_rows);
    AttentionJob job;
    job.q_stride = q.stride;
    job.out_stride = out.stride;
    job.kv_stride = cache.row();
    job.head_dim = head_dim;
    job.padded_dim = padded_dim;
    job.window = window;
    job.scale = scale;

    // Heads of blocks in one row, cut where the cost of what lies before is thread / n_threads of
    // the whole. Any cut gives the same result.
    const auto owner = [&](const Block& block, std::int64_t head) {
      const std::int64_t twice_middle =
          2 * (block.cost_before * n_heads + block.cost * head) + block.cost;
      return twice_middle * n_threads / (2 * cost);
    };
    std::int64_t bytes = 0;
    for (const Block& block : blocks) {
      for (std::int64_t kv_head = 0; kv_head < cache.n_kv_heads; ++kv_head) {
        std::int64_t begin = kv_head * group;
        const std::int64_t group_end = begin + group;
        while (begin < group_end && owner(block, begin) < thread) ++begin;
        std::int64_t end = begin;
        while (end < group_end && owner(block, end) == thread) ++end;
        if (begin == end) continue;
        const std::int64_t at = block.slot * cache.capacity * cache.row() + kv_head * head_dim;
        job.q = q.row(block.first_row) + begin * head_dim;
        job.out = out.row(block.first_row) + begin * head_dim;
        job.keys = cache.keys + at;
        job.values = cache.values + at;
        job.n_tokens = block.n_tokens;
        job.n_heads = end - begin;
        job.first_position = block.first_position;
        attend(job, s);
        // Two threads that share a group read the same bytes at the same time: counted once.
        const bool first_of_group = begin == kv_head * group;
        if (first_of_group) bytes += 2 * block.n_keys() * head_dim * std::int64_t{sizeof(float)};
      }
    }
    ctx.tally.add(Traffic::KvCache, bytes);
  };
  if (parallel) {
    ctx.pool.run(work);
  } else {
    work(0);
  }
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
