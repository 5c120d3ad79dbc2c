#pragma once

#include <filesystem>
#include <string>

#include "converter/data.h"
#include "converter/device.h"
#include "converter/recovery/recover.h"
#include "converter/state.h"
#include "models/tokenizer.h"

namespace moesaic::converter {

/// What `moesaic recover` was asked for.
struct RecoverFileOptions {
  std::filesystem::path dense, hybrid, output;
  std::string data;  // a text file, or "self": text that the dense model samples itself
  RecoverOptions recover;
  MakeDecoder decoder;  // that samples it; empty: on the CPU
  bool resume = false;
};

/// Recovers a hybrid that exists, made of this dense checkpoint, and writes the result. Keeps its
/// state in OUTPUT.state/ (state.h), removed at the end; also writes OUTPUT.report.json
/// {dense, hybrid, output, data, recovery {…}} and OUTPUT.report.html. Throws InputError (not made
/// of this checkpoint, state of another recovery), FormatError, IoError, Interrupted (state kept).
RecoveryReport recover_file(const RecoverFileOptions& options, Context& ctx,
                            engine::Monitor& monitor);

/// Text to recover on: windows of a file (options.text tokens at most) and options.self_tokens of
/// the model's own; of the latter alone where data is "self". What was sampled is kept in the state
/// folder. Throws as load_calibration and sample_calibration.
std::vector<std::int32_t> recovery_text(const std::string& data, const RecoverOptions& options,
                                        std::shared_ptr<const models::Checkpoint> dense,
                                        const models::Tokenizer& tokenizer,
                                        const MakeDecoder& make_decoder, StateFolder& state,
                                        Context& ctx, engine::Monitor& monitor);

/// The options that a recovery's outcome depends on, and a report, as JSON text (objects).
std::string options_json(const RecoverOptions& options);
std::string recovery_json(const RecoveryReport& report);

/// One self-contained page: the loss over the tokens trained on, and where it comes from.
std::string recovery_html(const RecoverFileOptions& options, const RecoveryReport& report);

}  // namespace moesaic::converter
