#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/base/huge_buffer.h"
#include "kernels/packing.h"
#include "kernels/self_routed.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"

namespace moesaic::kernels {

struct SelfRoutedOptions {
  DType gate = DType::Q4_1, up = DType::Q4_1, down = DType::Q4_1;
  std::int64_t d_model = 192, d_ff = 320;
  bool up_by_input = false;
  Activation phi = Activation::Silu;
  bool packed = true;
};

/// A random layer that owns its weights. Its thresholds keep about half of what comes to them.
struct SelfRoutedLayer {
  explicit SelfRoutedLayer(const SelfRoutedOptions& o)
      : gate(o.gate, o.d_ff, o.d_model, 1, 0.1f),
        up(o.up, o.d_ff, o.d_model, 2, 0.1f),
        down(o.down, o.d_model, o.d_ff, 3, 0.1f),
        input_threshold(spread(o.d_model, 4, 0.7f)),
        gate_threshold(spread(o.up_by_input ? 0 : o.d_ff, 5, 0.3f)),
        hidden_threshold(spread(o.d_ff, 6, 0.2f)),
        view{.phi = o.phi,
             .up_by_input = o.up_by_input,
             .w_gate = gate.view(),
             .w_up = up.view(),
             .w_down = down.view(),
             .input_threshold = input_threshold,
             .gate_threshold = gate_threshold,
             .hidden_threshold = hidden_threshold,
             .input_share = 0.5f,
             .gate_share = 0.5f,
             .hidden_share = 0.4f} {
    if (!o.packed) return;
    ThreadPool pool(2);
    Pieces count(nullptr);
    pack_self_routed(view, pool, count);
    buffer = HugeBuffer(count.used());
    Pieces pieces(buffer.data());
    pack_self_routed(view, pool, pieces);
  }
  SelfRoutedLayer(const SelfRoutedLayer&) = delete;
  SelfRoutedLayer& operator=(const SelfRoutedLayer&) = delete;

  static std::vector<float> spread(std::int64_t n, unsigned seed, float middle) {
    std::vector<float> v = normal_values(size(n), seed, 0.1f * middle);
    for (float& t : v) t = std::fabs(middle + t);
    return v;
  }

  Packed gate, up, down;
  std::vector<float> input_threshold, gate_threshold, hidden_threshold;
  SelfRoutedView view;
  HugeBuffer buffer;
};

}  // namespace moesaic::kernels
