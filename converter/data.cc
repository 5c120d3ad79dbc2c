#include "converter/data.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include "converter/digest.h"
#include "engine/logits.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

std::string digest_of(const std::vector<std::int32_t>& tokens) {
  return sha256(std::as_bytes(std::span(tokens)));
}

// ---- text of a file

/// Bytes [begin, begin + n) of an open file, or fewer where it ends.
std::string read_bytes(std::ifstream& in, const std::string& file, std::int64_t begin,
                       std::int64_t n) {
  std::string text(static_cast<std::size_t>(n), '\0');
  in.clear();
  in.seekg(begin);
  in.read(text.data(), n);
  require<IoError>(!in.bad(), "{}: cannot read", file);
  text.resize(static_cast<std::size_t>(in.gcount()));
  return text;
}

/// The file, or, where it is much larger than needed, whole lines out of `n_stretches` places
/// spread evenly over it: a window of text is wanted from everywhere, not 20 GB in memory.
std::string read_text(const std::filesystem::path& path, std::int64_t needed,
                      std::int64_t n_stretches) {
  const std::string file = path.string();
  std::error_code error;
  require<IoError>(!std::filesystem::is_directory(path, error), "{}: is a folder, expected a text",
                   file);
  std::ifstream in(path, std::ios::binary);
  require<IoError>(in.good(), "{}: cannot open: {}", file, std::generic_category().message(errno));
  in.seekg(0, std::ios::end);
  const auto size = static_cast<std::int64_t>(in.tellg());
  require<IoError>(in.good() && size >= 0, "{}: cannot read, expected a regular file", file);
  if (size <= needed) {
    std::string text = read_bytes(in, file, 0, size);
    models::check_utf8(text, file);
    return text;
  }
  std::string text;
  const std::int64_t length = needed / n_stretches;
  for (std::int64_t i = 0; i < n_stretches; ++i) {
    // In floating point: size · i may not fit in 64 bits, and a byte more or less is the same.
    const auto begin =
        static_cast<std::int64_t>(static_cast<double>(size - length) * static_cast<double>(i) /
                                  static_cast<double>(std::max<std::int64_t>(n_stretches - 1, 1)));
    std::string piece = read_bytes(in, file, begin, length);
    // From the first whole line to the last; without line ends, between whole characters.
    const auto continues = [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) == 0x80U; };
    std::size_t first = 0;
    std::size_t last = piece.size();
    if (begin > 0) {
      first = piece.find('\n') + 1;  // 0 where there is none
      while (first < std::min<std::size_t>(last, 4) && continues(piece[first])) ++first;
    }
    if (const std::size_t end = piece.rfind('\n'); end != piece.npos && end > first) {
      last = end + 1;
    } else {
      while (last > first && continues(piece[last - 1])) --last;
      if (last > first && (static_cast<unsigned char>(piece[last - 1]) & 0x80U) != 0) --last;
    }
    piece = piece.substr(first, last - first);
    models::check_utf8(
        piece, fmt::format("{}, from byte {} on", file, begin + static_cast<std::int64_t>(first)));
    text += piece;
  }
  return text;
}

/// Words that stand where word-level WikiText has `<unk>`. The rare words that it hides are names
/// more often than not; one and the same word for a twentieth of the text would be a habit that no
/// text has, so they take turns.
constexpr std::array<std::string_view, 16> kPlainWords = {
    "Martin", "river",  "Clara",  "garden", "Edward", "silver", "Laura",  "bridge",
    "Henry",  "forest", "Sophie", "market", "George", "winter", "Helena", "castle"};

std::string replace_unknown(std::string_view text) {
  constexpr std::string_view kUnknown = "<unk>";
  std::string out;
  out.reserve(text.size());
  std::size_t n = 0;
  std::size_t from = 0;
  for (std::size_t at = text.find(kUnknown); at != text.npos; at = text.find(kUnknown, from)) {
    out += text.substr(from, at - from);
    out += kPlainWords[n++ % kPlainWords.size()];
    from = at + kUnknown.size();
  }
  out += text.substr(from);
  return out;
}

// ---- text of the model itself

/// Which tokens may be drawn, and where a text begins and ends.
struct DrawRules {
  std::vector<bool> masked;     // [vocab_size] never drawn
  std::vector<bool> ends_text;  // [vocab_size]
  std::int32_t start = 0;       // what a text begins with
};

/// Control tokens (roles, padding, tool marks) are not running text: none is drawn but those that
/// end a text. A text starts with BOS where the model wants it, else with what stood between texts
/// in training: "<|endoftext|>" where a chat model's EOS is the end of a turn, else EOS.
DrawRules draw_rules(const models::Tokenizer& tokenizer, std::int64_t vocab_size,
                     const std::string& file) {
  const bool wants_bos = tokenizer.add_bos && tokenizer.bos.has_value();
  std::vector<std::int32_t> ends = tokenizer.stop_ids;
  if (tokenizer.eos) ends.push_back(*tokenizer.eos);
  std::erase_if(ends, [&](std::int32_t id) { return id < 0 || id >= vocab_size; });
  std::optional<std::int32_t> start = wants_bos ? tokenizer.bos : tokenizer.eos;
  for (const std::int32_t id : ends) {
    if (!wants_bos && tokenizer.piece(id, true) == "<|endoftext|>") start = id;
  }
  require<InputError>(start && *start >= 0 && *start < vocab_size,
                      "{}: has no BOS or EOS token to start a text from, expected one; calibrate "
                      "on a text instead (--data FILE)",
                      file);
  const auto n = static_cast<std::size_t>(vocab_size);
  DrawRules rules{std::vector<bool>(n), std::vector<bool>(n), *start};
  for (std::size_t i = 0; i < n; ++i) {
    // The embedding may have rows beyond the tokens.
    rules.masked[i] = static_cast<std::int64_t>(i) >= tokenizer.vocab_size() ||
                      tokenizer.piece(static_cast<std::int32_t>(i)).empty();
  }
  for (const std::int32_t id : ends) {
    rules.masked[static_cast<std::size_t>(id)] = false;
    rules.ends_text[static_cast<std::size_t>(id)] = true;
  }
  return rules;
}

/// Draws from softmax(logits) with u in [0, 1). engine::Sampler would do the same in three passes
/// of double exponentials over the vocabulary, 0.8 ms a token for 49,152 ids: as long as the
/// model's own share. Here each block of ids is summed by the engine's vector loop, and only the
/// block that u falls into is walked through.
std::int32_t draw(std::span<const float> logits, double u) {
  constexpr std::size_t kBlock = 1024;
  const double whole = engine::log_sum_exp(logits);
  require<Error>(std::isfinite(whole), "sampled text: the model's logits are not finite");
  double before = 0;
  std::size_t last =
      logits.size();  // last block with any weight, for a u that rounding leaves over
  for (std::size_t at = 0; at < logits.size(); at += kBlock) {
    const auto block = logits.subspan(at, std::min(kBlock, logits.size() - at));
    const double weight = std::exp(engine::log_sum_exp(block) - whole);
    if (weight > 0) last = at;
    if (u < before + weight) break;
    before += weight;
  }
  std::size_t id = last;
  const std::size_t end = std::min(last + kBlock, logits.size());
  for (std::size_t i = last; i < end; ++i) {
    const double p = std::exp(static_cast<double>(logits[i]) - whole);
    if (p > 0) id = i;
    before += p;
    if (u < before) break;
  }
  return static_cast<std::int32_t>(id);
}

/// A window is filled by texts of this length, each drawn on its own: attention over longer ones
/// costs more than all the rest, and where text starts afresh the window looks like packed training
/// data.
constexpr std::int64_t kTextLength = 256;

constexpr std::int64_t kTextsOnHost = 128;
// A decoder on a device takes more rows than these for a prompt.
constexpr std::int64_t kTextsOnDevice = 64;

/// How many texts are drawn at a time, so that each weight that is read and unpacked serves many
/// tokens, as long as their cache stays within 1.5 GiB.
std::int64_t parallel_texts(const engine::DecoderShape& shape, std::int64_t capacity,
                            std::int64_t most) {
  constexpr std::int64_t kCacheBytes = std::int64_t{3} << 29;
  const std::int64_t bytes =
      2 * shape.n_layers * capacity * shape.n_kv_heads * shape.head_dim * std::int64_t{4};
  return std::clamp<std::int64_t>(kCacheBytes / bytes, 1, most);
}

/// How n_texts are cut into groups that are drawn side by side.
struct Groups {
  std::int64_t n;
  std::int64_t largest;

  Groups(const engine::DecoderShape& shape, std::int64_t capacity, std::int64_t n_texts,
         std::int64_t at_once) {
    const std::int64_t most = parallel_texts(shape, capacity, at_once);
    n = (n_texts + most - 1) / most;
    largest = (n_texts + n - 1) / n;
  }
};

}  // namespace

std::int64_t sampling_bytes(const engine::DecoderShape& shape, std::int64_t n_ctx,
                            std::int64_t n_tokens) {
  const std::int64_t capacity = std::min(kTextLength, n_ctx);
  const std::int64_t n_windows = std::max<std::int64_t>(2, n_tokens / n_ctx);
  const Groups groups(shape, capacity, n_windows * ((n_ctx + capacity - 1) / capacity),
                      kTextsOnHost);
  const std::int64_t cache = 2 * shape.n_layers * capacity * shape.n_kv_heads * shape.head_dim;
  return groups.largest * (cache + shape.vocab_size) * static_cast<std::int64_t>(sizeof(float));
}

Calibration load_calibration(const std::filesystem::path& path, const models::Tokenizer& tokenizer,
                             std::int64_t n_ctx, std::int64_t max_tokens) {
  const std::string file = path.string();
  const bool with_bos = tokenizer.add_bos && tokenizer.bos.has_value();
  const std::int64_t length = n_ctx - (with_bos ? 1 : 0);  // tokens of text in a window
  require<InputError>(length >= 1, "n_ctx: {} given, expected at least 2", n_ctx);
  // A window takes some 4 bytes a token of prose; 64 leave room for text that packs far better.
  constexpr std::int64_t kBytesPerToken = 64;
  const bool all = max_tokens <= 0 || max_tokens > std::numeric_limits<std::int64_t>::max() / 64;
  const std::int64_t wanted = all ? 0 : std::max<std::int64_t>(2, max_tokens / n_ctx);
  std::string text =
      all ? read_text(path, std::numeric_limits<std::int64_t>::max(), 1)
          : read_text(path, std::max(wanted * n_ctx, max_tokens) * kBytesPerToken, wanted);
  if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);  // byte order mark
  require<InputError>(!text.empty(), "{}: is empty, expected UTF-8 text of at least {} tokens",
                      file, 2 * length);
  // What a user hands in is text throughout: the letters "<|im_end|>" in it are letters.
  const std::vector<std::int32_t> ids =
      tokenizer.encode(replace_unknown(text), models::SpecialTokens::Text);
  const auto n_tokens = static_cast<std::int64_t>(ids.size());
  const std::int64_t available = n_tokens / length;
  require<InputError>(available >= 2,
                      "{}: {} tokens found, expected at least {} (two windows of {})", file,
                      n_tokens, 2 * length, n_ctx);

  const std::int64_t n_windows = all ? available : std::min(wanted, available);
  Calibration calibration;
  calibration.n_ctx = n_ctx;
  calibration.tokens.reserve(static_cast<std::size_t>(n_windows * n_ctx));
  for (std::int64_t i = 0; i < n_windows; ++i) {
    const std::int64_t window = i * available / n_windows;
    if (with_bos) calibration.tokens.push_back(*tokenizer.bos);
    const auto first = ids.begin() + window * length;
    calibration.tokens.insert(calibration.tokens.end(), first, first + length);
  }
  calibration.digest = digest_of(calibration.tokens);
  return calibration;
}

Calibration sample_calibration(models::Transformer& model, const models::Tokenizer& tokenizer,
                               std::int64_t n_ctx, std::int64_t n_tokens, std::uint64_t seed,
                               engine::Monitor& monitor, engine::Decoder* on_device) {
  require<InputError>(n_ctx >= 2, "n_ctx: {} given, expected at least 2", n_ctx);
  const engine::DecoderShape shape = model.shape();
  const DrawRules rules =
      draw_rules(tokenizer, shape.vocab_size, model.checkpoint().file->path().string());
  const bool with_bos = tokenizer.add_bos && tokenizer.bos.has_value();
  const std::int64_t n_windows = std::max<std::int64_t>(2, n_tokens / n_ctx);

  Calibration calibration;
  calibration.n_ctx = n_ctx;
  calibration.tokens.assign(static_cast<std::size_t>(n_windows * n_ctx), rules.start);

  // Places in `tokens` that each text fills by drawing. Its start token is kept within a window and
  // where a window begins with BOS; elsewhere windows begin with plain text, as they do when a file
  // is cut and when a model without BOS is evaluated.
  std::vector<Range> texts;
  for (std::int64_t begin = 0; begin < n_windows * n_ctx; begin += n_ctx) {
    for (std::int64_t at = 0; at < n_ctx; at += kTextLength) {
      const bool keeps_start = at > 0 || with_bos;
      texts.push_back(
          {begin + at + (keeps_start ? 1 : 0), begin + std::min(at + kTextLength, n_ctx)});
    }
  }
  const auto n_texts = static_cast<std::int64_t>(texts.size());
  const std::int64_t capacity = std::min(kTextLength, n_ctx);
  const Groups groups(shape, capacity, n_texts,
                      on_device != nullptr ? kTextsOnDevice : kTextsOnHost);

  engine::Decoder& decoder = on_device != nullptr ? *on_device : model;
  const auto cache = decoder.make_cache(groups.largest, capacity);
  AlignedBuffer<float> logits_memory(static_cast<std::size_t>(groups.largest * shape.vocab_size));
  ThreadPool& pool = model.context().pool;
  monitor.stage("sample calibration text", n_texts * capacity);
  for (std::int64_t group = 0; group < groups.n; ++group) {
    const std::int64_t first = group * n_texts / groups.n;
    const std::int64_t n = (group + 1) * n_texts / groups.n - first;
    const auto size = static_cast<std::size_t>(n);
    std::vector<std::mt19937_64> random;
    std::vector<std::int32_t> slots;
    for (std::int64_t i = 0; i < n; ++i) {
      // Each text has its own stream of random numbers: neither the grouping nor the threads decide
      // which number a token gets.
      random.emplace_back(seed * 0x9E3779B97F4A7C15U + static_cast<std::uint64_t>(first + i));
      slots.push_back(static_cast<std::int32_t>(i));
    }
    std::vector<std::int32_t> current(size, rules.start);
    const Matrix logits(logits_memory.data(), n, shape.vocab_size);
    for (std::int64_t step = 0; step < capacity; ++step) {
      monitor.check();
      const std::vector<std::int32_t> positions(size, static_cast<std::int32_t>(step));
      decoder.forward({current, slots, positions, slots}, *cache, logits);
      pool.run([&](int thread) {
        const Range rows = split(n, pool.n_threads(), thread);
        for (std::int64_t i = rows.begin; i < rows.end; ++i) {
          const auto index = static_cast<std::size_t>(i);
          const std::span<float> row(logits.row(i), static_cast<std::size_t>(shape.vocab_size));
          for (std::size_t id = 0; id < row.size(); ++id) {
            if (rules.masked[id]) row[id] = -std::numeric_limits<float>::infinity();
          }
          std::int32_t token = draw(row, static_cast<double>(random[index]() >> 11) * 0x1p-53);
          // The text is over: another begins right behind it.
          if (rules.ends_text[static_cast<std::size_t>(token)]) token = rules.start;
          current[index] = token;
          const Range& text = texts[static_cast<std::size_t>(first + i)];
          if (step < text.size()) {
            calibration.tokens[static_cast<std::size_t>(text.begin + step)] = token;
          }
        }
      });
      monitor.advance(first * capacity + n * (step + 1), "");
    }
  }
  calibration.digest = digest_of(calibration.tokens);
  return calibration;
}

}  // namespace moesaic::converter
