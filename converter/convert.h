#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "converter/device.h"
#include "converter/recovery/recover.h"
#include "converter/self_routed/shares.h"
#include "engine/monitor.h"
#include "kernels/base/context.h"
#include "kernels/base/dtype.h"

namespace moesaic::converter {

/// What `moesaic convert` was asked for.
struct ConvertOptions {
  std::filesystem::path model;
  std::filesystem::path output;
  std::string data = "self";  // a text file, or "self": text that the model samples itself
  double active =
      0.5;  // mean active fraction of the MLPs over all layers, router and bypass counted
  std::string recipe = "fast";
  std::int64_t tokens = 0;  // calibration tokens; 0: the recipe's default
  bool resume = false;      // continue from the state an earlier run left beside the output
  std::uint64_t seed = 0;
  // Recovery behind the layer-wise stage; tokens 0: the recipe's default. Its seed is `seed`, its
  // device that of the conversion.
  RecoverOptions recover;
  ConverterDevice device;
  Budget budget = Budget::Planned;    // of self-routed recipes
  std::filesystem::path plan;         // a plan to follow instead of making one
  std::filesystem::path curves;       // a plan whose measured curves to plan from
  std::optional<DType> expert_dtype;  // default: the dense MLP's own format where it can be written
  std::optional<DType> router_dtype;
  // Of recipes with a router ("low-rank", "peer", "sgatlin", "paper"):
  std::int64_t n_experts = 0;  // 0: those of the dense MLP's neurons, or of "peer", "sgatlin" and
                               // "paper" the first square from twice d_ff on
  std::vector<int> layers;     // to convert, the others stay dense; empty: all
  std::int64_t block = 1;      // neurons of an expert ("low-rank")
  double passes = 0;           // over the activations ("peer", …); 0: the recipe's
};

/// One layer of the report.
struct LayerReport {
  int layer = 0;
  std::string kind;  // models/secret_moe_file.h, self_routed_file.h, mixture_file.h
  std::int64_t n_shared = 0, n_experts = 0, n_active = 0, router_rank = 0, bypass_rank = 0;
  std::int64_t expert_neurons = 1;  // of an expert
  std::int64_t d_ff = 0;            // of the dense MLP; 0: n_shared + n_experts
  Shares shares;                    // of self-routed layers, measured
  double active_fraction = 1;
  // Mean KL divergence from the dense model's next tokens, nats, with this layer alone converted:
  // measured at one common fraction, or for self-routed layers predicted from the layer's curve.
  double sensitivity = 0;
  // ω-weighted error over ω-weighted variance of what the layer is asked to add (the MLP's output
  // and the drift of earlier layers), packed, on held-out tokens. Of self-routed layers: of the
  // MLP's output on the hybrid's stream, on the calibration tokens; before any recovery. Students
  // from a random start have no closed form (NaN), and their error is unweighted.
  double error_closed_form = 0;
  // The same of what was kept: the distilled layer where it came out better, else the closed form.
  double error_distilled = 0;
  // [n_experts] share of calibration tokens that select each, or keep it where layers route
  // themselves. Of what was written: counted again after a recovery, as the shares are.
  std::vector<float> expert_usage;
};

/// True for kinds that models/self_routed_file.h describes.
bool is_self_routed(const LayerReport& layer);

/// What `convert` leaves beside its output as JSON and HTML.
struct ConvertReport {
  double seconds = 0;  // of all runs that made this file
  std::int64_t peak_memory_bytes = 0;
  double active_fraction = 0;
  std::int64_t n_tokens = 0;
  std::string source_digest, data_digest;  // SHA-256
  std::vector<LayerReport> layers;
  std::optional<RecoveryReport> recovery;  // of recipes that recover
};

/// True for layers that became students from a random start.
bool is_mixture(const LayerReport& layer);

/// Converts (DESIGN.md section 2, steps 1 to 6, and 7 with the recipe "best"; "peer", "sgatlin" and
/// "paper" train the papers' students instead). Says beforehand
/// through monitor.line() how much memory and disk it needs. Holds one layer's activations at a
/// time. After every layer its result is kept in OUTPUT.state/ (atomic files); with resume, layers
/// found there for the same options, checkpoint, data and kind of device are taken over, and the
/// output is byte for byte what an uninterrupted run gives with the same seed and thread count. The
/// state is removed after the output was written. Also writes OUTPUT.report.json and
/// OUTPUT.report.html. Throws InputError (bad options; state of another conversion), FormatError,
/// IoError, Interrupted (state kept).
ConvertReport convert(const ConvertOptions& options, Context& ctx, engine::Monitor& monitor);

}  // namespace moesaic::converter
