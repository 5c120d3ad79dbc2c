#include "converter/recipe.h"

#include <array>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

constexpr std::array<Recipe, 1> kRecipes = {{
    {.name = "fast",
     .tokens = 131072,
     .sensitivity_tokens = 12288,
     .shared_fraction = 1.0 / 12,
     .router_rank = 64,
     .bypass_rank = 64,
     .router_ridge = 1e-3,
     .output_ridge = 0.1,
     .correction = 0,
     .least_fraction = 0.30,
     .distill = {.passes = 0.5,
                 .batch = 1024,
                 .learning_rate = 1e-3,
                 .router_rate = 1e-3,
                 .auxiliary = 1.0}},
}};

}  // namespace

const Recipe& find_recipe(std::string_view name) {
  std::string known;
  for (const Recipe& r : kRecipes) {
    if (r.name == name) return r;
    known += known.empty() ? "" : ", ";
    known += r.name;
  }
  throw InputError(fmt::format("--recipe: \"{}\" is not known, expected one of: {}", name, known));
}

}  // namespace moesaic::converter
