#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/cudasim/base.h"
#include "tests/cudasim/count/bounds.h"

namespace cudasim {
namespace {

constexpr const char* kUsage =
    "usage: cudasim run [OPTIONS] PROGRAM [ARGUMENTS...]\n"
    "       cudasim bounds COUNTERS.json\n"
    "\n"
    "run     runs an unmodified CUDA program on the stand-in for the device. Exit status: the\n"
    "        program's, or 86 if a checker found something.\n"
    "  --schedule SEED   order of blocks, warps and streams (default 0: streams as late as "
    "possible)\n"
    "  --counters FILE   counters of every kernel, as JSON\n"
    "  --devices N       number of devices (1)\n"
    "  --arch N          compute capability, e.g. 90 (80)\n"
    "  --sms N           multiprocessors that the device reports (8)\n"
    "  --threads N       host threads that run blocks (all cores)\n"
    "bounds  prints, for every kernel, the least time it could take on some GPUs by what was "
    "counted:\n"
    "        a bound, not a prediction.\n";

struct Option {
  const char* flag;
  const char* variable;
};
constexpr Option kOptions[] = {
    {"--schedule", "CUDASIM_SCHEDULE"}, {"--counters", "CUDASIM_COUNTERS"},
    {"--devices", "CUDASIM_DEVICES"},   {"--arch", "CUDASIM_ARCH"},
    {"--sms", "CUDASIM_SMS"},           {"--threads", "CUDASIM_THREADS"}};

int usage(const std::string& what) {
  std::fprintf(stderr, "cudasim: %s\n%s", what.c_str(), kUsage);
  return 2;
}

// The program, looked up as the shell does.
std::string found(const std::string& program) {
  if (program.find('/') != std::string::npos) return program;
  const char* path = std::getenv("PATH");
  std::string rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const auto colon = rest.find(':');
    const std::string candidate = rest.substr(0, colon) + "/" + program;
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
  }
  return program;
}

// What the loader would load for the program says whether the stand-in comes first.
bool stand_in_is_loaded(const std::string& program, const std::string& libraries) {
  const std::string command = "LD_TRACE_LOADED_OBJECTS=1 '" + program + "' 2>/dev/null";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return true;
  bool ours = false, other = false;
  char line[4096];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    if (std::strstr(line, "libcudart") == nullptr) continue;
    (std::strstr(line, libraries.c_str()) != nullptr ? ours : other) = true;
  }
  pclose(pipe);
  if (other) {
    std::fprintf(stderr, "cudasim: %s loads another libcudart: it has an RPATH (not RUNPATH)\n",
                 program.c_str());
    return false;
  }
  if (!ours) {
    std::fprintf(stderr,
                 "cudasim: warning: %s does not link libcudart.so.13 as a shared library; what it "
                 "loads later may\n",
                 program.c_str());
  }
  return true;
}

int run(std::vector<std::string> arguments) {
  std::size_t k = 0;
  for (; k < arguments.size() && arguments[k].starts_with("--"); k += 2) {
    const char* variable = nullptr;
    for (const auto& o : kOptions) {
      if (arguments[k] == o.flag) variable = o.variable;
    }
    if (variable == nullptr) return usage("unknown option " + arguments[k]);
    if (k + 1 >= arguments.size()) return usage(arguments[k] + " needs a value");
    setenv(variable, arguments[k + 1].c_str(), 1);
  }
  if (k >= arguments.size()) return usage("no program given");
  const std::string libraries =
      std::filesystem::read_symlink("/proc/self/exe").parent_path() / "lib";
  const char* path = std::getenv("LD_LIBRARY_PATH");
  const bool more = path != nullptr && *path != '\0';
  setenv("LD_LIBRARY_PATH", (libraries + (more ? ":" + std::string(path) : "")).c_str(), 1);
  const std::string program = found(arguments[k]);
  if (!stand_in_is_loaded(program, libraries)) return 1;
  std::vector<char*> argv;
  for (; k < arguments.size(); ++k) argv.push_back(arguments[k].data());
  argv.push_back(nullptr);
  execv(program.c_str(), argv.data());
  std::fprintf(stderr, "cudasim: %s: %s\n", program.c_str(), std::strerror(errno));
  return 1;
}

}  // namespace
}  // namespace cudasim

int main(int argc, char** argv) {
  const std::vector<std::string> all(argv + 1, argv + argc);
  if (all.empty()) return cudasim::usage("no command given");
  if (all[0] == "--help" || all[0] == "-h") {
    std::fputs(cudasim::kUsage, stdout);
    return 0;
  }
  try {
    if (all[0] == "run") return cudasim::run({all.begin() + 1, all.end()});
    if (all[0] == "bounds" && all.size() == 2) {
      std::fputs(cudasim::bounds_table(all[1]).c_str(), stdout);
      return 0;
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "cudasim: %s\n", e.what());
    return 1;
  }
  return cudasim::usage("unknown command " + all[0]);
}
