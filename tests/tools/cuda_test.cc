// generate --device cuda: the program as built, on a GPU or on the stand-in for one.

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using models::TinyOptions;

// $MOESAIC_CUDA_TESTS says that there is something to run on; with $LD_LIBRARY_PATH set for it,
// that may be the stand-in (docs/cudasim.md).
class OnCudaDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("MOESAIC_CUDA_TESTS") == nullptr) GTEST_SKIP() << "no CUDA device";
  }
};

class OnCuda : public OnCudaDevice, public testing::WithParamInterface<TinyOptions> {};

TEST_P(OnCuda, GreedyTokensEqualTheCpus) {
  const TinyModel model(GetParam(), [](TinyModel& m) { add_vocabulary(m); });
  std::vector<std::string> line = {
      "generate", model.path.string(), "-p",  "the river",    "-n", "64", "--temp", "0", "-o",
      "json",     "--activations",     "f32", "--ignore-eos", "-q"};
  const ProgramRun cpu = run_program(line);
  line.insert(line.end(), {"--device", "cuda"});
  const ProgramRun gpu = run_program(line);
  ASSERT_EQ(cpu.status, 0) << cpu.err;
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.err, "");
  EXPECT_EQ(gpu.json()["tokens"].size(), 64u);
  EXPECT_EQ(gpu.json()["tokens"], cpu.json()["tokens"]);
  EXPECT_EQ(gpu.json()["text"], cpu.json()["text"]);
}

INSTANTIATE_TEST_SUITE_P(
    Models, OnCuda,
    testing::Values(TinyOptions{.architecture = "llama", .dtype = DType::Q8_0},
                    TinyOptions{.architecture = "gemma3", .window = 8},
                    TinyOptions{.architecture = "llama", .dtype = DType::Q4_1, .moe_layers = {1}}),
    [](const auto& instance) {
      return instance.param.architecture + (instance.param.moe_layers.empty() ? "" : "Hybrid");
    });

TEST_F(OnCudaDevice, SequencesOfABatchEqualTheCpus) {
  const TinyModel model({.moe_layers = {0}}, [](TinyModel& m) { add_vocabulary(m); });
  const TemporaryFolder folder;
  const std::string batch = folder.write("batch.jsonl",
                                         "{\"prompt\": \"north\"}\n{\"prompt\": \"a red fox\"}\n"
                                         "{\"prompt\": \"two\", \"max_tokens\": 3}\n");
  std::vector<std::string> line = {
      "generate", model.path.string(), "--batch", batch, "-n", "12", "--temp",
      "0",        "--activations",     "f32",     "-q"};
  const ProgramRun cpu = run_program(line);
  line.insert(line.end(), {"--device", "cuda:0"});
  const ProgramRun gpu = run_program(line);
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.out, cpu.out);
}

}  // namespace
}  // namespace moesaic::tools
