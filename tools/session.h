#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/monitor.h"
#include "models/tokenizer.h"
#include "models/transformer.h"
#include "tools/options.h"

namespace moesaic::tools {

/// Threads, scratch memory, byte tally and the context made of them: one per run of the program.
struct Runtime {
  explicit Runtime(const RunOptions& options);

  ThreadPool pool;
  Workspace workspace;
  Tally tally;
  Context context;
};

/// A checkpoint ready to run.
struct Model {
  /// `device` as in RunOptions.
  Model(const std::filesystem::path& path, Context& context, const std::string& device = "cpu");

  /// What runs the model on the device asked for.
  engine::Decoder& decoder() { return on_gpu ? *on_gpu : transformer; }

  std::shared_ptr<const models::Checkpoint> checkpoint;
  std::unique_ptr<models::Tokenizer> tokenizer;
  models::Transformer transformer;          // on the CPU
  std::unique_ptr<engine::Decoder> on_gpu;  // null: not asked for
};

/// A whole file ("-": standard input). Throws IoError("PATH: cannot read: reason").
std::string read_input(const std::filesystem::path& path);

/// Text that must be there and be UTF-8. Throws InputError naming the file.
std::string read_text(const std::filesystem::path& path);

/// Token ids from a file: .u32 raw little-endian, else JSON, an array or an object with
/// `input_ids` or `ids`. Throws FormatError naming the file, what was found and expected, and
/// InputError for an id outside [0, vocab_size).
std::vector<std::int32_t> read_ids(const std::filesystem::path& path, std::int64_t vocab_size);

/// Evaluation data: ids of a .u32 file, or a text file as tokens of user text, no BOS.
std::vector<std::int32_t> read_data(const std::filesystem::path& path,
                                    const models::Tokenizer& tokenizer);

/// Says so where chunks are longer than what the checkpoint was trained for.
void warn_beyond_context(const Model& model, std::int64_t n_ctx, engine::Monitor& monitor);

/// Bytes and elements of all tensors of the file.
struct TensorTotals {
  std::int64_t bytes = 0;
  std::int64_t elements = 0;
};
TensorTotals tensor_totals(const models::GgufFile& file);

/// "llama 134.52 M Q4_1": architecture, parameters, the format that holds most bytes.
std::string describe_model(const models::Checkpoint& checkpoint);

}  // namespace moesaic::tools
