// Distillation on a GPU against the CPU's: losses, gradients, whole layers.

#include "converter/distill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "converter/cuda/distillation.h"
#include "converter/cuda/student.h"
#include "converter/start.h"
#include "kernels/base/error.h"
#include "tests/converter/cuda/on_arrays.h"
#include "tests/converter/layer_case.h"
#include "tests/kernels/support.h"

namespace moesaic::converter {
namespace {

using kernels::Activation;

struct StudentCase {
  const char* name;
  std::int64_t rows, d_model, n_neurons;
  Activation phi;
  LayerPlan plan;  // dense, n_shared, n_active, router_rank, bypass_rank, block, n_clones
};

void PrintTo(const StudentCase& c, std::ostream* out) { *out << c.name; }

// A student away from its optimum, so that every gradient is large against rounding.
Student disturbed(LayerCase& c, const LayerPlan& plan) {
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-3);
  std::mt19937_64 rng(3);
  std::normal_distribution<float> normal;
  for (auto* values : {&s.bypass_q, &s.bypass_p, &s.bias}) {
    for (float& v : *values) v = 0.3F * normal(rng);
  }
  for (const std::span<float> values : tensors(s)) {
    for (float& v : values) v *= 1 + 0.1F * normal(rng);
  }
  return s;
}

double norm(std::span<const float> v) {
  double square = 0;
  for (const float x : v) square += static_cast<double>(x) * x;
  return std::sqrt(square);
}

double distance(std::span<const float> a, std::span<const float> b) {
  double square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    square += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  }
  return std::sqrt(square);
}

class CudaDistill : public OnArrays, public testing::WithParamInterface<StudentCase> {};

// Both sum the same float32 products in other orders: errors of a sum of n terms are within n ε of
// the terms' magnitudes, typically √n ε; 200 ε covers all sums here, which have up to 300 terms.
TEST_P(CudaDistill, LossAndGradientsEqualTheCpus) {
  const StudentCase& p = GetParam();
  LayerCase c(p.rows, p.d_model, p.n_neurons, p.phi);
  const Student s = disturbed(c, p.plan);
  const LossScales scales = {.y = 1.7, .c = 0.9};
  StudentGradients expected = make_gradients(s);
  student_gradients(c.ctx, s, c.sample.x, c.sample.y, c.weight, scales, 0.5, expected);

  cuda::Blas blas(stream);
  CudaStudent student(s, p.rows + 3, blas, stream);
  const auto to_device = [&](const AlignedBuffer<float>& b) {
    return cuda::on_device(std::vector<float>(b.begin(), b.end()), stream);
  };
  const auto x = to_device(c.x), y = to_device(c.y), weight = cuda::on_device(c.weight, stream);
  const auto losses = cuda::on_device(std::vector<double>{0, 0}, stream);
  const double total = std::accumulate(c.weight.begin(), c.weight.end(), 0.0);
  student.gradients({x.data(), p.rows, p.d_model}, {y.data(), p.rows, p.d_model}, weight.data(),
                    total, scales, 0.5, losses.data());
  const auto found_losses = cuda::on_host(losses, stream);
  EXPECT_NEAR(found_losses[0], expected.output_loss, 200 * kEps * expected.output_loss);
  EXPECT_NEAR(found_losses[1], expected.auxiliary_loss, 200 * kEps * expected.auxiliary_loss);
  const StudentTensors gradients = tensors(expected);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    const auto found = host<float>(student.tensors()[i].gradient);
    ASSERT_EQ(found.size(), gradients[i].size()) << i;
    EXPECT_LE(distance(found, gradients[i]), 200 * kEps * norm(gradients[i])) << "tensor " << i;
  }
  // A second batch is added.
  student.gradients({x.data(), p.rows, p.d_model}, {y.data(), p.rows, p.d_model}, weight.data(),
                    total, scales, 0.5, losses.data());
  EXPECT_NEAR(cuda::on_host(losses, stream)[0], 2 * found_losses[0], 1e-12 * found_losses[0]);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    std::vector<float> twice(gradients[i].begin(), gradients[i].end());
    for (float& v : twice) v *= 2;
    EXPECT_LE(distance(host<float>(student.tensors()[i].gradient), twice), 200 * kEps * norm(twice))
        << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Students, CudaDistill,
    testing::Values(StudentCase{"Silu", 37, 12, 30, Activation::Silu, {false, 5, 6, 8, 4}},
                    StudentCase{"Gelu", 20, 8, 300, Activation::GeluTanh, {false, 7, 90, 8, 3}},
                    StudentCase{"AllActive", 20, 8, 12, Activation::Silu, {false, 4, 8, 8, 4}},
                    StudentCase{"NoneActive", 20, 8, 12, Activation::Silu, {false, 4, 0, 8, 4}},
                    StudentCase{"NoneShared", 20, 8, 12, Activation::Silu, {false, 0, 5, 8, 4}},
                    StudentCase{"NoBypass", 20, 8, 12, Activation::Silu, {false, 4, 3, 8, 0}},
                    StudentCase{"OneExpert", 9, 8, 5, Activation::Silu, {false, 4, 1, 1, 1}},
                    StudentCase{"Blocks", 20, 8, 28, Activation::GeluTanh, {false, 4, 2, 8, 4, 4}},
                    StudentCase{"Clones", 20, 8, 12, Activation::Silu, {false, 4, 5, 8, 4, 1, 8}},
                    StudentCase{
                        "ClonesOfBlocks", 20, 8, 16, Activation::Silu, {false, 4, 3, 8, 4, 2, 4}},
                    StudentCase{"FewRows", 4, 8, 12, Activation::Silu, {false, 4, 3, 8, 4}}),
    [](const auto& info) { return std::string(info.param.name); });

class CudaDistillation : public cuda::OnDevice {
 protected:
  static DistillOptions options(double passes, std::int64_t batch) {
    DistillOptions o;
    o.passes = passes;
    o.batch = batch;
    o.learning_rate = o.router_rate = 5e-3;
    o.seed = 7;
    return o;
  }
  static Student on_cpu(LayerCase& c, Student s, const DistillOptions& o) {
    engine::Monitor monitor;
    distill(c.ctx, s, c.sample, o, monitor);
    return s;
  }
  static Student on_gpu(LayerCase& c, Student s, const DistillOptions& o) {
    engine::Monitor monitor;
    cuda_distillation(0)()->distill(c.ctx, s, c.sample, o, monitor);
    return s;
  }
  static bool same_bits(const Student& a, const Student& b) {
    const auto of_a = tensors(a), of_b = tensors(b);
    for (std::size_t i = 0; i < kStudentTensors; ++i) {
      if (of_a[i].size() != of_b[i].size() ||
          std::memcmp(of_a[i].data(), of_b[i].data(), of_a[i].size_bytes()) != 0) {
        return false;
      }
    }
    return true;
  }
};

struct Layer {
  LayerPlan plan;
  double passes;
  std::int64_t batch;
  const char* name;
};

// Whole layers: a step of Adam is the gradient's sign where it is the first, however small the
// gradient, so what rounding leaves of an element is far more than ε, but of few elements: of what
// a tensor moved less than a hundredth.
TEST_F(CudaDistillation, LayersEqualTheCpus) {
  for (const Layer& layer :
       {Layer{{false, 4, 3, 8, 4}, 0, 16, "no step"}, Layer{{false, 4, 3, 8, 4}, 0.36, 16, "one"},
        Layer{{false, 4, 3, 8, 4}, 6, 17, "a batch that does not divide the rows"},
        Layer{{false, 0, 12, 8, 0}, 3, 1000, "all rows a step, all experts, no bypass"},
        Layer{{false, 4, 2, 8, 4, 2}, 4, 16, "blocks"},
        Layer{{false, 4, 4, 8, 4, 1, 8}, 4, 16, "clones"}}) {
    LayerCase c(60, 8, 12, Activation::Silu);
    const auto copy = [&] { return disturbed(c, layer.plan); };
    const Student start = copy();
    const DistillOptions o = options(layer.passes, layer.batch);
    const Student a = on_cpu(c, copy(), o), b = on_gpu(c, copy(), o), again = on_gpu(c, copy(), o);
    EXPECT_TRUE(same_bits(b, again)) << layer.name;
    EXPECT_EQ(same_bits(b, start), layer.passes == 0) << layer.name;
    const auto from = tensors(start), expected = tensors(a), found = tensors(b);
    for (std::size_t i = 0; i < kStudentTensors; ++i) {
      EXPECT_LE(distance(found[i], expected[i]), 0.01 * distance(expected[i], from[i]))
          << layer.name << ", tensor " << i;
    }
  }
}

// Every score is the same: the lowest ids are chosen on both sides, step after step.
TEST_F(CudaDistillation, TiesAreTheCpus) {
  LayerCase c(40, 8, 12, Activation::Silu);
  const auto make = [&] {
    Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 3, 8, 0}, 1e-3);
    std::fill(s.router_u.begin(), s.router_u.end(), 0.0F);
    std::fill(s.router_bias.begin(), s.router_bias.end(), 0.0F);
    return s;
  };
  const Student start = make();
  DistillOptions o = options(1, 30);
  const Student a = on_cpu(c, make(), o), b = on_gpu(c, make(), o);
  const auto from = tensors(start), expected = tensors(a), found = tensors(b);
  // Experts 3 and above never ran.
  EXPECT_EQ(std::memcmp(found[0].data() + 7 * 8, from[0].data() + 7 * 8, 5 * 8 * sizeof(float)), 0);
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    EXPECT_LE(distance(found[i], expected[i]), 0.01 * distance(expected[i], from[i])) << i;
  }
}

// No error on either side: parameters that meet a NaN become NaN.
TEST_F(CudaDistillation, NanSpreadsAsOnTheCpu) {
  LayerCase c(40, 8, 12, Activation::Silu);
  c.x[3] = kNan;
  const auto make = [&] {
    LayerCase sound(40, 8, 12, Activation::Silu);
    return start_from_neurons(sound.ctx, sound.teacher, sound.sample, {false, 4, 3, 8, 4}, 1e-3);
  };
  const Student a = on_cpu(c, make(), options(2, 15)), b = on_gpu(c, make(), options(2, 15));
  for (std::size_t i = 0; i < kStudentTensors; ++i) {
    const auto is_nan = [](float v) { return std::isnan(v); };
    const auto expected = tensors(a)[i], found = tensors(b)[i];
    EXPECT_EQ(std::ranges::count_if(found, is_nan), std::ranges::count_if(expected, is_nan)) << i;
  }
}

TEST_F(CudaDistillation, TellsItsLossAndStopsWhenAsked) {
  struct Watch : engine::Monitor {
    bool cancelled() const override { return steps >= stop; }
    void advance(std::int64_t done, std::string_view note) override {
      steps = done;
      last = note;
    }
    std::int64_t steps = 0, stop = 1 << 20;
    std::string last;
  };
  LayerCase c(60, 8, 12, Activation::Silu);
  const auto make = [&] {
    return start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 4, 8, 0}, 1e-3);
  };
  const DistillOptions o = options(5, 15);
  Watch of_cpu, of_gpu, stopped;
  Student a = make(), b = make(), cut = make();
  distill(c.ctx, a, c.sample, o, of_cpu);
  const auto device = cuda_distillation(0)();
  device->distill(c.ctx, b, c.sample, o, of_gpu);
  EXPECT_EQ(of_gpu.steps, 15);
  EXPECT_EQ(of_gpu.steps, of_cpu.steps);
  EXPECT_EQ(of_gpu.last, of_cpu.last);
  stopped.stop = 8;
  EXPECT_THROW(device->distill(c.ctx, cut, c.sample, o, stopped), Interrupted);
  EXPECT_EQ(stopped.steps, 8);
  // The next layer is none the worse for it.
  Student next = make();
  device->distill(c.ctx, next, c.sample, o, of_gpu);
  EXPECT_TRUE(same_bits(next, b));
}

// What 20 steps more cost is counted (CMakeLists.txt): batches of 15 rows, three a pass.
class CudaDistillSteps : public cuda::OnDevice {
 protected:
  static void run(double passes) {
    LayerCase c(60, 8, 12, Activation::Silu);
    Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 4, 8, 4}, 1e-3);
    DistillOptions o;
    o.passes = passes;
    o.batch = 15;
    engine::Monitor monitor;
    cuda_distillation(0)()->distill(c.ctx, s, c.sample, o, monitor);
  }
};
TEST_F(CudaDistillSteps, Ten) { run(10.0 / 3 + 0.01); }
TEST_F(CudaDistillSteps, Thirty) { run(10); }

TEST_F(CudaDistillation, GapsAreNamed) {
  LayerCase c(20, 8, 12, Activation::Silu);
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 4, 8, 0}, 1e-3);
  c.sample.x = {c.sample.x.data, 10, 8, 16};
  c.sample.y = {c.sample.y.data, 10, 8, 16};
  c.sample.n_fit = 10;
  engine::Monitor monitor;
  EXPECT_THROW(cuda_distillation(0)()->distill(c.ctx, s, c.sample, options(1, 5), monitor),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::converter
