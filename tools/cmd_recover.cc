#include <fmt/format.h>

#include <filesystem>
#include <limits>
#include <memory>

#include "converter/recovery/recover_file.h"
#include "tools/commands.h"
#include "tools/device.h"
#include "tools/dtype_names.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/recover_options.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

struct Options {
  converter::RecoverFileOptions recover;
  std::string dense, hybrid, output, expert_type;
  RunOptions run;
};

void recover(Options& options) {
  converter::RecoverFileOptions& recover = options.recover;
  recover.dense = options.dense;
  recover.hybrid = options.hybrid;
  recover.output = options.output;
  if (!options.expert_type.empty()) {
    recover.recover.expert_type = dtype_from_name(options.expert_type);
  }
  for (const std::filesystem::path& input : {recover.dense, recover.hybrid}) {
    std::error_code error;
    if (std::filesystem::weakly_canonical(input, error) ==
            std::filesystem::weakly_canonical(recover.output, error) ||
        std::filesystem::equivalent(input, recover.output, error)) {
      throw UsageError(
          fmt::format("-o {}: is one of the inputs, expected another file", options.output));
    }
  }
  const converter::ConverterDevice device = make_converter_device(options.run.device);
  recover.recover.device = device.training;
  recover.decoder = device.decoder;
  Runtime runtime(options.run);
  Progress progress(options.run.quiet);
  try {
    const converter::RecoveryReport report =
        converter::recover_file(recover, runtime.context, progress);
    print(fmt::format(
        "KL divergence from dense on held-out text: {:.4f} before, {:.4f} trained, {:.4f} rounded, "
        "{:.4f} as written\nactive fraction of the MLPs there: {:.3f} before, {:.3f} trained, "
        "{:.3f} as "
        "written\n{} tokens in {}\n{}\n{}.report.json\n{}.report.html\n",
        report.kl_start, report.kl_trained, report.kl_rounded, report.kl_packed,
        report.active_start, report.active_trained, report.active_packed, report.tokens,
        format_seconds(report.seconds), options.output, options.output, options.output));
  } catch (const Interrupted&) {
    throw Interrupted(fmt::format(
        "interrupted: what was trained is kept in {}.state; the same command with --resume goes "
        "on from there",
        options.output));
  }
}

}  // namespace

void add_recover(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  converter::RecoverFileOptions& recover_options = options->recover;
  recover_options.recover.tokens = converter::kBestRecoveryTokens;
  CLI::App* cmd =
      app.add_subcommand("recover", "Train a hybrid end to end towards its dense checkpoint");
  cmd->add_option("DENSE", options->dense, "Checkpoint that the hybrid was made of (.gguf)")
      ->required();
  cmd->add_option("HYBRID", options->hybrid, "Hybrid (.gguf)")->required();
  cmd->add_option("-o,--output", options->output, "Recovered hybrid to write (.gguf)")->required();
  cmd->add_option("--data", recover_options.data,
                  "Text file to train on, or self: text that the dense model samples itself")
      ->required();
  cmd->add_flag("--resume", recover_options.resume, "Go on from what an interrupted run left");
  cmd->add_option("--expert-type", options->expert_type,
                  "Format of the experts (default: as the hybrid has them)")
      ->check(CLI::IsMember(dtype_names()));
  cmd->add_option("--seed", recover_options.recover.seed, "Seed of everything that is drawn")
      ->check(integer_between(0, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  add_recover_options(*cmd, recover_options.recover);
  options->run.activations = "f32";
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  cmd->footer(
      R"(Trains experts, shared neurons, bypass, bias and routers on the KL divergence from the dense
model, of self-routed layers the MLP's matrices, while their thresholds follow so that as much stays
active; attention (unless --train attention), norms, embeddings and head stay as they are. Then it
rounds them to their formats and trains the scales of their blocks. `convert --recipe best` does the
same behind its layer-wise stage. The training is saved in OUT.gguf.state every few minutes and on
Ctrl-C: the same command with --resume goes on bit for bit. With --device cuda it
is trained there, the teacher in bfloat16, too; rounding, --train attention and --refit-every are the
CPU's.

Examples:
  moesaic recover SmolLM2.gguf hybrid.gguf -o better.gguf --data wiki.valid.tokens
  moesaic recover SmolLM2.gguf hybrid.gguf -o better.gguf --data text.txt --recover-tokens 500000
  moesaic recover SmolLM2.gguf hybrid.gguf -o better.gguf --data text.txt --recover-tokens 0
  moesaic recover SmolLM2.gguf hybrid.gguf -o better.gguf --data text.txt --device cuda
  moesaic recover SmolLM2.gguf hybrid.gguf -o better.gguf --data text.txt --resume)");
  cmd->callback([options, &action] { action = [options] { recover(*options); }; });
}

}  // namespace moesaic::tools
