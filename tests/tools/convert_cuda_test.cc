// convert and recover with --device cuda: the program as built, on a GPU or on the stand-in for
// one.

#include <csignal>
#include <cstdlib>

#include "converter/digest.h"
#include "tests/converter/recovery/self_routed_model.h"
#include "tests/models/tiny_self_routed.h"
#include "tests/tools/on_cuda.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;

// A dense model, a hybrid made of it as its file says, whose layers route themselves with other up
// rows than the dense one's: much to learn. Windows are as short as the context.
class RecoverOnCuda : public OnCudaDevice {
 protected:
  static void prepare(TinyModel& m) {
    add_vocabulary(m);
    m.set("llama.context_length", models::GgufValue::u32(64));
  }
  std::vector<std::string> line(const std::string& output, const char* tokens = "1024",
                                const char* scale_tokens = "512") const {
    return {"recover",
            dense.path.string(),
            hybrid.path.string(),
            "-o",
            output,
            "--data",
            text,
            "--recover-tokens",
            tokens,
            "--scale-tokens",
            scale_tokens,
            "--recover-batch",
            "512",
            "--held-out",
            "512",
            "--judge-every",
            "2",
            "-t",
            "2",
            "-q",
            "--recover-rate",
            "2e-2"};
  }
  static nlohmann::json recovery(const std::string& output) {
    return nlohmann::json::parse(bytes(output + ".report.json")).at("recovery");
  }

  TemporaryFolder folder;
  std::string text = folder.write("text.txt", words(4000));
  TinyModel dense{{.dtype = DType::Q8_0, .tied = false}, prepare};
  TinyModel hybrid{{.dtype = DType::Q8_0, .tied = false, .seed = 2}, [this](TinyModel& m) {
                     prepare(m);
                     converter::self_route({0, 1}, false, 2)(m);
                     m.set("moesaic.source_digest",
                           models::GgufValue::string(converter::sha256_file(dense.path)));
                   }};
};

TEST_F(RecoverOnCuda, DivergenceIsTheCpus) {
  const std::string on_cpu = (folder.path() / "cpu.gguf").string();
  const std::string on_gpu = (folder.path() / "gpu.gguf").string();
  const ProgramRun cpu = run_program(line(on_cpu));
  ASSERT_EQ(cpu.status, 0) << cpu.err;
  std::vector<std::string> asked = line(on_gpu);
  asked.insert(asked.end(), {"--device", "cuda"});
  const ProgramRun gpu = run_program(asked);
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.err, "");
  const nlohmann::json a = recovery(on_cpu), b = recovery(on_gpu);
  for (const char* kl : {"kl_start", "kl_trained", "kl_rounded", "kl_packed"}) {
    const double expected = a[kl].get<double>();
    EXPECT_NEAR(b[kl].get<double>(), expected, 0.02 * expected) << kl;
  }
  EXPECT_LT(b["kl_packed"], b["kl_start"]);
  EXPECT_EQ(b["curve"].size(), a["curve"].size());
  // And of the file, as anyone measures it.
  const auto divergence = [&](const std::string& file) {
    return run_program({"compare", dense.path.string(), file, "--data", text, "--n-ctx", "64", "-r",
                        "1", "-o", "json", "-q"})
        .json()["kl_mean"]
        .get<double>();
  };
  const double expected = divergence(on_cpu);
  EXPECT_NEAR(divergence(on_gpu), expected, 0.02 * expected);
  EXPECT_LT(expected, divergence(hybrid.path.string()));
}

TEST_F(RecoverOnCuda, LayersBehindRouters) {
  const TinyModel behind_routers(
      {.dtype = DType::Q8_0, .tied = false, .moe_layers = {0, 1}, .seed = 2}, [this](TinyModel& m) {
        prepare(m);
        m.set("moesaic.source_digest",
              models::GgufValue::string(converter::sha256_file(dense.path)));
      });
  const std::string on_cpu = (folder.path() / "cpu.gguf").string();
  const std::string on_gpu = (folder.path() / "gpu.gguf").string();
  const auto run = [&](const std::string& output, const std::vector<std::string>& more) {
    std::vector<std::string> asked = line(output, "2048", "0");
    asked[2] = behind_routers.path.string();
    asked.insert(asked.end(), more.begin(), more.end());
    return run_program(asked);
  };
  const ProgramRun cpu = run(on_cpu, {}), gpu = run(on_gpu, {"--device", "cuda"});
  ASSERT_EQ(cpu.status, 0) << cpu.err;
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.err, "");
  const nlohmann::json a = recovery(on_cpu), b = recovery(on_gpu);
  for (const char* kl : {"kl_start", "kl_trained", "kl_packed"}) {
    const double expected = a[kl].get<double>();
    EXPECT_NEAR(b[kl].get<double>(), expected, 0.02 * expected) << kl;
  }
  EXPECT_LT(b["kl_packed"], b["kl_start"]);
  EXPECT_EQ(b["active_packed"], a["active_packed"]);
}

TEST_F(RecoverOnCuda, CutAndResumedGivesTheSameFile) {
  const auto on_gpu = [&](const std::string& output) {
    std::vector<std::string> asked = line(output, "2048", "0");
    asked.insert(asked.end(), {"--device", "cuda:0", "--save-seconds", "0"});
    std::erase(asked, "-q");
    return asked;
  };
  const std::string whole = (folder.path() / "whole.gguf").string();
  const std::string output = (folder.path() / "cut.gguf").string();
  const ProgramRun uncut = run_program(on_gpu(whole));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const ProgramRun cut = run_program_and_signal(on_gpu(output), "step 2 of", SIGKILL);
  if (cut.status == 0) GTEST_SKIP() << "the training was over before the signal came";
  std::vector<std::string> again = on_gpu(output);
  again.insert(again.end(), {"--resume", "-q"});
  const ProgramRun resumed = run_program(again);
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(bytes(output), bytes(whole));
  // The CPU rounds otherwise: it does not go on from there.
  EXPECT_EQ(run_program_and_signal(on_gpu(output), "step 2 of", SIGKILL).status, 128 + SIGKILL);
  again = line(output, "2048", "0");
  again.push_back("--resume");
  expect_one_line_error(run_program(again), 1, ".state");
}

TEST_F(RecoverOnCuda, BestTrainsThere) {
  const std::string on_cpu = (folder.path() / "cpu.gguf").string();
  const std::string on_gpu = (folder.path() / "gpu.gguf").string();
  std::vector<std::string> asked = {"convert",    dense.path.string(),
                                    "-o",         on_cpu,
                                    "--data",     text,
                                    "--recipe",   "best",
                                    "--tokens",   "512",
                                    "--active",   "0.4",
                                    "--held-out", "512",
                                    "-t",         "2",
                                    "-q",         "--recover-batch",
                                    "512",        "--scale-tokens",
                                    "512",        "--recover-tokens",
                                    "512"};
  const ProgramRun cpu = run_program(asked);
  ASSERT_EQ(cpu.status, 0) << cpu.err;
  asked[3] = on_gpu;
  asked.insert(asked.end(), {"--device", "cuda"});
  const ProgramRun gpu = run_program(asked);
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  const nlohmann::json a = recovery(on_cpu), b = recovery(on_gpu);
  EXPECT_EQ(b["tokens"], a["tokens"]);
  EXPECT_NEAR(b["active_packed"].get<double>(), a["active_packed"].get<double>(), 0.02);
  // Nats below what the teachers' own roundings make are not compared.
  for (const char* kl : {"kl_start", "kl_packed"}) {
    EXPECT_NEAR(std::sqrt(b[kl].get<double>()), std::sqrt(a[kl].get<double>()), 0.01) << kl;
  }
}

TEST_F(RecoverOnCuda, NamesWhatRunsOnTheCpuAlone) {
  const std::string output = (folder.path() / "better.gguf").string();
  std::vector<std::string> asked = line(output);
  asked.insert(asked.end(), {"--device", "cuda", "--train", "attention"});
  expect_one_line_error(run_program(asked), 1, "the attention learns on the CPU alone");
  asked = line(output);
  asked.insert(asked.end(), {"--device", "cuda", "--refit-every", "10"});
  expect_one_line_error(run_program(asked), 1, "routers are refitted on the CPU alone");
}

// Every kind of recipe: calibrated and measured there, the hybrid is the CPU's but for roundings.
class ConvertOnCuda : public OnCudaDevice {
 protected:
  std::vector<std::string> line(const std::string& output, const std::string& recipe,
                                const std::vector<std::string>& more = {}) const {
    std::vector<std::string> all = {
        "convert", dense.path.string(), "-o",   output,     "--data", text, "--recipe",
        recipe,    "--tokens",          "1024", "--active", "0.5",    "-t", "2"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::string path(const std::string& name) const { return (folder.path() / name).string(); }
  static nlohmann::json report(const std::string& output) {
    return nlohmann::json::parse(bytes(output + ".report.json"));
  }
  double perplexity(const std::string& file) const {
    return run_program({"eval", file, "--data", text, "--n-ctx", "64", "-o", "json", "-q"})
        .json()["perplexity"]
        .get<double>();
  }

  TemporaryFolder folder;
  std::string text = folder.write("text.txt", words(4000));
  TinyModel dense{{.dtype = DType::Q8_0}, [](TinyModel& m) {
                    add_vocabulary(m);
                    m.set("llama.context_length", models::GgufValue::u32(64));
                  }};
};

TEST_F(ConvertOnCuda, HybridsAreTheCpus) {
  const double of_dense = perplexity(dense.path.string());
  for (const char* recipe : {"fast", "threshold", "low-rank", "paper", "peer", "sgatlin"}) {
    SCOPED_TRACE(recipe);
    const std::string on_cpu = path(std::string(recipe) + "_cpu.gguf");
    const std::string on_gpu = path(std::string(recipe) + "_gpu.gguf");
    const ProgramRun cpu = run_program(line(on_cpu, recipe, {"-q"}));
    ASSERT_EQ(cpu.status, 0) << cpu.err;
    const ProgramRun gpu = run_program(line(on_gpu, recipe, {"-q", "--device", "cuda"}));
    ASSERT_EQ(gpu.status, 0) << gpu.err;
    EXPECT_EQ(gpu.err, "");
    const nlohmann::json a = report(on_cpu), b = report(on_gpu);
    EXPECT_NEAR(b["active_fraction"].get<double>(), a["active_fraction"].get<double>(), 0.02);
    ASSERT_EQ(b["layers"].size(), a["layers"].size());
    for (std::size_t l = 0; l < a["layers"].size(); ++l) {
      const auto &x = a["layers"][l], &y = b["layers"][l];
      EXPECT_EQ(y["kind"], x["kind"]);
      for (const char* share : {"input_share", "gate_share", "hidden_share"}) {
        if (!x.contains(share)) continue;
        EXPECT_NEAR(y[share].get<double>(), x[share].get<double>(), 0.06) << share;
      }
      const double error = x["error_distilled"].get<double>();
      EXPECT_NEAR(y["error_distilled"].get<double>(), error, 0.1 * error);
    }
    const double expected = perplexity(on_cpu);
    EXPECT_NE(expected, of_dense);
    // Distillation is float32 there, with operands in bfloat16 here.
    const double tolerance = std::string(recipe) == "low-rank" ? 0.05 : 0.02;
    EXPECT_NEAR(perplexity(on_gpu), expected, tolerance * expected);
  }
}

// Tokens are drawn by the host, from the device's logits: a draw near the border of two may fall
// the other way, and the text is another from there on, of the same distribution.
TEST_F(ConvertOnCuda, TextThatTheModelSamplesItself) {
  std::vector<nlohmann::json> reports;
  for (const char* device : {"cpu", "cuda"}) {
    const std::string output = path(std::string(device) + ".gguf");
    const ProgramRun run = run_program({"convert", dense.path.string(), "-o", output, "--data",
                                        "self", "--tokens", "512", "--recipe", "threshold",
                                        "--active", "0.5", "-t", "2", "-q", "--device", device});
    ASSERT_EQ(run.status, 0) << run.err;
    reports.push_back(report(output));
  }
  EXPECT_EQ(reports[1]["n_tokens"], 512);
  for (std::size_t l = 0; l < reports[0]["layers"].size(); ++l) {
    const auto &a = reports[0]["layers"][l], &b = reports[1]["layers"][l];
    EXPECT_NEAR(b["input_share"].get<double>(), a["input_share"].get<double>(), 0.02);
    EXPECT_NEAR(b["hidden_share"].get<double>(), a["hidden_share"].get<double>(), 0.02);
  }
}

TEST_F(ConvertOnCuda, CutAndResumedGivesTheSameFile) {
  const auto on_gpu = [&](const std::string& output, const std::vector<std::string>& more = {}) {
    std::vector<std::string> asked = line(output, "low-rank", {"--device", "cuda:0"});
    asked.insert(asked.end(), more.begin(), more.end());
    return asked;
  };
  const std::string whole = path("whole.gguf"), output = path("cut.gguf");
  const ProgramRun uncut = run_program(on_gpu(whole, {"-q"}));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const ProgramRun cut = run_program_and_signal(on_gpu(output), "layer  0: active", SIGKILL);
  ASSERT_EQ(cut.status, 128 + SIGKILL) << cut.err;
  // The CPU rounds otherwise: it does not go on from there.
  expect_one_line_error(run_program(line(output, "low-rank", {"--resume", "-q"})), 1, ".state");
  const ProgramRun resumed = run_program(on_gpu(output, {"--resume", "-q"}));
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(bytes(output), bytes(whole));
}

// Blocks and clones, too; and the same file comes out whatever order the device runs its blocks in.
TEST_F(OnCudaDevice, LowRankConversionDistillsThere) {
  const TinyModel dense({.dtype = DType::Q8_0}, [](TinyModel& m) {
    add_vocabulary(m);
    m.set("llama.context_length", models::GgufValue::u32(64));
  });
  const TemporaryFolder folder;
  const std::string text = folder.write("text.txt", words(9000));
  const auto report = [](const std::string& output) {
    return nlohmann::json::parse(bytes(output + ".report.json"));
  };
  const auto line = [&](const std::string& output, const std::vector<std::string>& more) {
    std::vector<std::string> all = {"convert",  dense.path.string(),
                                    "-o",       output,
                                    "--data",   text,
                                    "--tokens", "2048",
                                    "-t",       "2",
                                    "--active", "0.6",
                                    "-q",       "--recipe",
                                    "low-rank"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  for (const std::vector<std::string>& form :
       {std::vector<std::string>{}, {"--block", "4"}, {"--experts", "120"}}) {
    const std::string on_gpu = (folder.path() / "gpu.gguf").string();
    std::vector<std::string> asked = form;
    asked.insert(asked.end(), {"--device", "cuda"});
    const ProgramRun gpu = run_program(line(on_gpu, asked));
    ASSERT_EQ(gpu.status, 0) << gpu.err;
    EXPECT_EQ(gpu.err, "");
    const nlohmann::json converted = report(on_gpu);
    ASSERT_EQ(converted["layers"].size(), 2u);
    for (const auto& layer : converted["layers"]) {
      EXPECT_LT(layer["error_distilled"].get<double>(), layer["error_closed_form"].get<double>());
    }
    if (!form.empty()) continue;
    const char* set = std::getenv("CUDASIM_SCHEDULE");
    const std::string schedule = set == nullptr ? "0" : set;
    setenv("CUDASIM_SCHEDULE", "7", 1);
    const std::string again = (folder.path() / "again.gguf").string();
    const ProgramRun repeated = run_program(line(again, asked));
    setenv("CUDASIM_SCHEDULE", schedule.c_str(), 1);
    ASSERT_EQ(repeated.status, 0) << repeated.err;
    EXPECT_EQ(bytes(again), bytes(on_gpu));
  }
}

}  // namespace
}  // namespace moesaic::tools
