#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/cudasim/exec/block.h"

namespace cudasim::test {

/// Runs PTX on the device, without a runtime around it.
class PtxDevice {
 public:
  PtxDevice() = default;

  /// Device memory holding `values`.
  template <class T>
  u64 upload(const std::vector<T>& values) {
    const u64 at = arena.allocate(0, values.size() * sizeof(T), 256, "test memory");
    std::memcpy(reinterpret_cast<void*>(at), values.data(), values.size() * sizeof(T));
    arena.set_state(at, values.size() * sizeof(T), kInitialised);
    return at;
  }
  template <class T>
  std::vector<T> download(u64 at, std::size_t n) const {
    std::vector<T> values(n);
    std::memcpy(values.data(), reinterpret_cast<const void*>(at), n * sizeof(T));
    return values;
  }

  /// Runs the kernel `k` of a module with 64-bit parameters. The report of a fault, or empty.
  std::string run(const std::string& ptx, const std::vector<u64>& parameters, Dim grid = {},
                  Dim block = {32, 1, 1}, u64 dynamic_shared = 0);

  Arena arena;
  Tally tally;  // of the last run
  u64 seed = 0;

 private:
  u32 next_id_ = 1;
  u32 next_tag_ = 1;
};

/// One lane's inputs and outputs. %ha, %ra, %la (16, 32, 64 bits) hold a, and so on for b and c;
/// the result is what the instruction leaves in %h0, %r0 or %l0.
struct Lane {
  u64 a = 0, b = 0, c = 0;
};
struct Result {
  u16 h = 0;
  u32 r = 0;
  u64 l = 0;
};

/// The PTX of a kernel that runs `body` on 32 lanes.
std::string lane_kernel(const std::string& body);
/// Runs `body` for up to 32 lanes; the rest run with zeros. Fails the test on a report.
std::vector<Result> run_lanes(const std::string& body, std::vector<Lane> lanes);
/// True if NVIDIA's assembler takes the PTX for sm_80: the instruction under test exists.
bool assembles(const std::string& ptx, const std::string& arch = "sm_80");

}  // namespace cudasim::test
