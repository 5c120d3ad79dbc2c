#include "converter/self_routed/apply_plan.h"

#include <fmt/format.h>

#include "converter/assemble.h"
#include "converter/sensitivity.h"
#include "converter/stream.h"
#include "models/gguf_writer.h"
#include "models/secret_moe_file.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {

std::vector<Thresholds> apply_plan(Passes& passes, const RoutedPlan& plan,
                                   std::span<const std::int32_t> tokens, std::int64_t n_ctx,
                                   std::vector<LayerReport>& reports, engine::Monitor& monitor) {
  models::Transformer& model = passes.model();
  Context& ctx = model.context();
  const models::Checkpoint& checkpoint = model.checkpoint();
  const std::int64_t d = model.config().d_model;
  const std::unique_ptr<Stream> hybrid = passes.stream(tokens, n_ctx);
  const std::int64_t n = hybrid->n_tokens();
  AlignedBuffer<float> r(static_cast<std::size_t>(n * d)), x(r.size()), y(r.size());
  const Matrix mr(r.data(), n, d), mx(x.data(), n, d), my(y.data(), n, d);
  std::vector<Thresholds> result;
  for (int l = 0; l < model.config().n_layers; ++l) {
    monitor.check();
    const RoutedPlan::Layer& planned = plan.layers[static_cast<std::size_t>(l)];
    const models::Mlp& own = passes.own_mlp(l);
    hybrid->attention(l);
    LayerReport row;
    row.layer = l;
    row.sensitivity = planned.predicted;
    if (stays_dense(planned)) {
      row.kind = models::kKindDense;
      hybrid->mlp(l, own);
      result.emplace_back();
      reports.push_back(row);
      monitor.advance(l + 1, "stays dense");
      continue;
    }
    const auto& mlp = std::get<models::DenseMlp>(own);
    hybrid->mlp_rows(l, {mr, mx, my});
    const std::vector<float> weight = token_weights(model, l, mr, my);
    const LayerSample sample{mx, my, weight, mx.rows};
    const Neurons teacher =
        unpack(mlp, fmt::format("{}: blk.{}", checkpoint.file->path().string(), l));
    ThresholdFit fit(ctx, teacher, sample,
                     plan.up_by_input ? ThresholdShape::Uniform : ThresholdShape::ByWeights);
    result.push_back(fit.fit(planned.shares));
    const Thresholds& t = result.back();
    row.kind = plan.up_by_input ? models::kKindGluInput : models::kKindGluGate;
    row.n_experts = teacher.n;
    row.shares = t.shares;
    row.active_fraction = active_fraction(t.shares, plan.up_by_input);
    row.error_closed_form = row.error_distilled = fit.error();
    row.expert_usage = fit.usage();
    hybrid->mlp(l, t.view(mlp));
    monitor.advance(l + 1, fmt::format("active {:.3f}, error {:.4f}", row.active_fraction,
                                       row.error_closed_form));
    reports.push_back(std::move(row));
  }
  return result;
}

void write_self_routed(const models::GgufFile& dense, std::span<const Thresholds> thresholds,
                       const ConvertOptions& options, const ConvertReport& report,
                       const std::filesystem::path& output) {
  models::GgufWriter writer;
  set_hybrid_metadata(writer, dense, report.layers, options, report);
  for (const models::GgufTensor& t : dense.tensors()) {
    writer.add_tensor(t.name, t.dtype, t.dims, {t.data, static_cast<std::size_t>(t.bytes)});
  }
  for (std::size_t l = 0; l < thresholds.size(); ++l) {
    const auto add = [&](std::string_view part, const std::vector<float>& values) {
      if (values.empty()) return;
      writer.add_tensor(fmt::format("blk.{}.{}", l, part), DType::F32,
                        {static_cast<std::int64_t>(values.size())},
                        std::as_bytes(std::span(values)));
    };
    add(models::kInputThreshold, thresholds[l].input);
    add(models::kGateThreshold, thresholds[l].gate);
    add(models::kHiddenThreshold, thresholds[l].hidden);
  }
  writer.write(output);
}

}  // namespace moesaic::converter
