#pragma once

#include <atomic>

namespace moesaic::tools {

/// Ctrl-C and SIGTERM set stop_flag(), which long work looks at through Progress; a second one
/// kills the process. SIGPIPE is ignored, so that a closed standard output is an error like any
/// other.
void install_signal_handlers();

const std::atomic<bool>& stop_flag();

}  // namespace moesaic::tools
