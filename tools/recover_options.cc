#include "tools/recover_options.h"

#include "tools/options.h"

namespace moesaic::tools {

void add_recover_options(CLI::App& cmd, converter::RecoverOptions& o) {
  const auto group = [&](CLI::Option* option) {
    option->group("Recovery")->capture_default_str();
    return option;
  };
  const auto count = integer_between(0, std::int64_t{1} << 40);
  group(cmd.add_option("--recover-tokens", o.tokens,
                       "Tokens to train on, several passes over the text"))
      ->check(count);
  group(cmd.add_option("--scale-tokens", o.scale_tokens,
                       "Tokens to train block scales on after rounding, codes fixed (0: none)"))
      ->check(count);
  group(cmd.add_option("--scale-rate", o.scale_rate, "Adam's learning rate of the scales"))
      ->check(finite_between(0, 1));
  group(cmd.add_option_function<std::string>(
            "--train",
            [&o](const std::string& what) { o.attention_rank = what == "attention" ? 16 : 0; },
            "What learns: mlps, or attention: beside them updates of rank 16 of the attention's "
            "matrices, merged on writing"))
      ->check(CLI::IsMember({"mlps", "attention"}))
      ->default_str("mlps");
  group(cmd.add_option("--recover-text", o.text, "Tokens of text to take at most"))
      ->check(integer_between(1024, std::int64_t{1} << 40));
  group(cmd.add_option("--self-tokens", o.self_tokens,
                       "Tokens of the dense model's own text to train on beside a file's"))
      ->check(count);
  group(cmd.add_option("--recover-batch", o.batch, "Tokens a step, a multiple of 512"))
      ->check(integer_between(512, 1 << 20));
  group(cmd.add_option("--recover-rate", o.rate, "Adam's learning rate of the neurons"))
      ->check(finite_between(0, 1));
  group(cmd.add_option("--router-rate", o.router_rate, "Adam's learning rate of the routers"))
      ->check(finite_between(0, 1));
  group(cmd.add_flag("--scaled-rate,!--plain-rate", o.scaled_steps,
                     "Rates in units of each tensor's root mean square, or as they are"));
  group(cmd.add_option("--warm-up", o.warm_up, "Share of the steps with a rising rate"))
      ->check(finite_between(0, 1));
  group(cmd.add_option("--clip", o.clip, "Largest norm of the neurons' gradient (0: none)"))
      ->check(finite_between(0, 1e9));
  group(cmd.add_option("--auxiliary", o.auxiliary, "Weight of the routers' regression loss"))
      ->check(finite_between(0, 1e9));
  group(cmd.add_option("--straight-through", o.straight_through,
                       "Weight of the routers' straight-through gate (0: off)"))
      ->check(finite_between(0, 1e9));
  group(cmd.add_option("--gate-width", o.gate_width,
                       "Width of that gate, in standard deviations of a token's scores"))
      ->check(finite_between(1e-3, 10));
  group(cmd.add_option("--refit-every", o.refit_every,
                       "Steps between closed-form fits of the routers (0: never)"))
      ->check(count);
  group(cmd.add_option("--refit-memory", o.refit_memory,
                       "Steps after which what such a fit goes by has faded to 1/e"))
      ->check(finite_between(1, 1e9));
  group(cmd.add_option("--refit-ridge", o.refit_ridge, "Ridge of such a fit"))
      ->check(finite_between(0, 1e3));
  group(cmd.add_option("--threshold-gain", o.threshold_gain,
                       "How fast thresholds of self-routed layers follow their shares"))
      ->check(finite_between(0, 100));
  group(cmd.add_flag("--straight-through-inputs", o.straight_through_inputs,
                     "Gradients pass the inputs that self-routed layers leave out"));
  group(cmd.add_option("--held-out", o.held_out, "Tokens to judge on and never train on"))
      ->check(integer_between(512, std::int64_t{1} << 30));
  group(cmd.add_option("--judge-every", o.judge_every, "Steps between two judgements"))
      ->check(integer_between(1, std::int64_t{1} << 40));
  group(cmd.add_option("--save-seconds", o.save_seconds, "Seconds between two saved states"))
      ->check(finite_between(0, 1e9));
}

}  // namespace moesaic::tools
