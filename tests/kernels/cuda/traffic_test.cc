#include <dlfcn.h>

#include "kernels/cuda/linear.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"

namespace moesaic::cuda {
namespace {

// What decode runs, once, at the sizes of SmolLM2-135M. Each states what its algorithm must move;
// traffic.cmake compares that with what the stand-in has counted (docs/cudasim.md).
class Traffic : public OnDevice {
 protected:
  // Stated for one kernel of the test; the check sums over all.
  void state_minimum(const char* kernel, std::int64_t bytes) {
    auto* state = reinterpret_cast<void (*)(const char*, std::uint64_t)>(
        dlsym(RTLD_DEFAULT, "cudasim_minimum_bytes"));
    if (state != nullptr) state(kernel, static_cast<std::uint64_t>(bytes));
  }
  void run_linear(DType dtype, std::int64_t rows, std::int64_t cols) {
    const Packed w(dtype, rows, cols, 1);
    const DeviceWeights weights(w.view(), stream);
    const DeviceMatrix x(normal_values(size(cols), 2), 1, cols, stream), y(1, rows);
    linear({weights.view(), x.view(), nullptr, y.view()}, stream);
    state_minimum("linear_kernel", w.view().bytes() + 4 * (rows + cols));
  }
};

TEST_F(Traffic, LinearBF16) { run_linear(DType::BF16, 576, 576); }
TEST_F(Traffic, LinearQ8_0) { run_linear(DType::Q8_0, 576, 1536); }
TEST_F(Traffic, LinearQ4_0) { run_linear(DType::Q4_0, 576, 1536); }
TEST_F(Traffic, LinearQ4_1) { run_linear(DType::Q4_1, 576, 576); }
TEST_F(Traffic, LinearQ4_K) { run_linear(DType::Q4_K, 576, 2048); }
TEST_F(Traffic, LinearQ6_K) { run_linear(DType::Q6_K, 576, 2048); }

}  // namespace
}  // namespace moesaic::cuda
