// Drawing helpers shared by all plots of the explorer.
const LINK = "var(--link)", INK = "var(--ink)", MUTED = "var(--muted)", RULE = "var(--rule)", SHADE = "rgba(128,128,128,0.22)";

const DASH = "5px,4px";

function axes(x, y, height, more = {}) {
  const {xaxis, yaxis, ...rest} = more;
  const layout = Object.assign(structuredClone(head.layout), {height, shapes: []}, rest);
  Object.assign(layout.xaxis, {title: {text: x, standoff: 8}}, xaxis);
  Object.assign(layout.yaxis, {title: {text: y, standoff: 8}}, yaxis);
  return layout;
}

function line(name, x, y, look = {}) {
  const {colour = INK, width = 2, dash = "solid", symbol, size = 6, open = false, ...rest} = look;
  return {
    name, x, y, type: "scatter", mode: symbol ? "lines+markers" : "lines", hovertemplate: `${safe(name)}: %{y}<extra></extra>`,
    line: {color: colour, width, dash}, ...(symbol ? {marker: {symbol, size, color: colour, ...(open ? {line: {color: colour, width: 1.5}} : {})}} : {}), ...rest,
  };
}

function band(x, low, high, colour) {
  const known = x.map((_, i) => i).filter(i => Number.isFinite(low[i]) && Number.isFinite(high[i]));
  return {
    x: [...known.map(i => x[i]), ...[...known].reverse().map(i => x[i])], y: [...known.map(i => high[i]), ...[...known].reverse().map(i => low[i])],
    type: "scatter", mode: "lines", line: {width: 0}, fill: "toself", fillcolor: colour, hoverinfo: "skip",
  };
}

const translucent = (colour, share) => `${colour}${Math.round(share * 255).toString(16).padStart(2, "0")}`;
const cursor = x => ({type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: {color: LINK, width: 1.5, dash: "dot"}});
const across = (y, dash) => ({type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: {color: dash ? INK : MUTED, width: 1.3, dash: dash ?? "solid"}});
const numbers = (heading, body) => ({heading, body});
const edges = () => [head.layers[0] - 0.6, head.layers.at(-1) + 0.6];
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.classList.contains("printing");
const looks = which => which === "a" ? {colour: things()[state.a].colour, symbol: "circle"} : {colour: things()[state.b].colour, symbol: "diamond-open", dash: DASH};

function both(x, valuesOf) {
  const traces = [];
  for (const which of ["a", "b"]) {
    const values = valuesOf(state[which]);
    if (values.some(value => value.n > 1)) traces.push(band(x, values.map(value => value.low), values.map(value => value.high), translucent(things()[state[which]].colour, 0.2)));
    traces.push(line(`${which === "a" ? "●" : "◇"} ${label(state[which])}`, x, values.map(value => value.mean), {...looks(which), size: 7}));
  }
  return traces;
}

const logarithmic = values => {
  const positive = values.filter(value => value > 0);
  if (!positive.length || Math.max(...positive) / Math.min(...positive) < 8) return {rangemode: "tozero"};
  return {type: "log", ...head.ticks};
};
