#pragma once

#include <CLI/CLI.hpp>

#include "converter/recovery/options.h"

namespace moesaic::tools {

/// The flags of end-to-end recovery, shared by `convert --recipe best` and `recover`.
void add_recover_options(CLI::App& cmd, converter::RecoverOptions& options);

}  // namespace moesaic::tools
