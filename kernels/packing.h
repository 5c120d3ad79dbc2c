#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"
#include "kernels/secret_moe.h"
#include "kernels/self_routed.h"

/// Copies of weights in the orders that Activations::Q16 reads (panels.h, neurons.h, columns.h),
/// made at load time in memory that the caller owns. Two passes over the same weights: one that
/// counts, one that writes.
namespace moesaic::kernels {

/// Hands out the pieces of one buffer, at multiples of 64 bytes; without a buffer it only counts.
class Pieces {
 public:
  explicit Pieces(std::byte* data) : data_(data) {}
  bool counting() const { return data_ == nullptr; }
  /// Bytes handed out so far.
  std::size_t used() const { return used_; }
  /// The next piece, or null while counting.
  std::byte* take(std::int64_t bytes) {
    std::byte* p = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
    return p;
  }

 private:
  std::byte* data_;  // a multiple of 64
  std::size_t used_ = 0;
};

/// Gives w its panels, if its format and length have any.
void pack_matrix(WeightView& w, ThreadPool& pool, Pieces& pieces);

/// Gives a secret-MoE layer all its packed parts, if every one of its formats and lengths has one
/// and this machine has the fast path.
void pack_secret_moe(SecretMoeView& moe, ThreadPool& pool, Pieces& pieces);

/// Gives a self-routed layer the panels of its matrices and, if all of their formats and shapes
/// have them and this machine has the fast path, its columns and rows.
void pack_self_routed(SelfRoutedView& layer, ThreadPool& pool, Pieces& pieces);

}  // namespace moesaic::kernels
