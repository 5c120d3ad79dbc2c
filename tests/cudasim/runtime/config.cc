#include "tests/cudasim/runtime/config.h"

#include <charconv>
#include <cstdlib>
#include <thread>

#include "tests/cudasim/memory/arena.h"

namespace cudasim {
namespace {

template <class T>
void read(const char* name, T& value, u64 least, u64 greatest) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return;
  const std::string s = text;
  u64 n = 0;
  const auto [end, code] = std::from_chars(s.data(), s.data() + s.size(), n);
  if (code != std::errc{} || end != s.data() + s.size() || n < least || n > greatest) {
    fail("{}={}: expected a number from {} to {}", name, s, least, greatest);
  }
  value = static_cast<T>(n);
}

}  // namespace

Config config_from_environment() {
  Config c;
  read("CUDASIM_SCHEDULE", c.schedule, 0, ~0ull);
  read("CUDASIM_DEVICES", c.devices, 0, Arena::kPlaces - 1);
  read("CUDASIM_ARCH", c.arch, 80, 999);
  read("CUDASIM_SMS", c.multiprocessors, 1, 1024);
  u64 gib = c.memory >> 30;
  read("CUDASIM_MEMORY", gib, 1, Arena::kPlaceBytes >> 30);
  c.memory = gib << 30;
  c.threads = static_cast<int>(std::thread::hardware_concurrency());
  read("CUDASIM_THREADS", c.threads, 1, 1024);
  read("CUDASIM_MAX_INSTRUCTIONS", c.max_instructions, 0, ~0ull);
  read("CUDASIM_LEAKS", c.leaks, 0, 1);
  if (const char* file = std::getenv("CUDASIM_COUNTERS")) c.counters = file;
  return c;
}

}  // namespace cudasim
