#include "models/mixture_file.h"

#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "models/layer_reader.h"
#include "models/secret_moe_file.h"

namespace moesaic::models {
namespace {

using kernels::ExpertKind;
using kernels::GateKind;
using kernels::RouterKind;

constexpr std::string_view kSharedBias = "shared.input_bias";
constexpr std::string_view kExpertBias = "experts.input_bias";

template <class Kind>
struct Named {
  Kind kind;
  std::string_view name;
};
constexpr std::array<Named<ExpertKind>, 3> kExpertNames = {
    {{ExpertKind::Glu, "glu"}, {ExpertKind::Gelu, "gelu"}, {ExpertKind::Linear, "linear"}}};
constexpr std::array<Named<RouterKind>, 3> kRouterNames = {
    {{RouterKind::LowRank, "low_rank"},
     {RouterKind::FullRank, "full_rank"},
     {RouterKind::ProductKey, "product_key"}}};
constexpr std::array<Named<GateKind>, 3> kGateNames = {
    {{GateKind::None, "none"}, {GateKind::Softmax, "softmax"}, {GateKind::Score, "score"}}};

template <class Kind, std::size_t n>
std::string_view name_of(const std::array<Named<Kind>, n>& names, Kind kind) {
  for (const auto& named : names) {
    if (named.kind == kind) return named.name;
  }
  return "?";
}

void check_square(const GgufFile& file, int layer, std::int64_t n_experts, std::int64_t n_keys) {
  require<FormatError>(n_keys * n_keys == n_experts,
                       "{}: {} has {} experts behind product keys, expected a square",
                       file.path().string(), tensor_name(layer, kExperts), n_experts);
}

}  // namespace

std::string kind_name(const kernels::MixtureKind& kind) {
  return fmt::format("{}+{}+{}", name_of(kExpertNames, kind.expert),
                     name_of(kRouterNames, kind.router), name_of(kGateNames, kind.gate));
}

std::optional<kernels::MixtureKind> mixture_kind(std::string_view name) {
  for (const auto& expert : kExpertNames) {
    for (const auto& router : kRouterNames) {
      for (const auto& gate : kGateNames) {
        const kernels::MixtureKind kind{expert.kind, router.kind, gate.kind};
        if (kind_name(kind) == name) return kind;
      }
    }
  }
  return std::nullopt;
}

std::optional<kernels::MixtureView> read_mixture(const GgufFile& file, const ModelConfig& config,
                                                 int layer) {
  const std::optional<kernels::MixtureKind> kind = mixture_kind(layer_kind(file, config, layer));
  if (!kind) return std::nullopt;
  const std::string path = file.path().string();
  const LayerReader in(file, layer);
  const std::int64_t d_model = config.d_model;
  const std::int64_t c = kernels::rows_per_neuron(kind->expert);
  const bool biased = kind->expert == ExpertKind::Gelu;
  const std::vector<std::int64_t> dims = in.dims(kExperts, 4);
  const std::int64_t n_experts = dims[0], block = dims[2];
  require<FormatError>(
      n_experts <= std::numeric_limits<std::int32_t>::max() / block,
      "{}: layer {} has {} experts of {} neurons, expected fewer than 2^31 neurons", path, layer,
      n_experts, block);

  kernels::MixtureView view;
  view.kind = *kind;
  view.phi = config.phi;
  view.block = block;
  view.experts = in.weight(kExperts, {n_experts, c, block, d_model});
  if (biased) view.expert_bias = in.vector(kExpertBias, {n_experts, block});
  if (in.has(kExpertMean)) view.expert_mean = in.vector(kExpertMean, {n_experts, block});
  std::int64_t n_scores = n_experts;
  switch (kind->router) {
    case RouterKind::LowRank: {
      const std::int64_t rank = in.leading_dim(kRouterV, 2);
      view.router_v = in.weight(kRouterV, {rank, d_model});
      view.router_u = in.weight(kRouterU, {n_experts, rank});
      break;
    }
    case RouterKind::FullRank:
      view.router_u = in.weight(kRouterU, {n_experts, d_model});
      break;
    case RouterKind::ProductKey: {
      const std::int64_t n_keys = std::llround(std::sqrt(static_cast<double>(n_experts)));
      check_square(file, layer, n_experts, n_keys);
      n_scores = 2 * n_keys;
      const std::int64_t rank = in.dims(kRouterU, 2)[1];
      view.router_u = in.weight(kRouterU, {n_scores, rank});
      view.router_v = in.weight(kRouterV, {2 * rank, d_model});
      break;
    }
  }
  view.router_bias = in.vector(kRouterBias, n_scores);
  view.bias = in.vector(kBias, d_model);
  if (in.has(kShared)) {
    const std::int64_t n_shared = in.leading_dim(kShared, 3);
    view.shared = in.weight(kShared, {n_shared, c, d_model});
    if (biased) view.shared_bias = in.vector(kSharedBias, n_shared);
  }
  if (in.has(kBypassQ) || in.has(kBypassP)) {
    const std::int64_t bypass_rank = in.leading_dim(kBypassQ, 2);
    view.bypass_q = in.weight(kBypassQ, {bypass_rank, d_model});
    view.bypass_p = in.weight(kBypassP, {d_model, bypass_rank});
  }
  view.n_active = read_n_active(file, config, layer, n_experts);
  return view;
}

std::int64_t PackedMixture::router_v_rows() const {
  switch (kind.router) {
    case RouterKind::LowRank:
      return router_rank;
    case RouterKind::FullRank:
      return 0;
    case RouterKind::ProductKey:
      break;
  }
  return 2 * router_rank;
}

kernels::MixtureView PackedMixture::view() const {
  const std::int64_t c = kernels::rows_per_neuron(kind.expert);
  kernels::MixtureView view;
  view.kind = kind;
  view.phi = phi;
  view.block = block;
  view.n_active = n_active;
  view.shared = packed_view(shared, expert_dtype, c * n_shared, d_model);
  view.experts = packed_view(experts, expert_dtype, c * block * n_experts, d_model);
  view.shared_bias = shared_bias.span();
  view.expert_bias = expert_bias.span();
  view.expert_mean = expert_mean.span();
  view.router_v = packed_view(router_v, router_dtype, router_v_rows(), d_model);
  view.router_u = packed_view(router_u, router_dtype, router_u_rows(), router_rank);
  view.router_bias = router_bias.span();
  view.bypass_q = packed_view(bypass_q, router_dtype, bypass_rank, d_model);
  view.bypass_p = packed_view(bypass_p, router_dtype, d_model, bypass_rank);
  view.bias = bias.span();
  return view;
}

void PackedMixture::add_to(GgufWriter& writer, int layer) const {
  const auto add = [&](std::string_view part, DType dtype, std::vector<std::int64_t> dims,
                       std::span<const std::byte> data) {
    writer.add_tensor(tensor_name(layer, part), dtype, std::move(dims), data);
  };
  const auto add_floats = [&](std::string_view part, std::vector<std::int64_t> dims,
                              const AlignedBuffer<float>& data) {
    if (!data.empty()) add(part, DType::F32, std::move(dims), std::as_bytes(data.span()));
  };
  const std::int64_t c = kernels::rows_per_neuron(kind.expert);
  if (n_shared > 0) add(kShared, expert_dtype, {n_shared, c, d_model}, shared.span());
  add_floats(kSharedBias, {n_shared}, shared_bias);
  add(kExperts, expert_dtype, {n_experts, c, block, d_model}, experts.span());
  add_floats(kExpertBias, {n_experts, block}, expert_bias);
  add_floats(kExpertMean, {n_experts, block}, expert_mean);
  if (router_v_rows() > 0) {
    add(kRouterV, router_dtype, {router_v_rows(), d_model}, router_v.span());
  }
  add(kRouterU, router_dtype, {router_u_rows(), router_rank}, router_u.span());
  add_floats(kRouterBias, {router_u_rows()}, router_bias);
  if (bypass_rank > 0) {
    add(kBypassQ, router_dtype, {bypass_rank, d_model}, bypass_q.span());
    add(kBypassP, router_dtype, {d_model, bypass_rank}, bypass_p.span());
  }
  add_floats(kBias, {d_model}, bias);
}

}  // namespace moesaic::models
