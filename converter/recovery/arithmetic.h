#pragma once

#include <cstdint>
#include <span>

#include "converter/rows.h"
#include "kernels/activation.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"
#include "kernels/thresholds.h"

/// What the backward passes are written in: one code for three precisions. Training runs in
/// Bfloat16; Float64 lets the same code be checked against finite differences.
namespace moesaic::converter {

struct Float64 {
  using Scalar = double;   // elements, sums, norms, softmax
  using Operand = double;  // what enters a matrix product
};
struct Float32 {
  using Scalar = float;
  using Operand = float;
};
struct Bfloat16 {
  using Scalar = float;
  using Operand = std::uint16_t;  // raw bits
};

/// C = op(A) op(B), or C += with `accumulate`, on all threads. Shapes as kernels::gemm.
void multiply(Context& ctx, bool trans_a, bool trans_b, MatrixView<const double> a,
              MatrixView<const double> b, bool accumulate, MatrixView<double> c);
void multiply(Context& ctx, bool trans_a, bool trans_b, ConstMatrix a, ConstMatrix b,
              bool accumulate, Matrix c);
void multiply(Context& ctx, bool trans_a, bool trans_b, MatrixView<const std::uint16_t> a,
              MatrixView<const std::uint16_t> b, bool accumulate, Matrix c);

/// The same times alpha, on the calling thread.
void multiply_here(bool trans_a, bool trans_b, double alpha, MatrixView<const double> a,
                   MatrixView<const double> b, bool accumulate, MatrixView<double> c);
void multiply_here(bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
                   bool accumulate, Matrix c);

/// n elements as an operand of products, and back; on the calling thread.
void to_operand(const double* from, std::int64_t n, double* to);
void to_operand(const float* from, std::int64_t n, float* to);
void to_operand(const float* from, std::int64_t n, std::uint16_t* to);
void from_operand(const double* from, std::int64_t n, double* to);
void from_operand(const float* from, std::int64_t n, float* to);
void from_operand(const std::uint16_t* from, std::int64_t n, float* to);

/// φ and φ' of n elements; value or slope may be x. On the calling thread.
void activation_slope(kernels::Activation phi, const double* x, std::int64_t n, double* value,
                      double* slope);
void activation_slope(kernels::Activation phi, const float* x, std::int64_t n, float* value,
                      float* slope);

/// kernels::keep_large and kernels::keep_slopes (kernels/thresholds.h).
std::int64_t keep_large(const double* x, const double* threshold, std::int64_t n, double* kept,
                        std::uint32_t* marks);
std::int64_t keep_large(const float* x, const float* threshold, std::int64_t n, float* kept,
                        std::uint32_t* marks);
kernels::NeuronCounts keep_slopes(const double* gate, const double* hidden, std::int64_t n,
                                  double* a, double* u, double* slope);
kernels::NeuronCounts keep_slopes(const float* gate, const float* hidden, std::int64_t n, float* a,
                                  float* u, float* slope);

/// y_i = e^(x_i − shift), none of the differences above 0 but by rounding, and their sum.
double exponentials(const double* x, std::int64_t n, double shift, double* y);
float exponentials(const float* x, std::int64_t n, float shift, float* y);

/// The largest of n >= 1 elements.
double largest(const double* x, std::int64_t n);
float largest(const float* x, std::int64_t n);

/// Indices of the k largest scores, ascending; the lower index wins ties, as in kernels::top_k.
void choose_top(const double* scores, std::int64_t n, std::int64_t k, std::int32_t* ids);
void choose_top(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* ids);

/// A matrix in the context's workspace, uninitialised.
template <class T>
MatrixView<T> take_matrix(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {ctx.workspace.take<T>(static_cast<std::size_t>(rows * cols)).data(), rows, cols};
}

/// A buffer as a matrix.   b [rows · cols]
template <class T>
MatrixView<T> matrix(AlignedBuffer<T>& b, std::int64_t rows, std::int64_t cols) {
  return {b.data(), rows, cols};
}
template <class T>
MatrixView<const T> matrix(const AlignedBuffer<T>& b, std::int64_t rows, std::int64_t cols) {
  return {b.data(), rows, cols};
}

/// The same elements, not to be changed: templates deduce no conversion.
template <class T>
MatrixView<const T> constant(MatrixView<T> m) {
  return m;
}

/// A matrix as an operand, on all threads.
template <class Scalar, class Operand>
void to_operand(Context& ctx, MatrixView<const Scalar> from, MatrixView<Operand> to) {
  for_each_row(ctx, from.rows,
               [&](std::int64_t t, int) { to_operand(from.row(t), from.cols, to.row(t)); });
}

/// Owned matrix, grown on demand, never shrunk.
template <class T>
class Storage {
 public:
  MatrixView<T> reshape(std::int64_t rows, std::int64_t cols) {
    const auto n = static_cast<std::size_t>(rows * cols);
    if (n > data_.size()) data_ = AlignedBuffer<T>(n);
    view_ = {data_.data(), rows, cols};
    return view_;
  }
  MatrixView<T> view() const { return view_; }

 private:
  AlignedBuffer<T> data_;
  MatrixView<T> view_;
};

}  // namespace moesaic::converter
