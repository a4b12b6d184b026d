// Hovers over every chart, clicks both scales and raw curves, and notes errors and what was fetched.
const wrong = [];
addEventListener("error", event => wrong.push(String(event.message || event.target)), true);
addEventListener("securitypolicyviolation", event => wrong.push(event.violatedDirective + " " + event.blockedURI));
addEventListener("load", () => {
  const count = selector => document.querySelectorAll(selector).length;
  const tip = document.querySelector(".tip"), charts = [];
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  const overflow = document.documentElement.scrollWidth - innerWidth;
  for (const chart of document.querySelectorAll(".chart")) {
    const shown = () => [...chart.querySelectorAll(".scale")].filter(one => getComputedStyle(one).display !== "none");
    const scales = [shown().map(one => one.className)];
    chart.querySelectorAll("button").forEach(one => { one.click(); scales.push(shown().map(one => one.className)); });
    const area = chart.querySelector(".area"), box = area.getBoundingClientRect();
    area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.top + 9, bubbles: true}));
    const paths = [...shown()[0].querySelectorAll(".line, .dots")].map(one => one.getTotalLength());
    const tips = tip.style.display === "block" ? tip.innerText : "";
    charts.push({title: chart.querySelector("h2").firstChild.textContent.trim(), scales, tip: tips, paths,
      size: [box.width, box.height], cursor: getComputedStyle(chart.querySelector(".cursor")).display,
      labels: [...shown()[0].querySelectorAll(".y")].map(one => one.textContent)});
    area.dispatchEvent(new PointerEvent("pointerleave"));
  }
  const smoothed = count(".smoothed");
  document.getElementById("smoothed").click();
  const other = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  document.body.dataset.seen = JSON.stringify({wrong, charts, overflow, title: document.title, tip: tip.style.display,
    other: other.map(entry => entry.name), smoothed: [smoothed, count(".smoothed")],
    images: [...document.images].map(image => image.naturalWidth + "x" + image.naturalHeight),
    prompts: [...document.querySelectorAll(".samples tbody th")].map(one => one.textContent)});
});
