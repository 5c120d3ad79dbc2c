#pragma once

#include "converter/fit.h"
#include "converter/student.h"
#include "kernels/base/context.h"

namespace moesaic::converter {

/// Steps 2 and 3 of the recipe (DESIGN.md section 2): orders the teacher's neurons by E[ω c²],
/// c_i = |h_i − μ_i| · ‖w_down,i‖, the largest n_shared shared; reduced-rank regression of c on x
/// for the router. ω is used throughout; μ is the ω-weighted mean. Down rows are the teacher's;
/// bias and bypass are left zero (fit_outputs sets them).
///
/// With plan.block > 1 the others are grouped by E[ω c_i c_j] (balanced_groups), groups in the
/// order of their E[ω c²], and the router is fitted to contributions().
///
/// With plan.n_clones > 0 experts are copied, those of the largest E[ω c²] first and all of them
/// once before any of them twice. A token belongs to one of an expert's clones: at first by the
/// sign of h − μ of its first neuron (a router, being linear in x, cannot tell that |h − μ| is
/// large on both sides) and, from three clones on, by the sides of the hyperplanes that the router
/// of the layer without clones scores by first; then the router is fitted and tokens go to the
/// clone with the largest score (leave_to_winners), in turn. As long as one of an expert's clones
/// is selected, the layer is what it was without them. Throws InputError where the plan does not
/// fit.
Student start_from_neurons(Context& ctx, const Neurons& teacher, const LayerSample& sample,
                           const LayerPlan& plan, double ridge);

}  // namespace moesaic::converter
