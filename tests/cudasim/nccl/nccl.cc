#include <cuda_runtime_api.h>
#include <nccl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>

#include "tests/cudasim/nccl/exchange.h"
#include "tests/cudasim/nccl/reduce.h"
#include "tests/cudasim/runtime/hooks.h"

using cudasim::fail;
using cudasim::nccl::Call;
using cudasim::nccl::combine;
using cudasim::nccl::Exchange;
using cudasim::nccl::size_of;

struct ncclComm {
  std::string id;
  int rank = 0, ranks = 1, device = 0;
  std::unique_ptr<Exchange> exchange;
  std::uint64_t posted = 0, finished = 0;  // collectives
  std::uint64_t called = 0;                // operations, for injected failures
  std::map<int, std::uint64_t> sent, received;
  cudaStream_t stream = nullptr;  // of the last call
  ncclResult_t async_error = ncclSuccess;
};

namespace {

using Clock = std::chrono::steady_clock;

std::mutex registry_mutex;
std::set<ncclComm*> registry;  // of this process
thread_local int group_depth = 0;
std::string last_error;

// CUDASIM_NCCL_FAIL=RANK:CALL:KIND, calls counted from 0. "error": the call returns
// ncclSystemError; "hang": the rank never takes part; "async": the call works and the communicator
// reports ncclRemoteError from then on.
std::string injected(const ncclComm& c, std::uint64_t call) {
  const char* text = std::getenv("CUDASIM_NCCL_FAIL");
  int rank = -1;
  unsigned long long at = 0;
  char kind[16] = "";
  if (text == nullptr || std::sscanf(text, "%d:%llu:%15s", &rank, &at, kind) != 3) return "";
  return rank == c.rank && at == call ? kind : "";
}

double timeout_seconds() {
  const char* text = std::getenv("CUDASIM_NCCL_TIMEOUT");
  return text == nullptr ? 60 : std::atof(text);
}

// Lets ranks of this process that a collective waits for come to it.
void progress_peers(const ncclComm& c, int rank) {
  cudaStream_t stream = nullptr;
  int device = -1;
  {
    const std::lock_guard lock(registry_mutex);
    for (const ncclComm* peer : registry) {
      if (peer->id == c.id && peer->rank == rank && peer != &c) {
        stream = peer->stream;
        device = peer->device;
      }
    }
  }
  if (device >= 0) cudasim_progress(stream, device);
}

// One operation of one rank.
struct Operation {
  ncclComm* comm;
  Call call;
  const void* send = nullptr;
  void* receive = nullptr;
  std::size_t send_bytes = 0;
  int peer = -1;  // of a message
  std::string key;
  bool hangs = false;
  Clock::time_point since{};

  std::size_t element() const { return size_of(static_cast<ncclDataType_t>(call.type)); }
  bool is(const char* name) const { return std::strcmp(call.name, name) == 0; }
};

void drop(void* p) { delete static_cast<std::shared_ptr<Operation>*>(p); }
Operation& operation(void* p) { return **static_cast<std::shared_ptr<Operation>*>(p); }

std::string message_key(int from, int to, std::uint64_t n) {
  return fmt::format("message{}-{}-{}", from, to, n);
}

void post(void* p) {
  Operation& o = operation(p);
  if (o.send != nullptr) cudasim_check(o.send, o.send_bytes, 1, o.call.name);
  ncclComm& c = *o.comm;
  if (o.hangs) return;
  o.key = o.peer >= 0 ? message_key(c.rank, o.peer, c.sent[o.peer]++)
                      : fmt::format("call{}", c.posted++);
  c.exchange->post(o.key, o.call, o.send, o.send_bytes);
}

// True when every rank that the operation needs has come, or time is up.
int ready(void* p) {
  Operation& o = operation(p);
  ncclComm& c = *o.comm;
  if (o.since == Clock::time_point{}) {
    o.since = Clock::now();
    if (o.peer >= 0) o.key = message_key(o.peer, c.rank, c.received[o.peer]++);
  }
  bool all = true;
  for (int r = 0; r < c.ranks && all; ++r) {
    if (r == c.rank || (o.peer >= 0 && r != o.peer)) continue;
    if (!c.exchange->posted(o.key, r)) progress_peers(c, r);
    all = c.exchange->posted(o.key, r);
  }
  const std::chrono::duration<double> waited = Clock::now() - o.since;
  return all || o.hangs || waited.count() > timeout_seconds() ? 1 : 0;
}

void lost(ncclComm& c, const std::string& text) {
  last_error = text;
  c.async_error = ncclRemoteError;
  cudasim_fail(("NCCL: " + text).c_str());
}

void finish(void* p) {
  Operation& o = operation(p);
  ncclComm& c = *o.comm;
  const std::size_t size = o.element(), n = o.call.count;
  if (o.peer >= 0) {
    Call theirs;
    if (!c.exchange->posted(o.key, o.peer)) {
      lost(c,
           fmt::format("rank {} waits for a message of rank {} that never comes", c.rank, o.peer));
    }
    const auto data = c.exchange->read(o.key, o.peer, theirs);
    if (theirs.count != n || theirs.type != o.call.type) {
      lost(c, fmt::format("rank {} receives {}, and rank {} sent {}", c.rank, o.call.text(), o.peer,
                          theirs.text()));
    }
    cudasim_check(o.receive, data.size(), 0, "Recv");
    std::memcpy(o.receive, data.data(), data.size());
    std::remove(fmt::format("/dev/shm/{}/{}-{}", c.id, o.key, o.peer).c_str());
    return;
  }
  std::vector<std::vector<std::byte>> parts;
  for (int r = 0; r < c.ranks; ++r) {
    Call theirs;
    if (o.hangs || !c.exchange->posted(o.key, r)) {
      lost(c, fmt::format("rank {} waits in {}: rank {} never comes", c.rank, o.call.text(), r));
    }
    parts.push_back(c.exchange->read(o.key, r, theirs));
    if (!theirs.matches(o.call)) {
      lost(c, fmt::format("mismatched calls: rank {} calls {}, rank {} calls {}", c.rank,
                          o.call.text(), r, theirs.text()));
    }
  }
  const auto type = static_cast<ncclDataType_t>(o.call.type);
  const auto op = static_cast<ncclRedOp_t>(o.call.op);
  const auto rank = static_cast<std::size_t>(c.rank);
  if (o.is("AllReduce") || (o.is("Reduce") && c.rank == o.call.root)) {
    cudasim_check(o.receive, n * size, 0, o.call.name);
    combine(parts, 0, n, type, op, o.receive);
  } else if (o.is("ReduceScatter")) {
    cudasim_check(o.receive, n * size, 0, o.call.name);
    combine(parts, rank * n, n, type, op, o.receive);
  } else if (o.is("AllGather")) {
    cudasim_check(o.receive, n * size * parts.size(), 0, o.call.name);
    for (std::size_t r = 0; r < parts.size(); ++r) {
      std::memcpy(static_cast<std::byte*>(o.receive) + r * n * size, parts[r].data(), n * size);
    }
  } else if (o.is("Broadcast")) {
    cudasim_check(o.receive, n * size, 0, o.call.name);
    std::memcpy(o.receive, parts[static_cast<std::size_t>(o.call.root)].data(), n * size);
  }
  // Everybody has posted this call, so everybody has finished the one before.
  if (c.finished > 0) c.exchange->forget(fmt::format("call{}", c.finished - 1));
  ++c.finished;
}

struct Pending {
  std::shared_ptr<Operation> operation;
  cudaStream_t stream;
  bool posts, finishes;
};
thread_local std::vector<Pending> group;

ncclResult_t enqueue(const Pending& p, bool posting) {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(p.operation->comm->device);
  const int e =
      cudasim_enqueue(p.stream, "NCCL", posting ? post : finish, posting ? nullptr : ready, drop,
                      new std::shared_ptr<Operation>(p.operation));
  cudaSetDevice(before);
  return e == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

// What a group holds goes out together: first what ranks give, then what they take.
ncclResult_t flush() {
  const std::vector<Pending> all = std::move(group);
  group.clear();
  for (const bool posting : {true, false}) {
    for (const auto& p : all) {
      if (!(posting ? p.posts : p.finishes)) continue;
      if (const ncclResult_t e = enqueue(p, posting)) return e;
    }
  }
  return ncclSuccess;
}

ncclResult_t call(const char* name, ncclComm_t c, const void* send, void* receive, size_t count,
                  size_t send_count, ncclDataType_t type, int op, int root, int peer,
                  cudaStream_t stream) {
  if (c == nullptr || size_of(type) == 0 || op > ncclAvg || root >= c->ranks || peer >= c->ranks) {
    last_error = fmt::format("{}: invalid argument", name);
    return ncclInvalidArgument;
  }
  if (c->async_error != ncclSuccess) return c->async_error;
  auto o = std::make_shared<Operation>();
  o->comm = c;
  std::snprintf(o->call.name, sizeof o->call.name, "%s", name);
  o->call.count = count;
  o->call.type = type;
  o->call.op = op;
  o->call.root = root;
  o->call.rank = c->rank;
  o->send = send_count > 0 ? send : nullptr;
  o->receive = receive;
  o->send_bytes = send_count * size_of(type);
  o->peer = peer;
  c->stream = stream;
  const std::string failure = injected(*c, c->called++);
  if (failure == "error") {
    last_error = "injected failure";
    return ncclSystemError;
  }
  o->hangs = failure == "hang";
  const bool message = peer >= 0;
  group.push_back({o, stream, !message || send != nullptr, !message || send == nullptr});
  if (failure == "async") c->async_error = ncclRemoteError;
  return group_depth == 0 ? flush() : ncclSuccess;
}

ncclResult_t initialise(ncclComm_t* comm, int ranks, const std::string& id, int rank, int device) {
  if (ranks < 1 || rank < 0 || rank >= ranks) return ncclInvalidArgument;
  auto c = std::make_unique<ncclComm>();
  c->id = id;
  c->rank = rank;
  c->ranks = ranks;
  c->device = device;
  c->exchange = std::make_unique<Exchange>(id, rank, ranks);
  const std::lock_guard lock(registry_mutex);
  registry.insert(c.get());
  *comm = c.release();
  return ncclSuccess;
}

ncclResult_t destroy(ncclComm_t c) {
  if (c == nullptr) return ncclInvalidArgument;
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(c->device);
  cudaDeviceSynchronize();
  cudaSetDevice(before);
  {
    const std::lock_guard lock(registry_mutex);
    registry.erase(c);
  }
  for (const auto& name : c->exchange->left_over()) {
    std::fprintf(stderr, "cudasim: warning: NCCL: %s of rank %d was never received\n", name.c_str(),
                 c->rank);
  }
  delete c;
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  *id = {};
  std::snprintf(id->internal, sizeof id->internal, "cudasim-nccl-%d-%08x%08x", getpid(), random(),
                random());
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  int device = 0;
  cudaGetDevice(&device);
  return initialise(comm, ranks, id.internal, rank, device);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t*) {
  return ncclCommInitRank(comm, ranks, id, rank);
}
ncclResult_t ncclCommInitAll(ncclComm_t* comms, int n, const int* devices) {
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  for (int r = 0; r < n; ++r) {
    const int device = devices == nullptr ? r : devices[r];
    if (const ncclResult_t e = initialise(&comms[r], n, id.internal, r, device)) return e;
  }
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t c) { return destroy(c); }
ncclResult_t ncclCommAbort(ncclComm_t c) { return destroy(c); }
ncclResult_t ncclCommCount(const ncclComm_t c, int* n) {
  *n = c->ranks;
  return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t c, int* device) {
  *device = c->device;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t c, int* rank) {
  *rank = c->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t* e) {
  *e = c->async_error;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t e) {
  switch (e) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error";
    case ncclSystemError:
      return "unhandled system error";
    case ncclInternalError:
      return "internal error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    default:
      return "unknown result code";
  }
}
const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (group_depth == 0) return ncclInvalidUsage;
  return --group_depth == 0 ? flush() : ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t n, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
  return call("AllReduce", c, send, receive, n, n, type, op, 0, -1, s);
}
ncclResult_t ncclReduce(const void* send, void* receive, size_t n, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t c, cudaStream_t s) {
  return call("Reduce", c, send, receive, n, n, type, op, root, -1, s);
}
ncclResult_t ncclAllGather(const void* send, void* receive, size_t n, ncclDataType_t type,
                           ncclComm_t c, cudaStream_t s) {
  return call("AllGather", c, send, receive, n, n, type, 0, 0, -1, s);
}
ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t n, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
  const size_t all = c == nullptr ? 0 : n * static_cast<size_t>(c->ranks);
  return call("ReduceScatter", c, send, receive, n, all, type, op, 0, -1, s);
}
ncclResult_t ncclBroadcast(const void* send, void* receive, size_t n, ncclDataType_t type, int root,
                           ncclComm_t c, cudaStream_t s) {
  const bool gives = c != nullptr && c->rank == root;
  return call("Broadcast", c, send, receive, n, gives ? n : 0, type, 0, root, -1, s);
}
ncclResult_t ncclBcast(void* buffer, size_t n, ncclDataType_t type, int root, ncclComm_t c,
                       cudaStream_t s) {
  return ncclBroadcast(buffer, buffer, n, type, root, c, s);
}
ncclResult_t ncclSend(const void* send, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t s) {
  return call("Send", c, send, nullptr, n, n, type, 0, 0, peer, s);
}
ncclResult_t ncclRecv(void* receive, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t s) {
  return call("Recv", c, nullptr, receive, n, 0, type, 0, 0, peer, s);
}

}  // extern "C"
