#include <algorithm>

#include "tests/cudasim/runtime/api.h"

using namespace cudasim;  // the file is all extern "C" functions

namespace {

u64 next_capture = 1;
int capturing = 0;  // streams being captured as origins, with the mode that forbids unsafe calls

bool is_default(cudaStream_t s) {
  return s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread;
}

cudaStream_t handle(Stream* s) { return reinterpret_cast<cudaStream_t>(s); }

cudaError_t synchronise(Runtime& r, cudaStream_t stream) {
  Stream* s = stream_of(r, stream);
  if (s == nullptr) return cudaErrorInvalidResourceHandle;
  if (s->capture != nullptr) {
    s->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  ++r.process.synchronisations;
  r.streams.finish_stream(s);
  return sticky(r);
}

cudaError_t end_capture(Runtime& r, cudaStream_t stream, cudaGraph_t* graph) {
  Stream* s = stream_of(r, stream);
  *graph = nullptr;
  if (s == nullptr || s->capture == nullptr) return cudaErrorIllegalState;
  const auto capture = s->capture;
  if (capture->origin != s) return cudaErrorStreamCaptureUnmatched;
  auto* g = static_cast<CUgraph_st*>(capture->graph);
  // Every stream that joined must have been waited for by the origin.
  std::set<const GraphNode*> reached;
  const auto reach = [&](auto& self, const GraphNode* n) -> void {
    if (!reached.insert(n).second) return;
    for (const GraphNode* b : n->after) self(self, b);
  };
  for (const GraphNode* n : s->captured) reach(reach, n);
  const bool unjoined = reached.size() != g->nodes.size();
  for (Stream* other : capture->streams) {
    other->capture = nullptr;
    other->captured.clear();
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed) --capturing;
  if (capture->invalid || unjoined) {
    delete g;
    return capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined;
  }
  *graph = g;
  return cudaSuccess;
}

}  // namespace

namespace cudasim {

Stream* stream_of(Runtime& r, cudaStream_t s) {
  if (is_default(s)) return r.streams.legacy(thread_state().device);
  auto* stream = reinterpret_cast<Stream*>(s);
  return r.streams.exists(stream) ? stream : nullptr;
}

cudaError_t submit(Runtime& r, cudaStream_t handle, Work work) {
  Stream* s = stream_of(r, handle);
  if (s == nullptr) return cudaErrorInvalidResourceHandle;
  if (s->capture == nullptr) {
    if (is_default(handle) && capturing > 0) return cudaErrorStreamCaptureImplicit;
    r.streams.enqueue(s, std::move(work));
    return sticky(r);
  }
  if (s->capture->invalid) return cudaErrorStreamCaptureInvalidated;
  s->captured = {s->capture->graph->add(std::move(work), s->captured)};
  return cudaSuccess;
}

cudaError_t not_while_capturing(Runtime&) {
  return capturing > 0 ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

}  // namespace cudasim

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return call([&](Runtime& r) {
    *stream = handle(
        r.streams.create(thread_state().device, (flags & cudaStreamNonBlocking) == 0, priority));
    return cudaSuccess;
  });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr || is_default(stream)) return cudaErrorInvalidResourceHandle;
    r.streams.destroy(s);
    return cudaSuccess;
  });
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    *priority = s->priority;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    *flags = s->blocking ? cudaStreamDefault : cudaStreamNonBlocking;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    *id = s->id;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    *device = s->device;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call([&](Runtime& r) { return synchronise(r, stream); });
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    if (s->queue.empty()) return sticky(r);
    r.streams.progress(s);
    return cudaErrorNotReady;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr || event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->capture != nullptr) {
      // The stream joins the capture that the event was recorded in.
      if (s->capture == nullptr) {
        s->capture = event->capture;
        s->capture->streams.insert(s);
      }
      if (s->capture != event->capture) return cudaErrorStreamCaptureMerge;
      for (GraphNode* n : event->captured) {
        if (std::find(s->captured.begin(), s->captured.end(), n) == s->captured.end()) {
          s->captured.push_back(n);
        }
      }
      return cudaSuccess;
    }
    if (s->capture != nullptr) return cudaErrorStreamCaptureIsolation;
    if (event->task == nullptr) return cudaSuccess;  // never recorded: nothing to wait for
    Work work;
    work.name = "cudaStreamWaitEvent";
    r.streams.enqueue(s, std::move(work), {event->task});
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t f, void* data) {
  return call([&](Runtime& r) {
    Work work;
    work.kind = Work::Kind::Host;
    work.name = "cudaLaunchHostFunc";
    work.run = [f, data] { f(data); };
    return submit(r, stream, std::move(work));
  });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t f, void* data,
                                  unsigned) {
  return call([&](Runtime& r) {
    Work work;
    work.kind = Work::Kind::Host;
    work.name = "cudaStreamAddCallback";
    work.run = [f, data, stream, &r] { f(stream, sticky(r), data); };
    return submit(r, stream, std::move(work));
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call([&](Runtime&) {
    *event = new CUevent_st{};
    (*event)->device = thread_state().device;
    (*event)->timed = (flags & cudaEventDisableTiming) == 0;
    return cudaSuccess;
  });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call([&](Runtime&) {
    delete event;
    return cudaSuccess;
  });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr || event == nullptr) return cudaErrorInvalidResourceHandle;
    if (s->capture != nullptr) {
      event->capture = s->capture;
      event->captured = s->captured;
      return cudaSuccess;
    }
    event->capture = nullptr;
    Work work;
    work.name = "cudaEventRecord";
    event->task = r.streams.enqueue(s, std::move(work));
    return cudaSuccess;
  });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call([&](Runtime& r) {
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->capture != nullptr) return cudaErrorCapturedEvent;
    ++r.process.synchronisations;
    if (event->task != nullptr) r.streams.finish(event->task);
    return sticky(r);
  });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call([&](Runtime& r) {
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->task == nullptr || event->task->done) return sticky(r);
    r.streams.progress(event->task->stream);
    return cudaErrorNotReady;
  });
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return call([&](Runtime& r) {
    if (start == nullptr || end == nullptr) return cudaErrorInvalidResourceHandle;
    if (!start->timed || !end->timed || start->task == nullptr || end->task == nullptr) {
      return cudaErrorInvalidResourceHandle;
    }
    if (!start->task->done || !end->task->done) return cudaErrorNotReady;
    *ms = static_cast<float>((end->task->done_at - start->task->done_at) * 1e3);
    return sticky(r);
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    if (is_default(stream)) return cudaErrorStreamCaptureUnsupported;
    if (s->capture != nullptr) return cudaErrorIllegalState;
    s->capture = std::make_shared<Capture>();
    s->capture->graph = new CUgraph_st{};
    s->capture->origin = s;
    s->capture->streams = {s};
    s->capture->id = next_capture++;
    s->capture->mode = mode;
    if (mode != cudaStreamCaptureModeRelaxed) ++capturing;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return call([&](Runtime& r) { return end_capture(r, stream, graph); });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr) return cudaErrorInvalidResourceHandle;
    *status = s->capture == nullptr ? cudaStreamCaptureStatusNone
              : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, std::size_t* n) {
  const cudaError_t e = cudaStreamIsCapturing(stream, status);
  return e != cudaSuccess ? e : call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s->capture == nullptr) return cudaSuccess;
    if (id != nullptr) *id = s->capture->id;
    if (graph != nullptr) *graph = static_cast<CUgraph_st*>(s->capture->graph);
    if (dependencies != nullptr) {
      *dependencies = reinterpret_cast<const cudaGraphNode_t*>(s->captured.data());
    }
    if (edges != nullptr) *edges = nullptr;
    if (n != nullptr) *n = s->captured.size();
    return cudaSuccess;
  });
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}

}  // extern "C"
