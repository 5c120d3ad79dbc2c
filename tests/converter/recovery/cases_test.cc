// Backward passes against PyTorch's autograd, on cases that make_cases.py wrote.

#include <fstream>
#include <nlohmann/json.hpp>

#include "converter/recovery/attention.h"
#include "converter/recovery/head.h"
#include "converter/recovery/moe.h"
#include "converter/recovery/norm.h"
#include "converter/recovery/rotary.h"
#include "converter/recovery/self_routed.h"
#include "tests/converter/recovery/gradient_check.h"

namespace moesaic::converter {
namespace {

using nlohmann::json;
using Values = std::vector<double>;

const json& cases() {
  static const json all =
      json::parse(std::ifstream(MOESAIC_SOURCE_DIR "/tests/converter/recovery/cases.json"));
  return all;
}

// Both sides are float64 with sums of a few dozen terms.
void expect_equal(std::span<const double> found, const Values& expected, const char* what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  for (std::size_t i = 0; i < found.size(); ++i) {
    ASSERT_NEAR(found[i], expected[i], 1e-11 * (1 + std::abs(expected[i]))) << what << " " << i;
  }
}

MatrixView<double> matrix(Values& v, std::int64_t rows) {
  return {v.data(), rows, static_cast<std::int64_t>(v.size()) / rows};
}
MatrixView<const double> matrix(const Values& v, std::int64_t rows) {
  return {v.data(), rows, static_cast<std::int64_t>(v.size()) / rows};
}

TEST(RecoveryCases, Norm) {
  Lent lent;
  const json& c = cases()["norm"];
  const Values x = c["x"], w = c["w"], d = c["d"];
  Values y(x.size()), dx(x.size());
  norm_forward<double>(lent.ctx, matrix(x, 4), w, 1e-2, matrix(y, 4));
  norm_backward<double>(lent.ctx, matrix(x, 4), w, 1e-2, matrix(d, 4), false, matrix(dx, 4));
  expect_equal(y, c["y"], "y");
  expect_equal(dx, c["dx"], "dx");
}

TEST(RecoveryCases, RotatedGroupedAttention) {
  Lent lent;
  for (const json& c : cases()["attention"]) {
    const std::int64_t n = c["n"];
    const AttentionShape shape{c["heads"], c["kv"], c["dim"], c["scale"], c["window"], n};
    const auto style =
        c["interleaved"].get<bool>() ? kernels::RopeStyle::Interleaved : kernels::RopeStyle::Halves;
    const RotaryTable<double> table(n, shape.head_dim, c["base"]);
    Values q = c["q"], k = c["k"];
    const Values v = c["v"], d = c["d"];
    Values out(q.size()), lse(static_cast<std::size_t>(n * shape.n_heads));
    Values dq(q.size()), dk(k.size()), dv(k.size());
    rotate(lent.ctx, table, style, false, matrix(q, n));
    rotate(lent.ctx, table, style, false, matrix(k, n));
    const Values& q_rotated = q;
    const Values& k_rotated = k;
    attention_forward<double>(lent.ctx, shape, matrix(q_rotated, n), matrix(k_rotated, n),
                              matrix(v, n), matrix(out, n), matrix(lse, n));
    attention_backward<double>(lent.ctx, shape, matrix(q_rotated, n), matrix(k_rotated, n),
                               matrix(v, n), matrix(std::as_const(out), n),
                               matrix(std::as_const(lse), n), matrix(d, n), matrix(dq, n),
                               matrix(dk, n), matrix(dv, n));
    rotate(lent.ctx, table, style, true, matrix(dq, n));
    rotate(lent.ctx, table, style, true, matrix(dk, n));
    expect_equal(out, c["out"], "out");
    expect_equal(dq, c["dq"], "dq");
    expect_equal(dk, c["dk"], "dk");
    expect_equal(dv, c["dv"], "dv");
  }
}

TEST(RecoveryCases, SecretMoe) {
  Lent lent;
  for (const json& c : cases()["moe"]) {
    const std::int64_t n = c["n"];
    const MoeShape shape{
        c["gelu"].get<bool>() ? kernels::Activation::GeluTanh : kernels::Activation::Silu,
        c["d_model"],
        c["shared"],
        c["experts"],
        c["active"],
        c["rank"],
        c["bypass"]};
    MoeParameters<double> parameters(shape), gradient(shape);
    const auto tensors = parameters.tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Values values = c["parameters"][i];
      ASSERT_EQ(values.size(), tensors[i].size());
      std::copy(values.begin(), values.end(), tensors[i].begin());
    }
    MoeLayer<Float64> layer(shape, parameters, c["mean"].get<Values>());
    layer.refresh(lent.ctx);
    const Values x = c["x"], dy = c["dy"], weight = c["weight"];
    Values y(x.size()), dx(x.size());
    MoeTape<Float64> tape;
    RouterTraining router;
    router.auxiliary = 0.7;
    router.scale = 2;
    double total = 0;
    for (const double w : weight) total += w;
    layer.forward(lent.ctx, router, matrix(x, n), 0, tape, matrix(y, n));
    const double auxiliary = layer.backward(lent.ctx, router, matrix(dy, n), weight, total, tape,
                                            gradient, matrix(dx, n));
    expect_equal(y, c["y"], "y");
    expect_equal(dx, c["dx"], "dx");
    EXPECT_NEAR(auxiliary, c["auxiliary"].get<double>(), 1e-11);
    const auto gradients = gradient.tensors();
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "tensor " << i);
      expect_equal(gradients[i], c["gradients"][i], "gradient");
    }
  }
}

TEST(RecoveryCases, SelfRouted) {
  Lent lent;
  for (const json& c : cases()["self_routed"]) {
    const std::int64_t n = c["n"];
    const SelfRoutedShape shape{
        c["gelu"].get<bool>() ? kernels::Activation::GeluTanh : kernels::Activation::Silu,
        c["by_input"], c["d_model"], c["d_ff"]};
    SelfRoutedParameters<double> parameters(shape), gradient(shape);
    const auto tensors = parameters.tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Values values = c["parameters"][i];
      ASSERT_EQ(values.size(), tensors[i].size());
      std::copy(values.begin(), values.end(), tensors[i].begin());
    }
    SelfRoutedLayer<Float64> layer(
        shape, parameters, {c["input_threshold"], c["gate_threshold"], c["hidden_threshold"]});
    layer.refresh(lent.ctx);
    const Values x = c["x"], dy = c["dy"];
    Values y(x.size()), dx(x.size());
    SelfRoutedTape<Float64> tape;
    layer.forward(lent.ctx, matrix(x, n), tape, matrix(y, n));
    layer.backward(lent.ctx, c["straight_through"], matrix(dy, n), tape, gradient, matrix(dx, n));
    expect_equal(y, c["y"], "y");
    expect_equal(dx, c["dx"], "dx");
    const auto gradients = gradient.tensors();
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "tensor " << i);
      expect_equal(gradients[i], c["gradients"][i], "gradient");
    }
  }
}

TEST(RecoveryCases, Head) {
  Lent lent;
  const json& c = cases()["head"];
  const Values head = c["head"], teacher = c["teacher"], student = c["student"];
  Values dh(student.size());
  const double kl = kl_head<Float64>(lent.ctx, matrix(head, 50), matrix(teacher, 5),
                                     matrix(student, 5), 0.5, matrix(dh, 5));
  EXPECT_NEAR(kl, c["kl"].get<double>(), 1e-11);
  expect_equal(dh, c["dh"], "dh");
}

}  // namespace
}  // namespace moesaic::converter
