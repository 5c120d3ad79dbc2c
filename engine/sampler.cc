#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/error.h"

namespace moesaic::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^(logit − max), also where both are infinite: the largest logits weigh 1.
double weight(float logit, float max) {
  return logit == max ? 1.0 : std::exp(static_cast<double>(logit) - max);
}

}  // namespace

void validate(const SamplingOptions& options) {
  require<InputError>(std::isfinite(options.temperature) && options.temperature >= 0,
                      "temperature: {} given, expected a number >= 0", options.temperature);
  require<InputError>(options.top_k >= 0, "top_k: {} given, expected >= 0 (0: off)", options.top_k);
  require<InputError>(options.top_p >= 0 && options.top_p <= 1,
                      "top_p: {} given, expected 0 to 1 (1: off)", options.top_p);
  require<InputError>(options.min_p >= 0 && options.min_p <= 1,
                      "min_p: {} given, expected 0 to 1 (0: off)", options.min_p);
  require<InputError>(std::isfinite(options.repeat_penalty) && options.repeat_penalty > 0,
                      "repeat_penalty: {} given, expected a number > 0 (1: off)",
                      options.repeat_penalty);
  require<InputError>(options.repeat_last_n >= -1,
                      "repeat_last_n: {} given, expected >= -1 (0: off, -1: all)",
                      options.repeat_last_n);
}

Sampler::Sampler(const SamplingOptions& options) : options_(options), rng_(options.seed) {
  validate(options);
}

std::span<const float> Sampler::penalise(std::span<const float> logits,
                                         std::span<const std::int32_t> history) {
  penalised_.assign(logits.begin(), logits.end());
  if (options_.repeat_last_n > 0) {
    history =
        history.last(std::min(history.size(), static_cast<std::size_t>(options_.repeat_last_n)));
  }
  for (const std::int32_t id : history) {
    if (id < 0 || static_cast<std::size_t>(id) >= logits.size()) continue;
    // From the raw logit, so that a token that stands there twice is penalised once.
    const float raw = logits[static_cast<std::size_t>(id)];
    penalised_[static_cast<std::size_t>(id)] =
        raw > 0 ? raw / options_.repeat_penalty : raw * options_.repeat_penalty;
  }
  return penalised_;
}

// 53 random bits as a number in [0, 1): std::uniform_real_distribution may differ by library.
double Sampler::random() { return static_cast<double>(rng_() >> 11) * 0x1p-53; }

kernels::Draw Sampler::draw() {
  return {options_.temperature, options_.top_k, options_.top_p, options_.min_p,
          options_.temperature == 0 ? 0 : random()};
}

std::int32_t Sampler::sample(std::span<const float> logits, std::span<const std::int32_t> history) {
  require<Error>(!logits.empty(), "sampler: no logits to draw from");
  if (needs_history()) {
    logits = penalise(logits, history);
  }
  if (options_.temperature == 0) {
    const std::int32_t best = argmax(logits);
    require<Error>(!std::isnan(logits[static_cast<std::size_t>(best)]),
                   "sampler: every logit is NaN");
    return best;
  }

  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const std::size_t most =
      options_.top_k > 0 ? static_cast<std::size_t>(options_.top_k) : logits.size();
  candidates_.clear();
  if (most < logits.size()) {
    // The k best so far as a heap, the worst of them in front: one comparison for nearly all.
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (std::isnan(logits[i])) continue;
      if (candidates_.size() == most) {
        if (logits[i] <= candidates_.front().logit) continue;  // on ties the lower id stays
        std::pop_heap(candidates_.begin(), candidates_.end(), before);
        candidates_.pop_back();
      }
      candidates_.push_back({logits[i], static_cast<std::int32_t>(i)});
      std::push_heap(candidates_.begin(), candidates_.end(), before);
    }
    // Best first, as kernels::Draw says, not as a heap happens to lie.
    std::sort_heap(candidates_.begin(), candidates_.end(), before);
  } else {
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (!std::isnan(logits[i])) {
        candidates_.push_back({logits[i], static_cast<std::int32_t>(i)});
      }
    }
  }
  require<Error>(!candidates_.empty(), "sampler: every logit is NaN");
  std::size_t kept = candidates_.size();
  float max = -kInfinity;
  for (const Candidate& c : candidates_) max = std::max(max, c.logit);

  if (options_.top_p < 1) {
    double total = 0;
    for (const Candidate& c : candidates_) total += weight(c.logit, max);
    // The most likely ones are sorted in growing pieces: a whole sort of a large vocabulary would
    // cost more than the forward pass of a small model.
    double sum = 0;
    std::size_t sorted = 0;
    std::size_t n = 0;
    do {
      if (n == sorted) {
        const std::size_t end = std::min(kept, std::max<std::size_t>(64, 4 * sorted));
        std::partial_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(sorted),
                          candidates_.begin() + static_cast<std::ptrdiff_t>(end), candidates_.end(),
                          before);
        sorted = end;
      }
      sum += weight(candidates_[n++].logit, max);
    } while (n < kept && sum < options_.top_p * total);
    kept = n;
    candidates_.resize(kept);
  }
  if (options_.min_p > 0) {
    std::erase_if(candidates_,
                  [&](const Candidate& c) { return weight(c.logit, max) < options_.min_p; });
  }

  double total = 0;
  const auto tempered = [&](const Candidate& c) {
    if (c.logit == max) return 1.0;
    return std::exp((static_cast<double>(c.logit) - max) / options_.temperature);
  };
  for (const Candidate& c : candidates_) total += tempered(c);
  const double u = random() * total;
  double sum = 0;
  const Candidate* last = nullptr;
  for (const Candidate& c : candidates_) {
    const double w = tempered(c);
    if (w > 0) last = &c;  // a weight that underflowed is never drawn
    sum += w;
    if (u < sum) break;
  }
  return last->id;
}

}  // namespace moesaic::engine
