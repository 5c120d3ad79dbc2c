#pragma once

#include <map>
#include <string>
#include <vector>

#include "tests/cudasim/base.h"

namespace cudasim::ptx {

struct Operand {
  enum class Kind { None, Register, Integer, Float, Symbol, Address, Vector, Sink, Special };
  Kind kind = Kind::None;
  bool negated = false;        // !%p
  int reg = -1;                // Register: index into Function::registers
  int pair = -1;               // second register of %r1|%p1; -1: none, or a sink
  u64 value = 0;               // Integer; Float: bits
  bool is_double = false;      // Float given as 0d… or in decimal
  i64 offset = 0;              // Address: [base + offset]
  std::string name;            // Symbol, Special; Address: symbol base (or empty)
  std::vector<Operand> items;  // Vector
};

struct SourceLine {
  u32 file = 0;
  u32 line = 0;
  u32 column = 0;
  auto operator<=>(const SourceLine&) const = default;
};

struct Instruction {
  std::vector<std::string> op;  // "ld", "global", "u32"
  std::string text;             // as written, for messages
  Operand guard;                // Kind::None: always
  std::vector<Operand> args;
  int scope = 0;  // where a label in args is looked up
  u32 line = 0;   // of the PTX
  SourceLine source;

  bool has(std::string_view modifier) const {
    for (std::size_t i = 1; i < op.size(); ++i) {
      if (op[i] == modifier) return true;
    }
    return false;
  }
};

struct Register {
  std::string type;  // "pred", "b32", …
  std::string name;
};

/// A variable of any state space; a parameter too.
struct Variable {
  std::string space;  // "global", "const", "shared", "local", "param"
  std::string name;
  u64 align = 1;
  u64 size = 0;
  bool is_extern = false;
  bool unsized = false;          // extern .shared x[]
  std::vector<std::byte> image;  // initial contents, may be shorter than size
  struct Patch {                 // an address in the initial contents
    u64 offset;
    std::string symbol;
    i64 addend;
  };
  std::vector<Patch> patches;
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<Variable> parameters;
  std::vector<Variable> results;
  std::vector<Variable> locals;  // .local, .shared and .param variables declared inside
  std::vector<Register> registers;
  std::vector<Instruction> body;
  std::map<std::pair<int, std::string>, u32> labels;  // (scope, name) → index into body
  std::vector<int> parent_scope;                      // scope 0 is the body
  std::map<std::string, std::vector<std::string>> branch_targets;
  u32 max_threads = 0;  // .maxntid product, 0: none given
  bool has_cluster = false;

  /// Index into body. Throws Error for a label that does not exist.
  u32 label(int scope, const std::string& name) const;
};

struct Module {
  std::string target;  // "sm_80"
  std::vector<Variable> variables;
  std::vector<Function> functions;
  std::map<u32, std::string> files;
  std::map<SourceLine, SourceLine> inlined_at;

  const Function* find(const std::string& name) const;
  /// "file.cu:12", with "in header.h:5" in front where inlined; empty without line information.
  std::string describe(SourceLine at) const;
};

}  // namespace cudasim::ptx
