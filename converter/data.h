#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/monitor.h"
#include "models/tokenizer.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Calibration text, cut into windows that the model sees from position 0 on.
struct Calibration {
  std::vector<std::int32_t>
      tokens;  // [n_windows · n_ctx], each window starting with BOS where the model wants it
  std::int64_t n_ctx = 512;
  std::string digest;  // SHA-256 of the ids, hex

  std::int64_t n_windows() const { return static_cast<std::int64_t>(tokens.size()) / n_ctx; }
};

/// Windows of a UTF-8 text file, at most max_tokens in all (0: no limit; never fewer than two
/// windows), taken evenly over the file if it holds more. `<unk>`, the placeholder of word-level
/// WikiText that raw text has none of, is replaced by a plain word. Throws InputError (empty, not
/// UTF-8, shorter than two windows: says how many tokens were found and are needed), IoError.
Calibration load_calibration(const std::filesystem::path& path, const models::Tokenizer& tokenizer,
                             std::int64_t n_ctx, std::int64_t max_tokens);

/// Text that the model samples itself (data-free conversion): drawn token by token at temperature 1
/// from the model's full distribution, because what is wanted is the activations' distribution, and
/// cutting the tail (top-k, top-p) or sharpening narrows that to the text the model likes best.
/// Texts start from BOS, or, for a model that wants none, from its end-of-text token; a window
/// holds texts of at most 256 tokens, one behind the other. Control tokens other than the start are
/// never drawn. n_tokens rounded down to whole windows, at least two. The same seed and thread
/// count give the same ids. Where `on_device` is not null it runs the passes, a decoder of the same
/// checkpoint. Throws InputError if there is no token to start from, Interrupted.
Calibration sample_calibration(models::Transformer& model, const models::Tokenizer& tokenizer,
                               std::int64_t n_ctx, std::int64_t n_tokens, std::uint64_t seed,
                               engine::Monitor& monitor, engine::Decoder* on_device = nullptr);

/// Bytes of cache and logits that sample_calibration holds.
std::int64_t sampling_bytes(const engine::DecoderShape& shape, std::int64_t n_ctx,
                            std::int64_t n_tokens);

}  // namespace moesaic::converter
