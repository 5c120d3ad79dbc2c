#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "converter/convert.h"
#include "models/gguf.h"
#include "models/secret_moe_file.h"

namespace moesaic::converter {

/// A converted layer as kept on disk: a small GGUF with the layer's `blk.N.moe.*` tensors and its
/// report in the metadata. The view points into the mapping.
struct SavedLayer {
  LayerReport report;
  std::shared_ptr<const models::GgufFile> file;  // null for a layer that stays dense
  std::optional<kernels::SecretMoeView> view;    // nothing for a layer that stays dense
};

/// What a conversion keeps beside its output between runs: OUTPUT.state/ with `job.json`
/// (fingerprint of options, checkpoint, data, thread count and seed), `calibration.u32`,
/// `plan.json` and `layer-NNN.gguf`. Every file is written atomically, so a kill at any moment
/// leaves either a whole file or none.
class StateFolder {
 public:
  /// Opens OUTPUT.state. With `resume` and a folder there: takes it over if its fingerprint equals,
  /// else throws InputError that says which field differs (found, expected). Without `resume` and a
  /// folder there: throws InputError that says to pass --resume or remove it... unless it holds
  /// nothing finished. Creates it otherwise.
  StateFolder(const std::filesystem::path& output, const std::string& fingerprint_json,
              bool resume);

  std::optional<std::vector<std::int32_t>> load_calibration() const;
  void save_calibration(const std::vector<std::int32_t>& tokens);
  std::optional<std::string> load_plan() const;  // JSON text
  void save_plan(const std::string& json);
  std::optional<SavedLayer> load_layer(int layer, const models::ModelConfig& config) const;
  SavedLayer save_layer(const LayerReport& report, const models::PackedSecretMoe& packed,
                        const models::ModelConfig& config);
  SavedLayer save_dense_layer(const LayerReport& report);
  /// Seconds spent by earlier runs, and adding this run's.
  double seconds() const;
  void add_seconds(double seconds);
  /// Removes the folder, after the output was written.
  void remove();

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace moesaic::converter
