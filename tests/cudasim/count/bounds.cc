#include "tests/cudasim/count/bounds.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "tests/cudasim/base.h"

namespace cudasim {
namespace {

// NVIDIA data sheets: L4, A100 80 GB SXM, H100 SXM, GeForce RTX 4090 (Ada whitepaper, appendix A).
constexpr Gpu kGpus[] = {{"L4", 300e9, 121e12, 58, 2.04e9},
                         {"A100", 2039e9, 312e12, 108, 1.41e9},
                         {"H100", 3350e9, 989e12, 132, 1.98e9},
                         {"RTX 4090", 1008e9, 165.2e12, 128, 2.52e9}};

std::string microseconds(double seconds) { return fmt::format("{:.2f} µs", seconds * 1e6); }

}  // namespace

std::span<const Gpu> gpus() { return kGpus; }

Bound bound_of(const CountedWork& work, const Gpu& gpu) {
  const Bound candidates[] = {
      {work.dram_bytes / gpu.memory_bandwidth, "memory"},
      {work.tensor_flops / gpu.tensor_flops, "tensor"},
      {work.warp_instructions / (4 * gpu.multiprocessors * gpu.clock), "issue"},
      {work.shared_wavefronts / (gpu.multiprocessors * gpu.clock), "shared"}};
  return *std::max_element(std::begin(candidates), std::end(candidates),
                           [](const Bound& a, const Bound& b) { return a.seconds < b.seconds; });
}

namespace {

// A kernel's name without its parameters, result and unnamed namespaces.
std::string short_name(std::string name) {
  for (const std::string_view part : {"(anonymous namespace)::", "void "}) {
    for (auto at = name.find(part); at != std::string::npos; at = name.find(part)) {
      name.erase(at, part.size());
    }
  }
  int depth = 0;  // of template arguments, which may hold parentheses
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

std::string table_of(const nlohmann::json& counters) {
  std::string table =
      "Lower bounds from counted work, all launches of a kernel together; no launch "
      "overhead, no latency.\n\n| kernel | launches |";
  std::string line = "|---|---:|";
  for (const Gpu& g : kGpus) {
    table += fmt::format(" {} bound |", g.name);
    line += "---:|";
  }
  table += "\n" + line + "\n";
  std::vector<double> total(std::size(kGpus));
  for (const auto& k : counters.at("kernels")) {
    CountedWork work;
    work.dram_bytes =
        k.at("unique_read_bytes").get<double>() + k.at("unique_written_bytes").get<double>();
    work.tensor_flops = k.at("mma_flops").get<double>();
    work.warp_instructions = k.at("warp_instructions").get<double>();
    work.shared_wavefronts = k.at("shared_wavefronts").get<double>();
    table += fmt::format("| `{}` | {} |", short_name(k.at("name")), k.at("launches").get<u64>());
    for (std::size_t g = 0; g < std::size(kGpus); ++g) {
      const Bound b = bound_of(work, kGpus[g]);
      total[g] += b.seconds;
      table += fmt::format(" {} ({}) |", microseconds(b.seconds), b.by);
    }
    table += '\n';
  }
  table += "| **all** | |";
  for (const double t : total) table += fmt::format(" **{}** |", microseconds(t));
  return table + "\n";
}

}  // namespace

std::string bounds_table(const std::string& file) {
  std::ifstream in(file);
  if (!in) fail("{}: cannot read", file);
  try {
    return table_of(nlohmann::json::parse(in));
  } catch (const nlohmann::json::exception& e) {
    fail("{}: expected counters of `cudasim run --counters`: {}", file, e.what());
  }
}

}  // namespace cudasim
