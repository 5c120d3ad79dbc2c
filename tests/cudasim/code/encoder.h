#pragma once

#include <initializer_list>
#include <map>
#include <set>
#include <string_view>

#include "tests/cudasim/code/allocate.h"
#include "tests/cudasim/code/decode.h"
#include "tests/cudasim/exec/lanewise.h"
#include "tests/cudasim/exec/memory_ops.h"

namespace cudasim {

/// Turns flat instructions into decoded ones.
class Encoder {
 public:
  Encoder(const ptx::Module& module, const ptx::Function& kernel, const SymbolAddress& address);
  std::unique_ptr<Program> run();

 private:
  using Operand = ptx::Operand;
  using Instruction = ptx::Instruction;

  // encode_*.cc: false if the opcode is not of the family.
  bool arithmetic(const FlatIns& f, Ins& ins);
  bool moves(const FlatIns& f, Ins& ins);
  bool loads_and_stores(const FlatIns& f, Ins& ins);
  bool atomics(const FlatIns& f, Ins& ins);
  bool async_copies(const FlatIns& f, Ins& ins);
  bool matrices(const FlatIns& f, Ins& ins);
  bool collectives(const FlatIns& f, Ins& ins);
  bool barriers(const FlatIns& f, Ins& ins);
  bool control(const FlatIns& f, Ins& ins);

  [[noreturn]] void unknown(const FlatIns& f, std::string_view why) const;
  /// Throws unless every modifier from the second on is one of `known`.
  void allow(const FlatIns& f, std::initializer_list<std::string_view> known,
             std::size_t first = 1) const;

  /// Registers that are compared by an atom.cas: what is loaded into them begins a compare-and-swap
  /// loop, and may be out of date.
  void find_compared();
  void lay_out_parameters();
  void lay_out_shared();
  void encode(const FlatIns& f);
  void set_kind(Kind k) { program_->origins.back().kind = k; }

  /// Place of an operand stored with `width` bytes a lane (1: predicate). `f` for messages.
  Place place(const FlatIns& f, const Operand& o, u8 width, std::string_view type = {});
  /// Place of a destination; kNowhere for a sink.
  Place target(const FlatIns& f, const Operand& o, u8 width);
  Place pair_of(const FlatIns& f, const Operand& o, u8 width);
  Place register_place(int reg) const { return file_.place[static_cast<std::size_t>(reg)]; }
  u8 register_bytes(const Operand& o) const {
    return o.reg < 0 ? 0 : flat_.register_bytes[static_cast<std::size_t>(o.reg)];
  }
  Place constant(u64 value, u8 width);
  Place special(const FlatIns& f, const std::string& name, bool wide);
  /// Address of a variable, in its own space; false if there is none of that name.
  bool symbol(const std::string& name, u64& value);
  /// Sets op[1], imm and address flags from [base + offset].
  void set_address(const FlatIns& f, const Operand& o, Ins& ins);
  const Place* list(std::vector<Place> places);
  const std::vector<u32>* numbers(std::vector<u32> values);

  const ptx::Module& module_;
  const ptx::Function& kernel_;
  const SymbolAddress& address_;
  std::unique_ptr<Program> program_;
  Flat flat_;
  RegisterFile file_;
  std::map<std::pair<u64, u8>, Place> constants_;
  std::map<std::pair<Special, bool>, Place> presets_;
  std::map<std::string, u64> shared_;  // shared-window address by name
  std::map<std::string, const ptx::Variable*> shared_variables_;
  std::map<std::string, u64> parameters_;
  std::set<int> compared_;
};

}  // namespace cudasim
