#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/top_k.cuh"
#include "kernels/cuda/training/experts.h"
#include "kernels/cuda/training/reduce.cuh"
#include "kernels/cuda/training/slopes.cuh"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block a row.
__global__ void __launch_bounds__(kThreads)
    choose_experts_kernel(const float* bias, std::int64_t n_experts, std::int64_t k, float* scores,
                          std::int32_t* ids, std::uint8_t* mask) {
  __shared__ TopKShared shared;
  const std::int64_t t = blockIdx.x;
  scores += t * n_experts;
  mask += t * n_experts;
  ids += t * k;
  for (std::int64_t e = threadIdx.x; e < n_experts; e += kThreads) {
    scores[e] += bias[e];
    mask[e] = 0;
  }
  // Has a barrier before it reads the scores, and one at its end.
  block_top_k(scores, n_experts, k, ids, shared);
  for (std::int64_t j = threadIdx.x; j < k; j += kThreads) mask[ids[j]] = 1;
}

// A warp a row.
__global__ void __launch_bounds__(kThreads) row_norms_kernel(ConstMatrix w, float* norm) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t i = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (i >= w.rows) return;
  const float* row = w.data + i * w.cols;
  float square = 0;
  for (std::int64_t j = lane; j < w.cols; j += kWarp) square += row[j] * row[j];
  square = warp_sum(square);
  if (lane == 0) norm[i] = sqrtf(square);
}

// Whether the expert answers for its family: the first of those with the largest score.
__device__ bool answers(const ExpertNeurons& e, const float* scores, std::int64_t expert) {
  if (e.family == nullptr || e.family[expert] < 0) return true;
  const std::int32_t begin = e.begin[e.family[expert]], end = e.begin[e.family[expert] + 1];
  std::int32_t winner = e.members[begin];
  for (std::int32_t j = begin + 1; j < end; ++j) {
    if (scores[winner] < scores[e.members[j]]) winner = e.members[j];
  }
  return winner == expert;
}

// A block a token, a thread an expert at a time. The slopes may stand where the products do.
template <class T>
__global__ void __launch_bounds__(kThreads, min_blocks(kWarps))
    expert_slopes_kernel(ExpertNeurons neurons, ConstMatrix gate, ConstMatrix up,
                         ConstMatrix all_scores, const std::uint8_t* mask, ExpertTape<T> tape) {
  __shared__ double sums[kWarps];
  const std::int64_t t = blockIdx.x, n_experts = all_scores.cols;
  const std::int64_t row = t * gate.cols, expert_row = t * n_experts;
  const float* scores = all_scores.data + expert_row;
  for (std::int64_t i = threadIdx.x; i < neurons.n_shared; i += kThreads) {
    float a, slope;
    value_and_slope(neurons.phi, gate.data[row + i], &a, &slope);
    const float u = up.data[row + i];
    store(a * u, tape.f + row + i);
    store(slope * u, tape.slope_gate + row + i);
    store(a, tape.slope_up + row + i);
  }
  double squared = 0;
  for (std::int64_t e = threadIdx.x; e < n_experts; e += kThreads) {
    const float on = mask[expert_row + e];
    const std::int64_t first = neurons.n_shared + e * neurons.block;
    double length = 0;
    for (std::int64_t i = first; i < first + neurons.block; ++i) {
      float a, slope;
      value_and_slope(neurons.phi, gate.data[row + i], &a, &slope);
      const float u = up.data[row + i], centred = a * u - neurons.mean[i];
      store(on * centred, tape.f + row + i);
      store(on * (slope * u), tape.slope_gate + row + i);
      store(on * a, tape.slope_up + row + i);
      if (tape.centred != nullptr) store(centred, tape.centred + expert_row + e);
      const double part = fabsf(centred) * neurons.norm[i];
      length = neurons.block == 1 ? part : length + part * part;
    }
    float c = static_cast<float>(neurons.block == 1 ? length : sqrt(length));
    if (!answers(neurons, scores, e)) c = 0;
    const float gap = scores[e] - c;
    squared += static_cast<double>(gap) * gap;
    store(gap, tape.gap + expert_row + e);
  }
  squared = block_sum_of_doubles(squared, sums);
  if (threadIdx.x == 0) tape.squared_gap[t] = squared;
}

// A block a row.
__global__ void __launch_bounds__(kThreads)
    gate_slopes_kernel(ConstMatrix all_scores, const std::uint8_t* mask, float width,
                       std::uint16_t* kappa) {
  __shared__ float partial[kWarps];
  const std::int64_t n = all_scores.cols, row = blockIdx.x * n;
  const float* scores = all_scores.data + row;
  float least_chosen = INFINITY, below = -INFINITY, sum = 0, square = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float s = scores[i];
    sum += s;
    square += s * s;
    if (mask[row + i] != 0) {
      least_chosen = fminf(least_chosen, s);
    } else {
      below = fmaxf(below, s);
    }
  }
  least_chosen = -block_max(-least_chosen, partial);
  below = block_max(below, partial);
  sum = block_sum(sum, partial);
  square = block_sum(square, partial);
  const auto count = static_cast<float>(n);
  const float variance = fmaxf(0.0f, square / count - sum / count * (sum / count));
  const float w = fmaxf(1e-20f, width * sqrtf(variance));
  const float threshold = (least_chosen + below) / 2;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    store(fmaxf(0.0f, 1 - fabsf(scores[i] - threshold) / w) / w, kappa + row + i);
  }
}

// A block a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    score_gradients_kernel(const float* weight, double unit, StraightThrough gate,
                           MatrixView<T> gap) {
  __shared__ float partial[kWarps];
  const std::int64_t t = blockIdx.x, row = t * gap.cols;
  const float factor = static_cast<float>(unit * weight[t]);
  float mean = 0;
  const auto effect = [&](std::int64_t i) {
    return gate.df[t * gate.df_stride + i] * value_of(gate.centred[row + i]);
  };
  if (gate.share != 0) {
    float sum = 0, weighted = 0;
    for (std::int64_t i = threadIdx.x; i < gap.cols; i += kThreads) {
      const float kappa = value_of(gate.kappa[row + i]);
      sum += kappa;
      weighted += kappa * effect(i);
    }
    sum = block_sum(sum, partial);
    weighted = block_sum(weighted, partial);
    mean = sum > 0 ? weighted / sum : 0;
  }
  for (std::int64_t i = threadIdx.x; i < gap.cols; i += kThreads) {
    float slope = value_of(gap.data[row + i]) * factor;
    if (gate.share != 0) slope += gate.share * value_of(gate.kappa[row + i]) * (effect(i) - mean);
    store(slope, gap.data + row + i);
  }
}

// A block a row.
__global__ void __launch_bounds__(kThreads)
    output_gradients_kernel(const float* bias, ConstMatrix y, const float* weight, double unit,
                            float* y_hat, double* squared) {
  __shared__ double sums[kWarps];
  const std::int64_t t = blockIdx.x, row = t * y.cols;
  const double factor = unit * weight[t];
  double part = 0;
  for (std::int64_t j = threadIdx.x; j < y.cols; j += kThreads) {
    const float gap = y_hat[row + j] + bias[j] - y.data[row + j];
    part += static_cast<double>(gap) * gap;
    y_hat[row + j] = static_cast<float>(factor * gap);
  }
  part = block_sum_of_doubles(part, sums);
  if (threadIdx.x == 0) squared[t] = part;
}

__global__ void __launch_bounds__(kThreads)
    add_weighted_kernel(const double* values, const float* weight, std::int64_t n, double unit,
                        double* total) {
  __shared__ double sums[kWarps];
  double part = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) part += values[i] * weight[i];
  const double sum = block_sum_of_doubles(part, sums);
  if (threadIdx.x == 0) *total += unit * sum;
}

// A block 32 columns, a lane each; warp w takes the rows w, w + 8, ….
template <class T>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(MatrixView<const T> m, float* sums) {
  __shared__ float parts[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t j = std::int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0;
  for (std::int64_t t = warp; t < m.rows && j < m.cols; t += kWarps) {
    sum += value_of(m.data[t * m.cols + j]);
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || j >= m.cols) return;
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  sums[j] += sum;
}

__global__ void __launch_bounds__(kThreads) add_bias_kernel(const float* bias, Matrix m) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < m.rows * m.cols) m.data[i] += bias[i % m.cols];
}

// A warp a row.
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const float* from, const std::int32_t* ids, Matrix to) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t t = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (t >= to.rows) return;
  const float* row = from + ids[t] * to.cols;
  for (std::int64_t j = lane; j < to.cols; j += kWarp) to.data[t * to.cols + j] = row[j];
}

// A warp a row.
__global__ void __launch_bounds__(kThreads)
    token_weights_kernel(ConstMatrix r, ConstMatrix y, float* weight) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t t = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (t >= r.rows) return;
  const auto square = [&](const float* row) {
    float sum = 0;
    for (std::int64_t j = lane; j < r.cols; j += kWarp) sum += row[j] * row[j];
    return warp_sum(sum) + 1e-20f;
  };
  float w = 1 / square(r.data + t * r.cols);
  if (y.data != nullptr) w *= static_cast<float>(r.cols) / square(y.data + t * r.cols);
  if (lane == 0) weight[t] = w;
}

__global__ void __launch_bounds__(kThreads) mean_one_kernel(float* weight, std::int64_t n) {
  __shared__ double sums[kWarps];
  __shared__ float scale;
  double part = 0;
  for (std::int64_t t = threadIdx.x; t < n; t += kThreads) part += weight[t];
  const double total = block_sum_of_doubles(part, sums);
  if (threadIdx.x == 0) scale = static_cast<float>(static_cast<double>(n) / total);
  __syncthreads();
  for (std::int64_t t = threadIdx.x; t < n; t += kThreads) weight[t] *= scale;
}

unsigned blocks(std::int64_t n, std::int64_t of) { return static_cast<unsigned>(ceil_div(n, of)); }
unsigned blocks(std::int64_t n) { return static_cast<unsigned>(n); }

template <class T>
void require_no_gaps(const char* op, MatrixView<T> m) {
  require<ShapeError>(m.rows <= 1 || m.stride == m.cols,
                      "{}: [{}, {}] in rows of {}, expected no gaps", op, m.rows, m.cols, m.stride);
}

template <class T>
void launch_expert_slopes(const ExpertNeurons& neurons, ConstMatrix gate, ConstMatrix up,
                          ConstMatrix scores, const std::uint8_t* mask, const ExpertTape<T>& tape,
                          StreamHandle stream) {
  require<ShapeError>(
      gate.rows == up.rows && gate.cols == up.cols && scores.rows == gate.rows &&
          gate.cols == neurons.n_shared + neurons.block * scores.cols,
      "expert_slopes: gate is [{}, {}], up [{}, {}], scores [{}, {}], expected one row a token, "
      "{} shared neurons and {} an expert",
      gate.rows, gate.cols, up.rows, up.cols, scores.rows, scores.cols, neurons.n_shared,
      neurons.block);
  require<ShapeError>(tape.centred == nullptr || neurons.block == 1,
                      "expert_slopes: experts of {} neurons, expected one", neurons.block);
  for (const ConstMatrix& m : {gate, up, scores}) require_no_gaps("expert_slopes", m);
  if (gate.rows == 0) return;
  expert_slopes_kernel<<<blocks(gate.rows), kThreads, 0, stream>>>(neurons, gate, up, scores, mask,
                                                                   tape);
  check_launch("expert_slopes");
}

template <class T>
void launch_score_gradients(const float* weight, double unit, const StraightThrough& gate,
                            MatrixView<T> gap, StreamHandle stream) {
  require_no_gaps("score_gradients", gap);
  if (gap.rows == 0) return;
  score_gradients_kernel<<<blocks(gap.rows), kThreads, 0, stream>>>(weight, unit, gate, gap);
  check_launch("score_gradients");
}

template <class T>
void launch_add_rows(MatrixView<const T> m, float* sums, StreamHandle stream) {
  require_no_gaps("add_rows", m);
  if (m.rows == 0 || m.cols == 0) return;
  add_rows_kernel<<<blocks(m.cols, kWarp), kThreads, 0, stream>>>(m, sums);
  check_launch("add_rows");
}

}  // namespace

void choose_experts(const float* bias, std::int64_t k, Matrix scores, std::int32_t* ids,
                    std::uint8_t* mask, StreamHandle stream) {
  require<ShapeError>(k >= 0 && k <= scores.cols, "choose_experts: k is {}, expected 0 to {}", k,
                      scores.cols);
  require_no_gaps("choose_experts", scores);
  if (scores.rows == 0) return;
  choose_experts_kernel<<<blocks(scores.rows), kThreads, 0, stream>>>(bias, scores.cols, k,
                                                                      scores.data, ids, mask);
  check_launch("choose_experts");
}

void row_norms(ConstMatrix w, float* norm, StreamHandle stream) {
  require_no_gaps("row_norms", w);
  if (w.rows == 0) return;
  row_norms_kernel<<<blocks(w.rows, kWarps), kThreads, 0, stream>>>(w, norm);
  check_launch("row_norms");
}

void expert_slopes(const ExpertNeurons& neurons, ConstMatrix gate, ConstMatrix up,
                   ConstMatrix scores, const std::uint8_t* mask, const ExpertTape<float>& tape,
                   StreamHandle stream) {
  launch_expert_slopes(neurons, gate, up, scores, mask, tape, stream);
}

void expert_slopes(const ExpertNeurons& neurons, ConstMatrix gate, ConstMatrix up,
                   ConstMatrix scores, const std::uint8_t* mask,
                   const ExpertTape<std::uint16_t>& tape, StreamHandle stream) {
  launch_expert_slopes(neurons, gate, up, scores, mask, tape, stream);
}

void gate_slopes(ConstMatrix scores, const std::uint8_t* mask, float width, std::uint16_t* kappa,
                 StreamHandle stream) {
  require_no_gaps("gate_slopes", scores);
  if (scores.rows == 0) return;
  gate_slopes_kernel<<<blocks(scores.rows), kThreads, 0, stream>>>(scores, mask, width, kappa);
  check_launch("gate_slopes");
}

void score_gradients(const float* weight, double unit, MatrixView<float> gap, StreamHandle stream) {
  launch_score_gradients(weight, unit, {}, gap, stream);
}

void score_gradients(const float* weight, double unit, const StraightThrough& gate,
                     MatrixView<std::uint16_t> gap, StreamHandle stream) {
  launch_score_gradients(weight, unit, gate, gap, stream);
}

void output_gradients(const float* bias, ConstMatrix y, const float* weight, double unit,
                      Matrix y_hat, double* squared, StreamHandle stream) {
  require<ShapeError>(y.rows == y_hat.rows && y.cols == y_hat.cols,
                      "output_gradients: y is [{}, {}], what is given for it [{}, {}], expected "
                      "the same shape",
                      y.rows, y.cols, y_hat.rows, y_hat.cols);
  require_no_gaps("output_gradients", y);
  require_no_gaps("output_gradients", y_hat);
  if (y.rows == 0) return;
  output_gradients_kernel<<<blocks(y.rows), kThreads, 0, stream>>>(bias, y, weight, unit,
                                                                   y_hat.data, squared);
  check_launch("output_gradients");
}

void add_weighted(const double* values, const float* weight, std::int64_t n, double unit,
                  double* total, StreamHandle stream) {
  add_weighted_kernel<<<1, kThreads, 0, stream>>>(values, weight, n, unit, total);
  check_launch("add_weighted");
}

void add_rows(ConstMatrix m, float* sums, StreamHandle stream) { launch_add_rows(m, sums, stream); }

void add_rows(MatrixView<const std::uint16_t> m, float* sums, StreamHandle stream) {
  launch_add_rows(m, sums, stream);
}

void add_bias(const float* bias, Matrix m, StreamHandle stream) {
  require_no_gaps("add_bias", m);
  if (m.rows == 0 || m.cols == 0) return;
  add_bias_kernel<<<blocks(m.rows * m.cols, kThreads), kThreads, 0, stream>>>(bias, m);
  check_launch("add_bias");
}

void gather_rows(ConstMatrix from, const std::int32_t* ids, Matrix to, StreamHandle stream) {
  require<ShapeError>(from.cols == to.cols, "gather_rows: rows of {} into rows of {}", from.cols,
                      to.cols);
  require_no_gaps("gather_rows", from);
  require_no_gaps("gather_rows", to);
  if (to.rows == 0) return;
  gather_rows_kernel<<<blocks(to.rows, kWarps), kThreads, 0, stream>>>(from.data, ids, to);
  check_launch("gather_rows");
}

void token_weights(ConstMatrix r, ConstMatrix y, float* weight, StreamHandle stream) {
  require_no_gaps("token_weights", r);
  require_no_gaps("token_weights", y);
  if (r.rows == 0) return;
  token_weights_kernel<<<blocks(r.rows, kWarps), kThreads, 0, stream>>>(r, y, weight);
  check_launch("token_weights");
  mean_one_kernel<<<1, kThreads, 0, stream>>>(weight, r.rows);
  check_launch("token_weights, mean");
}

}  // namespace moesaic::cuda
