#include <algorithm>

#include "engine/generation.h"
#include "engine/utf8.h"

namespace moesaic::engine {

std::string StopFilter::push(const std::string& piece) {
  if (stopped_) return {};
  held_ += piece;

  // What could begin a stop string is never released, so every occurrence lies within held_.
  std::size_t found = std::string::npos;
  std::size_t open = 0;  // longest end of held_ that begins a stop string
  for (const std::string& stop : stops_) {
    if (stop.empty()) continue;
    found = std::min(found, held_.find(stop));
    for (std::size_t n = std::min(stop.size() - 1, held_.size()); n > open; --n) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) open = n;
    }
  }
  if (found != std::string::npos) {
    stopped_ = true;
    std::string text = utf8_repaired(std::string_view(held_).substr(0, found));
    held_.clear();
    return text;
  }
  std::size_t safe = held_.size() - open;
  safe -= utf8_partial_suffix(std::string_view(held_).substr(0, safe));
  std::string text = utf8_repaired(std::string_view(held_).substr(0, safe));
  held_.erase(0, safe);
  return text;
}

std::string StopFilter::flush() {
  std::string text = utf8_repaired(held_);
  held_.clear();
  return text;
}

}  // namespace moesaic::engine
