#pragma once

#include <cstdint>
#include <vector>

#include "converter/data.h"
#include "converter/job.h"
#include "converter/state.h"
#include "converter/stream.h"
#include "converter/study/paper_student.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Layers that become the papers' students (converter/study/paper_student.h): layer by layer one is
/// trained from a random start on the activations that the hybrid gives its MLP, by the papers'
/// protocol at one rate, and packed. Finished layers are kept in the state folder.
class PaperConversion {
 public:
  /// Takes over what the folder holds.
  PaperConversion(const Job& job, models::Transformer& model, StateFolder& state);

  /// Of what is still to be done (Schedule).
  double cost() const;

  /// All layers in order; report.active_fraction becomes the mean over all of them. Throws as
  /// convert().
  std::vector<SavedLayer> run(Passes& passes, const Calibration& calibration, Schedule& schedule,
                              ConvertReport& report, engine::Monitor& monitor);

 private:
  double train_cost() const;  // of one layer
  SavedLayer convert_layer(int layer, const Calibration& calibration, Stream& stream,
                           Schedule& schedule, engine::Monitor& monitor);

  const Job& job_;
  models::Transformer& model_;
  StateFolder& state_;
  study::StudentShape shape_;
  std::vector<SavedLayer> saved_;
};

/// The student of --active and --experts: as many shared neurons as selected ones, as many as the
/// fraction pays for when the router and the gate are counted, or all experts. Throws InputError
/// where the fraction does not pay for a router and one neuron.
study::StudentShape student_of(const Job& job, const models::ModelConfig& config);

/// Throws InputError where options do not fit the recipe or the checkpoint: asked before the work.
void check_paper(const Job& job, const models::Checkpoint& checkpoint);

/// Bytes at the peak while converting.
std::int64_t paper_memory(const Job& job, const models::ModelConfig& config);

}  // namespace moesaic::converter
