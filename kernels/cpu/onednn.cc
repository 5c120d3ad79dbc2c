#include "kernels/cpu/onednn.h"

#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/quant.h"

namespace moesaic::kernels {
namespace {

/// Our pool's threads are the parallelism: a product inside one of them must not start a team of
/// OpenMP threads. The setting belongs to the calling thread.
void keep_to_this_thread() {
  thread_local const bool once = [] {
    omp_set_num_threads(1);
    return true;
  }();
  (void)once;
}

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::memory::desc matrix(std::int64_t rows, std::int64_t cols, dnnl::memory::data_type type,
                          bool transposed, std::int64_t ld) {
  const dnnl::memory::dims strides =
      transposed ? dnnl::memory::dims{1, ld} : dnnl::memory::dims{ld, 1};
  return {{rows, cols}, type, strides};
}

template <class T>
void multiply(const Gemm& g, dnnl::memory::data_type type, const T* a, const T* b, float* c) {
  using dnnl::memory;
  keep_to_this_thread();
  try {
    const dnnl::engine& engine = cpu_engine();
    const memory::desc a_desc = matrix(g.m, g.k, type, g.trans_a, g.lda);
    const memory::desc b_desc = matrix(g.k, g.n, type, g.trans_b, g.ldb);
    const memory::desc c_desc = matrix(g.m, g.n, memory::data_type::f32, false, g.ldc);
    dnnl::primitive_attr attr;
    if (g.alpha != 1) attr.set_output_scales(0, {g.alpha});
    if (g.accumulate) {
      dnnl::post_ops post;
      post.append_sum();
      attr.set_post_ops(post);
    }
    // Made anew each time; oneDNN keeps the generated code in its own cache.
    const dnnl::matmul product(
        dnnl::matmul::primitive_desc(dnnl::matmul::desc(a_desc, b_desc, c_desc), attr, engine));
    dnnl::stream stream(engine);
    product.execute(stream, {{DNNL_ARG_SRC, memory(a_desc, engine, const_cast<T*>(a))},
                             {DNNL_ARG_WEIGHTS, memory(b_desc, engine, const_cast<T*>(b))},
                             {DNNL_ARG_DST, memory(c_desc, engine, c)}});
    stream.wait();
  } catch (const dnnl::error& e) {
    throw Error(fmt::format("oneDNN: product [{}, {}, {}] failed: {}", g.m, g.n, g.k, e.what()));
  }
}

// oneDNN multiplies bfloat16 only where it has AVX-512 (emulated below the bf16 instructions).
bool has_bf16() {
  static const bool has = [] {
    const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
    const auto least = static_cast<unsigned>(dnnl::cpu_isa::avx512_core);
    return (isa & least) == least;
  }();
  return has;
}

// The same values in float32, row after row; returns the elements from one row to the next.
std::int64_t widen(const std::uint16_t* from, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                   std::vector<float>& to) {
  to.resize(std::max(to.size(), static_cast<std::size_t>(rows * cols)));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < cols; ++i)
      to[static_cast<std::size_t>(r * cols + i)] = bf16_to_f32(from[r * ld + i]);
  }
  return cols;
}

}  // namespace

void gemm_f32(const Gemm& g, const float* a, const float* b, float* c) {
  multiply(g, dnnl::memory::data_type::f32, a, b, c);
}

void gemm_bf16(const Gemm& g, const std::uint16_t* a, const std::uint16_t* b, float* c) {
  if (has_bf16()) return multiply(g, dnnl::memory::data_type::bf16, a, b, c);
  // Scratch of the thread's own, grown to the largest product it has met: who calls need not know.
  thread_local std::vector<float> wide_a;
  thread_local std::vector<float> wide_b;
  Gemm wide = g;
  wide.lda = widen(a, g.trans_a ? g.k : g.m, g.trans_a ? g.m : g.k, g.lda, wide_a);
  wide.ldb = widen(b, g.trans_b ? g.n : g.k, g.trans_b ? g.k : g.n, g.ldb, wide_b);
  multiply(wide, dnnl::memory::data_type::f32, wide_a.data(), wide_b.data(), c);
}

}  // namespace moesaic::kernels
