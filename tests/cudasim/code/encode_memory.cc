#include "tests/cudasim/code/encoder.h"
#include "tests/cudasim/exec/memory_access.h"
#include "tests/cudasim/ptx/parser.h"

namespace cudasim {
namespace {

bool is_space(const std::string& m) {
  return m == "global" || m == "shared" || m == "shared::cta" || m == "local" || m == "const" ||
         m.starts_with("param");
}

Space space_of(const ptx::Instruction& i) {
  if (i.has("global")) return Space::Global;
  if (i.has("shared") || i.has("shared::cta")) return Space::Shared;
  if (i.has("local")) return Space::Local;
  if (i.has("const")) return Space::Const;
  for (const auto& m : i.op) {
    if (m.starts_with("param")) return Space::Param;
  }
  return Space::Generic;
}

// Hints and orders that change nothing but flags here.
bool is_access_modifier(const std::string& m) {
  static const std::vector<std::string> known = {
      "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster",
      "gpu",  "sys",      "ca",      "cg",      "cs",      "lu",      "cv",  "wb",
      "wt",   "nc",       "v2",      "v4",      "v8",      "noftz"};
  return std::find(known.begin(), known.end(), m) != known.end() || m.starts_with("L1::") ||
         m.starts_with("L2::");
}

u32 access_flags(const ptx::Instruction& i) {
  u32 flags = kPlain;
  for (const char* m : {"volatile", "relaxed", "acquire", "release"}) {
    if (i.has(m)) flags |= kStrong;
  }
  if (i.has("nc")) flags |= kReadOnly;
  if (i.has("release") || i.has("acq_rel")) flags |= kReleases;
  return flags;
}

}  // namespace

bool Encoder::loads_and_stores(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  const bool loads = i.op[0] == "ld" || i.op[0] == "ldu";
  if (!loads && i.op[0] != "st") return false;
  for (std::size_t k = 1; k + 1 < i.op.size(); ++k) {
    if (!is_space(i.op[k]) && !is_access_modifier(i.op[k])) {
      unknown(f, fmt::format("modifier (.{})", i.op[k]));
    }
  }
  Space space = space_of(i);
  if (space == Space::Param && f.local_parameter) space = Space::Local;
  const std::string& type = i.op.back();
  ins.width = static_cast<u8>(ptx::type_size(type));
  ins.count = i.has("v8") ? 8 : i.has("v4") ? 4 : i.has("v2") ? 2 : 1;
  if (ins.width > 8 || ins.width * ins.count > 32) unknown(f, "type");
  ins.flags = access_flags(i);
  if ((ins.flags & kReleases) != 0) program_->releases = true;
  set_kind(Kind::Memory);
  ins.run = loads ? load_handler(space) : store_handler(space);
  if (ins.run == nullptr) unknown(f, "state space");
  const Operand& data = i.args.at(loads ? 0 : 1);
  const Operand& where = i.args.at(loads ? 1 : 0);
  set_address(f, where, ins);
  std::vector<Operand> items = data.items;
  if (data.kind != Operand::Kind::Vector) items = {data};
  if (items.size() != ins.count) unknown(f, "number of registers");
  // cuda_fp16.h and user code begin such loops with a plain load.
  if (loads && compared_.contains(data.reg)) ins.flags |= kStrong;
  const bool is_signed = type[0] == 's';
  std::vector<Place> places;
  for (const auto& o : items) {
    const u8 bytes = register_bytes(o);
    const u8 stored = o.reg < 0 ? (ins.width == 8 ? 8 : 4) : bytes == 8 ? 8 : 4;
    if (bytes == 0 && o.reg >= 0) unknown(f, "predicate operand");
    if (o.reg >= 0 && bytes < ins.width) unknown(f, fmt::format("width of {}", o.name));
    if (stored == 8 && ins.width < 8) ins.flags |= kWideRegister;
    if (loads && is_signed && bytes > ins.width) {
      ins.flags |= kSignExtend;
      if (bytes == 2) ins.flags |= kInto16;
    }
    places.push_back(loads ? target(f, o, stored) : place(f, o, stored, type));
  }
  ins.more = list(std::move(places));
  return true;
}

bool Encoder::atomics(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  const bool returns = i.op[0] == "atom";
  if (!returns && i.op[0] != "red") return false;
  std::string what;
  for (std::size_t k = 1; k + 1 < i.op.size(); ++k) {
    const std::string& m = i.op[k];
    if (is_space(m)) continue;
    if (m == "v2" || m == "v4" || m == "v8" || !is_access_modifier(m)) {
      if (!what.empty() || m[0] == 'v') unknown(f, fmt::format("modifier (.{})", m));
      what = m;
    }
  }
  const std::string& type = i.op.back();
  ins.run = atomic_handler(space_of(i), what, type);
  if (ins.run == nullptr) return false;
  set_kind(Kind::Atomic);
  ins.flags = access_flags(i);
  if ((ins.flags & kReleases) != 0) program_->releases = true;
  ins.width = static_cast<u8>(ptx::type_size(type));
  const u8 stored = ins.width == 8 ? 8 : 4;
  std::size_t k = 0;
  if (returns) ins.op[0] = target(f, i.args.at(k++), stored);
  set_address(f, i.args.at(k++), ins);
  ins.op[2] = place(f, i.args.at(k++), stored, type);
  if (what == "cas") ins.op[3] = place(f, i.args.at(k++), stored, type);
  return true;
}

bool Encoder::async_copies(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  if (i.op[0] != "cp" || i.op.size() < 3 || i.op[1] != "async") return false;
  set_kind(Kind::Async);
  if (i.op[2] == "commit_group") {
    allow(f, {}, 3);
    ins.run = async_commit_handler();
    return true;
  }
  if (i.op[2] == "wait_group") {
    allow(f, {}, 3);
    ins.run = async_wait_group_handler();
    ins.imm = static_cast<i64>(i.args.at(0).value);
    return true;
  }
  if (i.op[2] == "wait_all") {
    allow(f, {}, 3);
    ins.run = async_wait_all_handler();
    return true;
  }
  if (i.op[2] != "ca" && i.op[2] != "cg") return false;
  allow(f,
        {"ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B",
         "L2::cache_hint"},
        2);
  if (i.args.size() < 3 || i.args[2].kind != Operand::Kind::Integer) unknown(f, "size");
  const u64 bytes = i.args[2].value;
  const bool fits = bytes == 16 || (i.op[2] == "ca" && (bytes == 4 || bytes == 8));
  if (!fits) unknown(f, "size");
  ins.run = async_copy_handler();
  ins.width = static_cast<u8>(bytes);
  Ins from;
  set_address(f, i.args[1], from);
  if ((from.flags & (kNoBase | kAddress32)) != 0) unknown(f, "source address");
  set_address(f, i.args[0], ins);
  if ((ins.flags & kNoBase) != 0) {
    ins.op[1] = constant(0, 4);
    ins.flags = kAddress32;
  }
  ins.op[2] = from.op[1];
  ins.targets = numbers({static_cast<u32>(from.imm)});
  const std::size_t plain = i.has("L2::cache_hint") ? 4 : 3;
  if (i.args.size() > plain) ins.op[3] = place(f, i.args[3], 4);
  return true;
}

}  // namespace cudasim
