#include <dlfcn.h>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/prompt_attention.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/secret_moe.h"
#include "tests/kernels/cuda/attention_case.h"
#include "tests/kernels/cuda/device_layer.h"
#include "tests/kernels/cuda/device_self_routed.h"
#include "tests/reference/self_routed.h"

namespace moesaic::cuda {
namespace {

// What decode runs, once, at the sizes of SmolLM2-135M. Each states what its algorithm must move;
// traffic.cmake compares that with what the stand-in has counted (docs/cudasim.md).
class Traffic : public OnDevice {
 protected:
  // Stated for one kernel of the test; the check sums over all.
  void state_minimum(const char* kernel, std::int64_t bytes) {
    auto* state = reinterpret_cast<void (*)(const char*, std::uint64_t)>(
        dlsym(RTLD_DEFAULT, "cudasim_minimum_bytes"));
    if (state != nullptr) state(kernel, static_cast<std::uint64_t>(bytes));
  }
  void run_linear(DType dtype, std::int64_t rows, std::int64_t cols) {
    const Packed w(dtype, rows, cols, 1);
    const DeviceWeights weights(w.view(), stream);
    const DeviceMatrix x(normal_values(size(cols), 2), 1, cols, stream), y(1, rows);
    linear({weights.view(), x.view(), nullptr, y.view()}, stream);
    state_minimum("linear_kernel", w.view().bytes() + 4 * (rows + cols));
  }
};

TEST_F(Traffic, LinearBF16) { run_linear(DType::BF16, 576, 576); }
TEST_F(Traffic, LinearQ8_0) { run_linear(DType::Q8_0, 576, 1536); }
TEST_F(Traffic, LinearQ4_0) { run_linear(DType::Q4_0, 576, 1536); }
TEST_F(Traffic, LinearQ4_1) { run_linear(DType::Q4_1, 576, 576); }
TEST_F(Traffic, LinearQ4_K) { run_linear(DType::Q4_K, 576, 2048); }
TEST_F(Traffic, LinearQ6_K) { run_linear(DType::Q6_K, 576, 2048); }

// What prompts run beside cuBLAS, whose own traffic nothing counts: a matrix unpacked to bfloat16,
// X rounded to it.
class TrafficGemm : public Traffic {
 protected:
  void run(DType dtype) {
    constexpr std::int64_t kRows = 192, kCols = 1536, kTokens = 80;
    const Packed w(dtype, kRows, kCols, 1);
    const DeviceWeights weights(w.view(), stream);
    const DeviceMatrix x(normal_values(size(kTokens * kCols), 2), kTokens, kCols, stream),
        y(kTokens, kRows);
    const DeviceBuffer<std::byte> workspace(gemm_workspace(kTokens, kCols, kRows * kCols));
    Blas blas(stream);
    gemm(blas, {weights.view(), x.view(), nullptr, y.view()}, {workspace.data(), workspace.size()},
         stream);
    state_minimum("round_kernel", w.view().bytes() + 2 * kRows * kCols + 6 * kTokens * kCols);
  }
};

TEST_F(TrafficGemm, Q4_1) { run(DType::Q4_1); }
TEST_F(TrafficGemm, Q6_K) { run(DType::Q6_K); }

// Keys and values are in a cache after a block has first read them; counted is what DRAM must move.
class TrafficPromptAttention : public Traffic {
 protected:
  void run(int n_heads, int n_kv_heads, int head_dim) {
    AttentionCase c{.n_heads = n_heads, .n_kv_heads = n_kv_heads, .head_dim = head_dim};
    c.slots.assign(200, 0);
    c.positions.resize(200);
    for (std::size_t i = 0; i < 200; ++i) c.positions[i] = static_cast<std::int32_t>(i);
    c.capacity = 200;
    const AttentionOperands operands(c, stream);
    const DeviceMatrix out(200, operands.cols());
    prompt_attention(operands.q(), operands.places(), operands.cache(), operands.shape(),
                     out.view(), stream);
    // That of filling the cache first, too: k, v, their copies, slots, positions.
    const std::int64_t cache = 2 * 4 * 200 * operands.row(), places = 2 * 4 * 200;
    state_minimum("prompt_attention_kernel",
                  2 * cache + places + cache + places + 2 * 4 * 200 * operands.cols());
  }
};

TEST_F(TrafficPromptAttention, SmolLM2) { run(9, 3, 64); }
TEST_F(TrafficPromptAttention, Gemma) { run(4, 1, 256); }

// One row of logits, read once; blocks tell each other little.
class TrafficSample : public Traffic {
 protected:
  void run(std::int64_t vocab_size, const kernels::Draw& draw) {
    const DeviceMatrix logits(normal_values(size(vocab_size), 1, 3), 1, vocab_size, stream);
    const auto draws = on_device(std::vector<kernels::Draw>{draw}, stream);
    const DeviceBuffer<std::int32_t> ids(1);
    const DeviceBuffer<std::byte> workspace(sample_workspace(1));
    zero_bytes(workspace.data(), workspace.size(), stream);
    sample(logits.view(), draws.data(), ids.data(), workspace.data(), stream);
    state_minimum("sample_kernel", 4 * vocab_size + 24 + 4);
  }
  static constexpr kernels::Draw kTopK{0.8F, 40, 0.95F, 0.05F, 0.3}, kAll{0.8F, 0, 1, 0, 0.3};
};

TEST_F(TrafficSample, Greedy) { run(49152, {}); }
// Counted, not checked: few stores (counts, candidates) and the search of a part's runs do not fill
// the sectors that they touch.
TEST_F(TrafficSample, TopK) { run(49152, kTopK); }
TEST_F(TrafficSample, Whole) { run(49152, kAll); }
TEST_F(TrafficSample, GemmaTopK) { run(262144, kTopK); }

// Bytes of the sectors that [begin, end) touches.
std::int64_t sector_bytes(std::int64_t begin, std::int64_t end) {
  return ((end + 31) / 32 - begin / 32) * 32;
}

// 128 shared and 256 of 1,408 experts. A neuron is one run of the file's rows, which begins where
// it begins: DRAM moves the sectors that it touches.
TEST_F(Traffic, SecretMoe) {
  const kernels::MoeLayer host({.experts = DType::Q4_1,
                                .router = DType::Q8_0,
                                .d_model = 576,
                                .n_shared = 128,
                                .n_experts = 1408,
                                .n_active = 256,
                                .router_rank = 64,
                                .bypass_rank = 64});
  const DeviceLayer layer(host, stream);
  const auto& v = host.view;
  const auto workspace = zeroed_workspace(layer, stream);
  const DeviceMatrix x(normal_values(576, 10), 1, 576, stream), y(1, 576);
  const DeviceBuffer<std::int32_t> ids(256);
  secret_moe_token(layer.view, x.view(), y.view(), ids.data(), workspace.data(), stream);
  std::int64_t minimum = v.router_v.bytes() + v.router_u.bytes() + v.bypass_q.bytes() +
                         v.bypass_p.bytes() + v.shared.bytes();
  for (const std::int64_t id : on_host(ids, stream)) {
    minimum += sector_bytes(3 * id * v.experts.row_bytes(), 3 * (id + 1) * v.experts.row_bytes());
  }
  const std::int64_t floats = v.n_experts() + v.n_active + 3 * 576;  // c, μ, b, x, y
  state_minimum("neurons_kernel", minimum + 4 * floats);
}

// Half of the inputs, half of the neurons routed, a third kept or so. A column is a run of its
// panel's codes, a unit's scales come with the first of its columns, a row begins where it begins.
class TrafficSelfRouted : public Traffic {
 protected:
  void run(bool up_by_input) {
    constexpr std::int64_t kModel = 576, kFf = 1536;
    const kernels::SelfRoutedLayer host(
        {.d_model = kModel, .d_ff = kFf, .up_by_input = up_by_input, .packed = false});
    const DeviceSelfRouted layer(host.view, stream);
    const auto workspace = zeroed_workspace(layer, stream);
    const std::vector<float> values = normal_values(kModel, 10);
    const DeviceMatrix x(values, 1, kModel, stream), y(1, kModel);
    self_routed(layer.view, x.view(), y.view(), workspace.data(), stream);

    constexpr reference::Precision kExact{.sum = 32 * kEps};
    const auto lists = reference::self_routed(host.view, ConstMatrix(values.data(), 1, kModel),
                                              kExact, kExact, kExact);
    const auto columns = [](const std::vector<std::int64_t>& ids, const WeightView& w) {
      const ColumnPanels layout = column_panels(w);
      std::int64_t bytes = std::ssize(ids) * layout.column_bytes;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        if (i == 0 || ids[i] / 32 != ids[i - 1] / 32) bytes += layout.scale_bytes;
      }
      return layout.n_panels * bytes;
    };
    std::int64_t minimum =
        columns(lists.inputs[0], host.view.w_gate) + columns(lists.kept[0], host.view.w_down);
    if (up_by_input) {
      minimum += columns(lists.inputs[0], host.view.w_up);
    } else {
      const std::int64_t row = host.view.w_up.row_bytes();
      for (const std::int64_t i : lists.routed[0]) minimum += sector_bytes(i * row, (i + 1) * row);
    }
    EXPECT_LT(minimum, (host.view.w_gate.bytes() * 3) * 7 / 10);
    const std::int64_t floats = 3 * kModel + (up_by_input ? 1 : 2) * kFf;  // thresholds, x, y
    state_minimum("gate_up_kernel", minimum + 4 * floats);
  }
};

TEST_F(TrafficSelfRouted, ByGate) { run(false); }
TEST_F(TrafficSelfRouted, ByInput) { run(true); }

// Beside cuBLAS: each matrix unpacked once, x read once and rounded, gate and up sums to h.
class TrafficSelfRoutedBatch : public Traffic {
 protected:
  void run(DType dtype, bool up_by_input) {
    constexpr std::int64_t kModel = 576, kFf = 1536, kTokens = 80;
    const kernels::SelfRoutedLayer host({.gate = dtype,
                                         .up = dtype,
                                         .down = dtype,
                                         .d_model = kModel,
                                         .d_ff = kFf,
                                         .up_by_input = up_by_input,
                                         .packed = false});
    const DeviceSelfRouted layer(host.view, stream);
    const DeviceBuffer<std::byte> workspace(self_routed_batch_workspace(layer.view, kTokens));
    const DeviceMatrix x(normal_values(size(kTokens * kModel), 10), kTokens, kModel, stream),
        y(kTokens, kModel);
    Blas blas(stream);
    self_routed_batch(blas, layer.view, x.view(), y.view(), workspace.data(), stream);
    const std::int64_t weights = 3 * host.view.w_gate.bytes() + 3 * 2 * kModel * kFf;
    const std::int64_t inputs = kTokens * kModel * (4 + (up_by_input ? 2 : 4)) + 4 * kModel;
    const std::int64_t hidden = kTokens * kFf * (8 + 2) + 4 * kFf * (up_by_input ? 1 : 2);
    state_minimum("hidden_kernel", weights + inputs + hidden);
  }
};

TEST_F(TrafficSelfRoutedBatch, Q4_1ByGate) { run(DType::Q4_1, false); }
TEST_F(TrafficSelfRoutedBatch, Q4_0ByInput) { run(DType::Q4_0, true); }
TEST_F(TrafficSelfRoutedBatch, Q8_0ByInput) { run(DType::Q8_0, true); }
TEST_F(TrafficSelfRoutedBatch, BF16ByInput) { run(DType::BF16, true); }
TEST_F(TrafficSelfRoutedBatch, F32ByGate) { run(DType::F32, false); }

}  // namespace
}  // namespace moesaic::cuda
