#include <cstdlib>
#include <cstring>

#include "tests/cudasim/runtime/api.h"

using namespace cudasim;  // the file is all extern "C" functions

namespace {

u64 address(const void* p) { return reinterpret_cast<u64>(p); }

cudaError_t allocate(Runtime& r, void** p, int place, u64 bytes, const char* origin) {
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  const u64 base = r.arena.allocate(place, bytes, 256, origin);
  if (base == 0) return cudaErrorMemoryAllocation;
  ++r.process.allocations;
  // The host writes to its own memory unseen.
  if (place == Arena::kHost) r.arena.set_state(base, bytes, kInitialised);
  *p = reinterpret_cast<void*>(base);
  return cudaSuccess;
}

cudaError_t release(Runtime& r, void* p, const char* origin) {
  if (p == nullptr) return cudaSuccess;
  const Allocation* a = r.arena.at_base(address(p));
  if (a == nullptr || !a->origin.starts_with(origin)) {
    std::fprintf(stderr, "cudasim: free of what is not allocated: %s\n",
                 r.arena.describe(address(p)).c_str());
    return cudaErrorInvalidValue;
  }
  // As the system does, work that may use the memory ends first.
  r.streams.finish_all();
  r.arena.release(address(p));
  return sticky(r);
}

bool pageable(const Runtime& r, const void* p) { return !r.arena.contains(address(p)); }

Work copy_work(const CopyWork& c, const char* name) {
  Work w;
  w.kind = Work::Kind::Copy;
  w.device = thread_state().device;
  w.name = name;
  w.copy = c;
  return w;
}

// Copies and sets that return when they are done.
cudaError_t at_once(Runtime& r, Work work) {
  if (const cudaError_t e = not_while_capturing(r)) return e;
  if (const cudaError_t e = submit(r, nullptr, std::move(work))) return e;
  ++r.process.synchronisations;
  r.streams.finish(r.streams.legacy(thread_state().device)->last);
  return sticky(r);
}

cudaError_t check_kind(const Runtime& r, const void* to, const void* from, cudaMemcpyKind kind) {
  if (kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  const bool to_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost;
  const bool from_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice;
  if (kind == cudaMemcpyDefault) return cudaSuccess;
  // A host pointer where a device pointer is promised.
  if ((!to_host && pageable(r, to)) || (!from_host && pageable(r, from))) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t copy(const CopyWork& c, cudaMemcpyKind kind, bool async, cudaStream_t stream,
                 const char* name) {
  return call([&](Runtime& r) {
    if (c.bytes == 0 || c.rows == 0) return cudaSuccess;
    const cudaError_t e =
        check_kind(r, reinterpret_cast<void*>(c.to), reinterpret_cast<void*>(c.from), kind);
    if (e != cudaSuccess) return e;
    Work work = copy_work(c, name);
    return async ? submit(r, stream, std::move(work)) : at_once(r, std::move(work));
  });
}

cudaError_t set(const SetWork& s, bool async, cudaStream_t stream) {
  return call([&](Runtime& r) {
    if (s.width == 0 || s.rows == 0) return cudaSuccess;
    if (pageable(r, reinterpret_cast<void*>(s.at))) return cudaErrorInvalidValue;
    Work work;
    work.kind = Work::Kind::Set;
    work.device = thread_state().device;
    work.name = "cudaMemset";
    work.set = s;
    // cudaMemset too returns before it is done.
    return submit(r, async ? stream : nullptr, std::move(work));
  });
}

cudaError_t symbol_address(Runtime& r, const void* symbol, u64& at, u64& size) {
  const auto v = r.variables.find(symbol);
  if (v == r.variables.end()) return cudaErrorInvalidSymbol;
  at = v->second.module->variable(v->second.name, thread_state().device, r.arena, size);
  return cudaSuccess;
}

cudaError_t copy_symbol(const void* symbol, u64 offset, u64 other, u64 bytes, bool to_symbol,
                        bool async, cudaStream_t stream) {
  return call([&](Runtime& r) {
    u64 at = 0, size = 0;
    if (const cudaError_t e = symbol_address(r, symbol, at, size)) return e;
    if (offset > size || bytes > size - offset) return cudaErrorInvalidValue;
    if (bytes == 0) return cudaSuccess;
    CopyWork c;
    c.to = to_symbol ? at + offset : other;
    c.from = to_symbol ? other : at + offset;
    c.bytes = bytes;
    Work work = copy_work(c, "cudaMemcpySymbol");
    return async ? submit(r, stream, std::move(work)) : at_once(r, std::move(work));
  });
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  return call([&](Runtime& r) {
    if (const cudaError_t e = not_while_capturing(r)) return e;
    return allocate(r, p, thread_state().device, bytes, "cudaMalloc");
  });
}

cudaError_t cudaMallocPitch(void** p, std::size_t* pitch, std::size_t width, std::size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return cudaMalloc(p, *pitch * height);
}

cudaError_t cudaFree(void* p) {
  return call([&](Runtime& r) {
    if (const cudaError_t e = not_while_capturing(r)) return e;
    return release(r, p, "cudaMalloc");
  });
}

cudaError_t cudaMallocManaged(void** p, std::size_t bytes, unsigned) {
  return call([&](Runtime& r) { return allocate(r, p, Arena::kHost, bytes, "cudaMallocManaged"); });
}

cudaError_t cudaHostAlloc(void** p, std::size_t bytes, unsigned) {
  return call([&](Runtime& r) { return allocate(r, p, Arena::kHost, bytes, "cudaHostAlloc"); });
}
cudaError_t cudaMallocHost(void** p, std::size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
cudaError_t cudaFreeHost(void* p) {
  return call([&](Runtime& r) { return release(r, p, "cudaHostAlloc"); });
}

cudaError_t cudaHostRegister(void* p, std::size_t bytes, unsigned) {
  return call([&](Runtime& r) {
    r.registered.push_back({address(p), bytes});
    return cudaSuccess;
  });
}
cudaError_t cudaHostUnregister(void* p) {
  return call([&](Runtime& r) {
    r.streams.finish_all();
    const auto n = std::erase_if(r.registered, [&](const auto& x) { return x.base == address(p); });
    return n == 0 ? cudaErrorHostMemoryNotRegistered : cudaSuccess;
  });
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaHostGetFlags(unsigned* flags, void*) {
  *flags = cudaHostAllocMapped;
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** p, std::size_t bytes, cudaStream_t stream) {
  return call([&](Runtime& r) {
    if (const cudaError_t e = not_while_capturing(r)) return e;
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    // Addressable when the stream gets there, not before.
    const u64 base = r.arena.allocate(thread_state().device, bytes, 256, "cudaMallocAsync", false);
    if (base == 0) return cudaErrorMemoryAllocation;
    ++r.process.allocations;
    *p = reinterpret_cast<void*>(base);
    Work work;
    work.kind = Work::Kind::Allocate;
    work.device = thread_state().device;
    work.name = "cudaMallocAsync";
    work.address = base;
    return submit(r, stream, std::move(work));
  });
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  return call([&](Runtime& r) {
    if (p == nullptr) return cudaSuccess;
    if (const cudaError_t e = not_while_capturing(r)) return e;
    const Allocation* a = r.arena.at_base(address(p));
    if (a == nullptr || !a->origin.starts_with("cudaMalloc")) return cudaErrorInvalidValue;
    Work work;
    work.kind = Work::Kind::Free;
    work.device = thread_state().device;
    work.name = "cudaFreeAsync";
    work.address = address(p);
    return submit(r, stream, std::move(work));
  });
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  return call([&](Runtime& r) {
    *total = r.config.memory;
    *free = r.config.memory - r.arena.bytes_in_use(thread_state().device);
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  return call([&](Runtime& r) {
    *a = {};
    a->device = -2;
    a->type = cudaMemoryTypeUnregistered;
    if (const Allocation* found = r.arena.holding(address(p)); found != nullptr && !found->freed) {
      const bool host = found->place == Arena::kHost;
      a->type = !host                                  ? cudaMemoryTypeDevice
                : found->origin == "cudaMallocManaged" ? cudaMemoryTypeManaged
                                                       : cudaMemoryTypeHost;
      a->device = host ? thread_state().device : found->place;
      a->devicePointer = const_cast<void*>(p);
      a->hostPointer = host ? const_cast<void*>(p) : nullptr;
      return cudaSuccess;
    }
    for (const auto& x : r.registered) {
      if (address(p) - x.base >= x.size) continue;
      a->type = cudaMemoryTypeHost;
      a->device = thread_state().device;
      a->devicePointer = a->hostPointer = const_cast<void*>(p);
    }
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t n, cudaMemcpyKind kind) {
  return copy({address(to), address(from), n, 1, 0, 0}, kind, false, nullptr, "cudaMemcpy");
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t n, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy({address(to), address(from), n, 1, 0, 0}, kind, true, stream, "cudaMemcpyAsync");
}
cudaError_t cudaMemcpy2D(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                         std::size_t width, std::size_t height, cudaMemcpyKind kind) {
  return copy({address(to), address(from), width, height, to_pitch, from_pitch}, kind, false,
              nullptr, "cudaMemcpy2D");
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                              std::size_t from_pitch, std::size_t width, std::size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  return copy({address(to), address(from), width, height, to_pitch, from_pitch}, kind, true, stream,
              "cudaMemcpy2DAsync");
}
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, std::size_t n) {
  return cudaMemcpy(to, from, n, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t n,
                                cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemset(void* p, int value, std::size_t n) {
  return set({address(p), n, 1, 0, static_cast<u32>(value) & 0xff, 1}, false, nullptr);
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t n, cudaStream_t stream) {
  return set({address(p), n, 1, 0, static_cast<u32>(value) & 0xff, 1}, true, stream);
}
cudaError_t cudaMemset2D(void* p, std::size_t pitch, int value, std::size_t width,
                         std::size_t height) {
  return set({address(p), width, height, pitch, static_cast<u32>(value) & 0xff, 1}, false, nullptr);
}
cudaError_t cudaMemset2DAsync(void* p, std::size_t pitch, int value, std::size_t width,
                              std::size_t height, cudaStream_t stream) {
  return set({address(p), width, height, pitch, static_cast<u32>(value) & 0xff, 1}, true, stream);
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, std::size_t n,
                               std::size_t offset, cudaMemcpyKind) {
  return copy_symbol(symbol, offset, address(from), n, true, false, nullptr);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, std::size_t n,
                                    std::size_t offset, cudaMemcpyKind, cudaStream_t stream) {
  return copy_symbol(symbol, offset, address(from), n, true, true, stream);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, std::size_t n, std::size_t offset,
                                 cudaMemcpyKind) {
  return copy_symbol(symbol, offset, address(to), n, false, false, nullptr);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, std::size_t n,
                                      std::size_t offset, cudaMemcpyKind, cudaStream_t stream) {
  return copy_symbol(symbol, offset, address(to), n, false, true, stream);
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  return call([&](Runtime& r) {
    u64 at = 0, size = 0;
    if (const cudaError_t e = symbol_address(r, symbol, at, size)) return e;
    *p = reinterpret_cast<void*>(at);
    return cudaSuccess;
  });
}
cudaError_t cudaGetSymbolSize(std::size_t* size, const void* symbol) {
  return call([&](Runtime& r) {
    u64 at = 0, bytes = 0;
    if (const cudaError_t e = symbol_address(r, symbol, at, bytes)) return e;
    *size = bytes;
    return cudaSuccess;
  });
}

cudaError_t cudaMemPrefetchAsync(const void*, std::size_t, cudaMemLocation, unsigned,
                                 cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaMemAdvise(const void*, std::size_t, cudaMemoryAdvise, cudaMemLocation) {
  return cudaSuccess;
}

// There is one pool per device, and it is the arena.
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  *pool = reinterpret_cast<cudaMemPool_t>(static_cast<std::uintptr_t>(device) + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) {
  return cudaDeviceGetDefaultMemPool(pool, device);
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, std::size_t) { return cudaSuccess; }

}  // extern "C"
