#include "tools/bench_output.h"

#include <fmt/format.h>

#include <algorithm>

#include "tools/statistics.h"

namespace moesaic::tools {

std::vector<Json> bench_json(const BenchedModel& model, const std::vector<BenchedTest>& tests) {
  const std::string cpu = cpu_name();
  std::vector<Json> rows;
  for (const BenchedTest& test : tests) {
    std::vector<double> nanoseconds;
    double sum = 0;
    const auto known = [&](double value) { return test.has_limits() ? Json(value) : Json(); };
    for (const double tps : test.result.tokens_per_second) {
      nanoseconds.push_back(1e9 * static_cast<double>(test.work.n_tokens()) / tps);
      sum += nanoseconds.back();
    }
    rows.push_back({{"build_commit", MOESAIC_VERSION},
                    {"cpu_info", cpu},
                    {"backends", test.backend},
                    {"model_filename", model.path},
                    {"model_type", model.description},
                    {"model_size", model.bytes},
                    {"model_n_params", model.n_params},
                    {"n_batch", test.work.n_batch},
                    {"n_ubatch", test.work.n_batch},
                    {"n_threads", test.threads},
                    {"type_k", "f32"},
                    {"type_v", "f32"},
                    {"activations", test.activations},
                    {"n_prompt", test.work.n_prompt},
                    {"n_gen", test.work.n_gen},
                    {"n_depth", test.work.depth},
                    {"n_sequences", test.work.n_sequences},
                    {"test_time", test.time},
                    {"avg_ns", sum / static_cast<double>(nanoseconds.size())},
                    {"stddev_ns", sample_stddev(nanoseconds)},
                    {"avg_ts", test.result.mean},
                    {"stddev_ts", test.result.stddev},
                    {"samples_ns", nanoseconds},
                    {"samples_ts", test.result.tokens_per_second},
                    {"bytes_per_token", known(test.result.bytes_per_token)},
                    {"bandwidth_fraction", known(test.bandwidth_fraction())},
                    {"read_bandwidth", known(test.read_bandwidth)},
                    {"flops_per_token", test.flops_per_token},
                    {"flops_fraction", known(test.flops_fraction())},
                    {"peak_flops", known(test.peak_flops)}});
  }
  return rows;
}

std::string bench_csv(const std::vector<Json>& tests) {
  std::string out;
  for (std::size_t i = 0; i < tests.size(); ++i) {
    std::string keys, values;
    for (const auto& [key, value] : tests[i].items()) {
      if (value.is_array()) continue;
      const char* comma = keys.empty() ? "" : ",";
      keys += comma + key;
      std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      for (std::size_t q = text.find('"'); q != std::string::npos; q = text.find('"', q + 2)) {
        text.insert(q, 1, '"');
      }
      values += fmt::format("{}\"{}\"", comma, text);
    }
    if (i == 0) out += keys + "\n";
    out += values + "\n";
  }
  return out;
}

std::string bench_table(const BenchedModel& model, const std::vector<BenchedTest>& tests) {
  // As llama-bench does, the batch size is a column only where there is something to tell apart.
  const engine::Work usual;
  const bool with_batch = std::any_of(tests.begin(), tests.end(), [&](const BenchedTest& test) {
    return test.work.n_batch != usual.n_batch;
  });
  std::vector<std::vector<std::string>> rows = {{"model", "size", "params", "backend", "threads"}};
  if (with_batch) rows[0].push_back("n_batch");
  for (const char* name : {"test", "t/s", "MB/token", "of limit"}) rows[0].push_back(name);
  std::string limits;
  for (const BenchedTest& test : tests) {
    std::vector<std::string> row = {
        model.description, format_bytes(static_cast<double>(model.bytes)),
        format_count(model.n_params), test.backend, std::to_string(test.threads)};
    if (with_batch) row.push_back(std::to_string(test.work.n_batch));
    row.push_back(test.work.name());
    row.push_back(fmt::format("{:.2f} ± {:.2f}", test.result.mean, test.result.stddev));
    if (!test.has_limits()) {
      row.insert(row.end(), {"–", "–"});
      rows.push_back(std::move(row));
      continue;
    }
    row.push_back(fmt::format("{:.3f}", test.result.bytes_per_token / 1e6));
    const double read = test.bandwidth_fraction();
    const double flops = test.flops_fraction();
    row.push_back(
        fmt::format("{:.0f} % {}", 100 * std::max(read, flops), read > flops ? "read" : "FLOP/s"));
    rows.push_back(std::move(row));
    limits += fmt::format(
        "{}, {} thread{}: between the repetitions memory gave {:.1f} GB/s ({:.1f}–{:.1f}), a bf16 "
        "GEMM {:.0f} GFLOP/s\n",
        test.work.name(), test.threads, test.threads == 1 ? "" : "s", test.read_bandwidth / 1e9,
        test.read_range.first / 1e9, test.read_range.second / 1e9, test.peak_flops / 1e9);
  }
  return markdown_table(rows) + (limits.empty() ? "" : "\n" + limits);
}

}  // namespace moesaic::tools
