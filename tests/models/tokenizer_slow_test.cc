#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <iterator>

#include "models/tokenizer.h"
#include "tests/models/small_vocabulary.h"

namespace moesaic::models {
namespace {

std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class TokenizerWikiText : public ::testing::TestWithParam<testing::ReferenceModel> {};

TEST_P(TokenizerWikiText, WholeTestSplitEqualsTheReference) {
  static_assert(std::endian::native == std::endian::little, "the reference is little-endian");
  const auto checkpoint = testing::checkpoint_path(GetParam().checkpoint);
  const auto text_path = testing::shared_path("data/wikitext-2/wiki.test.raw");
  const auto ids_path =
      testing::shared_path(std::string("reference/") + GetParam().name + ".wiki.test.u32");
  for (const auto& path : {checkpoint, text_path, ids_path}) {
    if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  }
  const auto tokenizer = load_tokenizer(*GgufFile::open(checkpoint));
  const std::string text = read_file(text_path);
  const std::string raw = read_file(ids_path);
  std::vector<std::int32_t> expected(raw.size() / sizeof(std::int32_t));
  std::memcpy(expected.data(), raw.data(), expected.size() * sizeof(std::int32_t));

  const auto ids = tokenizer->encode(text, SpecialTokens::Parse);
  ASSERT_EQ(ids.size(), expected.size());
  for (std::size_t i = 0; i < ids.size(); ++i) ASSERT_EQ(ids[i], expected[i]) << "at token " << i;
  EXPECT_EQ(tokenizer->decode(ids), text);
  // The text holds no special token, so taking it as a user's changes nothing.
  EXPECT_EQ(tokenizer->encode(text, SpecialTokens::Text), ids);
}

INSTANTIATE_TEST_SUITE_P(Models, TokenizerWikiText, ::testing::ValuesIn(testing::kReferenceModels),
                         [](const auto& model) {
                           std::string name = model.param.name;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace moesaic::models
