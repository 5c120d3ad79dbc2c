#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "converter/recovery/arithmetic.h"
#include "converter/recovery/moe.h"
#include "converter/recovery/self_routed.h"
#include "kernels/base/error.h"
#include "kernels/quant.h"

/// Weights of a file in the memory of a training.
namespace moesaic::converter {

/// Hands each row over, unpacked: fn(row index, values). Throws FormatError for a NaN or infinity,
/// unless they need not be `finite`.
template <class Fn>
void for_each_weight_row(const WeightView& w, const std::string& name, Fn&& fn,
                         bool finite = true) {
  std::vector<float> row(static_cast<std::size_t>(w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    kernels::dequantize_row(w.dtype, w.row(r), row);
    require<FormatError>(
        !finite || std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); }),
        "{}: row {} holds a NaN or infinity, expected finite weights", name, r);
    fn(r, row);
  }
}

/// What stays as it is: as operands of products.
template <class P>
void unpack_operand(const WeightView& w, const std::string& name,
                    MatrixView<typename P::Operand> to, bool finite = true) {
  std::vector<typename P::Scalar> values(static_cast<std::size_t>(w.cols));
  for_each_weight_row(
      w, name,
      [&](std::int64_t r, const std::vector<float>& row) {
        std::copy(row.begin(), row.end(), values.begin());
        to_operand(values.data(), w.cols, to.row(r));
      },
      finite);
}

/// What is trained.
template <class T>
void unpack_parameters(const WeightView& w, const std::string& name, AlignedBuffer<T>& to) {
  for_each_weight_row(w, name, [&](std::int64_t r, const std::vector<float>& row) {
    std::copy(row.begin(), row.end(), to.begin() + r * w.cols);
  });
}

/// Gate, up and down rows interleaved, as neurons `first` and on.
template <class T>
void unpack_neurons(const WeightView& w, const std::string& name, std::int64_t first,
                    MoeParameters<T>& to) {
  for_each_weight_row(w, name, [&](std::int64_t r, const std::vector<float>& row) {
    AlignedBuffer<T>* parts[3] = {&to.w_gate, &to.w_up, &to.w_down};
    std::copy(row.begin(), row.end(), parts[r % 3]->begin() + (first + r / 3) * w.cols);
  });
}

template <class T>
void unpack(const kernels::SecretMoeView& view, const std::string& name, MoeParameters<T>& to) {
  unpack_neurons(view.shared, name + ".shared", 0, to);
  unpack_neurons(view.experts, name + ".experts", view.n_shared(), to);
  unpack_parameters(view.router_v, name + ".router_v", to.router_v);
  unpack_parameters(view.router_u, name + ".router_u", to.router_u);
  unpack_parameters(view.bypass_q, name + ".bypass_q", to.bypass_q);
  unpack_parameters(view.bypass_p, name + ".bypass_p", to.bypass_p);
  std::copy(view.router_bias.begin(), view.router_bias.end(), to.router_bias.begin());
  std::copy(view.bias.begin(), view.bias.end(), to.bias.begin());
}

template <class T>
void unpack(const kernels::SelfRoutedView& view, const std::string& name,
            SelfRoutedParameters<T>& to) {
  unpack_parameters(view.w_gate, name + ".gate", to.w_gate);
  unpack_parameters(view.w_up, name + ".up", to.w_up);
  unpack_parameters(view.w_down, name + ".down", to.w_down);
}

template <class T>
SelfRoutedThresholds<T> thresholds_of(const kernels::SelfRoutedView& view) {
  const auto copy = [](std::span<const float> v) { return std::vector<T>(v.begin(), v.end()); };
  return {copy(view.input_threshold), copy(view.gate_threshold), copy(view.hidden_threshold)};
}

inline MoeShape shape_of(const kernels::SecretMoeView& view) {
  return {.phi = view.phi,
          .d_model = view.d_model(),
          .n_shared = view.n_shared(),
          .n_experts = view.n_experts(),
          .n_active = view.n_active,
          .router_rank = view.router_rank(),
          .bypass_rank = view.bypass_rank()};
}

inline SelfRoutedShape shape_of(const kernels::SelfRoutedView& view) {
  return {.phi = view.phi,
          .up_by_input = view.up_by_input,
          .d_model = view.d_model(),
          .d_ff = view.d_ff()};
}

}  // namespace moesaic::converter
