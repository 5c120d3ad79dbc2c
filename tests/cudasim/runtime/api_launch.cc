#include <algorithm>
#include <cstring>

#include "tests/cudasim/runtime/api.h"

using namespace cudasim;  // the file is all extern "C" functions

namespace cudasim {

cudaError_t make_kernel_work(Runtime& r, const void* function, Dim grid, Dim block, void** args,
                             u64 shared, bool cooperative, Work& work) {
  Kernel* k = r.kernel(function);
  if (k == nullptr) return cudaErrorInvalidDeviceFunction;
  const int device = thread_state().device;
  if (k->module->kernel(k->name) == nullptr) return cudaErrorNoKernelImageForDevice;
  const Program& p = r.program(*k, device);
  if (grid.count() == 0 || block.count() == 0 || block.count() > 1024 || block.z > 64 ||
      grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) {
    return cudaErrorInvalidConfiguration;
  }
  if (p.max_threads != 0 && block.count() > p.max_threads) return cudaErrorLaunchOutOfResources;
  u64 allowed = 48 << 10;
  if (const auto set = k->max_dynamic_shared.find(device); set != k->max_dynamic_shared.end()) {
    allowed = std::max(allowed, set->second + p.declared_shared);
  }
  if (p.declared_shared + shared > allowed) return cudaErrorInvalidValue;
  work.kind = Work::Kind::Kernel;
  work.device = device;
  work.name = p.readable;
  work.kernel = {k, grid, block, shared, std::vector<std::byte>(p.parameter_bytes), cooperative};
  for (std::size_t n = 0; n < p.parameters.size(); ++n) {
    std::memcpy(work.kernel.parameters.data() + p.parameters[n].offset, args[n],
                p.parameters[n].size);
  }
  return cudaSuccess;
}

}  // namespace cudasim

namespace {

Dim dim(dim3 d) { return {d.x, d.y, d.z}; }

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, u64 shared,
                   cudaStream_t stream, bool cooperative = false) {
  return call([&](Runtime& r) {
    Work work;
    const cudaError_t e =
        make_kernel_work(r, function, dim(grid), dim(block), args, shared, cooperative, work);
    return e != cudaSuccess ? e : submit(r, stream, std::move(work));
  });
}

cudaError_t occupancy(const void* function, int threads, u64 dynamic, int* blocks) {
  return call([&](Runtime& r) {
    const Kernel* k = r.kernel(function);
    if (k == nullptr) return cudaErrorInvalidDeviceFunction;
    const Program& p = r.program(*k, thread_state().device);
    const DeviceLimits limits = limits_of(r.config.arch);
    if (threads <= 0) return cudaErrorInvalidValue;
    const u64 shared = p.declared_shared + dynamic + kSharedStart;
    const int by_shared =
        static_cast<int>(static_cast<u64>(limits.shared_per_multiprocessor) / shared);
    const int warps = (threads + kLanes - 1) / kLanes;
    const int by_threads = limits.max_threads_per_multiprocessor / (warps * kLanes);
    *blocks = std::min({limits.max_blocks_per_multiprocessor, by_shared, by_threads});
    return cudaSuccess;
  });
}

}  // namespace

extern "C" {

// What nvcc's start-up code calls.

void** __cudaRegisterFatBinary(void* fat_binary) {
  Runtime& r = Runtime::get();
  const std::lock_guard lock(r.mutex);
  r.modules.push_back(std::make_unique<Module>(fat_binary, r.config.arch));
  return reinterpret_cast<void**>(r.modules.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Runtime& r = Runtime::get();
  const std::lock_guard lock(r.mutex);
  auto k = std::make_unique<Kernel>();
  k->module = reinterpret_cast<Module*>(module);
  k->name = name;
  r.kernels[host] = std::move(k);
}

void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, std::size_t, int,
                       int) {
  Runtime& r = Runtime::get();
  const std::lock_guard lock(r.mutex);
  r.variables[host] = {reinterpret_cast<Module*>(module), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, void* stream) {
  thread_state().pushed.push_back({dim(grid), dim(block), shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  auto& pushed = thread_state().pushed;
  if (pushed.empty()) return cudaErrorMissingConfiguration;
  const auto c = pushed.back();
  pushed.pop_back();
  *grid = {c.grid.x, c.grid.y, c.grid.z};
  *block = {c.block.x, c.block.y, c.block.z};
  *shared = c.shared;
  std::memcpy(stream, &c.stream, sizeof c.stream);
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return call([&](Runtime& r) {
    *kernel = reinterpret_cast<cudaKernel_t>(r.kernel(function));
    return *kernel == nullptr ? cudaErrorInvalidDeviceFunction : cudaSuccess;
  });
}
cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return __cudaGetKernel(kernel, function);
}
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* f, const void* symbol) {
  cudaKernel_t kernel = nullptr;
  const cudaError_t e = __cudaGetKernel(&kernel, symbol);
  *f = reinterpret_cast<cudaFunction_t>(kernel);
  return e;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               std::size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args,
                             std::size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, args, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** args,
                                        std::size_t shared, cudaStream_t stream) {
  int blocks = 0;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (const cudaError_t e = occupancy(function, threads, shared, &blocks)) return e;
  if (dim(grid).count() >
      static_cast<u64>(blocks) * static_cast<u64>(Runtime::get().config.multiprocessors)) {
    return call([](Runtime&) { return cudaErrorCooperativeLaunchTooLarge; });
  }
  return launch(function, grid, block, args, shared, stream, true);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** args) {
  bool cooperative = false;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    const auto& a = config->attrs[k];
    switch (a.id) {
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributePriority:
      case cudaLaunchAttributeAccessPolicyWindow:
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
        break;
      case cudaLaunchAttributeCooperative:
        cooperative = a.val.cooperative != 0;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        break;  // only allows overlap, and nothing overlaps here
      case cudaLaunchAttributeClusterDimension:
        if (a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z <= 1) break;
        [[fallthrough]];
      default:
        std::fprintf(stderr, "cudasim: launch attribute %d%s is not modelled\n",
                     static_cast<int>(a.id),
                     a.id == cudaLaunchAttributeClusterDimension ? " (thread block clusters)" : "");
        return call([](Runtime&) { return cudaErrorNotSupported; });
    }
  }
  if (cooperative) {
    return cudaLaunchCooperativeKernel(function, config->gridDim, config->blockDim, args,
                                       config->dynamicSmemBytes, config->stream);
  }
  return launch(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes,
                config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute a, int value) {
  return call([&](Runtime& r) {
    Kernel* k = r.kernel(function);
    if (k == nullptr) return cudaErrorInvalidDeviceFunction;
    const int device = thread_state().device;
    if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
      const Program& p = r.program(*k, device);
      const auto limit = static_cast<u64>(limits_of(r.config.arch).shared_per_block_optin);
      if (value < 0 || p.declared_shared + static_cast<u64>(value) > limit) {
        return cudaErrorInvalidValue;
      }
      k->max_dynamic_shared[device] = static_cast<u64>(value);
      return cudaSuccess;
    }
    return a == cudaFuncAttributePreferredSharedMemoryCarveout ? cudaSuccess
                                                               : cudaErrorInvalidValue;
  });
}

cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* function) {
  return call([&](Runtime& r) {
    Kernel* k = r.kernel(function);
    if (k == nullptr) return cudaErrorInvalidDeviceFunction;
    if (k->module->kernel(k->name) == nullptr) return cudaErrorNoKernelImageForDevice;
    const int device = thread_state().device;
    const Program& p = r.program(*k, device);
    *a = {};
    a->sharedSizeBytes = p.declared_shared;
    a->localSizeBytes = p.local_bytes;
    a->maxThreadsPerBlock = p.max_threads != 0 ? static_cast<int>(p.max_threads) : 1024;
    a->numRegs = static_cast<int>(std::min(p.live_registers, 255u));
    a->ptxVersion = a->binaryVersion = r.config.arch;
    const auto set = k->max_dynamic_shared.find(device);
    a->maxDynamicSharedSizeBytes = static_cast<int>(
        set != k->max_dynamic_shared.end() ? set->second : (48u << 10) - p.declared_shared);
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetName(const char** name, const void* function) {
  return call([&](Runtime& r) {
    const Kernel* k = r.kernel(function);
    if (k == nullptr) return cudaErrorInvalidDeviceFunction;
    *name = k->name.c_str();
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, std::size_t dynamic) {
  return occupancy(function, threads, dynamic, blocks);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, std::size_t dynamic,
                                                                   unsigned) {
  return occupancy(function, threads, dynamic, blocks);
}
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(std::size_t* bytes, const void* function,
                                                      int blocks, int) {
  return call([&](Runtime& r) {
    const Kernel* k = r.kernel(function);
    if (k == nullptr) return cudaErrorInvalidDeviceFunction;
    if (blocks <= 0) return cudaErrorInvalidValue;
    const DeviceLimits limits = limits_of(r.config.arch);
    const u64 each = std::min<u64>(
        static_cast<u64>(limits.shared_per_multiprocessor) / static_cast<u64>(blocks) -
            kSharedStart,
        static_cast<u64>(limits.shared_per_block_optin));
    const u64 taken = r.program(*k, thread_state().device).declared_shared;
    *bytes = each > taken ? each - taken : 0;
    return cudaSuccess;
  });
}

}  // extern "C"
