"use strict";
// Each plot's box and the function that makes its content. A plot takes the colours of the current theme, leaves out hidden
// losses, and is drawn when it comes near the screen, since a page has many plots and a reader looks at one.
const charts = new Map();
const hidden = new Set();
const near = new Set();
const stale = new Set();

// In print, in pixels: the width between the margins of a portrait page and of one of its two columns; the height of a plot,
// of a row of names, and of the tallest plot that fits on a page.
const PAPER = 680, COLUMN = 325, LOW = 185, ROW = 13, PAGE = 880;

// In print a plot is low and its font is small. A plot with many rows is as tall as they need, at most a page.
function onPaper(layout, wide) {
  const rows = layout.yaxis.ticktext?.length && layout.yaxis.tickvals?.length === layout.yaxis.ticktext.length && layout.yaxis.type !== "log" ? layout.yaxis.ticktext.length : 0;
  const needed = rows ? 18 + layout.margin.t + layout.margin.b + ROW * rows : wide ? 1.3 * LOW : LOW, height = Math.min(layout.height, needed, PAGE);
  const size = Math.min(9, 0.75 * (PAGE - 70) / Math.max(rows, 1));
  return {...layout, width: wide ? PAPER : COLUMN, height, font: {...layout.font, size}};
}

function paint(box, printing) {
  stale.delete(box);
  const style = getComputedStyle(document.documentElement);
  const coloured = value => {
    if (typeof value === "string") return value.replace(/^var\((--[a-z]+)\)$/, (_, name) => style.getPropertyValue(name).trim());
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    return value;
  };
  const {data, layout: asked} = coloured(charts.get(box)());
  const layout = printing ? onPaper(asked, Boolean(box.closest(".wide"))) : asked;
  for (const trace of data) trace.visible = !hidden.has(trace.meta);
  layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: style.getPropertyValue("--muted"), activecolor: style.getPropertyValue("--ink")};
  // On devices without hover the buttons would always cover the plots.
  const buttons = matchMedia("(hover: hover)").matches ? "hover" : false;
  Plotly.react(box, data, layout, {responsive: true, displaylogo: false, displayModeBar: buttons, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]});
}

function redraw(boxes = [...charts.keys()]) {
  for (const box of boxes) near.has(box) ? paint(box) : stale.add(box);
}

const watcher = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    isIntersecting ? near.add(target) : near.delete(target);
    if (isIntersecting && stale.has(target)) paint(target);
  }
}, {rootMargin: "200px"});

function chart(box, make) {
  charts.set(box, make);
  stale.add(box);
  watcher.observe(box);
}

for (const script of document.querySelectorAll(".plot + script")) {
  let plot;
  chart(script.previousElementSibling, () => plot ??= JSON.parse(script.textContent));
}

for (const button of document.querySelectorAll("button[data-loss]")) {
  button.addEventListener("click", () => {
    const loss = button.dataset.loss;
    if (!hidden.delete(loss)) hidden.add(loss);
    for (const same of document.querySelectorAll("button[data-loss]")) {
      if (same.dataset.loss === loss) same.setAttribute("aria-pressed", String(!hidden.has(loss)));
    }
    redraw();
  });
}

// Shows only the rows that hold every word that was typed.
for (const field of document.querySelectorAll(".search input")) {
  const place = field.closest(".search"), rows = [...place.nextElementSibling.querySelectorAll("tbody tr")];
  const texts = rows.map(row => row.textContent.toLowerCase());
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, number) => { row.hidden = !words.every(word => texts[number].includes(word)); });
    place.querySelector("output").textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length}` : "";
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    document.documentElement.classList.toggle("printing", printing);
    for (const box of charts.keys()) paint(box, printing);
  });
}
