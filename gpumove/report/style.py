"""How the page looks: on a phone and a desktop, in light and dark, and printed. Nothing is loaded from anywhere."""

CSS = """
:root { color-scheme: light dark; --page: #fdfdfc; --card: #f3f4f2; --ink: #1c2321; --muted: #4c5653; --grid: #d3d8d5;
  --first: #0b5fa5; --second: #a63d00; --alarm: #a3001b; --good: #1c6b2a; }
@media (prefers-color-scheme: dark) { :root { --page: #14181a; --card: #1e2427; --ink: #e8ecea; --muted: #aab4b0;
  --grid: #3a4347; --first: #74b9f5; --second: #ffab70; --alarm: #ff8f9a; --good: #83d492; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem 1.25rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--grid); }
p { max-width: 46rem; margin: 0.5rem 0; }
code { overflow-wrap: anywhere; font-size: 0.92em; }
a { color: var(--first); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; margin: 1rem 0; }
nav a { display: inline-block; padding: 0.25rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0.75rem; margin: 1rem 0; }
.tiles div { background: var(--card); border-radius: 0.5rem; padding: 0.6rem 0.9rem; }
.tiles dt { color: var(--muted); font-size: 0.9rem; }
.tiles dd { margin: 0; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
.tiles dd small { display: block; color: var(--muted); font-weight: 400; font-size: 0.85rem; }
.unknown { color: var(--muted); font-style: italic; }
.good { color: var(--good); } .bad { color: var(--alarm); font-weight: 600; }
figure { margin: 1rem 0; }
figcaption { color: var(--muted); font-size: 0.92rem; max-width: 46rem; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart * { stroke-linejoin: round; stroke-linecap: butt; }
svg.chart text { fill: var(--ink); }
.narrow { display: none; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
.scroll.tall { max-height: 28rem; overflow-y: auto; }
.scroll:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: 0.25rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.75rem 0.3rem 0;
  border-bottom: 1px solid var(--grid); }
td { overflow-wrap: anywhere; min-width: 4rem; }
time { white-space: nowrap; }
tbody th { white-space: nowrap; font-weight: 600; }
thead th { white-space: nowrap; color: var(--muted); font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
footer { color: var(--muted); font-size: 0.9rem; margin-top: 2rem; }
@media (max-width: 40rem) { body { padding: 0.75rem 0.9rem 2rem; } .wide { display: none; } .narrow { display: block; }
  h1 { font-size: 1.4rem; } td { min-width: 9rem; } td.n { min-width: 4rem; }
  tbody th, time { white-space: normal; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --muted: #333; --grid: #bbb;
  --first: #0b5fa5; --second: #a63d00; --alarm: #a3001b; --good: #1c6b2a; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  table { font-size: 8pt; } td { min-width: 0; } time { white-space: normal; }
  .wide { display: block; } .narrow { display: none; }
  .scroll, .scroll.tall { overflow: visible; max-height: none; } .tiles div { border: 1px solid var(--grid); }
  figure, tr, .tiles div { break-inside: avoid; } h2 { break-after: avoid; } }
"""
