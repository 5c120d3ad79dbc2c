#pragma once

#include <memory>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "converter/recovery/moe.h"
#include "converter/recovery/self_routed.h"

namespace moesaic::converter {

/// One tensor of a converted layer.
template <class T>
struct TrainedTensor {
  const char* name;
  std::span<T> value, gradient;
  bool router;  // learns at the router's rate, outside the clipped norm
};

/// A secret-MoE layer under training.
template <class P>
struct TrainedMoe {
  std::unique_ptr<MoeParameters<typename P::Scalar>> parameters, gradient;
  MoeLayer<P> layer;
  RouterTraining router;
  double auxiliary = 0;  // its regression loss in the last gradients()
};

/// A self-routed layer under training.
template <class P>
struct TrainedSelfRouted {
  std::unique_ptr<SelfRoutedParameters<typename P::Scalar>> parameters, gradient;
  SelfRoutedLayer<P> layer;
  SelfRoutedTriple target = {};   // shares that its thresholds shall keep to
  bool straight_through = false;  // SelfRoutedLayer::backward
  SelfRoutedCounts seen;          // since Hybrid::forget_counts()
};

/// A converted layer under training, in its form.
template <class P>
struct Converted {
  int layer = 0;
  std::variant<TrainedMoe<P>, TrainedSelfRouted<P>> form;

  TrainedMoe<P>* moe() { return std::get_if<TrainedMoe<P>>(&form); }
  TrainedSelfRouted<P>* self_routed() { return std::get_if<TrainedSelfRouted<P>>(&form); }

  /// Its tensors, in the order of the form's parameters.
  std::vector<TrainedTensor<typename P::Scalar>> tensors() {
    return std::visit(
        [](auto& f) {
          using Parameters = typename std::remove_reference_t<decltype(*f.parameters)>;
          const auto values = f.parameters->tensors();
          const auto gradients = f.gradient->tensors();
          std::vector<TrainedTensor<typename P::Scalar>> all;
          for (std::size_t i = 0; i < Parameters::kTensors; ++i) {
            all.push_back(
                {Parameters::kNames[i], values[i], gradients[i], i >= Parameters::kFirstOfRouter});
          }
          return all;
        },
        form);
  }

  void refresh(Context& ctx) {
    std::visit([&](auto& f) { f.layer.refresh(ctx); }, form);
  }
};

}  // namespace moesaic::converter
