#include "converter/self_routed/plan.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/base/error.h"
#include "tests/converter/layer_case.h"
#include "tests/converter/scratch_folder.h"

namespace moesaic::converter {
namespace {

// KL = weight · (1 − f)², error = (1 − f)².
LayerCurve quadratic(double weight) {
  LayerCurve curve;
  for (int step = 0; step <= 18; ++step) {
    const double f = 1 - 0.05 * step;
    curve.path.push_back({{f, f, f}, f, (1 - f) * (1 - f)});
  }
  for (const double f : {0.6, 0.4, 0.25}) {
    curve.measured.push_back({f, weight * (1 - f) * (1 - f)});
  }
  return curve;
}

double mean(const std::vector<PathPoint>& points) {
  double sum = 0;
  for (const PathPoint& p : points) sum += p.fraction;
  return sum / static_cast<double>(points.size());
}

double loss(const std::vector<LayerCurve>& curves, const std::vector<PathPoint>& points) {
  double sum = 0;
  for (std::size_t l = 0; l < curves.size(); ++l) sum += curves[l].predicted_kl(points[l]);
  return sum;
}

TEST(LayerCurve, PredictsWhatWasMeasured) {
  const LayerCurve curve = quadratic(0.3);
  for (const PathPoint& p : curve.path) {
    EXPECT_NEAR(curve.predicted_kl(p), 0.3 * (1 - p.fraction) * (1 - p.fraction), 1e-12);
  }
  EXPECT_EQ(curve.predicted_kl(curve.path.front()), 0);
}

// The rate, KL over error, runs between two measured points in the logarithm.
TEST(LayerCurve, InterpolatesTheRate) {
  LayerCurve curve = quadratic(1);
  curve.measured = {{0.6, 0.16}, {0.4, 4 * 0.36}};
  EXPECT_NEAR(curve.predicted_kl({{}, 0.5, 0.25}), 0.25 * 2, 1e-12);
  EXPECT_NEAR(curve.predicted_kl({{}, 0.8, 0.04}), 0.04, 1e-12);
  EXPECT_NEAR(curve.predicted_kl({{}, 0.2, 0.64}), 0.64 * 4, 1e-12);
}

TEST(RoutedAllot, BeatsUniformAndKeepsTheMean) {
  const std::vector<LayerCurve> curves = {quadratic(2), quadratic(0.1), quadratic(0.5),
                                          quadratic(0.1)};
  for (const double active : {0.3, 0.5, 0.75}) {
    const auto planned = allot(curves, active);
    const auto uniform = allot_uniformly(curves, active);
    EXPECT_LE(mean(planned), active + 1e-9);
    EXPECT_GT(mean(planned), active - 0.05);
    EXPECT_LT(loss(curves, planned), 0.9 * loss(curves, uniform));
    for (const PathPoint& p : uniform) EXPECT_LE(p.fraction, active + 1e-9);
    EXPECT_GT(planned[0].fraction, planned[2].fraction);
    EXPECT_GE(planned[2].fraction, planned[1].fraction);
  }
}

// With convex curves nothing that exchanges one step between two layers is better.
TEST(RoutedAllot, NoExchangeOfTwoStepsIsBetter) {
  const std::vector<LayerCurve> curves = {quadratic(2), quadratic(0.1), quadratic(0.5)};
  auto best = allot(curves, 0.5);
  const double least = loss(curves, best);
  const auto index = [&](std::size_t l) {
    return static_cast<std::size_t>(std::llround((1 - best[l].fraction) / 0.05));
  };
  for (std::size_t a = 0; a < 3; ++a) {
    for (std::size_t b = 0; b < 3; ++b) {
      if (a == b || index(a) == 0 || index(b) + 1 >= curves[b].path.size()) continue;
      auto other = best;
      other[a] = curves[a].path[index(a) - 1];
      other[b] = curves[b].path[index(b) + 1];
      EXPECT_GE(loss(curves, other), least - 1e-12);
    }
  }
}

TEST(RoutedAllot, AllOrNothing) {
  const std::vector<LayerCurve> curves = {quadratic(1), quadratic(2)};
  for (const PathPoint& p : allot(curves, 1)) EXPECT_EQ(p.fraction, 1);
  EXPECT_THROW(allot(curves, 0.05), InputError);
  EXPECT_THROW(allot_uniformly(curves, 0.05), InputError);
}

TEST(ShrinkPath, FallsStepByStepAndTakesTheCheapestFirst) {
  LayerCase c(80, 16, 48, kernels::Activation::Silu);
  ThresholdFit fit(c.ctx, c.teacher, c.sample, ThresholdShape::ByWeights);
  const auto path = shrink_path(fit, false, 0.2, 0.1);
  EXPECT_EQ(path.front().fraction, 1);
  EXPECT_EQ(path.front().error, 0);
  EXPECT_LE(path.back().fraction, 0.2 + 0.04);
  for (std::size_t i = 1; i < path.size(); ++i) {
    EXPECT_LT(path[i].fraction, path[i - 1].fraction);
    EXPECT_NEAR(path[i].fraction, active_fraction(path[i].shares, false), 1e-12);
    EXPECT_LE(path[i].shares.hidden, path[i].shares.gate + 1e-12);
    // What it left is no cheaper per fraction than what it took.
    const Shares& before = path[i - 1].shares;
    for (const Shares& other : {Shares{before.input - 0.1, before.gate, before.hidden},
                                Shares{before.input, before.gate, before.hidden - 0.1}}) {
      if (std::min(other.input, other.hidden) < 0.05) continue;
      fit.fit(other);
      const double slope = (fit.error() - path[i - 1].error) /
                           (path[i - 1].fraction - active_fraction(other, false));
      const double taken =
          (path[i].error - path[i - 1].error) / (path[i - 1].fraction - path[i].fraction);
      EXPECT_LE(taken, slope + 1e-9);
    }
  }
}

TEST(Plan, SurvivesJson) {
  const RoutedPlan plan = make_plan({quadratic(2), quadratic(0.1)}, 0.5, Budget::Planned);
  const RoutedPlan back = parse_plan(plan_json(plan), "plan.json", 2);
  ASSERT_EQ(back.layers.size(), 2U);
  for (std::size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(back.layers[l].shares.input, plan.layers[l].shares.input);
    EXPECT_EQ(back.layers[l].shares.gate, plan.layers[l].shares.gate);
    EXPECT_EQ(back.layers[l].shares.hidden, plan.layers[l].shares.hidden);
    EXPECT_NEAR(back.layers[l].fraction, plan.layers[l].fraction, 1e-12);
  }
  // Its curves can be planned from again.
  const RoutedPlan again = make_plan(back.curves, 0.3, Budget::Planned);
  EXPECT_LE(again.active_fraction(), 0.3 + 1e-9);
  EXPECT_EQ(plan_json(make_plan(back.curves, 0.5, Budget::Planned)), plan_json(plan));
}

TEST(Plan, ThresholdPlanIsTheSameEverywhere) {
  const RoutedPlan plan = threshold_plan(3, 0.4);
  EXPECT_TRUE(plan.up_by_input);
  EXPECT_NEAR(plan.active_fraction(), 0.4, 1e-12);
  EXPECT_TRUE(parse_plan(plan_json(plan), "plan.json", 3).up_by_input);
  EXPECT_FALSE(stays_dense(plan.layers[1]));
  EXPECT_TRUE(stays_dense(threshold_plan(1, 1).layers[0]));
}

TEST(Plan, ErrorsNameTheFileAndWhatIsWrong) {
  const auto fails = [](const std::string& text, const std::string& with, int n_layers = 1) {
    try {
      parse_plan(text, "my.json", n_layers);
      ADD_FAILURE() << text;
    } catch (const FormatError& e) {
      EXPECT_NE(std::string(e.what()).find("my.json"), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(with), std::string::npos) << e.what();
    }
  };
  const std::string layer =
      R"({"layer": 0, "input_share": 0.5, "gate_share": 0.6, "hidden_share": 0.4})";
  const auto plan = [](const std::string& layers) {
    return R"({"moesaic_plan": 1, "kind": "glu+gate", "layers": [)" + layers + "]}";
  };
  EXPECT_EQ(parse_plan(plan(layer), "my.json", 1).layers.size(), 1U);
  fails("", "is no plan");
  fails("{}", "moesaic_plan");
  fails(R"({"moesaic_plan": 2})", "expected 1");
  fails(R"({"moesaic_plan": 1, "kind": "glu"})", "expected glu+gate");
  fails(plan(layer), "expected 2", 2);
  fails(plan(R"({"layer": 1})"), "in order");
  fails(plan(R"({"layer": 0, "input_share": 1.5, "gate_share": 1, "hidden_share": 1})"),
        "input_share is 1.5");
  fails(plan(R"({"layer": 0, "input_share": 1, "gate_share": 0.2, "hidden_share": 0.3})"),
        "hidden_share 0.3 above gate_share 0.2");
  EXPECT_THROW(read_plan("/nowhere/plan.json", 1), IoError);
}

TEST(Plan, TableNamesDenseLayers) {
  RoutedPlan plan = make_plan({quadratic(2), quadratic(0.1)}, 0.5, Budget::Planned);
  plan.layers[0] = {};
  const std::string table = plan_table(plan);
  EXPECT_NE(table.find("stays dense"), std::string::npos);
  EXPECT_NE(table.find("plan: mean active fraction"), std::string::npos);
}

}  // namespace
}  // namespace moesaic::converter
