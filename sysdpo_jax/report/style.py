"""The style sheet of the report: system fonts, and colours that follow the reader's light or dark mode."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1f24; --faint: #69707a; --rule: #d9dde3; --panel: #f5f6f8; --accent: #2b62c4;
  --c0: #2b62c4; --c1: #c4501b; --c2: #2e8540; --c3: #8b3fb0; --c4: #a67800; --c5: #0f8a94;
  --c6: #c22f68; --c7: #5b6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e6e8eb; --faint: #9aa2ad; --rule: #343a42; --panel: #1d2126; --accent: #7fa8f5;
    --c0: #7fa8f5; --c1: #f2935f; --c2: #74c687; --c3: #c78be6; --c4: #e0b84a; --c5: #5ec8d1;
    --c6: #f082a9; --c7: #aab3bf;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
h4 { font-size: .85rem; margin: 0 0 .35rem; color: var(--faint); font-weight: 600; }
body > p, body ul { max-width: 46rem; }
.headline { border-left: .3rem solid var(--accent); background: var(--panel); padding: .6rem 1rem; max-width: 46rem; }
.headline p { margin: .2rem 0; }
.headline p:first-child { font-size: 1.1rem; font-weight: 600; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; margin: 0 0 1.5rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .35rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
.results th, .results td { white-space: nowrap; }
.results td, .results thead th:not(:first-child) { text-align: right; padding: .3rem 0 .3rem 1.5rem; }
.results tbody th { font-weight: 400; }
.runs { table-layout: fixed; width: 100%; max-width: 60rem; margin-bottom: 2.5rem; }
.runs td { white-space: pre-wrap; overflow-wrap: anywhere; padding-bottom: .6rem; }
.runs tbody th { border-bottom: none; padding-bottom: 0; font-weight: 400; font-size: .8rem; color: var(--faint); }
.runs ol, .runs dl, .runs dd { margin: 0; padding-left: 1.3rem; }
.runs dl { padding-left: 0; }
.runs dt { color: var(--faint); font-size: .8rem; }
.runs img { image-rendering: pixelated; display: block; max-width: 100%; height: auto; }
.empty { color: var(--faint); }
.settings { font-size: .85rem; }
.settings th { font-weight: 400; color: var(--faint); white-space: nowrap; }
.settings code { overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; }
pre { background: var(--panel); padding: .75rem 1rem; border-radius: 6px; white-space: pre-wrap; font-size: .8rem; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1.5rem; }
.constants { font-size: .9rem; color: var(--faint); }
.chart figcaption { font-weight: 600; font-size: .9rem; }
.chart svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.raw { opacity: .25; stroke-width: 1; }
.curve.band { fill: var(--hue); stroke: none; opacity: .18; }
.dashed { stroke-dasharray: 5 4; }
.c0 { stroke: var(--c0); --hue: var(--c0); } .c1 { stroke: var(--c1); --hue: var(--c1); }
.c2 { stroke: var(--c2); --hue: var(--c2); } .c3 { stroke: var(--c3); --hue: var(--c3); }
.c4 { stroke: var(--c4); --hue: var(--c4); } .c5 { stroke: var(--c5); --hue: var(--c5); }
.c6 { stroke: var(--c6); --hue: var(--c6); } .c7 { stroke: var(--c7); --hue: var(--c7); }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .15rem 1rem; font-size: .8rem; }
.legend li::before {
  content: ""; display: inline-block; width: 1.4rem; vertical-align: middle; margin-right: .4rem;
  border-top: 3px solid var(--hue);
}
.legend li.dashed::before { border-top-style: dashed; }
.methods { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.sequence { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
.sequence figcaption {
  font-size: .75rem; color: var(--faint); max-width: 6.5rem; overflow-wrap: anywhere; line-height: 1.3;
}
.sequence img {
  image-rendering: pixelated; display: block; max-width: min(16rem, 100%); height: auto; margin-bottom: .25rem;
}
.graph { display: block; max-width: none; height: auto; margin-bottom: 1rem; }
.graph rect, .graph polygon { fill: var(--panel); stroke: var(--accent); stroke-width: 1.4; }
.graph .input rect { stroke: var(--faint); }
.graph .tool polygon { stroke: var(--faint); }
.graph text { text-anchor: middle; font: 12px ui-monospace, monospace; }
.graph .line0 { fill: var(--ink); font-weight: 700; }
.edge { fill: none; stroke: var(--faint); stroke-width: 1.4; }
.tip { fill: var(--faint); }
@media (max-width: 30rem) {
  body { padding: 1.25rem 1rem 3rem; }
  .chart svg text { font-size: 15px; }
  .results th, .results td { white-space: normal; }
  .results td, .results thead th:not(:first-child) { padding-left: .8rem; }
  .settings th, .settings td { display: block; }
  .settings th { border-bottom: none; padding-bottom: 0; white-space: normal; }
}
"""
