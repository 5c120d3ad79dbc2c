#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace moesaic::converter {

/// What is known of one hybrid: how it was made (NAME.report.json beside it) and how it compares
/// with its dense checkpoint (*.compare.json, what `moesaic compare --json-file` wrote).
struct Run {
  std::string name;    // the hybrid's file name
  std::string source;  // the file that said so
  std::string recipe;  // "fast + recover" of one that was recovered later; "?" if nothing says
  std::string dense;   // file name of the dense checkpoint; empty if not known
  double active_fraction = 0;     // of the MLPs: as measured on the text, else as described
  std::optional<double> seconds;  // that conversion, or recovery, took

  struct Quality {
    std::string text;  // file name of the in-domain text
    double perplexity_dense = 0, perplexity = 0;
    double ratio = 0;
    double kl = 0;        // mean, nats
    double same_top = 0;  // share of tokens
    // Largest perplexity ratio of the other texts.
    std::optional<double> ratio_out;
  };
  std::optional<Quality> quality;  // of a run that was compared
  bool best = false;  // no run of the group has a lower ratio at the same or a lower fraction

  bool same_group(const Run& other) const {
    return dense == other.dense && quality && other.quality && quality->text == other.quality->text;
  }
};

/// All runs of a folder (not of its subfolders), those of one dense checkpoint and text together,
/// by active fraction; what was not compared comes last. Throws IoError for a folder that cannot be
/// read or holds no such file, FormatError naming a file that is not what its name says.
std::vector<Run> read_runs(const std::filesystem::path& folder);

/// One self-contained page: per dense checkpoint and text perplexity ratio against active fraction,
/// every run by its recipe's colour and the best at each fraction joined, and the table behind it.
std::string runs_page(const std::vector<Run>& runs);

}  // namespace moesaic::converter
