#include "converter/study/study.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "converter/study/figure.h"
#include "converter/study/published.h"
#include "converter/study/study_json.h"
#include "kernels/base/error.h"
#include "tests/converter/study/student_loops.h"

namespace moesaic::converter::study {
namespace {

TEST(StudyCells, InputsThenFamiliesThenAscendingNeurons) {
  StudyOptions o;
  o.active_neurons = {64, 16, 64};
  o.families = {Family::Dense, Family::LowRank, Family::Dense};
  std::vector<std::string> names;
  for (const Cell& c : study_cells(o, 640)) {
    names.push_back(std::string(inputs_name(c.inputs)) + " " +
                    std::string(family_name(c.shape.family)) + " " + std::to_string(c.n_neurons));
  }
  EXPECT_EQ(names,
            (std::vector<std::string>{"real dense 16", "real dense 64", "real low-rank 16",
                                      "real low-rank 64", "gaussian dense 16", "gaussian dense 64",
                                      "gaussian low-rank 16", "gaussian low-rank 64"}));
}

TEST(StudyCells, WhatCannotBeIsRefusedBeforeTheWork) {
  StudyOptions o;
  o.active_neurons = {1};
  EXPECT_THROW(study_cells(o, 64), InputError);
  o.families = {Family::Dense};
  EXPECT_EQ(study_cells(o, 64).size(), 2U);
  o.active_neurons = {};
  EXPECT_THROW(study_cells(o, 64), InputError);
  o.active_neurons = {16};
  o.train.rates = {};
  EXPECT_THROW(study_cells(o, 64), InputError);
  o.train.rates = {std::numeric_limits<double>::quiet_NaN()};
  EXPECT_THROW(study_cells(o, 64), InputError);
  o.train.rates = {1e-3};
  o.own_passes = 4;
  EXPECT_THROW(study_cells(o, 64), InputError);
}

TEST(OwnPlan, CostsNoMoreThanTheRowAndLeavesLittleUnused) {
  for (const std::int64_t neurons : {16, 64, 512}) {
    for (const Family family : {Family::LowRank, Family::Dense}) {
      const std::int64_t cost = multiply_adds(student_shape(family, 640, neurons, 10000, 128));
      const auto plan = own_plan(640, 2048, cost);
      ASSERT_TRUE(plan);
      const double wanted = static_cast<double>(cost) / (3.0 * 640 * 2048);
      EXPECT_LE(active_fraction(*plan, 640, 2048), wanted + 1e-9);
      EXPECT_GT(active_fraction(*plan, 640, 2048), wanted - 1.0 / 2048 - 1e-9);  // a neuron's cost
      EXPECT_GE(plan->n_active, 1);
      EXPECT_LE(plan->n_active + plan->n_shared, 2048);
    }
  }
  EXPECT_FALSE(
      own_plan(640, 2048, multiply_adds(student_shape(Family::FullRank, 640, 16, 10000, 0))));
  EXPECT_FALSE(own_plan(640, 2048, 100));  // not even a neuron
}

// Ours are the sizes of the recipe that makes such layers.
TEST(OwnPlan, HasTheSizesOfTheLowRankRecipe) {
  const std::int64_t half = 3 * 576 * 1536 / 2;
  const auto plan = own_plan(576, 1536, half);
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->n_shared, 128);
  EXPECT_EQ(plan->router_rank, 64);
  EXPECT_EQ(plan->bypass_rank, 64);
  EXPECT_LE(active_fraction(*plan, 576, 1536), 0.5);
  EXPECT_GT(active_fraction(*plan, 576, 1536), 0.499);
}

TEST(OwnStart, BeatsTheMeanAndDistillationHelps) {
  StudyCase c(1);
  engine::Monitor monitor;
  Neurons teacher{kernels::Activation::GeluTanh, 16, 64, {}, {}, {}};
  for (auto* w : {&teacher.w_gate, &teacher.w_up, &teacher.w_down}) {
    *w = AlignedBuffer<float>(64 * 16);
    c.fill(w->span(), 0.5F);
  }
  LayerData data;
  data.d_model = 16;
  data.sink.resize(6000);
  data.n_fit = 4500;
  data.n_choose = 500;
  data.y_scale = 2.5;
  data.x = AlignedBuffer<float>(6000 * 16);
  data.y = AlignedBuffer<float>(data.x.size());
  c.fill(data.x.span());
  std::vector<float> h(64);
  for (std::int64_t t = 0; t < 6000; ++t) {
    for (std::int64_t i = 0; i < 64; ++i) {
      double gate = 0;
      double up = 0;
      for (std::int64_t j = 0; j < 16; ++j) {
        gate += static_cast<double>(teacher.gate().row(i)[j]) * data.inputs().row(t)[j];
        up += static_cast<double>(teacher.up().row(i)[j]) * data.inputs().row(t)[j];
      }
      for (std::int64_t j = 0; j < 16; ++j) {
        data.y[static_cast<std::size_t>(t * 16 + j)] += static_cast<float>(
            DoubleStudent::gelu(gate) * up * teacher.down().row(i)[j] / data.y_scale);
      }
    }
  }
  const LayerPlan all{false, 8, 56, 4, 0};  // every neuron runs: the teacher itself
  EXPECT_LT(own_start(c.ctx, teacher, data, all, 0, 1, monitor).closed_form.all, 1e-6);
  const LayerPlan half{false, 8, 24, 8, 4};
  const OwnStart start = own_start(c.ctx, teacher, data, half, 3, 1, monitor);
  EXPECT_LT(start.closed_form.all, 0.9);
  ASSERT_TRUE(start.distilled);
  EXPECT_LT(start.distilled->all, start.closed_form.all);
  EXPECT_FALSE(own_start(c.ctx, teacher, data, half, 0, 1, monitor).distilled);
}

StudyReport small_report() {
  StudyReport report;
  report.name = "tiny <&>";
  report.layer = 9;
  report.options.active_neurons = {16, 64};
  for (const Cell& cell : study_cells(report.options, 640)) {
    CellResult r;
    r.cell = cell;
    r.active_fraction = 0.25;
    r.held_out = {0.5 / static_cast<double>(cell.n_neurons), 0.01};
    r.rate = 1e-3;
    r.by_rate = {{1e-3, 0.4, 0.5}, {1e-4, std::numeric_limits<double>::quiet_NaN(), 0.75}};
    r.seconds = 3;
    OwnStart own;
    own.plan = {false, 3, 5, 2, 1};
    own.closed_form = {0.3, 0.2};
    if (cell.n_neurons == 16) own.distilled = Unexplained{0.1, 0.05};
    r.own = own;
    r.published = published(cell.inputs, cell.shape.family, cell.n_neurons);
    report.cells.push_back(r);
  }
  return report;
}

TEST(StudyJson, KeptCellsComeBack) {
  const StudyReport report = small_report();
  const CellResult& r = report.cells[1];
  CellResult back;
  read_cell(nlohmann::json::parse(to_json(r).dump()), "file", back);
  EXPECT_EQ(back.held_out.all, r.held_out.all);
  EXPECT_EQ(back.held_out.without_sinks, r.held_out.without_sinks);
  EXPECT_EQ(back.rate, r.rate);
  EXPECT_EQ(back.seconds, r.seconds);
  ASSERT_EQ(back.by_rate.size(), 2U);
  EXPECT_TRUE(std::isnan(back.by_rate[1].training_loss));
  EXPECT_EQ(back.by_rate[1].chosen_by, 0.75);
  for (const std::size_t i : {0U, 1U}) {  // with and without distillation
    const OwnStart& own = *report.cells[i].own;
    const OwnStart own_back = read_own(nlohmann::json::parse(to_json(own).dump()), "file");
    EXPECT_EQ(own_back.plan.n_active, own.plan.n_active);
    EXPECT_EQ(own_back.closed_form.without_sinks, own.closed_form.without_sinks);
    ASSERT_EQ(own_back.distilled.has_value(), own.distilled.has_value());
    if (own.distilled) {
      EXPECT_EQ(own_back.distilled->without_sinks, own.distilled->without_sinks);
    }
  }
  EXPECT_THROW(read_cell(nlohmann::json::object(), "file", back), FormatError);
  EXPECT_THROW(read_own(nlohmann::json::array(), "file"), FormatError);
}

TEST(Published, RowsOfThePaper) {
  EXPECT_EQ(published(Inputs::Real, Family::LowRank, 64), 0.0272);
  EXPECT_EQ(published(Inputs::Real, Family::Dense, 512), 0.0193);
  EXPECT_EQ(published(Inputs::Gaussian, Family::LowRank, 16), 0.1162);
  EXPECT_FALSE(published(Inputs::Gaussian, Family::FullRank, 16));
  EXPECT_FALSE(published(Inputs::Real, Family::Dense, 17));
  EXPECT_TRUE(has_published_rows("gemma3", 18, 640, 9));
  EXPECT_FALSE(has_published_rows("gemma3", 18, 640, 8));
}

TEST(StudyFigure, ShowsEveryCellAndStandsAlone) {
  const StudyReport report = small_report();
  const std::string svg = figure_svg(report);
  EXPECT_EQ(svg.rfind("<svg xmlns", 0), 0U);
  EXPECT_NE(svg.find("<style>"), std::string::npos);
  EXPECT_EQ(svg.find("<&>"), std::string::npos);  // escaped
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  const auto count = [&](const std::string& what) {
    std::size_t n = 0;
    for (std::size_t at = svg.find(what); at != svg.npos; at = svg.find(what, at + 1)) ++n;
    return n;
  };
  // 12 cells, the 6 real ones once more without sinks, and the 10 that the paper reports.
  EXPECT_EQ(count("active neurons: "), 12U + 6U + 10U);
  EXPECT_EQ(count("our own start at"), 12U + 6U);
}

TEST(StudyFigure, NothingToDraw) {
  StudyReport report = small_report();
  for (CellResult& cell : report.cells) {
    cell.held_out = {std::numeric_limits<double>::quiet_NaN(), 0};
    cell.own.reset();
    cell.published.reset();
  }
  const std::string svg = figure_svg(report);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("active neurons: "), std::string::npos);
}

}  // namespace
}  // namespace moesaic::converter::study
