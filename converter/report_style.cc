#include "converter/report_style.h"

namespace moesaic::converter {
namespace {

constexpr std::string_view kStyle = R"css(
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f7fa; --ink: #18212c; --muted: #566373; --rule: #dde3ea;
  --accent: #0b6e69; --ring: #8592a3; --dense: #ccd3dc;
  --shared: #1d4f91; --selected: #78aee0; --router: #dd8a2e; --bypass: #8d68bd; --rise: #b4475d;
  --u6: #0f3460; --u5: #1f5f9e; --u4: #4189cb; --u3: #82b5e3; --u2: #b9d7f1; --u1: #dfecf8;
  --u0: #d9622b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #11161d; --panel: #1a212b; --ink: #e4e9ef; --muted: #98a5b5; --rule: #2b3541;
    --accent: #3fcabd; --ring: #8592a3; --dense: #3d4855;
    --shared: #5b9bea; --selected: #2f5f96; --router: #efa150; --bypass: #b193dd; --rise: #e0788c;
    --u6: #d3e8fd; --u5: #9fcbf5; --u4: #639fdc; --u3: #3a73b1; --u2: #254c7b; --u1: #1d3450;
    --u0: #ec7a41;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.kicker { margin: 0; color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: .2rem 0 .6rem; font-size: clamp(1.5rem, 4.5vw, 2.2rem); line-height: 1.2;
  overflow-wrap: anywhere; }
.lead { max-width: 46rem; margin: 0 0 1.8rem; font-size: 1.08rem; color: var(--muted); }
.lead strong { color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem;
  margin: 0 0 2.6rem; padding: 0; }
.cards div { padding: .85rem 1rem; background: var(--panel); border-radius: .6rem; }
.cards dt { color: var(--muted); font-size: .82rem; }
.cards dd { margin: .1rem 0 0; font-size: 1.4rem; font-weight: 650; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.cards small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
section { margin: 0 0 3rem; }
h2 { margin: 0 0 .3rem; font-size: 1.22rem; line-height: 1.3; }
section p { max-width: 46rem; margin: 0 0 1rem; color: var(--muted); }
figure { margin: 0; padding: .9rem .6rem .5rem; border: 1px solid var(--rule); border-radius: .6rem;
  overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 42rem; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .legend, svg .panel-title { fill: var(--ink); }
svg .panel-title { font-weight: 600; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--ring); }
svg .mean { stroke: var(--ink); stroke-dasharray: 5 4; }
svg .stem { stroke: var(--ring); stroke-width: 1.5; }
svg .before { fill: var(--paper); stroke: var(--ring); stroke-width: 2; }
svg .after { fill: var(--accent); stroke: var(--paper); }
svg .dense { fill: var(--dense); } svg .shared { fill: var(--shared); }
svg .selected { fill: var(--selected); } svg .router { fill: var(--router); }
svg .bypass { fill: var(--bypass); } svg .rise { fill: var(--rise); }
svg .u6 { fill: var(--u6); } svg .u5 { fill: var(--u5); } svg .u4 { fill: var(--u4); }
svg .u3 { fill: var(--u3); } svg .u2 { fill: var(--u2); } svg .u1 { fill: var(--u1); }
svg .u0 { fill: var(--u0); }
svg .part-gate { fill: var(--router); } svg .part-up { fill: var(--selected); }
svg .part-down { fill: var(--shared); }
svg .held-out { fill: var(--accent); stroke: var(--accent); stroke-width: 2; }
svg .training { fill: var(--ring); stroke: var(--ring); stroke-width: 1.5; }
svg rect:hover, svg circle:hover { opacity: .75; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: .6rem; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; text-align: right; white-space: nowrap; }
th { white-space: normal; line-height: 1.25; background: var(--panel); color: var(--muted); font-weight: 600; vertical-align: bottom; }
td { border-top: 1px solid var(--rule); }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.stays td { color: var(--muted); }
tfoot td { border-top: 2px solid var(--rule); font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0;
  font-size: .9rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 46rem) { .cards { grid-template-columns: 1fr 1fr; } }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .cards div { padding: .7rem .8rem; }
  .cards dd { font-size: 1.2rem; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .5rem; }
}
@media print {
  :root { color-scheme: light; --paper: #ffffff; --panel: #f5f7fa; --ink: #18212c; --muted: #444f5c;
    --rule: #cfd6de; --accent: #0b6e69; --dense: #ccd3dc; --shared: #1d4f91; --selected: #78aee0;
    --router: #dd8a2e; --bypass: #8d68bd; --rise: #b4475d; --u6: #0f3460; --u5: #1f5f9e;
    --u4: #4189cb; --u3: #82b5e3; --u2: #b9d7f1; --u1: #dfecf8; --u0: #d9622b; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .cards div, figure, tr { break-inside: avoid; }
  .cards dd { font-size: 1.1rem; }
  .picture { break-inside: avoid; }
  tfoot { display: table-row-group; }
  figure, .scroll { overflow: visible; }
  figure svg { min-width: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .35rem; }
}
)css";

}  // namespace

std::string_view report_style() { return kStyle; }

}  // namespace moesaic::converter
