#include "tests/cudasim/code/flatten.h"

#include <algorithm>

#include "tests/cudasim/ptx/parser.h"

namespace cudasim {
namespace {

constexpr int kMaxDepth = 64;

class Flattener {
 public:
  explicit Flattener(const ptx::Module& module) : module_(module) {}

  Flat run(const ptx::Function& kernel) {
    expand(kernel, {}, 0);
    return std::move(flat_);
  }

 private:
  using Offsets = std::map<std::string, u64>;  // local memory by name

  u64 reserve(u64 bytes, u64 align) {
    align = std::max<u64>(align, 8);
    const u64 at = (flat_.local_bytes + align - 1) / align * align;
    flat_.local_bytes = at + bytes;
    return at;
  }

  // Appends the body of f. `parameters`: where a called function's parameters and results are;
  // empty for the kernel itself.
  void expand(const ptx::Function& f, const Offsets& parameters, int depth) {
    if (depth > kMaxDepth) fail("{}: recursion is not modelled", f.name);
    Offsets offsets = parameters;
    for (const auto& v : f.locals) {
      if (v.space == "local" || v.space == "param") offsets[v.name] = reserve(v.size, v.align);
    }
    const int first_register = static_cast<int>(flat_.register_bytes.size());
    for (const auto& r : f.registers) {
      flat_.register_bytes.push_back(r.type == "pred" ? 0
                                                      : static_cast<u8>(ptx::type_size(r.type)));
    }
    std::vector<u32> start(f.body.size() + 1);  // of an instruction of f in the flat code
    std::vector<std::pair<std::size_t, std::size_t>> branches;  // flat index, index in f
    for (std::size_t k = 0; k < f.body.size(); ++k) {
      start[k] = static_cast<u32>(flat_.code.size());
      const auto& i = f.body[k];
      if (i.op[0] == "call") {
        call(i, offsets, depth);
        continue;
      }
      FlatIns flat{i, {}, {}, {}, false};
      rename(flat, first_register, offsets);
      const bool ends = i.op[0] == "ret" && depth > 0;
      if (i.op[0] == "bra" || i.op[0] == "brx" || ends) branches.push_back({flat_.code.size(), k});
      if (ends) flat.ptx.op = {"bra"};
      flat_.code.push_back(std::move(flat));
    }
    start[f.body.size()] = static_cast<u32>(flat_.code.size());
    // Something must stand behind the last label, and a kernel may lack its last ret.
    ptx::Instruction last;
    last.op = {depth == 0 ? "exit" : "nop"};
    last.text = depth == 0 ? "(end of the kernel)" : "(end of the function)";
    flat_.code.push_back({last, {}, {}, {}, false});
    for (const auto& [at, k] : branches) {
      const auto& i = f.body[k];
      auto& targets = flat_.code[at].targets;
      if (i.op[0] == "ret") {
        targets = {start[f.body.size()]};
      } else if (i.op[0] == "bra") {
        targets = {start[f.label(i.scope, i.args.at(0).name)]};
      } else {
        for (const auto& name : f.branch_targets.at(i.args.at(1).name)) {
          targets.push_back(start[f.label(i.scope, name)]);
        }
      }
    }
  }

  static void rename(FlatIns& flat, int first_register, const Offsets& offsets) {
    auto& i = flat.ptx;
    if (i.guard.reg >= 0) i.guard.reg += first_register;
    const bool parameter = i.op.size() > 1 && i.op[1].starts_with("param");
    const auto visit = [&](auto& self, ptx::Operand& o) -> void {
      if (o.reg >= 0) o.reg += first_register;
      if (o.pair >= 0) o.pair += first_register;
      for (auto& item : o.items) self(self, item);
      const auto found = offsets.find(o.name);
      if (found == offsets.end()) return;
      if (o.kind == ptx::Operand::Kind::Address) {
        o.offset += static_cast<i64>(found->second);
        o.name.clear();
        flat.local_parameter = parameter;
      } else if (o.kind == ptx::Operand::Kind::Symbol) {
        o.kind = ptx::Operand::Kind::Integer;
        o.value = found->second;
      }
    };
    for (auto& o : i.args) visit(visit, o);
  }

  // call.uni (results), f, (arguments);
  void call(const ptx::Instruction& i, const Offsets& offsets, int depth) {
    if (i.guard.kind != ptx::Operand::Kind::None)
      fail("\"{}\": guarded calls are not modelled", i.text);
    using Kind = ptx::Operand::Kind;
    std::size_t at = 0;
    std::vector<u64> results, arguments;
    const auto slots = [&](const ptx::Operand& list, std::vector<u64>& to) {
      for (const auto& o : list.items) {
        const auto found = offsets.find(o.name);
        if (found == offsets.end()) fail("\"{}\": argument {} is not modelled", i.text, o.name);
        to.push_back(found->second);
      }
    };
    if (i.args.at(0).kind == Kind::Vector) slots(i.args[at++], results);
    if (i.args.at(at).kind != Kind::Symbol) fail("\"{}\": indirect calls are not modelled", i.text);
    const std::string name = i.args[at++].name;
    if (at < i.args.size() && i.args[at].kind == Kind::Vector) slots(i.args[at++], arguments);
    const ptx::Function* callee = module_.find(name);
    if (callee == nullptr) {
      FlatIns flat{i, {}, results, name, false};
      flat.call_slots.insert(flat.call_slots.end(), arguments.begin(), arguments.end());
      flat.ptx.args.clear();
      flat_.code.push_back(std::move(flat));
      return;
    }
    if (callee->results.size() != results.size() || callee->parameters.size() != arguments.size()) {
      fail("\"{}\": {} has another number of parameters", i.text, name);
    }
    Offsets inner;
    for (std::size_t k = 0; k < results.size(); ++k) inner[callee->results[k].name] = results[k];
    for (std::size_t k = 0; k < arguments.size(); ++k) {
      inner[callee->parameters[k].name] = arguments[k];
    }
    expand(*callee, inner, depth + 1);
  }

  const ptx::Module& module_;
  Flat flat_;
};

}  // namespace

Flat flatten(const ptx::Module& module, const ptx::Function& kernel) {
  return Flattener(module).run(kernel);
}

}  // namespace cudasim
