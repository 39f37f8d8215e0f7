"use strict";
// Each plot is kept as it was written; what is drawn has today's colours and not the methods that are switched off.
const plots = [...document.querySelectorAll(".plot")].map(box => ({
  box,
  plot: JSON.parse(box.nextElementSibling.textContent),
}));
const hidden = new Set();

// Pixels between the margins of an upright page.
const PAPER = 680;

function draw(widest) {
  const style = getComputedStyle(document.documentElement);
  const coloured = value => {
    if (typeof value === "string") return value.replace(/^var\((--[a-z]+)\)$/, (_, name) => style.getPropertyValue(name).trim());
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    return value;
  };
  for (const {box, plot} of plots) {
    const {data, layout} = coloured(plot);
    for (const trace of data) trace.visible = !hidden.has(trace.meta);
    if (widest) layout.width = Math.min(box.clientWidth, widest);
    Plotly.react(box, data, layout, {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]});
  }
}

for (const button of document.querySelectorAll("button[data-method]")) {
  button.addEventListener("click", () => {
    const method = button.dataset.method;
    if (!hidden.delete(method)) hidden.add(method);
    for (const same of document.querySelectorAll("button[data-method]")) {
      if (same.dataset.method === method) same.setAttribute("aria-pressed", String(!hidden.has(method)));
    }
    draw();
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    document.documentElement.classList.toggle("printing", printing);
    draw(printing ? PAPER : undefined);
  });
}
draw();
