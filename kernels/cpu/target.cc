#include "kernels/cpu/target.h"

#include <array>
#include <cstdlib>
#include <string>

#include "hwy/highway.h"
#include "kernels/base/error.h"

namespace moesaic::kernels {
namespace {

struct Target {
  std::int64_t bit;
  std::string_view name;
};

// Best first. The last one is what the compiler makes of Highway's emulation for the baseline.
constexpr auto kTargets = std::to_array<Target>({
#if HWY_ARCH_X86
  {HWY_AVX3, "avx512"}, {HWY_AVX2, "avx2"}, {HWY_SSE4, "sse4"}, {HWY_SSSE3, "ssse3"},
#elif HWY_ARCH_ARM
  {HWY_NEON, "neon"},
#endif
      {HWY_STATIC_TARGET, "scalar"},
});

bool available(const Target& t) {
  return t.bit == HWY_STATIC_TARGET || (hwy::SupportedTargets() & HWY_TARGETS & t.bit) != 0;
}

}  // namespace

std::vector<std::string_view> simd_targets() {
  std::vector<std::string_view> names;
  for (const Target& t : kTargets) {
    if (available(t)) names.push_back(t.name);
  }
  return names;
}

void use_simd_target(std::string_view name) {
  hwy::SetSupportedTargetsForTest(0);
  if (!name.empty()) {
    const Target* found = nullptr;
    std::string names;
    for (const Target& t : kTargets) {
      if (!available(t)) continue;
      if (t.name == name) found = &t;
      names += (names.empty() ? "" : ", ") + std::string(t.name);
    }
    require<InputError>(found != nullptr, "instruction set \"{}\" unknown here, expected one of {}",
                        name, names);
    hwy::SetSupportedTargetsForTest(found->bit);
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

void obey_target_environment() {
  static const bool once = [] {
    if (const char* name = std::getenv("MOESAIC_TARGET"); name != nullptr && *name != '\0') {
      use_simd_target(name);
    }
    return true;
  }();
  (void)once;
}

}  // namespace moesaic::kernels
