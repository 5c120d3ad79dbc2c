#pragma once

#include <cstdint>

#include "kernels/base/context.h"

namespace moesaic::kernels {

/// Work below which a fork and join (1–2 µs while the workers spin, tens if they sleep) costs more
/// than it saves, in elements of an element-wise pass at a few elements per nanosecond.
inline constexpr std::int64_t kMinParallelElements = 1 << 14;

/// Calls fn(Range, thread) on consecutive parts of n rows, one per thread, or once on the calling
/// thread if all rows together hold fewer than kMinParallelElements elements.
template <class Fn>
void for_rows(Context& ctx, std::int64_t n_rows, std::int64_t row_elements, Fn&& fn) {
  if (n_rows <= 1 || n_rows * row_elements < kMinParallelElements) {
    fn(Range{0, n_rows}, 0);
    return;
  }
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range range = split(n_rows, n_threads, thread);
    if (range.size() > 0) fn(range, thread);
  });
}

}  // namespace moesaic::kernels
