#include <fmt/format.h>

#include "converter/recovery/recover_file.h"
#include "converter/report_page.h"
#include "converter/svg.h"

namespace moesaic::converter {

std::string recovery_html(const RecoverFileOptions& options, const RecoveryReport& report) {
  const std::string name = escape_html(options.hybrid.filename().string());
  std::string out = page_head(
      name + ", recovered", "moesaic recovery report", name,
      fmt::format("Trained end to end on {} tokens towards {}. The KL divergence from it on "
                  "held-out text is now <strong>{}</strong> nats a token.",
                  grouped(report.tokens), escape_html(options.dense.filename().string()),
                  fixed(report.kl_packed, 4)));
  out += "<dl class=\"cards\">\n";
  out += card("KL divergence", fixed(report.kl_packed, 3),
              fmt::format("nats a token, held-out text; {} before", fixed(report.kl_start, 3)));
  out += card("Active fraction", percent(report.active_packed),
              fmt::format("on that text; {} before", percent(report.active_start)));
  out += card("Trained on", grouped(report.tokens), "tokens");
  out += card("Time", duration(report.seconds), "all runs of this recovery");
  out += "</dl>\n" + recovery_section(report);
  const std::string data =
      options.data == "self" ? "self (text sampled by the dense model)" : options.data;
  out += "<section>\n<h2>Where it comes from</h2>\n<dl class=\"facts\">\n" +
         fact("checkpoint", options.dense.string()) + fact("hybrid", options.hybrid.string()) +
         fact("recovered hybrid", options.output.string()) + fact("text", data) +
         fact("options", options_json(options.recover)) + "</dl>\n</section>\n";
  return out + page_end();
}

}  // namespace moesaic::converter
