#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "tests/cudasim/base.h"
#include "tests/cudasim/ptx/ast.h"

namespace cudasim {

struct Warp;
struct Ins;

/// What a warp does after an instruction.
enum class Step : u8 {
  Next,
  Jump,   // the handler changed pc or the set of lanes
  Wait,   // lanes that the instruction names have not come yet: run others first
  Block,  // waits at a barrier of the block
  Yield,  // a good moment to run another warp
  Sleep,  // the same: waits for what others do (nanosleep)
  Done,   // every lane has exited
};

using Handler = Step (*)(Warp&, const Ins&, u32 mask);

/// Where an operand's lanes lie: a byte offset into the warp's registers, or, with the lowest bit
/// set, into the program's constants.
using Place = u32;
inline constexpr Place kNowhere = 0xfffffff0u;

/// One decoded instruction.
struct Ins {
  Handler run = nullptr;
  Place guard = kNowhere;
  bool guard_negated = false;
  bool control = false;  // runs with an empty mask too
  u8 width = 4;          // bytes of one element
  u8 count = 1;          // elements of a vector access
  u32 flags = 0;         // meaning is the handler's
  std::array<Place, 6> op{kNowhere, kNowhere, kNowhere, kNowhere, kNowhere, kNowhere};
  i64 imm = 0;                                // address offset, branch target, mode, …
  const Place* more = nullptr;                // operands beyond those in op
  const std::vector<u32>* targets = nullptr;  // brx.idx
};

/// What an instruction counts as.
enum class Kind : u8 { Alu, Memory, Async, Atomic, Matrix, Barrier, Control, Collective };

struct Origin {
  std::string text;  // PTX as written
  u32 line = 0;      // of the PTX
  ptx::SourceLine source;
  Kind kind = Kind::Alu;
};

enum class Special : u8 {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NwarpId,
  SmId,
  NsmId,
  GridId,
  LaneMaskEq,
  LaneMaskLt,
  LaneMaskLe,
  LaneMaskGt,
  LaneMaskGe,
  DynamicSharedSize,
  TotalSharedSize,
  WorkspaceHigh,
  WorkspaceLow
};

struct Parameter {
  u64 offset = 0;
  u64 size = 0;
};

/// A kernel decoded for one device: parsed and decoded once, run by any number of warps.
struct Program {
  std::string name;      // mangled
  std::string readable;  // demangled
  const ptx::Module* module = nullptr;
  std::vector<Ins> code;
  std::vector<Origin> origins;       // beside code
  std::vector<std::byte> constants;  // 64-byte aligned lanes start at constants_base()
  std::vector<std::unique_ptr<std::vector<Place>>> operand_lists;
  std::vector<std::unique_ptr<std::vector<u32>>> target_lists;
  struct Preset {
    Special what;
    Place at;
    bool wide;  // 64-bit register
  };
  std::vector<Preset> presets;
  u64 register_bytes = 0;   // of a warp
  u32 live_registers = 0;   // most 32-bit registers live at once: not what ptxas would use
  u64 static_shared = 0;    // bytes behind kSharedStart, gaps counted
  u64 declared_shared = 0;  // without the gaps
  std::vector<std::pair<u64, u64>> shared_gaps;  // (offset, bytes) between variables
  u64 local_bytes = 0;                           // of a thread
  std::vector<Parameter> parameters;
  u64 parameter_bytes = 0;
  u32 max_threads = 0;
  bool has_dynamic_shared = false;
  bool releases = false;  // has fences: blocks may synchronise with each other

  std::byte* constants_base() const;
};

/// Shared-window addresses below this are reserved, as the system does on sm_80 and later.
inline constexpr u64 kSharedStart = 1024;
/// Generic addresses of shared and local memory: outside anything the host can map.
inline constexpr u64 kSharedWindow = 0x0100'0000'0000'0000ull;
inline constexpr u64 kLocalWindow = 0x0200'0000'0000'0000ull;
inline constexpr u64 kWindowBytes = 1ull << 32;

}  // namespace cudasim
