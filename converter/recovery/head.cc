#include "converter/recovery/head.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

// KL(p ‖ q) of two rows of logits; p becomes unit · (q − p) in probabilities, q scratch.
template <class T>
double divergence_row(T* p, T* q, std::int64_t n, double unit) {
  // p_i (ln p_i − ln q_i) = e_i (p_i − q_i) / sum + …: kept are differences of logits less their
  // maxima, so that nothing cancels between large numbers.
  const T p_max = largest(p, n);
  const T q_max = largest(q, n);
  constexpr std::int64_t kPart = 512;
  T p_part[kPart];
  T q_part[kPart];
  double p_sum = 0;
  double q_sum = 0;
  double cross = 0;
  for (std::int64_t first = 0; first < n; first += kPart) {
    const std::int64_t size = std::min(kPart, n - first);
    p_sum += static_cast<double>(exponentials(p + first, size, p_max, p_part));
    q_sum += static_cast<double>(exponentials(q + first, size, q_max, q_part));
    T lanes[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
      for (std::int64_t j = 0; j < 8; ++j) {
        const T difference = (p[first + i + j] - p_max) - (q[first + i + j] - q_max);
        lanes[j] += p_part[i + j] * difference;
      }
    }
    for (; i < size; ++i) {
      lanes[0] += p_part[i] * ((p[first + i] - p_max) - (q[first + i] - q_max));
    }
    for (const T lane : lanes) cross += static_cast<double>(lane);
    std::copy_n(p_part, size, p + first);
    std::copy_n(q_part, size, q + first);
  }
  const T p_unit = static_cast<T>(unit / p_sum);
  const T q_unit = static_cast<T>(unit / q_sum);
  for (std::int64_t i = 0; i < n; ++i) p[i] = q_unit * q[i] - p_unit * p[i];
  return cross / p_sum + std::log(q_sum) - std::log(p_sum);
}

}  // namespace

template <class P>
double kl_head(Context& ctx, MatrixView<const typename P::Operand> head,
               MatrixView<const typename P::Operand> teacher,
               MatrixView<const typename P::Operand> student, double unit,
               MatrixView<typename P::Scalar> dh) {
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;
  require<ShapeError>(
      teacher.rows == student.rows && teacher.cols == head.cols && student.cols == head.cols,
      "head: hidden states [{}, {}] and [{}, {}] by a head of [{}, {}]", teacher.rows, teacher.cols,
      student.rows, student.cols, head.rows, head.cols);
  const std::int64_t vocab = head.rows;
  const std::int64_t tile =
      std::clamp<std::int64_t>(kHeadTileElements / std::max<std::int64_t>(vocab, 1), 16, 512);
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t most = std::min(tile, student.rows);
  const auto p = take_matrix<Scalar>(ctx, most, vocab);
  const auto q = take_matrix<Scalar>(ctx, most, vocab);
  const auto gradient = take_matrix<Operand>(ctx, dh.data == nullptr ? 0 : most, vocab);
  std::vector<double> by_row(static_cast<std::size_t>(student.rows));
  for (std::int64_t first = 0; first < student.rows; first += tile) {
    const std::int64_t rows = std::min(tile, student.rows - first);
    multiply(ctx, false, true, teacher.slice(first, rows), head, false, p.slice(0, rows));
    multiply(ctx, false, true, student.slice(first, rows), head, false, q.slice(0, rows));
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      by_row[static_cast<std::size_t>(first + t)] = divergence_row(p.row(t), q.row(t), vocab, unit);
      if (dh.data != nullptr) to_operand(p.row(t), vocab, gradient.row(t));
    });
    if (dh.data != nullptr) {
      multiply(ctx, false, false, MatrixView<const Operand>(gradient.slice(0, rows)), head, false,
               dh.slice(first, rows));
    }
  }
  return std::accumulate(by_row.begin(), by_row.end(), 0.0);
}

template double kl_head<Float64>(Context&, MatrixView<const double>, MatrixView<const double>,
                                 MatrixView<const double>, double, MatrixView<double>);
template double kl_head<Float32>(Context&, ConstMatrix, ConstMatrix, ConstMatrix, double, Matrix);
template double kl_head<Bfloat16>(Context&, MatrixView<const std::uint16_t>,
                                  MatrixView<const std::uint16_t>, MatrixView<const std::uint16_t>,
                                  double, Matrix);

}  // namespace moesaic::converter
