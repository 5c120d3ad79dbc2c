#pragma once

#include <string>
#include <vector>

#include "kernels/base/dtype.h"

namespace moesaic::tools {

/// What a flag that takes a format accepts.
inline std::vector<std::string> dtype_names() {
  std::vector<std::string> names;
  for (const DTypeTraits& t : kDTypes) names.emplace_back(t.name);
  return names;
}

}  // namespace moesaic::tools
