#include "tests/cudasim/count/counters.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

namespace cudasim {
namespace {

using Json = nlohmann::json;

double ratio(u64 a, u64 b) {
  return b == 0 ? 0.0 : static_cast<double>(a) / static_cast<double>(b);
}

Json traffic(const Tally::Traffic& t) {
  return {{"requests", t.requests},
          {"bytes", t.bytes},
          {"sectors", t.sectors},
          {"ideal_sectors", t.ideal_sectors},
          {"sectors_per_ideal", ratio(t.sectors, t.ideal_sectors)}};
}

Json instructions(const KernelCounts& c, u64& issued, u64& lanes) {
  static constexpr const char* kNames[] = {"alu",    "memory",  "async",   "atomic",
                                           "matrix", "barrier", "control", "collective"};
  Json kinds;
  for (const char* name : kNames) kinds[name] = 0;
  for (std::size_t k = 0; k < c.tally.issued.size(); ++k) {
    auto& n = kinds[kNames[static_cast<int>(c.program->origins[k].kind)]];
    n = n.get<u64>() + c.tally.issued[k];
    issued += c.tally.issued[k];
    lanes += c.tally.lanes[k];
  }
  return kinds;
}

// The instructions that ran most often, for finding where the time goes.
Json hottest(const KernelCounts& c) {
  std::vector<std::size_t> order(c.tally.issued.size());
  for (std::size_t k = 0; k < order.size(); ++k) order[k] = k;
  const std::size_t n = std::min<std::size_t>(5, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(),
                    [&](auto a, auto b) { return c.tally.issued[a] > c.tally.issued[b]; });
  Json list = Json::array();
  for (std::size_t k = 0; k < n; ++k) {
    const auto& at = c.program->origins[order[k]];
    list.push_back({{"ptx", at.text},
                    {"line", at.line},
                    {"source", c.program->module->describe(at.source)},
                    {"issued", c.tally.issued[order[k]]}});
  }
  return list;
}

Json kernel(const std::string& name, const KernelCounts& c) {
  const Tally& t = c.tally;
  u64 issued = 0, lanes = 0;
  const Json kinds = instructions(c, issued, lanes);
  const u64 dram = t.unique_read_bytes + t.unique_written_bytes;
  return {{"name", c.readable},
          {"mangled", name},
          {"launches", c.launches},
          {"blocks", c.blocks},
          {"threads", c.threads},
          {"live_registers", c.live_registers},
          {"shared_bytes", c.shared_bytes},
          {"local_bytes", c.local_bytes},
          {"warp_instructions", issued},
          {"thread_instructions", lanes},
          {"active_lanes", ratio(lanes, issued)},
          {"instructions", kinds},
          {"unique_read_bytes", t.unique_read_bytes},
          {"unique_written_bytes", t.unique_written_bytes},
          {"minimum_bytes", c.minimum_bytes},
          {"bytes_per_minimum", ratio(dram, c.minimum_bytes)},
          {"loads", traffic(t.loads)},
          {"stores", traffic(t.stores)},
          {"shared_requests", t.shared_requests},
          {"shared_wavefronts", t.shared_wavefronts},
          {"shared_ideal_wavefronts", t.shared_ideal_wavefronts},
          {"shared_wavefronts_per_ideal", ratio(t.shared_wavefronts, t.shared_ideal_wavefronts)},
          {"local_traffic_bytes", t.local_bytes},
          {"atomic_requests", t.atomic_requests},
          {"atomic_lanes", t.atomic_lanes},
          {"atomic_same_address", t.atomic_same_address},
          {"mma_flops", t.mma_flops},
          {"async_copies", t.async_copies},
          {"divergent_branches", t.divergent_branches},
          {"hottest", hottest(c)}};
}

}  // namespace

void write_counters(const Runtime& runtime, const std::string& file) {
  Json kernels = Json::array();
  for (const auto& [name, c] : runtime.counts) kernels.push_back(kernel(name, c));
  const ProcessCounts& p = runtime.process;
  const Json all = {{"kernels", kernels},
                    {"schedule", runtime.config.schedule},
                    {"reports", runtime.reports.size()},
                    {"process",
                     {{"kernel_launches", p.kernel_launches},
                      {"graph_launches", p.graph_launches},
                      {"copies", p.copies},
                      {"copied_bytes", p.copied_bytes},
                      {"sets", p.sets},
                      {"host_functions", p.host_functions},
                      {"library_calls", p.library_calls},
                      {"synchronisations", p.synchronisations},
                      {"allocations", p.allocations}}}};
  std::ofstream out(file);
  out << all.dump(1) << '\n';
  if (!out.flush()) fail("{}: cannot write", file);
}

}  // namespace cudasim
