#pragma once

#include "converter/study/paper_student.h"
#include "kernels/base/dtype.h"
#include "models/mixture_file.h"

namespace moesaic::converter::study {

/// The layer that a student is, in file formats: outputs times y_scale, rows rounded to the
/// formats' grids. Throws ShapeError for a student without experts.
models::PackedMixture pack(const PaperStudent& student, double y_scale, DType expert_dtype,
                           DType router_dtype);

}  // namespace moesaic::converter::study
