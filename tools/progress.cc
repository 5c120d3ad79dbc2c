#include "tools/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "tools/stop.h"

namespace moesaic::tools {
namespace {

constexpr auto kBarInterval = std::chrono::milliseconds(100);
constexpr auto kLineInterval = std::chrono::seconds(5);
constexpr double kWorthALine = 1.0;  // seconds; a shorter stage leaves no closing line in a log

double seconds_between(std::chrono::steady_clock::time_point from,
                       std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

int terminal_columns() {
  winsize size = {};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

void write_error(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

}  // namespace

std::string format_seconds(double seconds) {
  const auto s = static_cast<std::int64_t>(std::max(0.0, seconds) + 0.5);
  if (s < 60) return fmt::format("{} s", s);
  if (s < 3600) return fmt::format("{} min {:02} s", s / 60, s % 60);
  return fmt::format("{} h {:02} min", s / 3600, s % 3600 / 60);
}

Progress::Progress(bool quiet)
    : quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1), last_draw_(Clock::now()) {}

Progress::~Progress() { clear_bar(); }

bool Progress::cancelled() const { return stop_flag().load(std::memory_order_relaxed); }

bool SilentMonitor::cancelled() const { return stop_flag().load(std::memory_order_relaxed); }

void Progress::stage(std::string_view name, std::int64_t total) {
  if (stage_open_) finish_stage();
  name_ = name;
  total_ = total;
  done_ = 0;
  note_.clear();
  stage_start_ = Clock::now();
  stage_open_ = true;
  if (terminal_) draw({});
}

void Progress::advance(std::int64_t done, std::string_view note) {
  done_ = done;
  note_ = note;
  if (done_ >= total_) {
    if (stage_open_) finish_stage();
    return;
  }
  const auto now = Clock::now();
  if (terminal_) {
    if (now - last_draw_ < kBarInterval) return;
  } else if (now - last_draw_ < kLineInterval) {
    return;
  }
  last_draw_ = now;
  draw(note);
}

void Progress::job(double from, double to) {
  if (job_to_ <= 0) {
    job_begin_ = from;
    job_start_ = Clock::now();
  }
  job_from_ = from;
  job_to_ = to;
}

void Progress::line(std::string_view text) {
  if (quiet_) return;
  clear_bar();
  write_error(fmt::format("{}\n", text));
}

void Progress::draw(std::string_view note) {
  if (quiet_) return;
  const double elapsed = seconds_between(stage_start_, Clock::now());
  const double share = total_ > 0 ? static_cast<double>(done_) / static_cast<double>(total_) : 0.0;
  std::string text = fmt::format("{}: {:.0f} %", name_, 100 * share);
  if (done_ > 0) {
    text += fmt::format(", {} left", format_seconds(elapsed * (1 - share) / share));
  }
  if (!note.empty()) text += fmt::format(", {}", note);
  if (job_to_ > 0) {
    const double now = job_from_ + share * (job_to_ - job_from_);
    text += fmt::format("; whole job: {:.0f} %", 100 * now);
    const double worked = now - job_begin_;
    if (worked > 0.005) {
      const double so_far = seconds_between(job_start_, Clock::now());
      text += fmt::format(", {} left", format_seconds(so_far * (1 - now) / worked));
    }
  }
  if (!terminal_) {
    write_error(text + "\n");
    return;
  }
  constexpr int kBar = 24;
  const int filled = std::clamp(static_cast<int>(share * kBar), 0, kBar);
  std::string bar = fmt::format("[{}{}] {}", std::string(static_cast<std::size_t>(filled), '#'),
                                std::string(static_cast<std::size_t>(kBar - filled), '.'), text);
  // A line that wraps could not be redrawn.
  bar.resize(std::min(bar.size(), static_cast<std::size_t>(std::max(1, terminal_columns() - 1))));
  write_error("\r\033[K" + bar);
  bar_shown_ = true;
}

void Progress::finish_stage() {
  stage_open_ = false;
  clear_bar();
  const double elapsed = seconds_between(stage_start_, Clock::now());
  if (quiet_ || elapsed < kWorthALine || done_ < total_) return;
  write_error(fmt::format("{}: done in {}{}{}\n", name_, format_seconds(elapsed),
                          note_.empty() ? "" : ", ", note_));
}

void Progress::clear_bar() {
  if (!bar_shown_) return;
  write_error("\r\033[K");
  bar_shown_ = false;
}

}  // namespace moesaic::tools
