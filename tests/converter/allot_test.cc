#include "converter/allot.h"

#include <gtest/gtest.h>

#include <numeric>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

constexpr PlanShape kSmolLm2{
    .d_model = 576, .d_ff = 1536, .n_shared = 128, .router_rank = 64, .bypass_rank = 64};

double mean_fraction(const std::vector<LayerPlan>& plans, const PlanShape& shape) {
  double sum = 0;
  for (const LayerPlan& p : plans) sum += active_fraction(p, shape.d_model, shape.d_ff);
  return sum / static_cast<double>(plans.size());
}

TEST(ActiveFraction, CountsRouterAndBypass) {
  // (128 + 256) · 3 · 576 + 64 · (576 + 1408) + 2 · 64 · 576 over 3 · 576 · 1536: DESIGN.md's .326.
  EXPECT_NEAR(active_fraction({false, 128, 256, 64, 64}, 576, 1536), 0.3256, 5e-5);
  EXPECT_EQ(active_fraction({.dense = true}, 576, 1536), 1);
}

TEST(PlanForFraction, NeverExceedsTheFraction) {
  for (double f = 0.2; f < 1; f += 0.037) {
    const LayerPlan plan = plan_for_fraction(kSmolLm2, f);
    EXPECT_LE(active_fraction(plan, 576, 1536), f);
    EXPECT_GT(active_fraction(plan, 576, 1536), f - 9.0 / 1536 - 1e-9);
    EXPECT_EQ(plan.n_active % 8, 0);
  }
}

TEST(PlanForFraction, BlocksAndClonesAreCounted) {
  PlanShape shape = kSmolLm2;
  shape.block = 16;
  LayerPlan plan = plan_for_fraction(shape, 0.5);
  EXPECT_EQ(n_experts(plan, 1536), 88);
  // 128 + 16 k neurons, a router of 64 · (576 + 88), a bypass of 2 · 64 · 576.
  const auto fraction = [](std::int64_t neurons, std::int64_t experts) {
    return static_cast<double>(3 * 576 * neurons + 64 * (576 + experts) + 2 * 64 * 576) /
           (3.0 * 576 * 1536);
  };
  EXPECT_DOUBLE_EQ(active_fraction(plan, 576, 1536), fraction(128 + 16 * plan.n_active, 88));
  EXPECT_LE(active_fraction(plan, 576, 1536), 0.5);
  EXPECT_GT(fraction(128 + 16 * (plan.n_active + 1), 88), 0.5);

  shape.block = 1;
  shape.n_clones = 1664;
  plan = plan_for_fraction(shape, 0.5);
  EXPECT_EQ(n_experts(plan, 1536), 3072);
  EXPECT_DOUBLE_EQ(active_fraction(plan, 576, 1536), fraction(128 + plan.n_active, 3072));
  EXPECT_LE(active_fraction(plan, 576, 1536), 0.5);
  EXPECT_GT(fraction(128 + plan.n_active + 8, 3072), 0.5);

  shape.n_clones = 100000;  // the router alone costs more
  EXPECT_THROW(plan_for_fraction(shape, 0.5), InputError);
  shape.n_clones = 0;
  shape.block = 704;  // one of two experts does not fit
  EXPECT_THROW(plan_for_fraction(shape, 0.5), InputError);
}

TEST(PlanForFraction, OneIsDense) { EXPECT_TRUE(plan_for_fraction(kSmolLm2, 1.0).dense); }

TEST(PlanForFraction, NoRoomForExpertsThrows) {
  EXPECT_THROW(plan_for_fraction(kSmolLm2, 0.1), InputError);
}

TEST(LossCurve, FallsToZeroAtOneAndIsConvex) {
  EXPECT_EQ(loss_curve(1), 0);
  for (double f = 0.1; f < 0.95; f += 0.05) {
    EXPECT_GT(loss_curve(f), loss_curve(f + 0.05));
    EXPECT_LT(loss_curve(f + 0.025), 0.5 * (loss_curve(f) + loss_curve(f + 0.05))) << f;
  }
}

TEST(Allot, KeepsTheMeanAndGivesFragileLayersMore) {
  std::vector<double> sensitivity(30, 0.04);
  sensitivity[0] = 0.6;
  sensitivity[29] = 0.2;
  sensitivity[12] = 0.01;
  for (const double active : {0.35, 0.5, 0.6, 0.8}) {
    const auto plans = allot(kSmolLm2, sensitivity, active, 0.3);
    const double mean = mean_fraction(plans, kSmolLm2);
    EXPECT_LE(mean, active + 1e-12);
    EXPECT_GT(mean, active - 0.03) << active;
    EXPECT_GE(active_fraction(plans[0], 576, 1536), active_fraction(plans[5], 576, 1536));
    EXPECT_LE(active_fraction(plans[12], 576, 1536), active_fraction(plans[5], 576, 1536));
  }
  EXPECT_TRUE(allot(kSmolLm2, sensitivity, 0.5, 0.3)[0].dense);
}

// Any fraction that a single layer can have is one that all layers together can have.
TEST(Allot, EveryFractionThatAPlanReaches) {
  std::vector<double> sensitivity(30, 0.04);
  sensitivity[0] = 0.6;
  for (int percent = 20; percent < 100; ++percent) {
    const double active = percent / 100.0;
    const auto plans = allot(kSmolLm2, sensitivity, active, 0.36);
    EXPECT_LE(mean_fraction(plans, kSmolLm2), active + 1e-12) << active;
    EXPECT_GT(mean_fraction(plans, kSmolLm2), active - 0.03) << active;
  }
}

TEST(Allot, OneMeansAllDense) {
  for (const LayerPlan& p : allot(kSmolLm2, std::vector<double>(4, 0.1), 1.0, 0.3))
    EXPECT_TRUE(p.dense);
}

TEST(Allot, NegativeAndZeroSensitivityAreFine) {
  const auto plans = allot(kSmolLm2, std::vector<double>{0, -1, 0, 0}, 0.5, 0.3);
  EXPECT_LE(mean_fraction(plans, kSmolLm2), 0.5 + 1e-12);
}

TEST(Allot, TooSmallABudgetThrows) {
  EXPECT_THROW(allot(kSmolLm2, std::vector<double>(4, 0.1), 0.1, 0.3), InputError);
}

}  // namespace
}  // namespace moesaic::converter
