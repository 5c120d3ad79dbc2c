#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <limits>
#include <unordered_map>

#include "kernels/base/error.h"
#include "models/vocabulary.h"

namespace moesaic::models {
namespace {

// White space is spelled out as Unicode defines it ([\p{Z}\x{9}-\x{d}\x{85}]): PCRE2's \s also
// takes U+180E, which left that set in 2013.

// GPT-2's split.
constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{Z}\x{9}-\x{d}\x{85}\p{L}\p{N}]+)"
    R"(|[\p{Z}\x{9}-\x{d}\x{85}]+(?![^\p{Z}\x{9}-\x{d}\x{85}])|[\p{Z}\x{9}-\x{d}\x{85}]+)";
constexpr const char* kDigit = R"(\p{N})";

/// Expressions applied one after another: each cuts what the one before it left into its matches
/// and the gaps between them.
struct PreTokenizer {
  std::string_view name;  // tokenizer.ggml.pre
  std::array<const char*, 2> expressions;
};
constexpr std::array kPreTokenizers = {
    PreTokenizer{"default", {kGpt2, nullptr}},  PreTokenizer{"gpt-2", {kGpt2, nullptr}},
    PreTokenizer{"phi-2", {kGpt2, nullptr}},    PreTokenizer{"smollm", {kDigit, kGpt2}},
    PreTokenizer{"starcoder", {kDigit, kGpt2}}, PreTokenizer{"refact", {kDigit, kGpt2}},
};

template <auto Free>
struct Freer {
  template <class T>
  void operator()(T* pointer) const {
    Free(pointer);
  }
};
using Code = std::unique_ptr<pcre2_code, Freer<pcre2_code_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Freer<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Freer<pcre2_match_context_free>>;

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

/// One compiled expression; matching is thread-safe.
class Splitter {
 public:
  explicit Splitter(const char* expression) : context_(pcre2_match_context_create(nullptr)) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression), PCRE2_ZERO_TERMINATED,
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    require<Error>(code_ && context_, "PCRE2 does not take {}: {}", expression,
                   pcre2_message(error));
    // Without JIT (a kernel that forbids writable code) the interpreter does the same, slower.
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
    // The expressions backtrack by one character at most; a limit would only forbid long words.
    pcre2_set_match_limit(context_.get(), std::numeric_limits<std::uint32_t>::max());
  }

  /// Calls piece(match or gap) for each stretch of valid UTF-8 `text`, in order.
  template <class Piece>
  void split(std::string_view text, Piece&& piece) const {
    const MatchData match(pcre2_match_data_create(1, nullptr));
    require<Error>(match != nullptr, "PCRE2: out of memory");
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    for (std::size_t at = 0; at < text.size();) {
      const int found =
          pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                      PCRE2_NO_UTF_CHECK, match.get(), context_.get());
      require<Error>(found >= 0 || found == PCRE2_ERROR_NOMATCH, "PCRE2 at byte {}: {}", at,
                     pcre2_message(found));
      const std::size_t begin = found >= 0 ? range[0] : text.size();
      const std::size_t end = found >= 0 ? range[1] : text.size();
      if (begin > at) piece(text.substr(at, begin - at));
      if (end > begin) piece(text.substr(begin, end - begin));
      at = end;
    }
  }

 private:
  Code code_;
  MatchContext context_;
};

/// GPT-2's printable stand-in for each byte, as UTF-8: the printable bytes of Latin-1 stand for
/// themselves, the others for U+0100 and up, in order.
std::array<std::string, 256> byte_alphabet() {
  std::array<std::string, 256> alphabet;
  unsigned next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    const unsigned code = printable ? byte : next++;
    if (code < 0x80) {
      alphabet[byte] = {static_cast<char>(code)};
    } else {
      alphabet[byte] = {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    }
  }
  return alphabet;
}

/// The bytes each token stands for. A token that is not written in the alphabet (added by hand)
/// stands for its own text.
std::vector<std::string> bpe_surface(const Vocabulary& vocabulary) {
  std::unordered_map<std::string_view, char> byte_of;
  const auto alphabet = byte_alphabet();
  for (std::size_t byte = 0; byte < alphabet.size(); ++byte) {
    byte_of[alphabet[byte]] = static_cast<char>(byte);
  }
  const auto bytes = [&](std::string_view token) {
    std::string out;
    while (!token.empty()) {
      const auto width = static_cast<unsigned char>(token[0]) < 0x80 ? 1 : 2;
      const auto byte = byte_of.find(token.substr(0, width));
      if (byte == byte_of.end()) return std::optional<std::string>();
      out += byte->second;
      token.remove_prefix(byte->first.size());
    }
    return std::optional(out);
  };
  std::vector<std::string> surface = vocabulary.tokens;
  for (std::size_t i = 0; i < surface.size(); ++i) {
    const TokenType type = vocabulary.types[i];
    if (type != TokenType::Normal && type != TokenType::Unused) continue;
    if (auto decoded = bytes(surface[i])) surface[i] = *std::move(decoded);
  }
  return surface;
}

class BpeTokenizer final : public VocabularyTokenizer {
 public:
  BpeTokenizer(const Vocabulary& vocabulary, const std::vector<std::string>& merges,
               const PreTokenizer& pre)
      : VocabularyTokenizer(vocabulary, bpe_surface(vocabulary), {TokenType::UserDefined}) {
    for (const char* expression : pre.expressions) {
      if (expression != nullptr) splitters_.emplace_back(expression);
    }
    std::unordered_map<std::string_view, std::int32_t> id_of;
    for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
      id_of.emplace(vocabulary.tokens[i], static_cast<std::int32_t>(i));
    }
    const auto alphabet = byte_alphabet();
    for (std::size_t byte = 0; byte < alphabet.size(); ++byte) {
      const auto token = id_of.find(alphabet[byte]);
      byte_id_[byte] = token == id_of.end() ? -1 : token->second;
    }
    merges_.reserve(merges.size());
    for (std::size_t rank = 0; rank < merges.size(); ++rank)
      add_merge(vocabulary, id_of, merges, rank);
  }

 protected:
  void encode_fragment(std::string_view text, std::vector<std::int32_t>& ids) const override {
    require<InputError>(text.size() <= std::numeric_limits<std::int32_t>::max(),
                        "text of {} bytes is too long for one call", text.size());
    Work work{ids, {}, {}, {}};
    split(0, text, work);
  }

 private:
  struct Merge {
    std::int32_t rank;
    std::int32_t merged;  // id
  };
  struct Symbol {
    std::int32_t id;    // -1: no such token, or merged into its left neighbour
    std::int32_t prev;  // index of the neighbour, -1: none
    std::int32_t next;
  };
  struct Candidate {
    Merge merge;
    std::int32_t left, right;        // indices of symbols
    std::int32_t left_id, right_id;  // their ids when this was queued: stale if they differ now
    // std::push_heap keeps the greatest in front: the lowest rank, the leftmost of equals.
    bool operator<(const Candidate& other) const {
      return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : left > other.left;
    }
  };
  struct Work {
    std::vector<std::int32_t>& ids;
    // Where in `ids` a word of this text was encoded before: begin, count.
    std::unordered_map<std::string_view, std::pair<std::size_t, std::size_t>> seen;
    std::vector<Symbol> symbols;
    std::vector<Candidate> queue;
  };

  static std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
  }

  void add_merge(const Vocabulary& vocabulary,
                 const std::unordered_map<std::string_view, std::int32_t>& id_of,
                 const std::vector<std::string>& merges, std::size_t rank) {
    const std::string& text = merges[rank];
    const std::size_t space = text.find(' ', 1);
    require<FormatError>(space != std::string::npos && space + 1 < text.size(),
                         "{}: tokenizer.ggml.merges[{}] is \"{}\", expected \"LEFT RIGHT\"",
                         vocabulary.file, rank, text);
    const std::string left = text.substr(0, space);
    const std::string right = text.substr(space + 1);
    const std::string both = left + right;
    std::array<std::int32_t, 3> ids{};
    std::size_t n = 0;
    for (const std::string& token : {left, right, both}) {
      const auto found = id_of.find(token);
      require<FormatError>(found != id_of.end(),
                           "{}: tokenizer.ggml.merges[{}] is \"{}\", but \"{}\" is not a token",
                           vocabulary.file, rank, text, token);
      ids[n++] = found->second;
    }
    merges_.emplace(pair_key(ids[0], ids[1]), Merge{static_cast<std::int32_t>(rank), ids[2]});
  }

  void split(std::size_t stage, std::string_view text, Work& work) const {
    if (stage == splitters_.size()) {
      encode_word(text, work);
    } else {
      splitters_[stage].split(text, [&](std::string_view piece) { split(stage + 1, piece, work); });
    }
  }

  void encode_word(std::string_view word, Work& work) const {
    const auto [known, is_new] = work.seen.try_emplace(word, work.ids.size(), 0);
    if (!is_new) {
      const auto [begin, count] = known->second;
      for (std::size_t i = 0; i < count; ++i) work.ids.push_back(work.ids[begin + i]);
      return;
    }
    const auto n = static_cast<std::int32_t>(word.size());
    work.symbols.clear();
    for (std::int32_t i = 0; i < n; ++i) {
      const std::int32_t id =
          byte_id_[static_cast<unsigned char>(word[static_cast<std::size_t>(i)])];
      work.symbols.push_back({id, i - 1, i + 1 < n ? i + 1 : -1});
    }
    work.queue.clear();
    for (std::int32_t i = 1; i < n; ++i) queue_merge(i - 1, i, work);
    merge_all(work);
    for (std::int32_t i = 0; i != -1; i = symbol(work, i).next) {
      if (symbol(work, i).id >= 0) work.ids.push_back(symbol(work, i).id);
    }
    known->second.second = work.ids.size() - known->second.first;
  }

  static Symbol& symbol(Work& work, std::int32_t index) {
    return work.symbols[static_cast<std::size_t>(index)];
  }

  void queue_merge(std::int32_t left, std::int32_t right, Work& work) const {
    if (left < 0 || right < 0) return;
    const std::int32_t left_id = symbol(work, left).id;
    const std::int32_t right_id = symbol(work, right).id;
    if (left_id < 0 || right_id < 0) return;
    const auto merge = merges_.find(pair_key(left_id, right_id));
    if (merge == merges_.end()) return;
    work.queue.push_back({merge->second, left, right, left_id, right_id});
    std::push_heap(work.queue.begin(), work.queue.end());
  }

  void merge_all(Work& work) const {
    while (!work.queue.empty()) {
      std::pop_heap(work.queue.begin(), work.queue.end());
      const Candidate best = work.queue.back();
      work.queue.pop_back();
      Symbol& left = symbol(work, best.left);
      Symbol& right = symbol(work, best.right);
      if (left.id != best.left_id || right.id != best.right_id || left.next != best.right) continue;
      left.id = best.merge.merged;
      left.next = right.next;
      right.id = -1;
      if (left.next >= 0) symbol(work, left.next).prev = best.left;
      queue_merge(left.prev, best.left, work);
      queue_merge(best.left, left.next, work);
    }
  }

  std::vector<Splitter> splitters_;
  std::array<std::int32_t, 256> byte_id_{};  // [byte] → id, -1 if the vocabulary lacks it
  std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_bpe_tokenizer(const Vocabulary& vocabulary,
                                              const std::vector<std::string>& merges,
                                              std::string_view pre) {
  std::string known;
  for (const PreTokenizer& candidate : kPreTokenizers) {
    if (candidate.name == pre) {
      return std::make_unique<BpeTokenizer>(vocabulary, merges, candidate);
    }
    known += fmt::format("{}{}", known.empty() ? "" : ", ", candidate.name);
  }
  throw FormatError(fmt::format("{}: tokenizer.ggml.pre is \"{}\", expected one of {}",
                                vocabulary.file, pre, known));
}

}  // namespace moesaic::models
