#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace moesaic {

/// What a weight byte was read for.
enum class Traffic : int { Embedding, Attention, Mlp, Router, Experts, Head, KvCache, kCount };

/// Bytes that kernels have read from weights and cache, counted by the kernels at the place of
/// reading (one addition per thread and call, or per selected expert), so that "bytes per token" is
/// a measurement and not a formula. Activations, which stay in cache, do not count. One object per
/// engine; kernels get it through their context.
class Tally {
 public:
  void add(Traffic kind, std::int64_t bytes) {
    bytes_[static_cast<std::size_t>(kind)].fetch_add(bytes, std::memory_order_relaxed);
  }
  std::int64_t bytes(Traffic kind) const {
    return bytes_[static_cast<std::size_t>(kind)].load(std::memory_order_relaxed);
  }
  std::int64_t total() const {
    std::int64_t sum = 0;
    for (const auto& b : bytes_) sum += b.load(std::memory_order_relaxed);
    return sum;
  }
  void reset() {
    for (auto& b : bytes_) b.store(0, std::memory_order_relaxed);
    mlp_work_.store(0, std::memory_order_relaxed);
    dense_mlp_work_.store(0, std::memory_order_relaxed);
  }

  /// Multiply-adds that the MLPs asked for, by their description and whichever path ran, and those
  /// of the dense MLPs in their place: their quotient is the active fraction as it was.
  void add_mlp_work(std::int64_t multiply_adds, std::int64_t dense_multiply_adds) {
    mlp_work_.fetch_add(multiply_adds, std::memory_order_relaxed);
    dense_mlp_work_.fetch_add(dense_multiply_adds, std::memory_order_relaxed);
  }
  /// 1 if no MLP ran.
  double active_fraction() const {
    const std::int64_t dense = dense_mlp_work_.load(std::memory_order_relaxed);
    if (dense == 0) return 1;
    return static_cast<double>(mlp_work_.load(std::memory_order_relaxed)) /
           static_cast<double>(dense);
  }

 private:
  std::atomic<std::int64_t> mlp_work_{0}, dense_mlp_work_{0};
  std::array<std::atomic<std::int64_t>, static_cast<std::size_t>(Traffic::kCount)> bytes_{};
};

}  // namespace moesaic
