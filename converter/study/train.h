#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "converter/study/layer_data.h"
#include "converter/study/paper_student.h"
#include "engine/monitor.h"

namespace moesaic::converter::study {

/// How students are trained: plain Adam (β 0.9/0.999, ε 1e-8), half a cosine down to zero without
/// warm-up, from the same random start and in the same order of tokens at each rate.
struct TrainOptions {
  double passes = 3;          // over the fitted rows; the papers' 100
  std::int64_t batch = 1024;  // tokens per step
  std::vector<double> rates = {1e-4, 3e-4, 1e-3};
  std::uint64_t seed = 0;  // of start and order
};

/// Steps of one training, at least one.
std::int64_t train_steps(const TrainOptions& options, std::int64_t n_fit);

/// One rate's student.
struct RateResult {
  double rate = 0;
  double training_loss = 0;  // mean over the last tenth of the steps; NaN where it diverged
  double chosen_by = 0;      // unexplained on the rows that choose; NaN likewise
};

struct Trained {
  PaperStudent student;             // of the best rate
  double rate = 0;                  // NaN where all of them diverged
  std::vector<RateResult> by_rate;  // in the order given
};

/// Trains once per rate and keeps the student that leaves least unexplained of the rows that
/// choose, the first of equals. Monitor: one stage per rate, named after `name`, from share `from`
/// to share `to` of the job. Deterministic for a seed and thread count. Throws Interrupted.
Trained train(Context& ctx, const StudentShape& shape, const LayerData& data,
              const TrainOptions& options, std::string_view name, double from, double to,
              engine::Monitor& monitor);

/// What a student leaves unexplained of rows [first, first + n).
Unexplained judge(Context& ctx, const PaperStudent& student, const LayerData& data,
                  std::int64_t first, std::int64_t n);

}  // namespace moesaic::converter::study
