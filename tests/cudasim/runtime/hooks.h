#pragma once

#include <cstddef>
#include <cstdint>

// What the stand-in offers beyond CUDA. A program that also runs on a device looks these up with
// dlsym(RTLD_DEFAULT, …) and does without where they are missing.
extern "C" {

/// Copies the text of the oldest report into `text` (cut to `size`, always terminated), forgets it
/// and the sticky error. Returns the length of the text, 0 if there is no report.
std::size_t cudasim_take_report(char* text, std::size_t size);

/// Reports that nobody has taken.
std::size_t cudasim_report_count();

/// Divides an allocation into regions of the program's own: nothing of it is addressable until
/// cudasim_region() says so. For arenas, whose parts would otherwise look like one allocation.
void cudasim_suballocate(const void* allocation);
/// [p, p + bytes) comes to life, uninitialised (live), or its life ends (not live).
void cudasim_region(const void* p, std::size_t bytes, int live);

/// Adds to the bytes that a kernel's algorithm must move at least (mangled name, or part of the
/// readable one), for the counter bytes_per_minimum.
void cudasim_minimum_bytes(const char* kernel, std::uint64_t bytes);

/// For the stand-ins of cuBLAS and NCCL: enqueues work on a stream, or captures it. `ready` may be
/// null. Called with the runtime's lock held when run. Returns a cudaError_t.
int cudasim_enqueue(void* stream, const char* name, void (*run)(void*), int (*ready)(void*),
                    void (*drop)(void*), void* data);
/// Runs one task of a stream, if it has any: for a collective whose other ranks are in this
/// process.
void cudasim_progress(void* stream, int device);
/// Checks that [p, p + bytes) is addressable device memory, and initialised if `read`; marks it
/// initialised if not. Called from a work function; a failure stops the work with a report (it
/// throws, so call with nothing to clean up).
void cudasim_check(const void* p, std::size_t bytes, int read, const char* what);
/// Ends the work that calls it with a report: the context is lost.
[[noreturn]] void cudasim_fail(const char* text);

}  // extern "C"
