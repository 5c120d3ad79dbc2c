#include "tools/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moesaic::tools {

double median(std::vector<double> samples) {
  if (samples.empty()) return 0;
  std::sort(samples.begin(), samples.end());
  const std::size_t mid = samples.size() / 2;
  return samples.size() % 2 == 1 ? samples[mid] : (samples[mid - 1] + samples[mid]) / 2;
}

double sample_stddev(const std::vector<double>& samples) {
  if (samples.size() < 2) return 0;
  const auto n = static_cast<double>(samples.size());
  const double mean = std::accumulate(samples.begin(), samples.end(), 0.0) / n;
  double sum = 0;
  for (const double s : samples) sum += (s - mean) * (s - mean);
  return std::sqrt(sum / (n - 1));
}

}  // namespace moesaic::tools
