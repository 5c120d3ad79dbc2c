#include "models/secret_moe_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "models/layer_reader.h"
#include "models/mixture_file.h"
#include "models/self_routed_file.h"

namespace moesaic::models {
bool is_hybrid(const GgufFile& file) {
  if (file.find(kKeyLayerKind) == nullptr) return false;
  const std::vector<std::string> kinds = file.get_strings(kKeyLayerKind);
  return std::any_of(kinds.begin(), kinds.end(), [](const auto& k) { return k != kKindDense; });
}

std::string layer_kind(const GgufFile& file, const ModelConfig& config, int layer) {
  if (file.find(kKeyLayerKind) == nullptr) return std::string(kKindDense);
  const std::string path = file.path().string();
  const std::int64_t version = file.get_int(kKeyFormatVersion);
  require<FormatError>(version == kSecretMoeFormatVersion, "{}: {} is {}, expected {}", path,
                       kKeyFormatVersion, version, kSecretMoeFormatVersion);
  const std::vector<std::string> kinds = file.get_strings(kKeyLayerKind);
  const std::string& kind = layer_entry(file, kKeyLayerKind, kinds, config, layer);
  constexpr std::array kKnown = {kKindDense, kKindGluLowRank, kKindGluGate, kKindGluInput};
  require<FormatError>(
      std::find(kKnown.begin(), kKnown.end(), kind) != kKnown.end() || mixture_kind(kind),
      "{}: layer {} is of kind \"{}\", expected one of {}, or {}", path, layer, kind,
      fmt::join(kKnown, ", "), kMixtureKinds);
  return kind;
}

std::optional<kernels::SecretMoeView> read_secret_moe(const GgufFile& file,
                                                      const ModelConfig& config, int layer) {
  if (layer_kind(file, config, layer) != kKindGluLowRank) return std::nullopt;
  const std::string path = file.path().string();
  const LayerReader in(file, layer);
  const std::int64_t d_model = config.d_model;
  const std::int64_t n_experts = in.leading_dim(kExperts, 3);
  require<FormatError>(n_experts <= std::numeric_limits<std::int32_t>::max(),
                       "{}: layer {} has {} experts, expected fewer than 2^31", path, layer,
                       n_experts);
  const std::int64_t router_rank = in.leading_dim(kRouterV, 2);

  kernels::SecretMoeView view;
  view.phi = config.phi;
  view.experts = in.weight(kExperts, {n_experts, 3, d_model});
  view.expert_mean = in.vector(kExpertMean, n_experts);
  view.router_v = in.weight(kRouterV, {router_rank, d_model});
  view.router_u = in.weight(kRouterU, {n_experts, router_rank});
  view.router_bias = in.vector(kRouterBias, n_experts);
  view.bias = in.vector(kBias, d_model);
  if (in.has(kShared)) {
    view.shared = in.weight(kShared, {in.leading_dim(kShared, 3), 3, d_model});
  }
  if (in.has(kBypassQ) || in.has(kBypassP)) {
    const std::int64_t bypass_rank = in.leading_dim(kBypassQ, 2);
    view.bypass_q = in.weight(kBypassQ, {bypass_rank, d_model});
    view.bypass_p = in.weight(kBypassP, {d_model, bypass_rank});
  }

  view.n_active = read_n_active(file, config, layer, n_experts);
  return view;
}

kernels::SecretMoeView PackedSecretMoe::view() const {
  kernels::SecretMoeView view;
  view.phi = phi;
  view.n_active = n_active;
  view.shared = packed_view(shared, expert_dtype, 3 * n_shared, d_model);
  view.experts = packed_view(experts, expert_dtype, 3 * n_experts, d_model);
  view.expert_mean = expert_mean.span();
  view.router_v = packed_view(router_v, router_dtype, router_rank, d_model);
  view.router_u = packed_view(router_u, router_dtype, n_experts, router_rank);
  view.router_bias = router_bias.span();
  view.bypass_q = packed_view(bypass_q, router_dtype, bypass_rank, d_model);
  view.bypass_p = packed_view(bypass_p, router_dtype, d_model, bypass_rank);
  view.bias = bias.span();
  return view;
}

void PackedSecretMoe::add_to(GgufWriter& writer, int layer) const {
  const auto add = [&](std::string_view part, DType dtype, std::vector<std::int64_t> dims,
                       std::span<const std::byte> data) {
    writer.add_tensor(tensor_name(layer, part), dtype, std::move(dims), data);
  };
  if (n_shared > 0) add(kShared, expert_dtype, {n_shared, 3, d_model}, shared.span());
  add(kExperts, expert_dtype, {n_experts, 3, d_model}, experts.span());
  add(kExpertMean, DType::F32, {n_experts}, std::as_bytes(expert_mean.span()));
  add(kRouterV, router_dtype, {router_rank, d_model}, router_v.span());
  add(kRouterU, router_dtype, {n_experts, router_rank}, router_u.span());
  add(kRouterBias, DType::F32, {n_experts}, std::as_bytes(router_bias.span()));
  if (bypass_rank > 0) {
    add(kBypassQ, router_dtype, {bypass_rank, d_model}, bypass_q.span());
    add(kBypassP, router_dtype, {d_model, bypass_rank}, bypass_p.span());
  }
  add(kBias, DType::F32, {d_model}, std::as_bytes(bias.span()));
}

}  // namespace moesaic::models
