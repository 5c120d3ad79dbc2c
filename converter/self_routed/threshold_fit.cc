#include "converter/self_routed/threshold_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/linear.h"

namespace moesaic::converter {
namespace {

// The bound that a share of values[i] · scale is at or above; 0 for all of them.
float bound(ConstMatrix values, std::span<const float> scale, double share) {
  if (share >= 1) return 0;
  // Some 2^18 of them, whole rows; an odd step meets all positions of windows alike.
  const std::int64_t step = (values.rows * values.cols / (std::int64_t{1} << 18)) | 1;
  std::vector<float> sizes;
  sizes.reserve(static_cast<std::size_t>(values.rows / step * values.cols));
  for (std::int64_t t = 0; t < values.rows; t += step) {
    for (std::int64_t i = 0; i < values.cols; ++i) {
      const float size = std::fabs(values.row(t)[i]) * scale[static_cast<std::size_t>(i)];
      sizes.push_back(std::isnan(size) ? 0 : size);
    }
  }
  const auto n = static_cast<double>(sizes.size());
  const auto dropped = static_cast<std::ptrdiff_t>(std::llround(n * (1 - std::max(0.0, share))));
  if (dropped >= static_cast<std::ptrdiff_t>(sizes.size())) {
    return std::numeric_limits<float>::infinity();
  }
  std::nth_element(sizes.begin(), sizes.begin() + dropped, sizes.end());
  return sizes[static_cast<std::size_t>(dropped)];
}

std::vector<float> per_entry(float bound, std::span<const float> scale) {
  std::vector<float> thresholds(scale.size());
  for (std::size_t i = 0; i < scale.size(); ++i) {
    // A scale of 0 is of an entry that nothing depends on.
    thresholds[i] = bound == 0     ? 0
                    : scale[i] > 0 ? bound / scale[i]
                                   : std::numeric_limits<float>::infinity();
  }
  return thresholds;
}

std::vector<float> row_norms(ConstMatrix m) {
  std::vector<float> norms;
  for (std::int64_t i = 0; i < m.rows; ++i) {
    double square = 0;
    for (std::int64_t j = 0; j < m.cols; ++j)
      square += static_cast<double>(m.row(i)[j]) * m.row(i)[j];
    norms.push_back(static_cast<float>(std::sqrt(square)));
  }
  return norms;
}

// √(Σ v² / n) of each column.
std::vector<float> column_sizes(ConstMatrix m, double n) {
  std::vector<double> square(static_cast<std::size_t>(m.cols));
  for (std::int64_t i = 0; i < m.rows; ++i) {
    for (std::int64_t j = 0; j < m.cols; ++j) {
      square[static_cast<std::size_t>(j)] += static_cast<double>(m.row(i)[j]) * m.row(i)[j];
    }
  }
  std::vector<float> sizes;
  for (const double s : square) sizes.push_back(static_cast<float>(std::sqrt(s / n)));
  return sizes;
}

}  // namespace

double active_fraction(const Shares& shares, bool up_by_input) {
  return (shares.input + (up_by_input ? shares.input : shares.gate) + shares.hidden) / 3;
}

kernels::SelfRoutedView Thresholds::view(const models::DenseMlp& dense) const {
  return {.phi = dense.phi,
          .up_by_input = up_by_input,
          .w_gate = dense.w_gate,
          .w_up = dense.w_up,
          .w_down = dense.w_down,
          .input_threshold = input,
          .gate_threshold = gate,
          .hidden_threshold = hidden,
          .input_share = static_cast<float>(shares.input),
          .gate_share = static_cast<float>(shares.gate),
          .hidden_share = static_cast<float>(shares.hidden)};
}

ThresholdFit::ThresholdFit(Context& ctx, const Neurons& teacher, const LayerSample& sample,
                           ThresholdShape shape)
    : ctx_(ctx), teacher_(teacher), sample_(sample), shape_(shape) {
  const auto n = static_cast<std::size_t>(sample.x.rows);
  const auto d_ff = static_cast<std::size_t>(teacher.n);
  x_hat_ = AlignedBuffer<float>(n * static_cast<std::size_t>(teacher.d_model));
  y_ = AlignedBuffer<float>(x_hat_.size());
  h_ = AlignedBuffer<float>(n * d_ff);
  thresholds_.up_by_input = shape == ThresholdShape::Uniform;
  if (shape == ThresholdShape::Uniform) {
    column_scale_.assign(static_cast<std::size_t>(teacher.d_model), 1.0f);
    down_scale_.assign(d_ff, 1.0f);
    return;
  }
  u_ = AlignedBuffer<float>(n * d_ff);
  const Matrix u(u_.data(), sample.x.rows, teacher.n);
  kernels::gemm(ctx, false, true, 1, sample.x, teacher.up(), 0, u);
  column_scale_ = column_sizes(teacher.gate(), 1);
  down_scale_ = row_norms(teacher.down());
  up_scale_ = column_sizes(u, static_cast<double>(std::max<std::int64_t>(1, u.rows)));
  for (std::size_t i = 0; i < d_ff; ++i) up_scale_[i] *= down_scale_[i];
}

void ThresholdFit::fit_inputs(double share, Inputs& inputs) {
  const ConstMatrix x = sample_.x;
  const auto size = static_cast<std::size_t>(x.rows * teacher_.n);
  if (inputs.a.size() == 0) {
    inputs.a = AlignedBuffer<float>(size);
    if (shape_ == ThresholdShape::Uniform) inputs.u = AlignedBuffer<float>(size);
  }
  const Matrix x_hat(x_hat_.data(), x.rows, x.cols);
  const Matrix a(inputs.a.data(), x.rows, teacher_.n);
  const float at_least = bound(x, column_scale_, share);
  inputs.threshold = per_entry(at_least, column_scale_);
  std::vector<std::int64_t> kept(static_cast<std::size_t>(ctx_.pool.n_threads()));
  ctx_.pool.run([&](int thread) {
    const Range rows = split(x.rows, ctx_.pool.n_threads(), thread);
    std::int64_t n = 0;
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      for (std::int64_t j = 0; j < x.cols; ++j) {
        const bool large = std::fabs(x.row(t)[j]) >= inputs.threshold[static_cast<std::size_t>(j)];
        x_hat.row(t)[j] = large ? x.row(t)[j] : 0.0f;
        n += large;
      }
    }
    kept[static_cast<std::size_t>(thread)] = n;
  });
  std::int64_t n = 0;
  for (const std::int64_t k : kept) n += k;
  inputs.share = static_cast<double>(n) / static_cast<double>(x.rows * x.cols);
  kernels::gemm(ctx_, false, true, 1, x_hat, teacher_.gate(), 0, a);
  if (shape_ == ThresholdShape::Uniform) {
    kernels::gemm(ctx_, false, true, 1, x_hat, teacher_.up(), 0,
                  {inputs.u.data(), x.rows, teacher_.n});
  }
  ctx_.pool.run([&](int thread) {
    const Range rows = split(x.rows, ctx_.pool.n_threads(), thread);
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const std::span<float> row(a.row(t), static_cast<std::size_t>(teacher_.n));
      kernels::activation(teacher_.phi, row, row);
    }
  });
  inputs.asked = share;
}

void ThresholdFit::fit_neurons(const Shares& shares, const Inputs& inputs) {
  const std::int64_t n_rows = sample_.x.rows, d_ff = teacher_.n;
  const ConstMatrix a(inputs.a.data(), n_rows, d_ff);
  const ConstMatrix u((thresholds_.up_by_input ? inputs.u : u_).data(), n_rows, d_ff);
  const Matrix h(h_.data(), n_rows, d_ff);
  const bool by_gate = !thresholds_.up_by_input;
  thresholds_.gate.clear();
  if (by_gate) thresholds_.gate = per_entry(bound(a, up_scale_, shares.gate), up_scale_);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(ctx_.pool.n_threads()));
  const auto share_of = [&](auto&& keep_in_row) {
    ctx_.pool.run([&](int thread) {
      const Range rows = split(n_rows, ctx_.pool.n_threads(), thread);
      std::int64_t n = 0;
      for (std::int64_t t = rows.begin; t < rows.end; ++t) n += keep_in_row(t);
      counts[static_cast<std::size_t>(thread)] = n;
    });
    std::int64_t n = 0;
    for (const std::int64_t c : counts) n += c;
    return static_cast<double>(n) / static_cast<double>(n_rows * d_ff);
  };
  // What the gate does not route is NaN until the second pass, so that no bound keeps it.
  constexpr float kNotRouted = std::numeric_limits<float>::quiet_NaN();
  thresholds_.shares.gate = share_of([&](std::int64_t t) {
    const float *at = a.row(t), *ut = u.row(t), *bounds = thresholds_.gate.data();
    float* ht = h.row(t);
    std::int32_t n = 0;
    for (std::int64_t i = 0; i < d_ff; ++i) {
      const bool routed = !by_gate || std::fabs(at[i]) >= bounds[i];
      ht[i] = routed ? at[i] * ut[i] : kNotRouted;
      n += routed;
    }
    return n;
  });
  thresholds_.hidden = per_entry(bound(h, down_scale_, shares.hidden), down_scale_);
  thresholds_.shares.hidden = share_of([&](std::int64_t t) {
    const float* bounds = thresholds_.hidden.data();
    float* ht = h.row(t);
    std::int32_t n = 0;
    for (std::int64_t i = 0; i < d_ff; ++i) {
      const bool kept = std::fabs(ht[i]) >= bounds[i];
      ht[i] = kept ? ht[i] : 0.0f;
      n += kept;
    }
    return n;
  });
}

const Thresholds& ThresholdFit::fit(const Shares& shares) {
  if (inputs_[0].asked != shares.input) std::swap(inputs_[0], inputs_[1]);
  if (inputs_[0].asked != shares.input) fit_inputs(shares.input, inputs_[0]);
  thresholds_.input = inputs_[0].threshold;
  thresholds_.shares.input = inputs_[0].share;
  fit_neurons(shares, inputs_[0]);
  return thresholds_;
}

std::vector<float> ThresholdFit::usage() const {
  const std::int64_t n_rows = sample_.x.rows;
  const ConstMatrix h(h_.data(), n_rows, teacher_.n);
  std::vector<float> shares(static_cast<std::size_t>(teacher_.n));
  ctx_.pool.run([&](int thread) {
    const Range neurons = split(teacher_.n, ctx_.pool.n_threads(), thread);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(neurons.end - neurons.begin));
    for (std::int64_t t = 0; t < n_rows; ++t) {
      const float* row = h.row(t) + neurons.begin;
      for (std::size_t i = 0; i < counts.size(); ++i) counts[i] += row[i] != 0;
    }
    for (std::size_t i = 0; i < counts.size(); ++i) {
      shares[static_cast<std::size_t>(neurons.begin) + i] =
          static_cast<float>(static_cast<double>(counts[i]) / static_cast<double>(n_rows));
    }
  });
  return shares;
}

double ThresholdFit::error() {
  const Matrix y(y_.data(), sample_.x.rows, teacher_.d_model);
  kernels::gemm(ctx_, false, false, 1, {h_.data(), sample_.x.rows, teacher_.n}, teacher_.down(), 0,
                y);
  return relative_error(sample_, y);
}

}  // namespace moesaic::converter
