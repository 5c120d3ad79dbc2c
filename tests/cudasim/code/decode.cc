#include "tests/cudasim/code/decode.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <set>

#include "tests/cudasim/code/encoder.h"

namespace cudasim {
namespace {

constexpr u64 kGap = 16;  // unused bytes behind a static shared variable

std::string demangle(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

u64 round_up(u64 n, u64 to) { return (n + to - 1) / to * to; }

}  // namespace

std::byte* Program::constants_base() const {
  const auto start = reinterpret_cast<std::uintptr_t>(constants.data());
  return reinterpret_cast<std::byte*>((start + 63) & ~std::uintptr_t{63});
}

std::unique_ptr<Program> decode(const ptx::Module& module, const ptx::Function& kernel,
                                const SymbolAddress& address) {
  return Encoder(module, kernel, address).run();
}

Encoder::Encoder(const ptx::Module& module, const ptx::Function& kernel,
                 const SymbolAddress& address)
    : module_(module), kernel_(kernel), address_(address), program_(std::make_unique<Program>()) {}

std::unique_ptr<Program> Encoder::run() {
  Program& p = *program_;
  p.name = kernel_.name;
  p.readable = demangle(kernel_.name);
  p.module = &module_;
  p.max_threads = kernel_.max_threads;
  if (kernel_.has_cluster) fail("{}: thread block clusters are not modelled", p.readable);
  flat_ = flatten(module_, kernel_);
  file_ = allocate(flat_);
  p.register_bytes = file_.bytes;
  p.live_registers = file_.most_live;
  p.local_bytes = round_up(flat_.local_bytes, 16);
  find_compared();
  lay_out_parameters();
  lay_out_shared();
  p.constants.resize(64);
  p.code.reserve(flat_.code.size());
  for (const auto& f : flat_.code) encode(f);
  p.register_bytes = round_up(p.register_bytes, 64);
  // Into alignment, for which the last 64 bytes are slack.
  std::memmove(p.constants_base(), p.constants.data(), p.constants.size() - 64);
  return std::move(program_);
}

void Encoder::find_compared() {
  for (const auto& f : flat_.code) {
    const bool cas = f.ptx.op[0] == "atom" && f.ptx.has("cas") && f.ptx.args.size() == 4;
    if (cas && f.ptx.args[2].reg >= 0) compared_.insert(f.ptx.args[2].reg);
  }
  for (const auto& f : flat_.code) {
    const bool moves =
        f.ptx.op[0] == "mov" && f.ptx.args.size() == 2 && compared_.contains(f.ptx.args[0].reg);
    if (moves && f.ptx.args[1].reg >= 0) compared_.insert(f.ptx.args[1].reg);
  }
}

void Encoder::lay_out_parameters() {
  u64 at = 0;
  for (const auto& v : kernel_.parameters) {
    at = round_up(at, std::max<u64>(v.align, 1));
    parameters_[v.name] = at;
    program_->parameters.push_back({at, v.size});
    at += v.size;
  }
  program_->parameter_bytes = at;
}

// Only variables that the kernel names are laid out; dynamic shared memory lies behind them.
void Encoder::lay_out_shared() {
  for (const auto* all : {&module_.variables, &kernel_.locals}) {
    for (const auto& v : *all) {
      if (v.space == "shared") shared_variables_[v.name] = &v;
    }
  }
  for (const auto& f : module_.functions) {
    for (const auto& v : f.locals) {
      if (v.space == "shared") shared_variables_[v.name] = &v;
    }
  }
  std::set<std::string> named;
  const auto visit = [&](auto& self, const Operand& o) -> void {
    if (!o.name.empty() && shared_variables_.contains(o.name)) named.insert(o.name);
    for (const auto& item : o.items) self(self, item);
  };
  for (const auto& f : flat_.code) {
    for (const auto& o : f.ptx.args) visit(visit, o);
  }
  u64 at = 0;
  for (const auto& name : named) {
    const ptx::Variable& v = *shared_variables_[name];
    if (v.unsized) continue;
    at = round_up(at, std::max<u64>(v.align, 16));
    shared_[name] = kSharedStart + at;
    program_->declared_shared += v.size;
    at += v.size;
    const u64 next = round_up(at + kGap, 16);
    program_->shared_gaps.push_back({at, next - at});
    at = next;
  }
  at = round_up(at, 128);
  if (!program_->shared_gaps.empty()) {
    auto& [first, bytes] = program_->shared_gaps.back();
    bytes = at - first;
  }
  program_->static_shared = at;
  for (const auto& name : named) {
    if (!shared_variables_[name]->unsized) continue;
    shared_[name] = kSharedStart + at;
    program_->has_dynamic_shared = true;
  }
}

void Encoder::encode(const FlatIns& f) {
  Program& p = *program_;
  p.origins.push_back({f.ptx.text, f.ptx.line, f.ptx.source, Kind::Alu});
  Ins ins;
  if (f.ptx.guard.reg >= 0) {
    ins.guard = register_place(f.ptx.guard.reg);
    ins.guard_negated = f.ptx.guard.negated;
  }
  const bool known = control(f, ins) || loads_and_stores(f, ins) || atomics(f, ins) ||
                     async_copies(f, ins) || matrices(f, ins) || collectives(f, ins) ||
                     barriers(f, ins) || moves(f, ins) || arithmetic(f, ins);
  if (!known || ins.run == nullptr) unknown(f, "opcode or modifier");
  p.code.push_back(ins);
}

void Encoder::unknown(const FlatIns& f, std::string_view why) const {
  fail("kernel {}, PTX line {}: \"{}\": this {} is not modelled", program_->readable, f.ptx.line,
       f.ptx.text, why);
}

void Encoder::allow(const FlatIns& f, std::initializer_list<std::string_view> known,
                    std::size_t first) const {
  for (std::size_t k = first; k < f.ptx.op.size(); ++k) {
    if (std::find(known.begin(), known.end(), f.ptx.op[k]) == known.end()) {
      unknown(f, fmt::format("modifier (.{})", f.ptx.op[k]));
    }
  }
}

Place Encoder::place(const FlatIns& f, const Operand& o, u8 width, std::string_view type) {
  switch (o.kind) {
    case Operand::Kind::Register: {
      const u8 bytes = register_bytes(o);
      const u8 stored = bytes == 0 ? 1 : bytes == 8 ? 8 : 4;
      if (stored != width) unknown(f, fmt::format("width of operand {}", o.name));
      return register_place(o.reg);
    }
    case Operand::Kind::Integer:
      return constant(o.value, width);
    case Operand::Kind::Float: {
      u64 bits = o.value;
      if (o.is_double && width == 4) {
        bits = std::bit_cast<u32>(static_cast<float>(std::bit_cast<double>(bits)));
      } else if (!o.is_double && width == 8) {
        bits =
            std::bit_cast<u64>(static_cast<double>(std::bit_cast<float>(static_cast<u32>(bits))));
      }
      if (type == "f16" || type == "bf16") unknown(f, "half-precision constant");
      return constant(bits, width);
    }
    case Operand::Kind::Special:
      return special(f, o.name, width == 8);
    case Operand::Kind::Symbol: {
      u64 value = 0;
      if (!symbol(o.name, value)) unknown(f, fmt::format("symbol {}", o.name));
      return constant(value, width);
    }
    default:
      unknown(f, "operand");
  }
}

Place Encoder::target(const FlatIns& f, const Operand& o, u8 width) {
  if (o.kind == Operand::Kind::Sink) return kNowhere;
  if (o.kind != Operand::Kind::Register) unknown(f, "destination");
  return place(f, o, width);
}

Place Encoder::pair_of(const FlatIns& f, const Operand& o, u8 width) {
  if (o.pair < 0) return kNowhere;
  Operand second = o;
  second.reg = o.pair;
  return place(f, second, width);
}

Place Encoder::constant(u64 value, u8 width) {
  if (width == 1) value = value != 0 ? kAllLanes : 0;
  if (width == 4) value &= 0xffffffffu;
  const auto [found, is_new] = constants_.try_emplace({value, width}, 0);
  if (!is_new) return found->second;
  const u64 offset = program_->constants.size() - 64;
  std::vector<std::byte> lanes(width == 8 ? 8 * kLanes : 4 * kLanes);
  for (int l = 0; l < kLanes; ++l) {
    if (width == 8) {
      std::memcpy(lanes.data() + 8 * l, &value, 8);
    } else {
      std::memcpy(lanes.data() + 4 * l, &value, 4);
    }
  }
  program_->constants.insert(program_->constants.end() - 64, lanes.begin(), lanes.end());
  found->second = static_cast<Place>(offset) | 1;
  return found->second;
}

Place Encoder::special(const FlatIns& f, const std::string& name, bool wide) {
  static const std::map<std::string, Special> known = {
      {"tid.x", Special::TidX},
      {"tid.y", Special::TidY},
      {"tid.z", Special::TidZ},
      {"ntid.x", Special::NtidX},
      {"ntid.y", Special::NtidY},
      {"ntid.z", Special::NtidZ},
      {"ctaid.x", Special::CtaidX},
      {"ctaid.y", Special::CtaidY},
      {"ctaid.z", Special::CtaidZ},
      {"nctaid.x", Special::NctaidX},
      {"nctaid.y", Special::NctaidY},
      {"nctaid.z", Special::NctaidZ},
      {"laneid", Special::LaneId},
      {"warpid", Special::WarpId},
      {"nwarpid", Special::NwarpId},
      {"smid", Special::SmId},
      {"nsmid", Special::NsmId},
      {"gridid", Special::GridId},
      {"lanemask_eq", Special::LaneMaskEq},
      {"lanemask_lt", Special::LaneMaskLt},
      {"lanemask_le", Special::LaneMaskLe},
      {"lanemask_gt", Special::LaneMaskGt},
      {"lanemask_ge", Special::LaneMaskGe},
      {"dynamic_smem_size", Special::DynamicSharedSize},
      {"total_smem_size", Special::TotalSharedSize},
      {"envreg1", Special::WorkspaceHigh},
      {"envreg2", Special::WorkspaceLow}};
  const auto what = known.find(name);
  if (what == known.end()) unknown(f, fmt::format("special register %{}", name));
  const auto [found, is_new] = presets_.try_emplace({what->second, wide}, 0);
  if (is_new) {
    Program& p = *program_;
    found->second = static_cast<Place>(p.register_bytes);
    p.register_bytes += (wide ? 8 : 4) * kLanes;
    p.presets.push_back({what->second, found->second, wide});
  }
  return found->second;
}

bool Encoder::symbol(const std::string& name, u64& value) {
  if (const auto s = shared_.find(name); s != shared_.end()) {
    value = s->second;
    return true;
  }
  if (const auto p = parameters_.find(name); p != parameters_.end()) {
    value = p->second;
    return true;
  }
  const auto is_it = [&](const ptx::Variable& v) {
    return v.name == name && (v.space == "global" || v.space == "const");
  };
  if (std::any_of(module_.variables.begin(), module_.variables.end(), is_it)) {
    value = address_(name);
    return true;
  }
  return false;
}

void Encoder::set_address(const FlatIns& f, const Operand& o, Ins& ins) {
  if (o.kind != Operand::Kind::Address) unknown(f, "address");
  ins.imm = o.offset;
  if (o.reg >= 0) {
    Operand base = o;
    base.kind = Operand::Kind::Register;
    const bool narrow = register_bytes(base) == 4;
    ins.op[1] = place(f, base, narrow ? 4 : 8);
    if (narrow) ins.flags |= kAddress32;
    return;
  }
  ins.flags |= kNoBase;
  if (o.name.empty()) return;
  u64 value = 0;
  if (!symbol(o.name, value)) unknown(f, fmt::format("symbol {}", o.name));
  ins.imm += static_cast<i64>(value);
}

const Place* Encoder::list(std::vector<Place> places) {
  program_->operand_lists.push_back(std::make_unique<std::vector<Place>>(std::move(places)));
  return program_->operand_lists.back()->data();
}

const std::vector<u32>* Encoder::numbers(std::vector<u32> values) {
  program_->target_lists.push_back(std::make_unique<std::vector<u32>>(std::move(values)));
  return program_->target_lists.back().get();
}

}  // namespace cudasim
