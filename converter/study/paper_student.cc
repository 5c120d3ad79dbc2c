#include "converter/study/paper_student.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/base/error.h"

namespace moesaic::converter::study {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// Uniform in ±1/√n, 24 random bits each: the same on every machine.
void fill_uniform(std::span<float> values, std::int64_t n, std::mt19937_64& rng) {
  const double half = 1 / std::sqrt(static_cast<double>(n));
  for (float& v : values) {
    v = static_cast<float>(half * (2 * static_cast<double>(rng() >> 40U) / 16777216.0 - 1));
  }
}

}  // namespace

std::string_view family_name(Family family) {
  switch (family) {
    case Family::LowRank:
      return "low-rank";
    case Family::FullRank:
      return "full-rank";
    case Family::Dense:
      return "dense";
    case Family::Peer:
      return "peer";
    case Family::Sgatlin:
      break;
  }
  return "sgatlin";
}

std::optional<Family> family_from_name(std::string_view name) {
  for (const Family f : kFamilies) {
    if (family_name(f) == name) return f;
  }
  return std::nullopt;
}

kernels::MixtureKind mixture_kind(Family family) {
  using kernels::ExpertKind;
  using kernels::GateKind;
  using kernels::RouterKind;
  switch (family) {
    case Family::FullRank:
      return {ExpertKind::Gelu, RouterKind::FullRank, GateKind::Softmax};
    case Family::Peer:
      return {ExpertKind::Gelu, RouterKind::ProductKey, GateKind::Softmax};
    case Family::Sgatlin:
      return {ExpertKind::Linear, RouterKind::ProductKey, GateKind::Score};
    case Family::LowRank:
    case Family::Dense:
      break;
  }
  return {ExpertKind::Gelu, RouterKind::LowRank, GateKind::Softmax};
}

std::int64_t StudentShape::n_keys() const {
  return std::llround(std::sqrt(static_cast<double>(n_experts)));
}

StudentShape student_shape(Family family, std::int64_t d_model, std::int64_t n_neurons,
                           std::int64_t n_experts, std::int64_t router_rank) {
  StudentShape s{family, d_model, n_neurons, 0, 0, 0};
  require<InputError>(n_neurons >= 1, "active neurons: {}, expected at least 1", n_neurons);
  if (family == Family::Dense) return s;
  s.n_active = n_neurons / 2;
  s.n_shared = n_neurons - s.n_active;
  s.n_experts = n_experts;
  require<InputError>(s.n_active >= 1,
                      "active neurons: {}, expected at least 2: a {} student selects half of them",
                      n_neurons, family_name(family));
  require<InputError>(s.n_active <= n_experts,
                      "active neurons: {} of which a {} student selects {} from {} experts, "
                      "expected at most as many as there are",
                      n_neurons, family_name(family), s.n_active, n_experts);
  if (family != Family::FullRank) {
    require<InputError>(router_rank >= 1, "router rank: {}, expected at least 1", router_rank);
    s.router_rank = router_rank;
  }
  require<InputError>(!s.product_keys() || s.n_keys() * s.n_keys() == n_experts,
                      "experts: {}, expected a square: {} has product keys", n_experts,
                      family_name(family));
  return s;
}

std::int64_t multiply_adds(const StudentShape& s) {
  const std::int64_t neurons = 2 * s.d_model * (s.n_shared + s.n_active) + s.n_active;
  switch (s.family) {
    case Family::LowRank:
      return neurons + s.router_rank * (s.d_model + s.n_experts);
    case Family::FullRank:
      return neurons + s.d_model * s.n_experts;
    case Family::Dense:
      return neurons;
    case Family::Peer:
    case Family::Sgatlin:
      break;
  }
  return neurons + 2 * s.router_rank * (s.d_model + s.n_keys());
}

PaperStudent::PaperStudent(const StudentShape& s)
    : shape(s),
      shared_in(size(s.n_shared * s.d_model)),
      shared_out(shared_in.size()),
      shared_bias(size(s.family == Family::Sgatlin ? 0 : s.n_shared)),
      expert_in(size(s.n_experts * s.d_model)),
      expert_out(expert_in.size()),
      expert_bias(size(s.family == Family::Sgatlin ? 0 : s.n_experts)),
      router_v(size((s.product_keys() ? 2 : 1) * s.router_rank * s.d_model)),
      router_u(size(s.n_scores() * router_cols())),
      router_bias(size(s.n_scores())),
      bias(size(s.d_model)) {}

std::vector<std::span<float>> PaperStudent::tensors() {
  return {shared_in.span(),   shared_out.span(),  shared_bias.span(), expert_in.span(),
          expert_out.span(),  expert_bias.span(), router_v.span(),    router_u.span(),
          router_bias.span(), bias.span()};
}

PaperStudent random_start(const StudentShape& shape, std::span<const double> output_mean,
                          std::uint64_t seed) {
  require<ShapeError>(output_mean.size() == size(shape.d_model),
                      "student of {}: {} output means, expected one per output", shape.d_model,
                      output_mean.size());
  PaperStudent s(shape);
  std::mt19937_64 rng(seed);
  const std::int64_t outputs = shape.family == Family::Dense ? shape.n_shared : shape.n_active;
  fill_uniform(s.shared_in.span(), shape.d_model, rng);
  fill_uniform(s.shared_out.span(), outputs, rng);
  fill_uniform(s.expert_in.span(), shape.d_model, rng);
  fill_uniform(s.expert_out.span(), outputs, rng);
  fill_uniform(s.router_v.span(), shape.d_model, rng);
  fill_uniform(s.router_u.span(), s.router_cols(), rng);
  fill_uniform(s.router_bias.span(), s.router_cols(), rng);
  // The protocol leaves this open. From zero, a mean beyond the deviation, as MLPs have it, is
  // thousands of steps of 1e-3 away.
  std::transform(output_mean.begin(), output_mean.end(), s.bias.begin(),
                 [](double v) { return static_cast<float>(v); });
  return s;
}

}  // namespace moesaic::converter::study
