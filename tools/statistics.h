#pragma once

#include <vector>

namespace moesaic::tools {

/// Middle of the samples, the mean of the two middle ones of an even number; 0 without any.
double median(std::vector<double> samples);

/// Square root of Σ (x − mean)² / (n − 1); 0 for fewer than two samples.
double sample_stddev(const std::vector<double>& samples);

}  // namespace moesaic::tools
