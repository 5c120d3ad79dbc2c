#include "tests/cudasim/code/encoder.h"
#include "tests/cudasim/exec/collective.h"
#include "tests/cudasim/ptx/parser.h"

namespace cudasim {

bool Encoder::arithmetic(const FlatIns& f, Ins& ins) {
  Instruction i = f.ptx;
  if (i.op.size() < 2) return false;
  if (i.op[0] == "cvt" && i.args.size() > 1) {
    for (Operand& o : i.args) o.value = o.kind == Operand::Kind::Register ? register_bytes(o) : 0;
  }
  Choice choice;
  for (const auto family : {&compare_handler, &convert_handler, &float_handler, &function_handler,
                            &half_handler, &integer_handler, &bits_handler, &move_handler}) {
    choice = family(i);
    if (choice) break;
  }
  if (!choice) return false;
  ins.run = choice.run;
  const std::string& type = i.op.back();
  std::size_t k = 0;
  ins.op[k] = target(f, i.args.at(0), choice.width[0]);
  if (ins.op[k] == kNowhere && i.op[0] != "setp") unknown(f, "destination");
  ++k;
  if (i.op[0] == "setp") {
    ins.op[k++] = pair_of(f, i.args[0], 1);
    if (i.args.size() == 4) {
      ins.flags = i.has("and") ? 1 : i.has("or") ? 2 : 3;
      if (i.args[3].negated) ins.flags |= 4;
    }
  }
  for (std::size_t a = 1; a < f.ptx.args.size(); ++a, ++k) {
    const Operand& operand = f.ptx.args[a];
    if (k >= choice.width.size() || choice.width[k] == 0) unknown(f, "number of operands");
    if (operand.negated && i.op[0] != "setp") unknown(f, "negated operand");
    ins.op[k] = place(f, operand, choice.width[k], type);
  }
  return true;
}

bool Encoder::moves(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  if (i.op[0] == "createpolicy") {  // a hint for the L2 cache
    ins.run = move_handler({{"mov", "b64"}, {}, {}, {}, 0, 0, {}}).run;
    ins.op[0] = target(f, i.args.at(0), 8);
    ins.op[1] = constant(0, 8);
    return true;
  }
  if (i.op[0] != "mov" || i.op.size() != 2 || i.args.size() != 2) return false;
  const bool packs = i.args[1].kind == Operand::Kind::Vector;
  const bool unpacks = i.args[0].kind == Operand::Kind::Vector;
  if (packs || unpacks) {
    const u64 whole = ptx::type_size(i.op[1]);
    const auto& parts = i.args[packs ? 1 : 0].items;
    if (whole > 8 || parts.empty() || whole % parts.size() != 0) unknown(f, "vector");
    ins.count = static_cast<u8>(parts.size());
    ins.width = static_cast<u8>(whole / parts.size());
    const u8 part_width = ins.width == 8 ? 8 : 4;
    std::vector<Place> places;
    for (const auto& o : parts) {
      places.push_back(unpacks ? target(f, o, part_width) : place(f, o, part_width));
    }
    ins.more = list(std::move(places));
    ins.op[0] =
        packs ? target(f, i.args[0], whole == 8 ? 8 : 4) : place(f, i.args[1], whole == 8 ? 8 : 4);
    ins.run = packs ? pack_handler(whole, part_width) : unpack_handler(whole, part_width);
    return true;
  }
  if (i.args[1].kind == Operand::Kind::Special) {
    const Handler clock = clock_handler(i.args[1].name, ins.flags);
    if (clock == nullptr) return false;
    ins.run = clock;
    ins.width = ptx::type_size(i.op[1]) == 8 ? 8 : 4;
    ins.op[0] = target(f, i.args[0], ins.width);
    return true;
  }
  return false;
}

bool Encoder::matrices(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  const bool loads = i.op[0] == "ldmatrix", stores = i.op[0] == "stmatrix";
  if (loads || stores) {
    allow(f,
          {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"});
    if (!i.has("m8n8") || i.op.back() != "b16") unknown(f, "shape");
    ins.count = i.has("x4") ? 4 : i.has("x2") ? 2 : 1;
    set_kind(Kind::Memory);
    ins.run = loads ? ldmatrix_handler(i.has("trans")) : stmatrix_handler(i.has("trans"));
    const auto& registers = i.args.at(loads ? 0 : 1);
    std::vector<Place> places;
    if (registers.kind == Operand::Kind::Vector) {
      for (const auto& o : registers.items) places.push_back(place(f, o, 4));
    } else {
      places.push_back(place(f, registers, 4));
    }
    if (places.size() != ins.count) unknown(f, "number of registers");
    ins.more = list(std::move(places));
    set_address(f, i.args.at(loads ? 1 : 0), ins);
    return true;
  }
  if (i.op[0] == "movmatrix") {
    allow(f, {"sync", "aligned", "m8n8", "trans", "b16"});
    set_kind(Kind::Collective);
    ins.run = movmatrix_handler();
    ins.op[0] = target(f, i.args.at(0), 4);
    ins.op[1] = place(f, i.args.at(1), 4);
    return true;
  }
  if (i.op[0] == "mma") {
    ins.run = mma_handler(i.op);
    if (ins.run == nullptr) unknown(f, "shape or type of mma");
    set_kind(Kind::Matrix);
    std::vector<Place> places;
    for (const auto& o : i.args) {
      for (const auto& item : o.items) places.push_back(place(f, item, 4));
    }
    ins.more = list(std::move(places));
    return true;
  }
  return false;
}

bool Encoder::collectives(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  const auto& op = i.op;
  if (op[0] == "shfl" && op.size() == 4 && op[1] == "sync" && op[3] == "b32") {
    ins.run = shuffle_handler(op[2]);
    if (i.args.size() != 5) unknown(f, "number of operands");
    ins.op = {target(f, i.args[0], 4), pair_of(f, i.args[0], 1), place(f, i.args[1], 4),
              place(f, i.args[2], 4),  place(f, i.args[3], 4),   kNowhere};
    ins.more = list({place(f, i.args[4], 4)});
  } else if (op[0] == "vote" && op.size() == 4 && op[1] == "sync") {
    ins.run = vote_handler(op[2]);
    ins.op[0] = target(f, i.args.at(0), op[2] == "ballot" ? 4 : 1);
    ins.op[1] = place(f, i.args.at(1), 1);
    ins.op[2] = place(f, i.args.at(2), 4);
    ins.flags = i.args[1].negated ? 1 : 0;
  } else if (op[0] == "match" && op.size() == 4 && op[2] == "sync") {
    ins.run = match_handler(op[1], op[3]);
    ins.op[0] = target(f, i.args.at(0), 4);
    ins.op[1] = pair_of(f, i.args[0], 1);
    ins.op[2] = place(f, i.args.at(1), op[3] == "b64" ? 8 : 4);
    ins.op[3] = place(f, i.args.at(2), 4);
  } else if (op[0] == "redux" && op.size() == 4 && op[1] == "sync" && op[3][0] != 'f') {
    ins.run = reduce_handler(op[2], op[3]);
    ins.op[0] = target(f, i.args.at(0), 4);
    ins.op[1] = place(f, i.args.at(1), 4);
    ins.op[2] = place(f, i.args.at(2), 4);
  } else if (op[0] == "activemask" && op.size() == 2) {
    ins.run = active_mask_handler();
    ins.op[0] = target(f, i.args.at(0), 4);
  } else if (op[0] == "elect" && op.size() == 2) {
    ins.run = elect_handler();
    ins.op[0] = target(f, i.args.at(0), 4);
    ins.op[1] = pair_of(f, i.args[0], 1);
    ins.op[2] = place(f, i.args.at(1), 4);
  } else {
    return false;
  }
  set_kind(Kind::Collective);
  return true;
}

bool Encoder::barriers(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  const auto& op = i.op;
  if (op[0] == "membar" || op[0] == "fence") {
    allow(f, {"gl", "sys", "cta", "gpu", "acq_rel", "sc", "acquire", "release"});
    const bool wide = i.has("gl") || i.has("sys") || i.has("gpu");
    ins.run = fence_handler(wide);
    if (wide) program_->releases = true;
    set_kind(Kind::Barrier);
    return true;
  }
  if (op[0] != "bar" && op[0] != "barrier") return false;
  set_kind(Kind::Barrier);
  if (op[0] == "bar" && i.has("warp")) {
    allow(f, {"warp", "sync"});
    ins.run = warp_barrier_handler();
    ins.op[0] = place(f, i.args.at(0), 4);
    set_kind(Kind::Collective);
    return true;
  }
  allow(f, {"cta", "sync", "arrive", "red", "aligned", "popc", "and", "or", "u32", "pred"});
  BarrierKind kind = BarrierKind::Sync;
  if (i.has("arrive")) kind = BarrierKind::Arrive;
  if (i.has("popc")) kind = BarrierKind::Popc;
  if (i.has("and")) kind = BarrierKind::And;
  if (i.has("or")) kind = BarrierKind::Or;
  ins.run = barrier_handler(kind);
  if (op[0] == "bar" || i.has("aligned")) ins.flags |= 2;
  std::size_t k = 0;
  const bool reduces = i.has("red");
  if (reduces) ins.op[0] = target(f, i.args.at(k++), kind == BarrierKind::Popc ? 4 : 1);
  ins.op[1] = place(f, i.args.at(k++), 4);
  if (i.args.size() - k == (reduces ? 2u : 1u)) ins.op[2] = place(f, i.args.at(k++), 4);
  if (reduces) {
    ins.op[3] = place(f, i.args.at(k), 1);
    if (i.args[k].negated) ins.flags |= 1;
  }
  return true;
}

bool Encoder::control(const FlatIns& f, Ins& ins) {
  const Instruction& i = f.ptx;
  const std::string& op = i.op[0];
  ins.control = true;
  set_kind(Kind::Control);
  if (op == "bra") {
    allow(f, {"uni"});
    ins.run = branch_handler();
    ins.imm = f.targets.at(0);
    return true;
  }
  if (op == "brx") {
    allow(f, {"idx", "uni"});
    ins.run = branch_index_handler();
    ins.op[0] = place(f, i.args.at(0), 4);
    ins.targets = numbers(f.targets);
    return true;
  }
  if (op == "ret" || op == "exit") {
    allow(f, {"uni"});
    ins.run = exit_handler();
    return true;
  }
  if (op == "trap") {
    ins.run = trap_handler();
    return true;
  }
  ins.control = false;
  if (op == "call") {
    ins.run = built_in_handler(f.callee);
    if (ins.run == nullptr) unknown(f, fmt::format("function {}", f.callee));
    std::vector<u32> slots(f.call_slots.begin(), f.call_slots.end());
    ins.targets = numbers(std::move(slots));
    return true;
  }
  if (op == "nanosleep") {
    ins.run = sleep_handler();
    return true;
  }
  for (const char* hint :
       {"nop", "prefetch", "prefetchu", "discard", "applypriority", "pmevent", "griddepcontrol"}) {
    if (op == hint) {
      ins.run = nothing_handler();
      return true;
    }
  }
  set_kind(Kind::Alu);
  return false;
}

}  // namespace cudasim
