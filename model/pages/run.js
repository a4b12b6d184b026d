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

// The index of the nearest of ascending steps.
function nearest(steps, step) {
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
// The newest samples are on the right.
for (const one of document.querySelectorAll(".scroll")) one.scrollLeft = one.scrollWidth;
if (smoothed) smoothed.addEventListener("change", () => document.body.classList.toggle("smoothed", smoothed.checked));
