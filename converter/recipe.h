#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "converter/distill.h"
#include "converter/study/paper_student.h"

namespace moesaic::converter {

/// What converted layers become.
enum class Method {
  SelfRouted,  // "glu+gate" with a planned budget
  Threshold,   // "glu+input", the same share everywhere: the rival (TEAL)
  LowRank,     // "glu+low_rank"
  Paper,       // a student of the papers, from a random start
};

/// The settings behind a recipe's name. How each was chosen stands beside it in recipe.cc.
struct Recipe {
  std::string_view name;
  Method method = Method::SelfRouted;
  std::int64_t tokens = 0;  // calibration tokens by default
  // Of these, but a third at most: to measure the layers' sensitivity; the rest of this struct but
  // recover_tokens and student is for Method::LowRank, of which Method::Paper takes router_rank and
  // of `distill` passes, batch and learning_rate.
  std::int64_t sensitivity_tokens = 0;
  double shared_fraction = 0;  // n_shared over d_ff, rounded to a multiple of 32
  std::int64_t router_rank = 0;
  std::int64_t bypass_rank = 0;
  double router_ridge = 0;  // of the regressions behind router and bypass
  double output_ridge = 0;  // of the down rows, towards where they stand
  double correction = 0;  // share of the drift of earlier layers that a layer is asked to take back
  double least_fraction = 0;  // no converted layer gets less
  DistillOptions distill = {};
  std::int64_t recover_tokens = 0;  // trained end to end behind all that; 0: no recovery
  study::Family student = study::Family::LowRank;  // of Method::Paper
};

/// The recipe of that name. Throws InputError that lists the known ones.
const Recipe& find_recipe(std::string_view name);

}  // namespace moesaic::converter
