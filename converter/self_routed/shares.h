#pragma once

namespace moesaic::converter {

/// Mean shares of a self-routed layer's columns, routed neurons and kept neurons per token
/// (kernels/self_routed.h).
struct Shares {
  double input = 1;
  double gate = 1;
  double hidden = 1;
};

/// Multiply-adds over the dense MLP's: (input + gate + hidden) / 3, with up_by_input (2 input +
/// hidden) / 3.
double active_fraction(const Shares& shares, bool up_by_input);

/// How a budget is spread over the layers.
enum class Budget {
  Planned,  // by the layers' measured curves
  Uniform,  // the same active fraction in each layer
};

}  // namespace moesaic::converter
