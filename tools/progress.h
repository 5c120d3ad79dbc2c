#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/monitor.h"

namespace moesaic::tools {

/// "12 s", "3 min 05 s", "1 h 02 min".
std::string format_seconds(double seconds);

/// Shows on standard error where long work stands: one line that is redrawn, with a bar and an ETA,
/// on a terminal; elsewhere a plain line every few seconds. Quiet shows nothing. cancelled() is
/// Ctrl-C.
class Progress : public engine::Monitor {
 public:
  explicit Progress(bool quiet);
  ~Progress() override;

  void stage(std::string_view name, std::int64_t total) override;
  void advance(std::int64_t done, std::string_view note) override;
  void job(double from, double to) override;
  void line(std::string_view text) override;
  bool cancelled() const override;

 private:
  using Clock = std::chrono::steady_clock;

  void draw(std::string_view note);
  void finish_stage();
  void clear_bar();

  bool quiet_;
  bool terminal_;
  std::string name_;
  std::int64_t total_ = 0;
  std::int64_t done_ = 0;
  std::string note_;
  Clock::time_point stage_start_;
  Clock::time_point last_draw_;
  // The whole job, where it says how far it is: shares at the borders of the next (or open) stage,
  // and where the first one began.
  double job_from_ = 0;
  double job_to_ = 0;
  double job_begin_ = 0;
  Clock::time_point job_start_;
  bool bar_shown_ = false;
  bool stage_open_ = false;
};

/// Passes Ctrl-C on and shows nothing: for short work inside a stage that somebody else reports.
class SilentMonitor : public engine::Monitor {
 public:
  bool cancelled() const override;
};

}  // namespace moesaic::tools
