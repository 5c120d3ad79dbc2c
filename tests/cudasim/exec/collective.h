#pragma once

#include "tests/cudasim/exec/block.h"

namespace cudasim {

// Instructions of several lanes or warps. Operands as in PTX order, a second destination after the
// first; kNowhere where there is none.

/// mode "up", "down", "bfly", "idx": d, p, a, b, c, membermask (the last in more[0]).
Handler shuffle_handler(std::string_view mode);
/// "all", "any", "uni" (d predicate), "ballot" (d register): d, a, membermask.
/// flags 1: a is negated.
Handler vote_handler(std::string_view mode);
/// "any", "all" of "b32", "b64": d, p, a, membermask.
Handler match_handler(std::string_view mode, std::string_view type);
/// d, a, membermask. Null for what is not known.
Handler reduce_handler(std::string_view op, std::string_view type);
Handler active_mask_handler();
Handler warp_barrier_handler();  // bar.warp.sync: op[0] membermask
Handler elect_handler();         // d, p, membermask

enum class BarrierKind : u8 { Sync, Arrive, Popc, And, Or };
/// op[0]: destination of a reduction; op[1]: barrier; op[2]: threads or kNowhere; op[3]: predicate.
/// flags 1: predicate negated; 2: aligned.
Handler barrier_handler(BarrierKind kind);
Handler fence_handler(bool device_wide);

/// The barriers that the warps which still live complete are completed: call when a warp exits.
void complete_barriers(Block& b);

// Control flow. imm: target.
Handler branch_handler();
Handler branch_index_handler();  // op[0] index, targets
Handler exit_handler();
Handler trap_handler();
Handler sleep_handler();
Handler nothing_handler();
/// A function the system provides ("vprintf", "__assertfail"); targets: where its results and
/// arguments are. Null for another.
Handler built_in_handler(std::string_view name);

/// Lanes that are not to run now: they go on at pc, together with others that are there.
void put_aside(Warp& w, u32 pc, u32 mask, bool waiting);
/// Lets the fragment of least pc run that does not wait. False: all wait.
bool switch_fragment(Warp& w);

}  // namespace cudasim
