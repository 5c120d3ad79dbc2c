#include "converter/study/train.h"

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "tests/converter/study/student_loops.h"

namespace moesaic::converter::study {
namespace {

// Outputs of a student on normal inputs, of unit variance.
LayerData data_of(StudyCase& c, const PaperStudent& teacher, std::int64_t n_tokens) {
  LayerData data;
  data.d_model = teacher.shape.d_model;
  data.x = AlignedBuffer<float>(static_cast<std::size_t>(n_tokens * data.d_model));
  data.y = AlignedBuffer<float>(data.x.size());
  data.sink.resize(static_cast<std::size_t>(n_tokens));
  data.n_fit = n_tokens * 8 / 10;
  data.n_choose = n_tokens / 10;
  c.fill(data.x.span());
  predict(c.ctx, teacher, data.inputs(), {data.y.data(), n_tokens, data.d_model});
  double square = 0;
  for (const float v : data.y) square += static_cast<double>(v) * v;
  const auto unit = static_cast<float>(1 / std::sqrt(square / static_cast<double>(data.y.size())));
  for (float& v : data.y) v *= unit;
  return data;
}

// Larger than the random start, so that its neurons bend.
PaperStudent teacher_of(StudyCase& c, const StudentShape& shape) {
  PaperStudent teacher(shape);
  for (const auto& t : teacher.tensors()) c.fill(t);
  return teacher;
}

class InFamily : public testing::TestWithParam<std::pair<StudentShape, StudentShape>> {};

TEST_P(InFamily, IsLearntToNearZero) {
  StudyCase c(1);
  engine::Monitor monitor;
  const LayerData data = data_of(c, teacher_of(c, GetParam().first), 4000);
  TrainOptions options;
  options.passes = 200;
  options.batch = 256;
  options.rates = {1e-2};
  const Trained trained =
      train(c.ctx, GetParam().second, data, options, "in family", 0, 1, monitor);
  const Unexplained u =
      judge(c.ctx, trained.student, data, data.n_fit + data.n_choose, data.n_held_out());
  EXPECT_LT(u.all, 0.005);
  EXPECT_EQ(u.all, u.without_sinks);  // there are none
}

INSTANTIATE_TEST_SUITE_P(Families, InFamily,
                         testing::Values(std::pair(StudentShape{Family::Dense, 4, 3, 0, 0, 0},
                                                   StudentShape{Family::Dense, 4, 24, 0, 0, 0}),
                                         std::pair(StudentShape{Family::LowRank, 4, 1, 2, 2, 2},
                                                   StudentShape{Family::LowRank, 4, 12, 12, 12, 3}),
                                         std::pair(StudentShape{Family::FullRank, 4, 1, 2, 2, 0},
                                                   StudentShape{Family::FullRank, 4, 12, 12, 12,
                                                                0})),
                         [](const auto& info) {
                           std::string name(family_name(info.param.first.family));
                           std::erase(name, '-');
                           return name;
                         });

TEST(Train, KeepsTheBestRateAndRepeats) {
  StudyCase c(1);
  engine::Monitor monitor;
  const LayerData data = data_of(c, teacher_of(c, {Family::Dense, 8, 16, 0, 0, 0}), 2000);
  TrainOptions options;
  options.passes = 6;
  options.batch = 100;
  options.rates = {1e-6, 1e-2, 1e-4};
  const StudentShape shape = student_shape(Family::LowRank, 8, 8, 20, 4);
  const auto run = [&] { return train(c.ctx, shape, data, options, "", 0, 1, monitor); };
  const Trained trained = run();
  ASSERT_EQ(trained.by_rate.size(), 3U);
  EXPECT_EQ(trained.rate, 1e-2);
  for (const RateResult& r : trained.by_rate) {
    EXPECT_GE(r.chosen_by, trained.by_rate[1].chosen_by);
    EXPECT_GT(r.training_loss, 0);
  }
  EXPECT_EQ(judge(c.ctx, trained.student, data, data.n_fit, data.n_choose).all,
            trained.by_rate[1].chosen_by);
  EXPECT_EQ(run().by_rate[1].chosen_by, trained.by_rate[1].chosen_by);
  options.seed = 1;
  EXPECT_NE(run().by_rate[1].chosen_by, trained.by_rate[1].chosen_by);
}

TEST(Train, RateThatDivergesIsNotKept) {
  StudyCase c(1);
  engine::Monitor monitor;
  const LayerData data = data_of(c, teacher_of(c, {Family::Dense, 8, 16, 0, 0, 0}), 500);
  TrainOptions options;
  options.rates = {1e30};
  options.passes = 20;
  options.batch = 50;
  const StudentShape shape = student_shape(Family::Dense, 8, 8, 0, 0);
  const Trained none = train(c.ctx, shape, data, options, "", 0, 1, monitor);
  EXPECT_TRUE(std::isnan(none.rate));
  EXPECT_TRUE(std::isnan(none.by_rate[0].chosen_by));
  options.rates = {1e30, 1e-3};
  EXPECT_EQ(train(c.ctx, shape, data, options, "", 0, 1, monitor).rate, 1e-3);
}

TEST(Train, StopsWhenAsked) {
  struct Stop : engine::Monitor {
    bool cancelled() const override { return true; }
  } monitor;
  StudyCase c(1);
  const LayerData data = data_of(c, teacher_of(c, {Family::Dense, 8, 4, 0, 0, 0}), 100);
  EXPECT_THROW(train(c.ctx, student_shape(Family::Dense, 8, 8, 0, 0), data, {}, "", 0, 1, monitor),
               Interrupted);
}

TEST(Train, StepsAreWholeBatches) {
  EXPECT_EQ(train_steps({.passes = 3, .batch = 1024}, 10240), 30);
  EXPECT_EQ(train_steps({.passes = 1, .batch = 1024}, 100), 1);  // a smaller batch
  EXPECT_EQ(train_steps({.passes = 1e-6, .batch = 1024}, 10240), 1);
}

}  // namespace
}  // namespace moesaic::converter::study
