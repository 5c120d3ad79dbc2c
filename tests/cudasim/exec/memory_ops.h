#pragma once

#include "tests/cudasim/exec/memory_access.h"

namespace cudasim {

enum class Space : u8 { Generic, Global, Shared, Local, Const, Param };

// Ins::flags of loads, stores and atomics: AccessFlags in the low byte, and
inline constexpr u32 kAddress32 = 1u << 8;      // the base register has 32 bits
inline constexpr u32 kNoBase = 1u << 9;         // [imm]
inline constexpr u32 kWideRegister = 1u << 10;  // registers of 64 bits for narrower elements
inline constexpr u32 kSignExtend = 1u << 11;
inline constexpr u32 kInto16 = 1u << 12;    // sign extension stops at 16 bits
inline constexpr u32 kReleases = 1u << 13;  // .release or .acq_rel: fences first
inline constexpr u32 kAcquires = 1u << 14;

/// Lanes' addresses: op[1] + imm.
void addresses(const Warp& w, const Ins& i, u64* a);

// What a matching instruction runs as. Elements: Ins::width bytes, Ins::count of them; the
// registers are Ins::more.
Handler load_handler(Space space);
Handler store_handler(Space space);
/// atom and red. op[0]: destination or kNowhere; op[2], op[3]: operands; width: bytes of the
/// element. Null for what is not known. `op` is "add", "cas", …; `type` as in PTX.
Handler atomic_handler(Space space, std::string_view op, std::string_view type);
/// cp.async: op[1] shared address, op[2] global address, op[3] source bytes or kNowhere; width:
/// bytes; imm, imm2 in targets are offsets.
Handler async_copy_handler();
Handler async_commit_handler();
Handler async_wait_group_handler();
Handler async_wait_all_handler();

/// ldmatrix: count matrices (1, 2, 4), registers in more, op[1] + imm the row addresses.
Handler ldmatrix_handler(bool transposed);
Handler stmatrix_handler(bool transposed);
Handler movmatrix_handler();
/// mma.sync: d, a, b, c registers one after the other in more. `op`: all parts of the opcode.
/// Null for a shape or types that are not known.
Handler mma_handler(const std::vector<std::string>& op);

}  // namespace cudasim
