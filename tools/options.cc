#include "tools/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "tools/device.h"

namespace moesaic::tools {
namespace {

std::string check_device(const std::string& value, Devices devices) {
  if (value == "cpu") return {};
  if (cuda_device(value) && !built_with_cuda()) {
    return fmt::format("'{}' is not available: built without CUDA", value);
  }
  if (devices == Devices::Cpu) return fmt::format("found '{}', expected cpu", value);
  if (cuda_device(value)) return {};
  return fmt::format("found '{}', expected cpu, cuda or cuda:N", value);
}

/// The whole text as a number, or nothing.
template <class T>
std::optional<T> parse_number(const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

CLI::Validator finite_between(double low, double high) {
  return CLI::Validator(
      [low, high](std::string& text) -> std::string {
        const auto value = parse_number<double>(text);
        if (value && std::isfinite(*value) && *value >= low && *value <= high) return {};
        return fmt::format("found '{}', expected a number from {:g} to {:g}", text, low, high);
      },
      fmt::format("[{:g} - {:g}]", low, high));
}

CLI::Validator integer_between(std::int64_t low, std::int64_t high) {
  return CLI::Validator(
      [low, high](std::string& text) -> std::string {
        const auto value = parse_number<std::int64_t>(text);
        if (value && *value >= low && *value <= high) return {};
        return fmt::format("found '{}', expected a whole number from {} to {}", text, low, high);
      },
      fmt::format("[{} - {}]", low, high));
}

void add_run_options(CLI::App& cmd, RunOptions& options) {
  add_run_options(cmd, options, Devices::Cpu);
}

void add_run_options(CLI::App& cmd, RunOptions& options, Devices devices) {
  cmd.add_option("-t,--threads", options.threads,
                 "Threads (default: all cores this process may use)")
      ->check(integer_between(1, 1024))
      ->capture_default_str();
  cmd.add_option(
         "--device", options.device,
         devices == Devices::Cpu ? "Where to run: cpu" : "Where to run: cpu, cuda or cuda:N")
      ->check(CLI::Validator(
          [devices](const std::string& value) { return check_device(value, devices); }, "DEVICE"))
      ->capture_default_str();
  cmd.add_option("--activations", options.activations,
                 "Precision in which activations enter a matrix product; sums are f32 in all. q16: "
                 "16-bit integers with a scale per 32, bf16 where the weights are BF16")
      ->check(CLI::IsMember({"f32", "bf16", "q16"}))
      ->capture_default_str();
  cmd.add_flag("-q,--quiet", options.quiet, "No progress on standard error");
}

void add_output_option(CLI::App& cmd, std::string& format,
                       const std::vector<std::string>& formats) {
  format = formats.front();
  cmd.add_option("-o,--output", format, fmt::format("Output: {}", fmt::join(formats, ", ")))
      ->check(CLI::IsMember(formats))
      ->type_name("FORMAT")
      ->capture_default_str();
}

void add_chunk_options(CLI::App& cmd, models::ChunkOptions& options) {
  cmd.add_option("--chunks", options.n_chunks, "Chunks to score (-1: all)")
      ->check(CLI::Validator(
          [](std::string& text) -> std::string {
            const auto n = parse_number<std::int64_t>(text);
            if (n && (*n == -1 || *n >= 1)) return {};
            return fmt::format("found '{}', expected a whole number from 1, or -1 for all", text);
          },
          "N"))
      ->capture_default_str();
  cmd.add_option("--n-ctx", options.n_ctx, "Tokens per chunk")
      ->check(integer_between(4, std::int64_t{1} << 24))
      ->capture_default_str();
}

}  // namespace moesaic::tools
