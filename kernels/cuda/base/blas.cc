#include "kernels/cuda/base/blas.h"

#include <cublas_v2.h>
#include <dlfcn.h>

#include <limits>
#include <string>

#include "kernels/base/error.h"

namespace moesaic::cuda {
namespace {

constexpr std::size_t kWorkspace = 32 << 20;  // NVIDIA's advice for sm_90; 4 MiB elsewhere

// The functions of libcublas.so.N, for as long as the program runs.
class Library {
 public:
  static const Library& get() {
    static const Library library;
    return library;
  }

  decltype(&cublasCreate_v2) create;
  decltype(&cublasDestroy_v2) destroy;
  decltype(&cublasSetStream_v2) set_stream;
  decltype(&cublasSetWorkspace_v2) set_workspace;
  // cublasGemmEx has overloads in C++; this is the library's.
  cublasStatus_t (*gemm)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                         const void*, const void*, cudaDataType, int, const void*, cudaDataType,
                         int, const void*, void*, cudaDataType, int, cublasComputeType_t,
                         cublasGemmAlgo_t);
  cublasStatus_t (*gemm_batch)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                               const void*, const void*, cudaDataType, int, long long, const void*,
                               cudaDataType, int, long long, const void*, void*, cudaDataType, int,
                               long long, int, cublasComputeType_t, cublasGemmAlgo_t);
  decltype(&cublasGetStatusString) status_string;

 private:
  Library() {
    const std::string name = fmt::format("libcublas.so.{}", CUBLAS_VER_MAJOR);
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    require<DeviceError>(library != nullptr, "cuda: cuBLAS is needed: {}", dlerror_text());
    const auto load = [&]<class Fn>(Fn& fn, const char* symbol) {
      fn = reinterpret_cast<Fn>(dlsym(library, symbol));
      require<DeviceError>(fn != nullptr, "cuda: {} lacks {}", name, symbol);
    };
    load(create, "cublasCreate_v2");
    load(destroy, "cublasDestroy_v2");
    load(set_stream, "cublasSetStream_v2");
    load(set_workspace, "cublasSetWorkspace_v2");
    load(gemm, "cublasGemmEx");
    load(gemm_batch, "cublasGemmStridedBatchedEx");
    load(status_string, "cublasGetStatusString");
  }
  static std::string dlerror_text() {
    const char* text = dlerror();
    return text == nullptr ? "" : text;
  }
};

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw DeviceError(
      fmt::format("cuda: cuBLAS: {}: {}", what, Library::get().status_string(status)));
}

}  // namespace

Blas::Blas(const Stream& stream) : workspace_(kWorkspace) {
  const Library& library = Library::get();
  check(library.create(&handle_), "start");
  try {
    // The stream first: setting it takes the workspace away.
    check(library.set_stream(handle_, stream), "stream");
    check(library.set_workspace(handle_, workspace_.data(), workspace_.size()), "workspace");
  } catch (...) {
    library.destroy(handle_);
    throw;
  }
}

Blas::~Blas() { Library::get().destroy(handle_); }

namespace {

// Sizes of C = op(A) op(B) as cuBLAS counts them: to it our rows are columns, so that it is given
// Cᵀ = op(B)ᵀ op(A)ᵀ, [n, m].
struct Sizes {
  int m, n, k, lda, ldb, ldc;
};

template <class T>
Sizes sizes(bool trans_a, bool trans_b, MatrixView<const T> a, MatrixView<const T> b, Matrix c) {
  const std::int64_t m = trans_a ? a.cols : a.rows, k = trans_a ? a.rows : a.cols;
  const std::int64_t n = trans_b ? b.rows : b.cols;
  require<ShapeError>((trans_b ? b.cols : b.rows) == k && c.rows == m && c.cols == n,
                      "cuBLAS: [{}, {}]{} by [{}, {}]{} into [{}, {}], expected [{}, {}]", a.rows,
                      a.cols, trans_a ? "ᵀ" : "", b.rows, b.cols, trans_b ? "ᵀ" : "", c.rows,
                      c.cols, m, n);
  constexpr std::int64_t kMost = std::numeric_limits<int>::max();
  for (const std::int64_t size : {m, n, k, a.stride, b.stride, c.stride}) {
    require<ShapeError>(size <= kMost, "cuBLAS: a size of {}, expected up to {}", size, kMost);
  }
  const auto as_int = [](std::int64_t v) { return static_cast<int>(v); };
  return {as_int(m), as_int(n), as_int(k), as_int(a.stride), as_int(b.stride), as_int(c.stride)};
}

cublasOperation_t operation(bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

}  // namespace

void Blas::multiply(Bf16Matrix x, Bf16Matrix w, Matrix y, bool accumulate) {
  multiply(false, true, x, w, accumulate, y);
}

void Blas::multiply(bool trans_a, bool trans_b, Bf16Matrix a, Bf16Matrix b, bool accumulate,
                    Matrix c) {
  const Sizes s = sizes(trans_a, trans_b, a, b, c);
  if (s.m == 0 || s.n == 0) return;
  const float one = 1, before = accumulate ? 1 : 0;
  check(Library::get().gemm(handle_, operation(trans_b), operation(trans_a), s.n, s.m, s.k, &one,
                            b.data, CUDA_R_16BF, s.ldb, a.data, CUDA_R_16BF, s.lda, &before, c.data,
                            CUDA_R_32F, s.ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "product");
}

void Blas::multiply(bool trans_a, bool trans_b, ConstMatrix a, ConstMatrix b, bool accumulate,
                    Matrix c) {
  multiply_batch(1, trans_a, trans_b, 1, {a}, {b}, accumulate, {c});
}

void Blas::multiply_batch(std::int64_t n, bool trans_a, bool trans_b, float alpha,
                          Batch<const float> a, Batch<const float> b, bool accumulate,
                          Batch<float> c) {
  const Sizes s = sizes(trans_a, trans_b, a.first, b.first, c.first);
  if (n == 0 || s.m == 0 || s.n == 0) return;
  const float before = accumulate ? 1 : 0;
  check(Library::get().gemm_batch(handle_, operation(trans_b), operation(trans_a), s.n, s.m, s.k,
                                  &alpha, b.first.data, CUDA_R_32F, s.ldb, b.step, a.first.data,
                                  CUDA_R_32F, s.lda, a.step, &before, c.first.data, CUDA_R_32F,
                                  s.ldc, c.step, static_cast<int>(n), CUBLAS_COMPUTE_32F,
                                  CUBLAS_GEMM_DEFAULT),
        "products");
}

}  // namespace moesaic::cuda
