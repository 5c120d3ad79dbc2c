#include "kernels/cuda/base/products.h"

#include <algorithm>
#include <span>

#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/base/device.h"
#include "kernels/cuda/base/device_buffer.h"
#include "kernels/cuda/base/pinned_buffer.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {
namespace {

// `least`, reasoned and not measured: a host of sixteen cores does some 10¹² operations a second in
// float32, and 10 GB/s go through its memory and PCIe to the device and back, so that 100
// operations take as long as a byte's way. At SmolLM2-135M's sizes 2,048 rows by the up matrix are
// above it (576 by 1,536: 174 in float32), by a router of rank 64 below (28). What is above it has
// 4 · 10⁸ operations at least, beside which some 50 µs until the device answers do not count.

class CudaProducts : public kernels::Products {
 public:
  CudaProducts(int device, const ProductsOptions& options) : device_(device), options_(options) {}

  bool takes(std::int64_t m, std::int64_t n, std::int64_t k,
             std::int64_t operand_bytes) const override {
    const auto count = [](std::int64_t a, std::int64_t b) {
      return static_cast<double>(a) * static_cast<double>(b);
    };
    const double bytes = static_cast<double>(operand_bytes) * (count(m, k) + count(k, n)) +
                         sizeof(float) * count(m, n);
    return k > 0 && 2 * count(m, n) * static_cast<double>(k) >= options_.least * bytes;
  }

  void multiply(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
                float beta, Matrix c) override {
    run(ctx, trans_a, trans_b, alpha, a, b, beta, c);
  }
  void multiply(Context& ctx, bool trans_a, bool trans_b, float alpha, Bf16Matrix a, Bf16Matrix b,
                float beta, Matrix c) override {
    run(ctx, trans_a, trans_b, alpha, a, b, beta, c);
  }

 private:
  // One piece in pinned and in device memory.
  struct Piece {
    explicit Piece(std::int64_t block)
        : host(static_cast<std::size_t>(block * block)), device(host.span().size()) {}
    PinnedBuffer<float> host;
    DeviceBuffer<float> device;
  };

  template <class T>
  void run(Context& ctx, bool trans_a, bool trans_b, float alpha, MatrixView<const T> a,
           MatrixView<const T> b, float beta, Matrix c);
  template <class T>
  MatrixView<const T> put(Context& ctx, MatrixView<const T> m, Range rows, Range cols,
                          const Piece& piece);

  MadeOn device_;
  ProductsOptions options_;
  bool idle_ = true;  // nothing is queued that reads the pieces
  Stream stream_;
  Blas blas_{stream_};
  Piece a_{options_.block}, b_{options_.block}, c_{options_.block};
};

Range piece(std::int64_t first, std::int64_t n, std::int64_t block) {
  return {first, std::min(n, first + block)};
}

// A part of a host matrix, without gaps, on its way to device memory.
template <class T>
MatrixView<const T> CudaProducts::put(Context& ctx, MatrixView<const T> m, Range rows, Range cols,
                                      const Piece& to) {
  T* host = reinterpret_cast<T*>(to.host.span().data());
  ctx.pool.run([&](int thread) {
    const Range own = split(rows.size(), ctx.pool.n_threads(), thread);
    for (std::int64_t r = own.begin; r < own.end; ++r) {
      std::copy_n(m.row(rows.begin + r) + cols.begin, cols.size(), host + r * cols.size());
    }
  });
  copy_bytes_in(reinterpret_cast<std::byte*>(to.device.data()), host,
                static_cast<std::size_t>(rows.size() * cols.size()) * sizeof(T), stream_);
  return {reinterpret_cast<const T*>(to.device.data()), rows.size(), cols.size()};
}

template <class T>
void CudaProducts::run(Context& ctx, bool trans_a, bool trans_b, float alpha, MatrixView<const T> a,
                       MatrixView<const T> b, float beta, Matrix c) {
  const std::int64_t k = trans_a ? a.rows : a.cols, block = options_.block;
  for (std::int64_t i = 0; i < c.rows; i += block) {
    for (std::int64_t j = 0; j < c.cols; j += block) {
      const Range rows = piece(i, c.rows, block), cols = piece(j, c.cols, block);
      const Matrix sum(c_.device.data(), rows.size(), cols.size());
      for (std::int64_t l = 0; l < k; l += block) {
        const Range inner = piece(l, k, block);
        // The last piece's copies, or those of a call that threw, read the same memory.
        if (l > 0 || !idle_) stream_.synchronize();
        idle_ = false;
        const auto pa = put(ctx, a, trans_a ? inner : rows, trans_a ? rows : inner, a_);
        const auto pb = put(ctx, b, trans_b ? cols : inner, trans_b ? inner : cols, b_);
        blas_.multiply(trans_a, trans_b, pa, pb, l > 0, sum);
      }
      const std::span<float> found =
          c_.host.span().first(static_cast<std::size_t>(rows.size() * cols.size()));
      copy_bytes_out(found.data(), reinterpret_cast<const std::byte*>(sum.data), found.size_bytes(),
                     stream_);
      stream_.synchronize();
      idle_ = true;
      ctx.pool.run([&](int thread) {
        const Range own = split(rows.size(), ctx.pool.n_threads(), thread);
        for (std::int64_t r = own.begin; r < own.end; ++r) {
          const float* from = found.data() + r * cols.size();
          float* to = c.row(rows.begin + r) + cols.begin;
          for (std::int64_t x = 0; x < cols.size(); ++x) {
            to[x] = beta == 0 ? alpha * from[x] : alpha * from[x] + beta * to[x];
          }
        }
      });
    }
  }
}

}  // namespace

std::unique_ptr<kernels::Products> make_products(int device, const ProductsOptions& options) {
  return std::make_unique<CudaProducts>(device, options);
}

}  // namespace moesaic::cuda
