#pragma once

#include "kernels/base/thread_pool.h"

namespace moesaic::tools {

/// Bytes per second that all threads of the pool together read from memory: the best of a few
/// passes over 512 MiB, far beyond any cache of the machines this is meant for.
double measure_read_bandwidth(ThreadPool& pool);

}  // namespace moesaic::tools
