#pragma once

#include <atomic>
#include <cstdint>
#include <string_view>

#include "kernels/base/error.h"

namespace moesaic::engine {

/// How long work tells its caller where it stands, and learns that it should stop. The default is
/// silent and never cancels; tools/ overrides it to draw progress with an ETA. Called from one
/// thread.
class Monitor {
 public:
  virtual ~Monitor() = default;
  /// A new stage of `total` units begins ("layer 7: distill", 240).
  virtual void stage(std::string_view /*name*/, std::int64_t /*total*/) {}
  /// `done` units of the stage are finished; `note` is a short running figure ("ppl 23.51"), may be
  /// empty.
  virtual void advance(std::int64_t /*done*/, std::string_view /*note*/) {}
  /// The stage that begins next takes the whole job from one share of its expected time to another.
  virtual void job(double /*from*/, double /*to*/) {}
  /// A line worth keeping (plan, memory estimate, result of a layer).
  virtual void line(std::string_view /*text*/) {}
  /// The user asked to stop.
  virtual bool cancelled() const { return false; }
  /// Throws Interrupted if cancelled().
  void check() const {
    if (cancelled()) throw Interrupted("interrupted");
  }
};

}  // namespace moesaic::engine
