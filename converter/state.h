#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "converter/convert.h"
#include "models/gguf.h"
#include "models/mixture_file.h"
#include "models/mlp.h"
#include "models/secret_moe_file.h"

namespace moesaic::converter {

/// A converted layer as kept on disk: a small GGUF with the layer's `blk.N.moe.*` tensors and its
/// report in the metadata. The layer points into the mapping.
struct SavedLayer {
  LayerReport report;
  std::shared_ptr<const models::GgufFile> file;  // null for a layer that stays dense
  std::optional<models::Mlp> mlp;                // nothing for a layer that stays dense
};

/// What a conversion keeps beside its output between runs: OUTPUT.state/ with
///
///   job.json          fingerprint of options, checkpoint, data, thread count and seed
///   calibration.u32   ids, little-endian; good once calibration.json, with their SHA-256, is there
///   plan.json         what each layer becomes
///   layer-NNN.gguf    a finished layer
///   hybrid.gguf       the hybrid before recovery
///   training.gguf     recovery as it stands
///   scales.gguf       its second training, of block scales
///   time.json         seconds spent so far
///
/// Every file is written atomically, so a kill at any moment leaves either a whole file or none;
/// temporary files that a kill left, here and beside the output, are removed by the next run. One
/// process at a time: the folder is locked (flock) while the object lives.
///
/// A file that is damaged all the same (by the disk, by hand) makes the load functions throw a
/// FormatError that names it and says what to remove. All of them throw IoError.
class StateFolder {
 public:
  /// Opens OUTPUT.state. With `resume` and a folder there: takes it over if its fingerprint equals,
  /// else throws InputError that says which fields differ (found, expected). Without `resume` and
  /// finished layers or a training there: throws InputError that says to pass --resume or remove
  /// it; without either, starts over in it. Creates it otherwise. Throws InputError if another
  /// process works in it. `fingerprint_json` is the text of a JSON object.
  StateFolder(const std::filesystem::path& output, const std::string& fingerprint_json,
              bool resume);
  ~StateFolder();
  StateFolder(const StateFolder&) = delete;
  StateFolder& operator=(const StateFolder&) = delete;

  std::optional<std::vector<std::int32_t>> load_calibration() const;
  void save_calibration(const std::vector<std::int32_t>& tokens);
  std::optional<std::string> load_plan() const;  // JSON text
  void save_plan(const std::string& json);
  std::optional<SavedLayer> load_layer(int layer, const models::ModelConfig& config) const;
  SavedLayer save_layer(const LayerReport& report, const models::PackedSecretMoe& packed,
                        const models::ModelConfig& config);
  SavedLayer save_layer(const LayerReport& report, const models::PackedMixture& packed,
                        const models::ModelConfig& config);
  SavedLayer save_dense_layer(const LayerReport& report);
  /// Seconds spent by earlier runs, and adding this run's.
  double seconds() const;
  void add_seconds(double seconds);
  /// Removes the folder's own files and the folder, after the output was written. A folder that
  /// holds anything else stays, with what is not ours.
  void remove();

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path hybrid_path() const { return path_ / "hybrid.gguf"; }
  std::filesystem::path training_path() const { return path_ / "training.gguf"; }
  std::filesystem::path scales_path() const { return path_ / "scales.gguf"; }

 private:
  std::filesystem::path layer_path(int layer) const;
  void check_fingerprint(const std::string& expected) const;

  std::filesystem::path path_;
  int lock_ = -1;  // descriptor of the folder
};

}  // namespace moesaic::converter
