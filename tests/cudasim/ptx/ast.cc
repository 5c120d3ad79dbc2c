#include "tests/cudasim/ptx/ast.h"

#include <algorithm>

namespace cudasim::ptx {

u32 Function::label(int scope, const std::string& label_name) const {
  for (int s = scope; s >= 0; s = parent_scope[static_cast<std::size_t>(s)]) {
    if (const auto found = labels.find({s, label_name}); found != labels.end()) {
      return found->second;
    }
  }
  fail("{}: no label {}", name, label_name);
}

const Function* Module::find(const std::string& name) const {
  const auto matches = [&](const Function& f) { return f.name == name && f.has_body; };
  const auto found = std::find_if(functions.begin(), functions.end(), matches);
  return found == functions.end() ? nullptr : &*found;
}

std::string Module::describe(SourceLine at) const {
  if (at.line == 0) return {};
  const auto name = [&](SourceLine l) {
    const auto file = files.find(l.file);
    return fmt::format("{}:{}", file == files.end() ? "?" : file->second, l.line);
  };
  SourceLine root = at;
  for (auto up = inlined_at.find(root); up != inlined_at.end(); up = inlined_at.find(root)) {
    root = up->second;
  }
  return root == at ? name(at) : fmt::format("{} (inlined from {})", name(root), name(at));
}

}  // namespace cudasim::ptx
