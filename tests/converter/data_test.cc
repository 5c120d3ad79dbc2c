#include "converter/data.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "tests/converter/scratch_folder.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

/// One token a byte; 256 is BOS, 257 EOS, where the vocabulary reaches so far.
class ByteTokenizer : public models::Tokenizer {
 public:
  explicit ByteTokenizer(bool with_bos) {
    bos = 256;
    eos = 257;
    add_bos = with_bos;
    stop_ids = {257};
  }
  std::vector<std::int32_t> encode(std::string_view text,
                                   models::SpecialTokens special) const override {
    EXPECT_EQ(special, models::SpecialTokens::Text);
    models::check_utf8(text, "text");
    std::vector<std::int32_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string piece(std::int32_t id, bool with_special) const override {
    if (id < 256) return std::string(1, static_cast<char>(id));
    return with_special ? "<special>" : "";
  }
  std::int64_t vocab_size() const override { return 258; }
};

std::string text_of(const Calibration& c) {
  std::string text;
  for (const std::int32_t id : c.tokens) text += id < 256 ? static_cast<char>(id) : '^';
  return text;
}

struct LoadCalibration : testing::Test {
  ScratchFolder scratch;
  std::filesystem::path file = scratch.path / "text.txt";

  Calibration load(std::string_view text, bool bos, std::int64_t n_ctx, std::int64_t max_tokens) {
    write_text(file, text);
    return load_calibration(file, ByteTokenizer(bos), n_ctx, max_tokens);
  }
};

TEST_F(LoadCalibration, WindowsFollowEachOther) {
  const Calibration c = load("abcdefghijklm", false, 4, 0);
  EXPECT_EQ(text_of(c), "abcdefghijkl");
  EXPECT_EQ(c.n_windows(), 3);
  EXPECT_EQ(c.n_ctx, 4);
}

TEST_F(LoadCalibration, EveryWindowBeginsWithBos) {
  const Calibration c = load("abcdefghijklm", true, 4, 0);
  EXPECT_EQ(text_of(c), "^abc^def^ghi^jkl");
}

TEST_F(LoadCalibration, FewerTokensThanThereAreComeEvenlyFromTheFile) {
  std::string text;
  for (char c = 'a'; c <= 'j'; ++c) text += std::string(4, c);
  EXPECT_EQ(text_of(load(text, false, 4, 20)), "aaaacccceeeeggggiiii");
  EXPECT_EQ(text_of(load(text, false, 4, 15)), "aaaaddddgggg");
  EXPECT_EQ(load(text, false, 4, 1000).n_windows(), 10);
  EXPECT_EQ(load(text, false, 4, 1).n_windows(), 2);  // never fewer
}

TEST_F(LoadCalibration, UnknownBecomesPlainWordsInTurn) {
  const std::string text = text_of(load("<unk> met <unk> , <unk>.", false, 1, 0));
  EXPECT_EQ(text.find("<unk>"), text.npos);
  EXPECT_EQ(text, "Martin met river , Clara.");
  EXPECT_EQ(text_of(load("<unk", false, 1, 0)), "<unk");
}

TEST_F(LoadCalibration, DigestFollowsTheIds) {
  const std::string a = load("abcdefgh", false, 4, 0).digest;
  EXPECT_EQ(a.size(), 64U);
  EXPECT_EQ(load("abcdefghi", false, 4, 0).digest, a);  // the same windows
  EXPECT_NE(load("abcdefgi", false, 4, 0).digest, a);
}

TEST_F(LoadCalibration, ByteOrderMarkIsNotText) {
  EXPECT_EQ(text_of(load("\xEF\xBB\xBF"
                         "abcd",
                         false, 2, 0)),
            "abcd");
}

TEST_F(LoadCalibration, LargeFileIsReadInStretches) {
  // 4 windows of 8 tokens need 2 KiB at 64 bytes a token; the file has 30 lines' worth of each
  // letter, 78 KiB.
  std::string text;
  for (char c = 'a'; c <= 'z'; ++c) {
    for (int i = 0; i < 30; ++i) text += std::string(99, c) + "\n";
  }
  const Calibration c = load(text, false, 8, 32);
  ASSERT_EQ(c.n_windows(), 4);
  const std::string got = text_of(c);
  EXPECT_EQ(got.front(), 'a');
  std::set<char> letters(got.begin(), got.end());
  letters.erase('\n');
  EXPECT_EQ(letters.size(), 4U);  // each from another place of the file
  EXPECT_GT(*letters.rbegin(), 'w');
}

TEST_F(LoadCalibration, LargeFileWithoutLineEndsIsCutBetweenCharacters) {
  std::string text;
  for (int i = 0; i < 20000; ++i) text += i % 3 == 0 ? "€" : i % 3 == 1 ? "ü" : "𝄞";
  for (const std::int64_t n_ctx : {7, 8, 9, 10, 11}) {
    EXPECT_EQ(load(text, false, n_ctx, 4 * n_ctx).n_windows(), 4);
  }
}

TEST_F(LoadCalibration, EmptyFile) {
  const std::string text = thrown<InputError>([&] { (void)load("", false, 4, 0); });
  EXPECT_NE(text.find("text.txt: is empty, expected UTF-8 text"), text.npos) << text;
}

TEST_F(LoadCalibration, ShorterThanTwoWindowsSaysHowManyTokens) {
  const std::string text = thrown<InputError>([&] { (void)load("abcdefg", false, 4, 0); });
  EXPECT_NE(text.find("text.txt: 7 tokens found, expected at least 8"), text.npos) << text;
  const std::string bos = thrown<InputError>([&] { (void)load("abcde", true, 4, 0); });
  EXPECT_NE(bos.find("5 tokens found, expected at least 6"), bos.npos) << bos;
}

TEST_F(LoadCalibration, NotUtf8NamesTheFileAndTheByte) {
  const std::string text = thrown<InputError>([&] {
    (void)load(
        "abc\xFF"
        "def",
        false, 2, 0);
  });
  EXPECT_NE(text.find("text.txt"), text.npos) << text;
  EXPECT_NE(text.find("not UTF-8 at byte 3"), text.npos) << text;
}

TEST_F(LoadCalibration, AbsentFileAndFolder) {
  EXPECT_NE(thrown<IoError>([&] {
              (void)load_calibration(scratch.path / "absent", ByteTokenizer(false), 4, 0);
            }).find("absent: cannot open: No such file"),
            std::string::npos);
  EXPECT_NE(thrown<IoError>([&] {
              (void)load_calibration(scratch.path, ByteTokenizer(false), 4, 0);
            }).find("is a folder, expected a text"),
            std::string::npos);
}

// ---- self-sampled text

/// The tokenizer of a TinyModel: 80 ids, of which 1 is BOS, 2 EOS, 3 and 4 other control tokens.
class TinyTokenizer : public ByteTokenizer {
 public:
  explicit TinyTokenizer(bool with_bos) : ByteTokenizer(with_bos) {
    bos = 1;
    eos = 2;
    stop_ids = {2};
  }
  std::string piece(std::int32_t id, bool with_special) const override {
    return id >= 1 && id <= 4 && !with_special ? "" : "t" + std::to_string(id);
  }
  std::int64_t vocab_size() const override { return models::TinyModel::kVocab; }
};

struct SampleCalibration : testing::Test {
  models::TinyModel tiny{{.tied = false}};  // tied, it would repeat its last token
  models::TestContext context{2};
  models::Transformer model{tiny.load(), context.context};
  engine::Monitor silent;

  Calibration sample(bool bos, std::int64_t n_ctx, std::int64_t n_tokens, std::uint64_t seed) {
    return sample_calibration(model, TinyTokenizer(bos), n_ctx, n_tokens, seed, silent);
  }
};

TEST_F(SampleCalibration, WholeWindowsThatStartWithBos) {
  const Calibration c = sample(true, 16, 16 * 5 + 3, 1);
  EXPECT_EQ(c.n_windows(), 5);
  EXPECT_EQ(c.tokens.size(), 80U);
  EXPECT_EQ(c.digest.size(), 64U);
  for (std::int64_t w = 0; w < 5; ++w) EXPECT_EQ(c.tokens[static_cast<std::size_t>(w * 16)], 1);
  EXPECT_EQ(sample(true, 16, 3, 1).n_windows(), 2);
}

TEST_F(SampleCalibration, ControlTokensAreNotDrawnAndTheEndStartsATextAnew) {
  for (const bool bos : {true, false}) {
    const std::int32_t start = bos ? 1 : 2;
    const Calibration c = sample(bos, 64, 64 * 40, 2);
    std::map<std::int32_t, int> counts;
    for (const std::int32_t id : c.tokens) ++counts[id];
    EXPECT_EQ(counts[bos ? 2 : 1], 0);
    EXPECT_EQ(counts[3], 0);
    EXPECT_EQ(counts[4], 0);
    EXPECT_GT(counts[start], bos ? 40 : 0);  // the model draws the end now and then
  }
}

TEST_F(SampleCalibration, SameSeedSameIds) {
  const Calibration a = sample(false, 16, 320, 7);
  EXPECT_EQ(a.tokens, sample(false, 16, 320, 7).tokens);
  EXPECT_NE(a.tokens, sample(false, 16, 320, 8).tokens);
  // Windows differ from each other too.
  EXPECT_FALSE(std::equal(a.tokens.begin(), a.tokens.begin() + 16, a.tokens.begin() + 16));
}

TEST_F(SampleCalibration, DrawsFollowTheModelsDistribution) {
  // First tokens after EOS, over many windows, against the softmax of the oracle's logits.
  const int n = 2000;
  const Calibration c = sample(false, 2, 2 * n, 3);
  std::vector<double> counts(models::TinyModel::kVocab);
  for (std::size_t i = 0; i < c.tokens.size(); i += 2)
    ++counts[static_cast<std::size_t>(c.tokens[i])];
  std::vector<double> p = tiny.reference.logits({2})[0];
  for (const int masked : {1, 3, 4}) p[static_cast<std::size_t>(masked)] = -1e9;
  double sum = 0;
  for (double& x : p) sum += x = std::exp(x);
  double chi_squared = 0;
  int cells = 0;
  for (std::size_t id = 0; id < p.size(); ++id) {
    const double expected = p[id] / sum * n;
    if (expected < 5) continue;
    chi_squared += (counts[id] - expected) * (counts[id] - expected) / expected;
    ++cells;
  }
  ASSERT_GT(cells, 3);
  // Mean `cells`, variance 2 · cells: five standard deviations for a seed that never changes.
  EXPECT_LT(chi_squared, cells + 5 * std::sqrt(2.0 * cells));
}

TEST_F(SampleCalibration, ReportsProgressAndStops) {
  struct Stopping : engine::Monitor {
    std::int64_t total = 0, last = 0;
    int left = 1 << 20;
    void stage(std::string_view, std::int64_t n) override { total = n; }
    void advance(std::int64_t done, std::string_view) override {
      EXPECT_GE(done, last);
      last = done;
      --left;
    }
    bool cancelled() const override { return left <= 0; }
  } monitor;
  (void)sample_calibration(model, TinyTokenizer(true), 16, 16 * 70, 1, monitor);
  EXPECT_EQ(monitor.last, monitor.total);
  EXPECT_EQ(monitor.total, 16 * 70);
  monitor.left = 3;
  monitor.last = 0;
  EXPECT_THROW((void)sample_calibration(model, TinyTokenizer(true), 16, 16 * 70, 1, monitor),
               Interrupted);
}

TEST_F(SampleCalibration, LongWindowsHoldSeveralTexts) {
  for (const bool bos : {true, false}) {
    const Calibration c = sample(bos, 256 + 40, 3 * 296, 5);
    ASSERT_EQ(c.n_windows(), 3);
    for (std::size_t w = 0; w < 3; ++w) EXPECT_EQ(c.tokens[w * 296 + 256], bos ? 1 : 2);
  }
}

TEST_F(SampleCalibration, EndOfTextIsPreferredToTheEndOfATurn) {
  struct ChatTokenizer : TinyTokenizer {
    ChatTokenizer() : TinyTokenizer(false) { stop_ids = {2, 3}; }
    std::string piece(std::int32_t id, bool with_special) const override {
      return id == 3 && with_special ? "<|endoftext|>" : TinyTokenizer::piece(id, with_special);
    }
  };
  const Calibration c = sample_calibration(model, ChatTokenizer(), 64, 64 * 40, 2, silent);
  EXPECT_EQ(std::count(c.tokens.begin(), c.tokens.end(), 2), 0);  // a turn's end ends a text too
  EXPECT_GT(std::count(c.tokens.begin(), c.tokens.end(), 3), 0);
}

TEST_F(SampleCalibration, NoTokenToStartFrom) {
  TinyTokenizer tokenizer(false);
  tokenizer.eos.reset();
  tokenizer.stop_ids.clear();
  const std::string text =
      thrown<InputError>([&] { (void)sample_calibration(model, tokenizer, 16, 64, 1, silent); });
  EXPECT_NE(text.find("no BOS or EOS token"), text.npos) << text;
  EXPECT_NE(text.find("--data FILE"), text.npos) << text;
}

}  // namespace
}  // namespace moesaic::converter
