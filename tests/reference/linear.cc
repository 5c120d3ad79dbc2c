#include "tests/reference/linear.h"

#include <cmath>

#include "kernels/quant.h"

namespace moesaic::reference {

std::vector<float> unpack(const WeightView& w) {
  std::vector<float> values(static_cast<std::size_t>(w.rows * w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    kernels::dequantize_row(w.dtype, w.row(r),
                            {values.data() + r * w.cols, static_cast<std::size_t>(w.cols)});
  }
  return values;
}

Product linear(const WeightView& w, ConstMatrix x) {
  const std::vector<float> values = unpack(w);
  Product p;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t r = 0; r < w.rows; ++r) {
      double sum = 0;
      double magnitude = 0;
      for (std::int64_t i = 0; i < w.cols; ++i) {
        const double term =
            static_cast<double>(values[static_cast<std::size_t>(r * w.cols + i)]) * x.row(t)[i];
        sum += term;
        magnitude += std::fabs(term);
      }
      p.value.push_back(sum);
      p.magnitude.push_back(magnitude);
    }
  }
  return p;
}

Product gemm(bool trans_a, bool trans_b, double alpha, ConstMatrix a, ConstMatrix b, double beta,
             ConstMatrix c) {
  const std::int64_t k = trans_a ? a.rows : a.cols;
  Product p;
  for (std::int64_t i = 0; i < c.rows; ++i) {
    for (std::int64_t j = 0; j < c.cols; ++j) {
      double sum = beta == 0 ? 0 : beta * c.row(i)[j];
      double magnitude = std::fabs(sum);
      for (std::int64_t l = 0; l < k; ++l) {
        const double term = alpha * static_cast<double>(trans_a ? a.row(l)[i] : a.row(i)[l]) *
                            static_cast<double>(trans_b ? b.row(j)[l] : b.row(l)[j]);
        sum += term;
        magnitude += std::fabs(term);
      }
      p.value.push_back(sum);
      p.magnitude.push_back(magnitude);
    }
  }
  return p;
}

}  // namespace moesaic::reference
