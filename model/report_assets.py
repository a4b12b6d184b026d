"""Style, script and frame of the page about a run (model/report_page.py fills the frame)."""

# Text and image have one colour each on the whole page; all colours tell apart for the colour-blind (after Okabe, Ito).
STYLE = """
:root { color-scheme: light dark; --ink: #263238; --soft: #5f6f79; --line: #e3e8ec; --page: #f5f7f9; --card: #fff;
  --note: #fff4e0; --note-edge: #f0a63a; --calm: #e4f5ec; --calm-edge: #2e9e6b; --bar: #dfe5e9; --mark: #3f73d8;
  --train: #37474f; --val: #c2378a; --text: #d06a00; --image: #2f6fde; --t0: #00865f; --t1: #7a55c7; --t2: #b38600;
  --t3: #2aa0c8; --t4: #a0522d; --t5: #808000; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ec; --soft: #9fb0ba; --line: #2f3a42; --page: #12181c;
  --card: #1b2328; --note: #3a2f1a; --note-edge: #d9922b; --calm: #18302a; --calm-edge: #2e9e6b; --bar: #2f3a42;
  --mark: #7aa5f5; --train: #cfd8dc; --val: #f07fc0; --text: #f5a04c; --image: #6ea3ff; --t0: #3fcf9f; --t1: #b79cf2;
  --t2: #e6c34a; --t3: #6fd0f0; --t4: #d99a76; --t5: #c3c35a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { margin: 0; font-size: 26px; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; } h3 { margin: 0 0 4px; font-size: 13px; color: var(--soft); font-weight: 600; }
h2 small, summary small { color: var(--soft); font-weight: 400; font-size: 13px; }
h2.part, summary { font-size: 20px; font-weight: 650; margin: 32px 0 12px; }
summary { cursor: pointer; }
.title { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
.status { border-radius: 99px; padding: 2px 12px; font-size: 13px; font-weight: 600; background: var(--bar); }
.status.finished { background: var(--calm); color: var(--t0); }
.status.running { background: var(--image); color: var(--card); }
.status.stopped { background: var(--note); color: var(--text); }
.done { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 20px; margin: 10px 0 8px; }
.done span + span { color: var(--soft); font-size: 13px; }
.bar { height: 8px; border-radius: 4px; background: var(--bar); overflow: hidden; margin-bottom: 16px; }
.bar i { display: block; height: 100%; background: var(--image); } .bar.finished i { background: var(--calm-edge); }
.bar.stopped i { background: var(--note-edge); }
.note { background: var(--note); border-left: 4px solid var(--note-edge); border-radius: 6px; padding: 8px 14px;
  margin: 8px 0; overflow-wrap: anywhere; }
.note.calm { background: var(--calm); border-color: var(--calm-edge); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 16px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  box-shadow: 0 1px 3px rgb(0 0 0 / 6%); }
.tile { padding: 12px 16px; } .tile b { display: block; font-size: 21px; font-weight: 650; line-height: 1.3;
  white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.tile[class*="c-"] { border-left: 4px solid var(--c); }
.c-train { --c: var(--train); } .c-val { --c: var(--val); }
.c-text { --c: var(--text); } .c-image { --c: var(--image); }
.c-soft { --c: var(--soft); }
.c-0 { --c: var(--t0); } .c-1 { --c: var(--t1); } .c-2 { --c: var(--t2); } .c-3 { --c: var(--t3); }
.c-4 { --c: var(--t4); } .c-5 { --c: var(--t5); }
.controls { display: flex; align-items: baseline; gap: 24px; } .controls label { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 14px; }
.card { padding: 16px 18px; min-width: 0; } .chart { display: flex; flex-direction: column; }
.wide { grid-column: 1 / -1; }
.chart header { display: flex; justify-content: space-between; gap: 10px; align-items: start; min-height: 28px; }
.switch { display: flex; flex: none; border: 1px solid var(--line); border-radius: 7px; overflow: hidden; }
.switch button { border: 0; background: none; color: var(--soft); font: inherit; font-size: 12px; padding: 2px 9px;
  cursor: pointer; }
[data-scale="linear"] button[data-scale="linear"], [data-scale="log"] button[data-scale="log"] {
  background: var(--bar); color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 20px; height: 3px; border-radius: 2px; background: var(--c);
  margin-right: 6px; vertical-align: middle; }
.legend .sparse i { width: 9px; height: 9px; border-radius: 50%; }
.plot { margin: auto 4px 0 46px; padding-top: 10px; }
.area { position: relative; height: 200px; touch-action: pan-y; cursor: crosshair; } .wide .area { height: 300px; }
.scale { position: absolute; inset: 0; } .scale svg { width: 100%; height: 100%; display: block; overflow: visible; }
[data-scale="linear"] .scale.log, [data-scale="log"] .scale.linear { display: none; }
.scale path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.scale .grid { stroke: var(--line); stroke-width: 1; } .scale .epochs { stroke: var(--soft); stroke-width: 1;
  stroke-dasharray: 1 5; }
.scale .line { stroke: var(--c); stroke-width: 1.8; } .scale .sparse { stroke-width: 1.2; stroke-dasharray: 4 4; }
.scale .dots { stroke: var(--c); stroke-width: 8; } .scale .dots.small { stroke-width: 5; }
.scale .dots.many { stroke-width: 2.5; }
.scale .smooth { display: none; stroke-width: 2.2; }
.smoothed .smooth { display: inline; } .smoothed .raw { stroke-width: 1.2; opacity: .3; }
.y, .x span { position: absolute; font-size: 12px; color: var(--soft); line-height: 1; white-space: nowrap; }
.y { right: calc(100% + 7px); transform: translateY(-50%); }
.x { position: relative; height: 22px; margin-top: 6px; border-top: 1px solid var(--soft); } .x span { top: 6px;
  transform: translateX(-50%); }
.x-name { text-align: center; font-size: 12px; color: var(--soft); margin-bottom: -6px; }
.cursor { display: none; position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft);
  pointer-events: none; }
.tip { position: fixed; display: none; z-index: 2; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 7px 11px; font-size: 13px; line-height: 1.45; pointer-events: none;
  box-shadow: 0 3px 12px rgb(0 0 0 / 22%); }
.tip i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--c); margin-right: 6px; }
.tip small { color: var(--soft); }
.scroll { overflow-x: auto; padding: 0; }
.samples { border-collapse: collapse; width: 100%; table-layout: fixed; }
.samples th, .samples td { padding: 10px; vertical-align: top; text-align: left; border-bottom: 1px solid var(--line); }
.samples tr:last-child > * { border-bottom: 0; }
.samples thead th:first-child { width: 150px; }
.samples thead th { font-size: 13px; color: var(--soft); white-space: nowrap; }
.samples tbody th { font-weight: 500; font-size: 14px; }
.samples th:first-child { position: sticky; left: 0; background: var(--card); border-radius: 12px;
  overflow-wrap: anywhere; }
.samples td p { margin: 4px 0 0; font-size: 13px; max-height: 9em; overflow: auto; }
.samples td p, .samples tbody th { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.samples img { display: block; width: 100%; max-width: 192px; border-radius: 6px; margin-bottom: 4px; }
.samples .pixelated { image-rendering: pixelated; border-radius: 3px; }
.unreadable { color: var(--text); }
.listing { margin: 0; padding-left: 44px; font-size: 13px; overflow-wrap: anywhere; }
.columns { columns: 4 270px; column-gap: 36px; } .options { break-inside: avoid-column; margin-bottom: 18px; }
dl { margin: 0; font-size: 13.5px; } dl div { display: flex; justify-content: space-between; gap: 14px;
  border-bottom: 1px solid var(--line); padding: 2px 6px; }
dl dt { color: var(--soft); } dl dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.changed { box-shadow: inset 3px 0 var(--mark); } .changed dt { color: var(--ink); } .changed dd { font-weight: 650; }
.facts div { justify-content: start; } .facts dt { flex: 0 0 13em; } .facts dd { text-align: left; }
pre { margin: 0; padding: 14px 18px; overflow-x: auto; user-select: all;
  font: 13px/1.5 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
@media (max-width: 600px) { main { padding: 18px 12px 48px; } .card { padding: 14px 12px; } .plot { margin-left: 42px; }
  .scroll { padding: 0; } .wide .area { height: 230px; } .facts div { flex-wrap: wrap; gap: 0 14px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .samples thead th:first-child { width: 104px; } }
"""

SCRIPT = """
"use strict";
const {charts} = JSON.parse(document.getElementById("curves").textContent);
const sections = [...document.querySelectorAll(".chart")], tip = document.querySelector(".tip");
const smoothed = document.getElementById("smoothed");

function showNumber(value, isShare) {
  if (isShare) return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", {maximumFractionDigits: 0});
  return size && size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

function nearest(steps, step) {  // index of the step next to it; steps ascend
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function showCursor(step, last) {
  for (const cursor of document.querySelectorAll(".cursor")) {
    cursor.style.display = step === null ? "none" : "block";
    if (step !== null) cursor.style.left = 100 * step / last + "%";
  }
}

function fillTip(chart, step) {
  tip.replaceChildren(Object.assign(document.createElement("b"), {textContent: "step " + step.toLocaleString("en")}));
  for (const series of chart.series) {
    const index = nearest(series.x, step), at = series.x[index], row = document.createElement("div");
    row.className = series.color;
    const there = series.smooth && smoothed.checked ? series.smooth[index] : series.y[index];
    row.append(document.createElement("i"), series.name + " " + showNumber(there, chart.isShare));
    const more = document.createElement("small");
    if (there !== series.y[index]) more.textContent += " raw " + showNumber(series.y[index], chart.isShare);
    if (at !== step) more.textContent += " at step " + at.toLocaleString("en");
    row.append(more);
    tip.append(row);
  }
}

sections.forEach((section, number) => {
  const chart = charts[number], area = section.querySelector(".area");
  const dense = chart.series.reduce((a, b) => b.x.length > a.x.length ? b : a);
  const hover = event => {
    const box = area.getBoundingClientRect();
    const step = dense.x[nearest(dense.x, (event.clientX - box.left) / box.width * chart.last)];
    showCursor(step, chart.last);
    fillTip(chart, step);
    tip.style.display = "block";
    const side = event.clientX + tip.offsetWidth + 24 > innerWidth ? -tip.offsetWidth - 14 : 14;
    tip.style.left = Math.max(4, event.clientX + side) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  };
  area.addEventListener("pointermove", hover);
  area.addEventListener("pointerdown", hover);
  area.addEventListener("pointerleave", () => { showCursor(null); tip.style.display = "none"; });
  for (const button of section.querySelectorAll("button")) {
    button.addEventListener("click", () => { section.dataset.scale = button.dataset.scale; });
  }
});
for (const one of document.querySelectorAll(".scroll")) one.scrollLeft = one.scrollWidth;  // the newest samples
if (smoothed) smoothed.addEventListener("change", () => document.body.classList.toggle("smoothed", smoothed.checked));
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src 'sha256-{script_hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body class="smoothed">
<main>
{head}
{notes}
{tiles}
{controls}
{charts}
{more}
{samples}
{bad}
{options}
{facts}
{command}
</main>
<div class="tip"></div>
<script type="application/json" id="curves">{data}</script>
<script>{script}</script>
</body>
</html>
"""
