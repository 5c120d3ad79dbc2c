#include "converter/assemble.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "models/secret_moe_file.h"
#include "models/transformer.h"
#include "tests/converter/packed_case.h"
#include "tests/converter/scratch_folder.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

/// A tiny checkpoint with its middle layer converted.
struct AssembleTest : testing::Test {
  ScratchFolder scratch;
  models::TinyModel tiny{{.n_layers = 3}};
  std::shared_ptr<const models::GgufFile> dense = models::GgufFile::open(tiny.path);
  StateFolder state{scratch.path / "out.gguf", "{}", false};
  models::PackedSecretMoe packed = packed_layer(5);
  std::vector<SavedLayer> layers;
  ConvertOptions options;
  ConvertReport report;

  AssembleTest() {
    layers.push_back(state.save_dense_layer(dense_report(0)));
    layers.push_back(state.save_layer(packed_report(1, packed), packed, small_config(3)));
    layers.push_back(state.save_dense_layer(dense_report(2)));
    options.model = tiny.path;
    options.output = scratch.path / "out.gguf";
    options.seed = 9;
    report.active_fraction = 0.8125;
    report.n_tokens = 1024;
    report.source_digest = "abc";
    report.data_digest = "def";
  }
};

TEST_F(AssembleTest, HybridLoadsAndItsLayersAreWhatWasPacked) {
  assemble(*dense, layers, options, report, options.output);
  const auto checkpoint = models::Checkpoint::load(options.output);
  EXPECT_TRUE(models::is_hybrid(*checkpoint->file));
  EXPECT_TRUE(std::holds_alternative<models::DenseMlp>(checkpoint->layers[0].mlp));
  EXPECT_TRUE(std::holds_alternative<models::DenseMlp>(checkpoint->layers[2].mlp));
  const auto& view = std::get<kernels::SecretMoeView>(checkpoint->layers[1].mlp);
  const kernels::SecretMoeView expected = packed.view();
  EXPECT_EQ(view.n_active, expected.n_active);
  EXPECT_EQ(std::memcmp(view.experts.data, expected.experts.data,
                        static_cast<std::size_t>(expected.experts.bytes())),
            0);
  EXPECT_EQ(std::memcmp(view.bypass_p.data, expected.bypass_p.data,
                        static_cast<std::size_t>(expected.bypass_p.bytes())),
            0);
}

TEST_F(AssembleTest, EverythingElseStaysAsItWasAndInOrder) {
  assemble(*dense, layers, options, report, options.output);
  const auto hybrid = models::GgufFile::open(options.output);
  std::vector<std::string> kept;
  std::vector<std::string> expected;
  for (const auto& t : hybrid->tensors()) {
    if (t.name.find(".moe.") == t.name.npos) kept.push_back(t.name);
  }
  for (const auto& t : dense->tensors()) {
    if (t.name.starts_with("blk.1.ffn_") && t.name != "blk.1.ffn_norm.weight") continue;
    expected.push_back(t.name);
    const models::GgufTensor* same = hybrid->find_tensor(t.name);
    ASSERT_NE(same, nullptr) << t.name;
    EXPECT_EQ(same->dtype, t.dtype);
    EXPECT_EQ(same->dims, t.dims);
    EXPECT_EQ(std::memcmp(same->data, t.data, static_cast<std::size_t>(t.bytes)), 0) << t.name;
  }
  EXPECT_EQ(kept, expected);
  for (const auto& [key, value] : dense->metadata()) {
    EXPECT_NE(hybrid->find(key), nullptr) << key;
  }
  EXPECT_EQ(hybrid->get_string("general.name"), "tiny (secret MoE hybrid)");
  EXPECT_EQ(hybrid->get_strings("tokenizer.ggml.tokens"),
            dense->get_strings("tokenizer.ggml.tokens"));
}

TEST_F(AssembleTest, MetadataDescribesTheConversion) {
  assemble(*dense, layers, options, report, options.output);
  const auto hybrid = models::GgufFile::open(options.output);
  EXPECT_EQ(hybrid->get_strings("moesaic.layer.kind"),
            (std::vector<std::string>{"dense", "glu+low_rank", "dense"}));
  EXPECT_EQ(hybrid->get_ints("moesaic.layer.n_active"), (std::vector<std::int64_t>{0, 24, 0}));
  EXPECT_EQ(hybrid->get_ints("moesaic.layer.router_rank"), (std::vector<std::int64_t>{0, 8, 0}));
  EXPECT_EQ(hybrid->get_int("moesaic.format_version"), 1);
  EXPECT_EQ(hybrid->get_string("moesaic.source_file"), tiny.path.filename().string());
  EXPECT_EQ(hybrid->get_string("moesaic.source_digest"), "abc");
  EXPECT_EQ(hybrid->get_string("moesaic.data_digest"), "def");
  EXPECT_EQ(hybrid->get_string("moesaic.recipe"), "fast");
  EXPECT_EQ(hybrid->get_float("moesaic.active_fraction"), 0.8125);
  EXPECT_EQ(hybrid->get_int("moesaic.seed"), 9);
}

TEST_F(AssembleTest, SameBytesWhateverTheTimeAndTheOutputName) {
  assemble(*dense, layers, options, report, scratch.path / "a.gguf");
  report.seconds = 1234;
  report.peak_memory_bytes = 99;
  options.output = scratch.path / "b.gguf";
  std::vector<SavedLayer> again;  // as a resumed run reads them
  for (int l = 0; l < 3; ++l) again.push_back(*state.load_layer(l, small_config(3)));
  assemble(*dense, again, options, report, options.output);
  EXPECT_EQ(read_text(scratch.path / "a.gguf"), read_text(scratch.path / "b.gguf"));
}

TEST_F(AssembleTest, CheckpointWithoutAName) {
  models::TinyModel nameless({.n_layers = 3},
                             [](models::TinyModel& m) { m.erase_key("general.name"); });
  assemble(*models::GgufFile::open(nameless.path), layers, options, report, options.output);
  EXPECT_EQ(models::GgufFile::open(options.output)->get_string("general.name"),
            nameless.path.stem().string() + " (secret MoE hybrid)");
}

TEST_F(AssembleTest, MissingOrMisplacedLayers) {
  const auto expect_refused = [&](const std::vector<SavedLayer>& given) {
    EXPECT_THROW(assemble(*dense, given, options, report, options.output), InputError);
    EXPECT_FALSE(std::filesystem::exists(options.output));
  };
  expect_refused({layers[0], layers[1]});
  expect_refused({layers[0], layers[2], layers[1]});
  expect_refused({});
  SavedLayer without_view = layers[1];
  without_view.mlp.reset();
  expect_refused({layers[0], without_view, layers[2]});
}

TEST_F(AssembleTest, OutputThatCannotBeWritten) {
  EXPECT_THROW(assemble(*dense, layers, options, report, scratch.path / "absent" / "out.gguf"),
               IoError);
}

TEST_F(AssembleTest, EstimateIsAnUpperBound) {
  // Random bf16 experts in place of an F32 MLP, and the estimate of that format.
  assemble(*dense, layers, options, report, options.output);
  const auto written = static_cast<std::int64_t>(std::filesystem::file_size(options.output));
  EXPECT_GE(estimate_output_bytes(*dense), written);
  EXPECT_GE(estimate_output_bytes(*dense, DType::BF16, DType::BF16), written);
  EXPECT_GE(estimate_output_bytes(*dense), dense->file_bytes());
  EXPECT_LE(estimate_output_bytes(*dense), 2 * dense->file_bytes() + (1 << 17));
}

TEST(EstimateOutputBytes, FormatThatCannotBeWrittenGrows) {
  const models::TinyModel q8({.n_layers = 2, .dtype = DType::Q8_0});
  const auto file = models::GgufFile::open(q8.path);
  EXPECT_GE(estimate_output_bytes(*file, DType::F32) - estimate_output_bytes(*file, DType::Q8_0),
            2 * 3 * 64 * 96 * 2);
}

// Of clones: three rows each, a row of the router, a mean and a score's bias.
TEST(EstimateOutputBytes, NeuronsMoreThanTheMlpsGrow) {
  const models::TinyModel q8({.n_layers = 2, .dtype = DType::Q8_0});
  const auto file = models::GgufFile::open(q8.path);
  const auto estimate = [&](std::int64_t more) {
    return estimate_output_bytes(*file, DType::Q8_0, DType::Q8_0, more);
  };
  EXPECT_EQ(estimate(0), estimate_output_bytes(*file, DType::Q8_0, DType::Q8_0));
  EXPECT_GE(estimate(100) - estimate(0), 2 * 100 * (3 * 68 + 17 + 8));
}

}  // namespace
}  // namespace moesaic::converter
