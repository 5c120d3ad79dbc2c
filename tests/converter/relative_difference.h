#pragma once

#include <cmath>
#include <cstddef>
#include <span>

namespace moesaic::converter {

/// ‖a − b‖ / ‖b‖.
inline double relative_difference(std::span<const float> a, std::span<const float> b) {
  double difference = 0, square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    square += b[i] * b[i];
  }
  return std::sqrt(difference / square);
}

}  // namespace moesaic::converter
