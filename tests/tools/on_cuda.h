#pragma once

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/tools/program.h"

namespace moesaic::tools {

/// $MOESAIC_CUDA_TESTS says that there is something to run on; with $LD_LIBRARY_PATH set for it,
/// that may be the stand-in (docs/cudasim.md).
class OnCudaDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("MOESAIC_CUDA_TESTS") == nullptr) GTEST_SKIP() << "no CUDA device";
  }
};

}  // namespace moesaic::tools
