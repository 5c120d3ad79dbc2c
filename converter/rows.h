#pragma once

#include <cstdint>

#include "kernels/base/context.h"

namespace moesaic::converter {

/// fn(row, thread) for all rows, on all threads.
template <class Fn>
void for_each_row(Context& ctx, std::int64_t n_rows, Fn&& fn) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range rows = split(n_rows, n_threads, thread);
    for (std::int64_t t = rows.begin; t < rows.end; ++t) fn(t, thread);
  });
}

}  // namespace moesaic::converter
