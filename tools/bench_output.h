#pragma once

#include <string>
#include <utility>
#include <vector>

#include "engine/throughput.h"
#include "tools/machine_limits.h"
#include "tools/output.h"

namespace moesaic::tools {

/// What `moesaic bench` says about the model in every line.
struct BenchedModel {
  std::string path;
  std::string description;
  std::int64_t bytes = 0;     // of all tensors
  std::int64_t n_params = 0;  // elements of all tensors
};

/// One test of `moesaic bench`: what was timed, and what came out.
struct BenchedTest {
  engine::Work work;
  int threads = 1;
  std::string activations;
  std::string backend = "CPU";  // or CUDA, where nothing below but the result's speeds is known
  std::string time;             // ISO 8601, UTC
  engine::Throughput result;
  double flops_per_token = 0;
  double read_bandwidth = 0;             // bytes/s, MachineLimits around these repetitions
  std::pair<double, double> read_range;  // its lowest and highest sample
  double peak_flops = 0;                 // FLOP/s, likewise

  bool has_limits() const { return backend == "CPU"; }
  /// Share of the machine's read bandwidth, and of its peak FLOP/s.
  double bandwidth_fraction() const {
    return result.bytes_per_token * result.mean / read_bandwidth;
  }
  double flops_fraction() const { return flops_per_token * result.mean / peak_flops; }
};

/// llama-bench's keys for each test, and ours after them. Keys: docs/cli.md.
std::vector<Json> bench_json(const BenchedModel& model, const std::vector<BenchedTest>& tests);

/// One line per test under one of keys; texts quoted, lists left to JSON.
std::string bench_csv(const std::vector<Json>& tests);

/// llama-bench's table with the bytes per token and the share of the nearer of the two limits;
/// under it, the limits.
std::string bench_table(const BenchedModel& model, const std::vector<BenchedTest>& tests);

}  // namespace moesaic::tools
