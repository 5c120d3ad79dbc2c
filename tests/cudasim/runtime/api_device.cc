#include <algorithm>
#include <cstring>

#include "tests/cudasim/runtime/api.h"

using namespace cudasim;  // the file is all extern "C" functions

namespace cudasim {

// CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
DeviceLimits limits_of(int arch) {
  switch (arch) {
    case 80:
      return {163 << 10, 164 << 10, 2048, 32};
    case 86:
      return {99 << 10, 100 << 10, 1536, 16};
    case 89:
      return {99 << 10, 100 << 10, 1536, 24};
    case 90:
    case 100:
      return {227 << 10, 228 << 10, 2048, 32};
    case 120:
      return {99 << 10, 100 << 10, 1536, 32};
    default:
      return {99 << 10, 100 << 10, 1536, 16};
  }
}

}  // namespace cudasim

namespace {

constexpr int kVersion = 13000;

bool valid(const Runtime& r, int device) { return device >= 0 && device < r.config.devices; }

cudaError_t attribute(const Runtime& r, int* value, cudaDeviceAttr a) {
  const DeviceLimits limits = limits_of(r.config.arch);
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxBlockDimX:
      *value = 1024;
      break;
    case cudaDevAttrMaxBlockDimY:
      *value = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
      *value = 65535;
      break;
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = limits.shared_per_block_optin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = limits.shared_per_multiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = static_cast<int>(kSharedStart);
      break;
    case cudaDevAttrTotalConstantMemory:
      *value = 64 << 10;
      break;
    case cudaDevAttrWarpSize:
      *value = kLanes;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = 65536;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = r.config.multiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = limits.max_threads_per_multiprocessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = limits.max_blocks_per_multiprocessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = r.config.arch / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = r.config.arch % 10;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 40 << 20;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = 5120;
      break;
    case cudaDevAttrMemoryClockRate:
      *value = 1215000;
      break;
    case cudaDevAttrClockRate:
      *value = 1410000;
      break;
    case cudaDevAttrAsyncEngineCount:
      *value = 2;
      break;
    case cudaDevAttrTextureAlignment:
      *value = 512;
      break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
      *value = 1;
      break;
    case cudaDevAttrIntegrated:
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrEccEnabled:
    case cudaDevAttrTccDriver:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrClusterLaunch:
    case cudaDevAttrComputeMode:
    case cudaDevAttrPciBusId:
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrGPUDirectRDMASupported:
      *value = 0;
      break;
    default:
      std::fprintf(stderr, "cudasim: device attribute %d is not modelled\n", static_cast<int>(a));
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  return call([&](Runtime& r) {
    *count = r.config.devices;
    return r.config.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t cudaSetDevice(int device) {
  return call([&](Runtime& r) {
    if (!valid(r, device)) return cudaErrorInvalidDevice;
    thread_state().device = device;
    return cudaSuccess;
  });
}

cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return call([&](Runtime& r) { return valid(r, device) ? cudaSuccess : cudaErrorInvalidDevice; });
}

cudaError_t cudaGetDevice(int* device) {
  return call([&](Runtime& r) {
    *device = thread_state().device;
    return r.config.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  *flags = cudaDeviceMapHost;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int device) {
  return call([&](Runtime& r) {
    return valid(r, device) ? attribute(r, value, a) : cudaErrorInvalidDevice;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  return call([&](Runtime& r) {
    if (!valid(r, device)) return cudaErrorInvalidDevice;
    const DeviceLimits limits = limits_of(r.config.arch);
    *p = {};
    std::snprintf(p->name, sizeof p->name, "cudasim sm_%d", r.config.arch);
    p->totalGlobalMem = r.config.memory;
    p->sharedMemPerBlock = 48 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = kLanes;
    p->memPitch = 0x7fffffff;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 64 << 10;
    p->major = r.config.arch / 10;
    p->minor = r.config.arch % 10;
    p->textureAlignment = 512;
    p->multiProcessorCount = r.config.multiprocessors;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
    p->asyncEngineCount = 2;
    p->memoryBusWidth = 5120;
    p->l2CacheSize = 40 << 20;
    p->maxThreadsPerMultiProcessor = limits.max_threads_per_multiprocessor;
    p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
    p->sharedMemPerMultiprocessor = static_cast<std::size_t>(limits.shared_per_multiprocessor);
    p->concurrentManagedAccess = p->cooperativeLaunch = p->hostRegisterSupported = 1;
    p->canUseHostPointerForRegisteredMem = p->memoryPoolsSupported = 1;
    p->sharedMemPerBlockOptin = static_cast<std::size_t>(limits.shared_per_block_optin);
    p->maxBlocksPerMultiProcessor = limits.max_blocks_per_multiprocessor;
    p->reservedSharedMemPerBlock = kSharedStart;
    p->pciDeviceID = device;
    return cudaSuccess;
  });
}

cudaError_t cudaChooseDevice(int* device, const cudaDeviceProp*) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  return call([&](Runtime& r) {
    if (!valid(r, device)) return cudaErrorInvalidDevice;
    std::snprintf(text, static_cast<std::size_t>(size), "0000:%02x:00.0", device);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetLimit(std::size_t* value, cudaLimit limit) {
  *value = limit == cudaLimitStackSize ? 1024 : 8 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceSetLimit(cudaLimit, std::size_t) { return cudaSuccess; }
cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaDeviceGetCacheConfig(cudaFuncCache* c) {
  *c = cudaFuncCachePreferNone;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return call([&](Runtime& r) {
    if (!valid(r, device) || !valid(r, peer)) return cudaErrorInvalidDevice;
    *can = device != peer ? 1 : 0;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  return call([&](Runtime& r) {
    const int device = thread_state().device;
    if (!valid(r, peer) || peer == device) return cudaErrorInvalidDevice;
    if ((r.peers[device] >> peer & 1) != 0) return cudaErrorPeerAccessAlreadyEnabled;
    r.peers[device] |= 1u << peer;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return call([&](Runtime& r) {
    const int device = thread_state().device;
    if (!valid(r, peer)) return cudaErrorInvalidDevice;
    if ((r.peers[device] >> peer & 1) == 0) return cudaErrorPeerAccessNotEnabled;
    r.peers[device] &= ~(1u << peer);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr a, int, int) {
  *value = a == cudaDevP2PAttrAccessSupported ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  return call([&](Runtime& r) {
    if (const cudaError_t e = not_while_capturing(r)) return e;
    ++r.process.synchronisations;
    r.streams.finish_device(thread_state().device);
    return sticky(r);
  });
}

cudaError_t cudaDeviceReset() {
  return call([&](Runtime& r) {
    r.streams.finish_device(thread_state().device);
    for (const auto& [base, a] : r.arena.live(thread_state().device, "cudaMalloc")) {
      r.arena.release(base);
    }
    return cudaSuccess;
  });
}

cudaError_t cudaDriverGetVersion(int* v) {
  *v = kVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = kVersion;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
