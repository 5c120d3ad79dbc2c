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

void Blas::multiply(Bf16Matrix x, Bf16Matrix w, Matrix y, bool accumulate) {
  constexpr std::int64_t kMost = std::numeric_limits<int>::max();
  require<ShapeError>(x.cols == w.cols && y.rows == x.rows && y.cols == w.rows,
                      "cuBLAS: X [{}, {}] by W [{}, {}] into Y [{}, {}], expected Y [{}, {}]",
                      x.rows, x.cols, w.rows, w.cols, y.rows, y.cols, x.rows, w.rows);
  require<ShapeError>(x.rows <= kMost && w.rows <= kMost && x.stride <= kMost &&
                          w.stride <= kMost && y.stride <= kMost,
                      "cuBLAS: X [{}, {}] by W [{}, {}], expected sizes up to {}", x.rows, x.cols,
                      w.rows, w.cols, kMost);
  if (x.rows == 0 || w.rows == 0) return;
  // To cuBLAS our rows are columns: Yᵀ [rows, n] = W Xᵀ.
  const float one = 1, before = accumulate ? 1 : 0;
  check(Library::get().gemm(handle_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(w.rows),
                            static_cast<int>(x.rows), static_cast<int>(x.cols), &one, w.data,
                            CUDA_R_16BF, static_cast<int>(w.stride), x.data, CUDA_R_16BF,
                            static_cast<int>(x.stride), &before, y.data, CUDA_R_32F,
                            static_cast<int>(y.stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "product");
}

}  // namespace moesaic::cuda
