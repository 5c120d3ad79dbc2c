#include "tools/resident.h"

#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

#include "engine/throughput.h"
#include "tools/progress.h"
#include "tools/session.h"
#include "tools/stop.h"

namespace moesaic::tools {
namespace {

constexpr std::int64_t kPrefill = 512;
constexpr std::int64_t kDecode = 32;

std::int64_t resident_bytes_now() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  }
  throw IoError("/proc/self/status: no VmRSS");
}

/// What the child does: load, run, look.
std::int64_t run_and_look(const std::filesystem::path& path, const RunOptions& run) {
  Runtime runtime(run);
  Model model(path, runtime.context, run.device);
  SilentMonitor monitor;
  engine::Decoder& decoder = model.decoder();
  const std::int64_t context = decoder.shape().context_length;
  engine::measure_prefill(decoder, runtime.tally, std::min(kPrefill, context), kPrefill, 1,
                          monitor);
  engine::measure_decode(decoder, runtime.tally, std::min(kDecode, context), 1, monitor);
  return resident_bytes_now();
}

}  // namespace

std::int64_t measure_resident_bytes(const std::filesystem::path& model, const RunOptions& run) {
  int ends[2];
  require<IoError>(pipe(ends) == 0, "pipe: {}", std::strerror(errno));
  const pid_t child = fork();
  require<IoError>(child >= 0, "fork: {}", std::strerror(errno));
  if (child == 0) {
    close(ends[0]);
    int status = 1;
    try {
      const std::int64_t bytes = run_and_look(model, run);
      if (write(ends[1], &bytes, sizeof(bytes)) == sizeof(bytes)) status = 0;
    } catch (const std::exception&) {
      // The parent meets the same error when it loads the model, and tells it.
    }
    _exit(status);  // not exit(): the parent's buffers are not the child's to flush
  }
  close(ends[1]);
  std::int64_t bytes = 0;
  const ssize_t got = read(ends[0], &bytes, sizeof(bytes));
  close(ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (stop_flag().load()) throw Interrupted("interrupted: nothing is kept");
  require<Error>(got == sizeof(bytes) && WIFEXITED(status) && WEXITSTATUS(status) == 0,
                 "{}: the process that was to measure its resident memory failed", model.string());
  return bytes;
}

}  // namespace moesaic::tools
