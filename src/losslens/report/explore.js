"use strict";
// The explorer: every number and plot follows from two runs (or two methods), a layer, a projection and a measure.
const LINK = "var(--link)", INK = "var(--ink)", MUTED = "var(--muted)", RULE = "var(--rule)", SHADE = "rgba(128,128,128,0.22)";
const DASH = "5px,4px";

// Name, digits after the point, unit; the module's value; the columns of the layer and of the whole, and their floors.
const angle = (end, side) => (row, module) => data.at("modules.ends", row, module, side, end);
const column = name => (row, module) => data.at(`modules.${name}`, row, module);
const share = cosine => Math.sqrt(1 - cosine * cosine);
const MEASURES = {
  cosine: {name: "cosine", digits: 4, module: column("cosine"), layer: "cosine", whole: "cosine", floors: "cosine", signed: true},
  orthogonal: {name: "orthogonal share", digits: 4, module: column("orthogonal_a_to_b"), layer: "orthogonal_a_to_b", whole: "orthogonal_a_to_b", floors: "cosine", of: share},
  left: {name: "smallest angle, left", digits: 2, unit: "°", module: angle(0, 0), layer: "angle_min_left", whole: "angle_min_left", floors: "angle_min_left"},
  right: {name: "smallest angle, right", digits: 2, unit: "°", module: angle(0, 1), whole: "angle_min_right", floors: "angle_min_right"},
  left_largest: {name: "largest angle, left", digits: 2, unit: "°", module: angle(1, 0), whole: "angle_max_left", floors: "angle_max_left"},
  right_largest: {name: "largest angle, right", digits: 2, unit: "°", module: angle(1, 1), whole: "angle_max_right", floors: "angle_max_right"},
  u1: {name: "agreement of u₁", digits: 4, module: column("u1"), whole: "u1", floors: "u1"},
  v1: {name: "agreement of v₁", digits: 4, module: column("v1"), whole: "v1", floors: "v1"},
};
const SIZES = {
  norm: "‖ΔW‖", relative_norm: "of ‖W0‖", effective_rank: "effective rank", stable_rank: "stable rank",
  drift_min: "smallest drift of A (°)", drift_max: "largest drift of A (°)", off_principal: "off-principal share",
};

let data, head;
const state = {kind: "runs", a: 0, b: 1, layer: 0, projection: 0, measure: "cosine"};
const $ = id => document.getElementById(`x-${id}`);
const element = (name, text = "", attributes = {}) => {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
// For plotly, which reads some markup.
const safe = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const signed = text => text.replace("-", "−");
const fixed = (value, digits) => Number.isFinite(value) ? signed(value.toFixed(digits)).replace(/^−(?=[0.]+$)/, "") : "–";
const precise = (value, digits = 4) => Number.isFinite(value) ? signed(value === 0 ? "0" : Number(value.toPrecision(digits)).toString()) : "–";

// ---- What is looked at ----

const arms = () => state.kind === "arms";
const things = () => arms() ? head.arms : head.runs;
const runsOf = which => arms() ? head.arms[which].runs : [which];
const symmetric = (a, b) => `${Math.min(a, b)},${Math.max(a, b)}`;

// The pairs that are averaged.
function pairs() {
  const found = (arms() ? armPairs : runPairs).get(symmetric(state.a, state.b));
  return found ?? [];
}
let armPairs, runPairs, heldRows, angledRows, moduleAt;

function spread(values) {
  const known = values.filter(Number.isFinite);
  if (!known.length) return {n: 0, mean: NaN, std: NaN, low: NaN, high: NaN};
  const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
  const squares = known.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const std = known.length > 1 ? Math.sqrt(squares / (known.length - 1)) : NaN;
  return {n: known.length, mean, std, low: Math.min(...known), high: Math.max(...known)};
}

const mean = values => spread(values).mean;
const ofModule = (measure, layer, projection) => {
  const module = moduleAt[layer]?.[projection];
  return spread(pairs().map(pair => measure.module(heldRows.get(pair), module)));
};
const ofLayer = (name, layer) => spread(pairs().map(pair => data.at(`layers.${name}`, heldRows.get(pair), layer)));
const ofWhole = name => spread(pairs().map(pair => data.at(`pairs.${name}`, pair)));
const ofRun = (name, which, module) => spread(runsOf(which).map(run => module === undefined ? data.at(`runs.${name}`, run) : data.at(`run_modules.${name}`, run, module)));

// `0.951`, or `0.95 ± 0.02`: what is averaged was rounded before, so it has a digit less.
function shown({n, mean, std}, digits, unit = "") {
  if (!n) return "–";
  return n === 1 ? fixed(mean, digits) + unit : `${fixed(mean, digits - 1)}${unit} ± ${fixed(std, digits - 1)}${unit}`;
}
function sized({n, mean, std}) {
  return n > 1 ? `${precise(mean, 3)} ± ${precise(std, 2)}` : precise(mean);
}
const label = which => things()[which].label;
const here = () => `layer ${head.layers[state.layer]}, ${head.projections[state.projection]}`;

// ---- Numbers ----

function rows(table, heading, body) {
  const thead = element("thead"), tbody = element("tbody"), top = element("tr");
  heading.forEach((text, place) => top.append(text ? element("th", text, {scope: "col", ...(place ? {class: "number"} : {})}) : element("td")));
  thead.append(top);
  for (const [name, ...cells] of body) {
    const row = element("tr");
    row.append(element("th", name, {scope: "row"}));
    for (const cell of cells) {
      const {text, below = "", key} = typeof cell === "string" ? {text: cell} : cell;
      const made = element("td", "", {class: "number"});
      made.append(element("span", text, key ? {"data-key": key} : {}));
      if (below) made.append(element("small", below, {class: "below"}));
      row.append(made);
    }
    tbody.append(row);
  }
  table.querySelectorAll("thead, tbody").forEach(old => old.remove());
  table.append(thead, tbody);
}

function floors(measure, at) {
  const of = measure.of ?? (value => value);
  const found = {};
  for (const floor of ["null", "seeds"]) {
    const name = `${measure.floors}_${floor}`;
    const value = at === "whole" ? ofWhole(name).mean
      : at === "layer" && data.arrays.has(`layers.${name}`) ? ofLayer(name, state.layer).mean
      : at === "module" && name === "cosine_null" ? ofModule({module: column(name)}, state.layer, state.projection).mean : NaN;
    found[floor] = of(value);
  }
  return found;
}

function beside(measure, at) {
  const {null: none, seeds} = floors(measure, at);
  const lines = [];
  if (Number.isFinite(none)) lines.push(`null ${measure.signed ? "±" : ""}${fixed(none, measure.digits)}`);
  if (Number.isFinite(seeds)) lines.push(`seeds ${fixed(seeds, measure.digits)}`);
  return lines.join("\n");
}

function pairTable() {
  const body = Object.entries(MEASURES).map(([key, measure]) => {
    const cell = (value, at) => ({text: shown(value, measure.digits, measure.unit), below: beside(measure, at), key: `${key}-${at}`});
    return [
      measure.name,
      cell(ofModule(measure, state.layer, state.projection), "module"),
      cell(measure.layer ? ofLayer(measure.layer, state.layer) : spread([]), "layer"),
      cell(ofWhole(measure.whole), "whole"),
    ];
  });
  rows($("pair"), ["", here(), `layer ${head.layers[state.layer]}`, "all modules"], body);
}

function sizesTable() {
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const body = [];
  for (const [name, title] of Object.entries(SIZES)) {
    const cells = [[state.a, module], [state.b, module], [state.a], [state.b]].map(([which, where], place) => ({
      text: sized(ofRun(name, which, where)), key: `${name}-${"abab"[place]}-${place < 2 ? "module" : "whole"}`,
    }));
    if (cells.some(cell => cell.text !== "–")) body.push([title, ...cells]);
  }
  rows($("sizes"), ["", `● ${here()}`, `◇ ${here()}`, "● all", "◇ all"], body);
}

const turned = pair => !runsOf(state.a).includes(head.pairs[pair][0]);
function functionsTable() {
  const body = [];
  const interval = (name, digits, scale = 1) => {
    const [one] = pairs();
    const ends = [`${name}_low`, `${name}_high`].map(end => data.at(`pairs.${end}`, one));
    return pairs().length === 1 && ends.every(Number.isFinite) ? `95% ${fixed(ends[0] * scale, digits)} … ${fixed(ends[1] * scale, digits)}` : "";
  };
  for (const [name, title] of [["barrier_chord", "barrier to the chord"], ["barrier_mean", "barrier to the mean"], ["cka_last", "CKA, last layer"], ["cka_min", "CKA, smallest"]]) {
    const value = ofWhole(name), seeds = ofWhole(`${name}_seeds`).mean;
    const below = [name.startsWith("barrier") ? interval(name, 5) : "", Number.isFinite(seeds) ? `seeds ${fixed(seeds, 5)}` : ""];
    if (value.n) body.push([title, {text: shown(value, 5), below: below.filter(Boolean).join("\n"), key: `${name}-whole`}]);
  }
  const difference = spread(pairs().map(pair => data.at("pairs.accuracy_diff", pair) * (turned(pair) ? -100 : 100)));
  if (difference.n) {
    const [one] = pairs();
    const facts = [];
    if (pairs().length === 1) {
      const p = data.at("p_holm", one);
      const [low, high] = ["diff_low", "diff_high"].map(name => data.at(`pairs.${name}`, one) * 100);
      if (Number.isFinite(low)) facts.push(`95% ${turned(one) ? `${fixed(-high, 1)} … ${fixed(-low, 1)}` : `${fixed(low, 1)} … ${fixed(high, 1)}`}`);
      if (Number.isFinite(p)) facts.push(`p (Holm) ${p < 0.001 ? "<0.001" : precise(p)}`);
      const verdict = head.verdicts[one];
      facts.push({"a better": turned(one) ? "◇ better" : "● better", "b better": turned(one) ? "● better" : "◇ better"}[verdict] ?? verdict);
    }
    const text = difference.n === 1 ? `${fixed(difference.mean, 2)} points` : `${fixed(difference.mean, 1)} ± ${fixed(difference.std, 1)} points`;
    body.push(["accuracy, ● over ◇", {text, below: facts.join("\n"), key: "accuracy_diff"}]);
  }
  const middle = spread(pairs().map(pair => data.at("pairs.accuracy_mid", pair) * 100));
  if (middle.n) {
    // Of fewer problems than the accuracies elsewhere, so beside it the two ends' on the same ones.
    const end = which => mean(pairs().map(pair => data.at(`pairs.accuracy_mid_${turned(pair) === (which === "a") ? "b" : "a"}`, pair) * 100));
    const ends = [["●", end("a")], ["◇", end("b")]].filter(([, value]) => Number.isFinite(value)).map(([mark, value]) => `${mark} ${fixed(value, 1)}%`);
    const count = Math.max(...pairs().map(pair => data.at("pairs.accuracy_mid_n", pair)).filter(Number.isFinite));
    const same = ends.length ? `${ends.join(", ")} on the same${count > 0 ? ` ${count}` : ""} problems` : "";
    body.push(["accuracy halfway", {text: `${fixed(middle.mean, 1)}%`, below: same, key: "accuracy_mid"}]);
  }
  if (!body.length) body.push(["not measured for this pair", ""]);
  rows($("functions"), ["", "value"], body);
}

function sentence() {
  const many = pairs();
  const both = `● ${label(state.a)} and ◇ ${label(state.b)}`;
  if (!many.length) return `${both}: no pair of these was compared.`;
  if (!many.some(pair => heldRows.has(pair))) return `${both}: this page holds no layers or modules of this pair; see the notes below.`;
  const of = arms() ? `, ${many.length === 1 ? "1 pair" : `mean ± standard deviation of ${many.length} pairs`} of runs` : "";
  const shared = new Set(many.map(pair => head.shared[pair]));
  const initial = shared.size > 1 ? "" : {true: ", from one initial adapter", false: ", from different initial adapters"}[[...shared][0]] ?? "";
  return `${both}${of}${initial}; ${here()}.`;
}

function tiles() {
  const found = ["cosine", "left", "right"].map(key => {
    const measure = MEASURES[key], around = beside(measure, "whole").replace("\n", ", ");
    const own = beside(measure, "module"), whole = shown(ofWhole(measure.whole), measure.digits, measure.unit);
    return [measure.name, shown(ofModule(measure, state.layer, state.projection), measure.digits, measure.unit), [own, `all modules ${whole}`, around && `(${around})`]];
  });
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const [a, b] = [ofRun("norm", state.a, module), ofRun("norm", state.b, module)];
  found.push(["‖ΔW‖ of ● and ◇", `${precise(a.mean)}, ${precise(b.mean)}`, ["all modules", `${precise(ofRun("norm", state.a).mean)}, ${precise(ofRun("norm", state.b).mean)}`]]);
  const {values} = ckaOfPair(), here = values[head.cka.states.indexOf(head.layers[state.layer])];
  if (here?.n) found.push([`CKA after layer ${head.layers[state.layer]}`, shown(here, 5), [`last layer ${shown(ofWhole("cka_last"), 5)}`, seeds("cka_last")]]);
  const barrier = ofWhole("barrier_chord");
  if (barrier.n) found.push(["barrier to the chord", shown(barrier, 5), [`to the mean ${shown(ofWhole("barrier_mean"), 5)}`, seeds("barrier_chord"), "nats a token"]]);
  return found;
}

function seeds(name) {
  const value = ofWhole(`${name}_seeds`).mean;
  return Number.isFinite(value) ? `seeds ${fixed(value, 5)}` : "";
}

let saying;
function status() {
  const list = element("dl");
  for (const [name, value, below] of tiles()) {
    const tile = element("div");
    const [main, spread] = value.split(" ± "), number = element("dd", main);
    if (spread) number.append(element("small", ` ± ${spread}`));
    tile.append(element("dt", name), number, ...below.filter(Boolean).map(text => element("dd", text, {class: "small"})));
    list.append(tile);
  }
  $("status").replaceChildren(element("p", sentence()), list);
  // A screen reader hears what was reached, not what was passed on the way.
  clearTimeout(saying);
  saying = setTimeout(() => {
    const heard = tiles().slice(0, 3).map(([name, value]) => `${name} ${value}`).join("; ");
    $("said").textContent = `${sentence()} ${heard}.`;
  }, 600);
}

// ---- Plots ----

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
const average = () => pairs().length > 1;

function modulesPlot() {
  const measure = MEASURES[state.measure];
  const all = head.projections.map((_, projection) => head.layers.map((_, layer) => ofModule(measure, layer, projection).mean));
  const nulls = state.measure === "cosine" ? head.projections.map((_, projection) => head.layers.map((_, layer) => ofModule({module: column("cosine_null")}, layer, projection).mean)) : null;
  const flat = all.flat().filter(Number.isFinite);
  const most = Math.max(...flat.map(Math.abs), 1e-9);
  const colours = measure.signed
    ? {colorscale: [[0, "#D55E00"], [0.5, dark() ? "#20242a" : "#f7f7f7"], [1, "#0072B2"]], zmin: -most, zmax: most}
    : {colorscale: dark() ? [[0, "#20242a"], [1, "#8cc8ff"]] : [[0, "#f3f6fa"], [1, "#0b4f8a"]], zmin: Math.min(...flat), zmax: Math.max(...flat)};
  const dots = nulls && all.map((row, p) => row.map((value, l) => Math.abs(value) < nulls[p][l] ? "·" : ""));
  const within = dots ? dots.flat().filter(Boolean).length : 0;
  const at = {x: head.layers[state.layer], y: state.projection};
  const layout = axes("layer", "", 104 + 24 * head.projections.length, {
    xaxis: {showgrid: false, range: edges()}, margin: {l: 64, r: 16, t: 8, b: 92},
    yaxis: {tickvals: head.projections.map((_, p) => p), ticktext: head.projections.map(safe), range: [head.projections.length - 0.5, -0.5], showgrid: false, automargin: false, ticks: ""},
    shapes: [{type: "rect", x0: at.x - 0.5, x1: at.x + 0.5, y0: at.y - 0.5, y1: at.y + 0.5, line: {color: INK, width: 2.5}}],
  });
  const trace = {
    type: "heatmap", x: head.layers, y: head.projections.map((_, p) => p), z: all, xgap: 1, ygap: 1, ...colours,
    hoverinfo: "text", hovertext: all.map((row, p) => row.map((value, l) => `layer ${head.layers[l]}, ${safe(head.projections[p])}: ${fixed(value, measure.digits)}${measure.unit ?? ""}`)),
    colorbar: {orientation: "h", thickness: 8, yref: "container", y: 0, yanchor: "bottom", ypad: 4, outlinewidth: 0, nticks: 5, ticksuffix: measure.unit ?? ""},
    ...(within ? {text: dots, texttemplate: "%{text}", textfont: {color: INK, size: 14}} : {}),
  };
  const [low, high] = [Math.min(...flat), Math.max(...flat)];
  const caption = flat.length
    ? `${measure.name} of each module, from ${fixed(low, measure.digits)} to ${fixed(high, measure.digits)}${measure.unit ?? ""}.${nulls ? ` Dots (${within} of ${flat.length}): within the null, what two updates with nothing in common show.` : ""} Click a module to choose it.`
    : "Not known of this pair.";
  return {data: [trace], layout, caption, table: numbers(["layer", ...head.projections], head.layers.map((layer, l) => [String(layer), ...all.map(row => fixed(row[l], measure.digits))]))};
}

const edges = () => [head.layers[0] - 0.6, head.layers.at(-1) + 0.6];
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.classList.contains("printing");

function depthPlot() {
  const measure = MEASURES[state.measure], of = measure.of ?? (value => value);
  const x = head.layers, chosen = x.map((_, layer) => ofModule(measure, layer, state.projection));
  const traces = [], said = [], table = [["layer"], x.map(layer => [String(layer)])];
  const add = (name, values) => { table[0].push(name); values.forEach((value, i) => table[1][i].push(fixed(value, measure.digits))); };
  const layers = name => x.map((_, layer) => ofLayer(name, layer).mean);
  const floored = measure.layer ? measure.floors : null;
  const nulls = floored ? layers(`${floored}_null`).map(of) : x.map(() => of(ofWhole(`${measure.floors}_null`).mean));
  const seeds = floored ? layers(`${floored}_seeds`).map(of) : x.map(() => of(ofWhole(`${measure.floors}_seeds`).mean));
  const scope = floored ? "of the layer" : "median or mean over all modules";
  if (nulls.some(Number.isFinite)) {
    if (measure.signed) traces.push(band(x, nulls.map(value => -value), nulls, SHADE));
    else traces.push(line("null", x, nulls, {colour: MUTED, width: 1.5, dash: "2px,3px"}));
    said.push(`${measure.signed ? "Grey band" : "Dotted"}: the null, ${scope}.`);
    add("null", nulls);
  }
  if (seeds.some(Number.isFinite)) {
    traces.push(line("other seeds", x, seeds, {colour: INK, width: 1.5, dash: "9px,5px"}));
    said.push(`Dashed: the same methods at other seeds, ${scope}.`);
    add("other seeds", seeds);
  }
  head.projections.forEach((name, projection) => {
    const values = x.map((_, layer) => ofModule(measure, layer, projection).mean);
    if (projection !== state.projection) traces.push(line(name, x, values, {colour: MUTED, width: 1}));
    add(name, values);
  });
  if (measure.layer) {
    const whole = layers(measure.layer);
    traces.push(line("the layer as a whole", x, whole, {width: 1.8}));
    said.unshift("Plain line: the layer as a whole.");
    add("layer", whole);
  }
  if (average()) traces.push(band(x, chosen.map(value => value.low), chosen.map(value => value.high), "rgba(60,130,200,0.22)"));
  traces.push(line(head.projections[state.projection], x, chosen.map(value => value.mean), {colour: LINK, width: 3, symbol: "circle", size: 6}));
  const layout = axes("layer", `${measure.name}${measure.unit ? ` (${measure.unit})` : ""}`, 330, {
    xaxis: {range: edges()}, yaxis: {automargin: false}, margin: {l: 64, r: 16, t: 8, b: 44}, shapes: [cursor(x[state.layer]), ...(measure.signed ? [across(0)] : [])],
  });
  const others = head.projections.filter((_, p) => p !== state.projection);
  const caption = `Thick: ${head.projections[state.projection]}${average() ? ", its band from the smallest to the largest pair" : ""}${others.length ? `; thin: ${others.join(", ")}` : ""}. ${said.join(" ")} Click a layer to choose it.`;
  return {data: traces, layout, caption, table: numbers(...table)};
}

function anglesPlot() {
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const count = data.side("modules.angles", 3), traces = [], table = [["angle"], []];
  const has = pairs().some(pair => angledRows.has(pair));
  const sides = ["left", "right"].map((name, side) => {
    let values = Array.from({length: count}, (_, i) => spread(pairs().map(pair => data.at("modules.angles", angledRows.get(pair), module, side, i))));
    let x = values.map((_, i) => i + 1);
    if (!has) [values, x] = [[0, 1].map(end => ofModule(MEASURES[`${name}${end ? "_largest" : ""}`], state.layer, state.projection)), [1, Math.max(count, 2)]];
    const kept = values.map(value => value.n > 0);
    return {name, x: x.filter((_, i) => kept[i]), values: values.filter((_, i) => kept[i])};
  });
  for (const {name, x, values} of sides) {
    const left = name === "left";
    if (average()) traces.push(band(x, values.map(value => value.low), values.map(value => value.high), SHADE));
    traces.push(line(`${name} (${left ? "output" : "input"})`, x, values.map(value => value.mean), {colour: left ? LINK : INK, dash: left ? "solid" : DASH, symbol: left ? "circle" : "square-open", size: 7}));
  }
  const last = Math.max(1, ...sides.map(side => side.x.at(-1) ?? 1));
  const marks = {null: {symbol: "circle-open", size: 8, color: MUTED, line: {width: 1.5}}, seeds: {symbol: "line-ew", size: 16, line: {color: INK, width: 2.5}}};
  const known = new Set();
  for (const floor of ["null", "seeds"]) {
    const found = [["min", 1], ["max", last]].flatMap(([end, x]) => ["left", "right"].map(side => ({x, y: ofWhole(`angle_${end}_${side}_${floor}`).mean, text: `${floor}, ${end === "min" ? "smallest" : "largest"} ${side}`}))).filter(({y}) => Number.isFinite(y));
    if (!found.length) continue;
    known.add(floor);
    traces.push({type: "scatter", mode: "markers", x: found.map(each => each.x), y: found.map(each => each.y), marker: marks[floor], hovertext: found.map(each => `${each.text}: ${fixed(each.y, 2)}°`), hoverinfo: "text"});
  }
  const rowsOf = Math.max(...sides.map(side => side.x.length), 0);
  table[0].push("left (°)", "right (°)");
  for (let i = 0; i < rowsOf; i++) table[1].push([String(sides[0].x[i] ?? sides[1].x[i]), ...sides.map(side => fixed(side.values[i]?.mean, 2))]);
  const said = `${known.has("null") ? " Circles: the null;" : ""}${known.has("seeds") ? " bars: other seeds;" : ""}${known.size ? " of the smallest and the largest angle, medians over all modules." : ""}`;
  const [left, right] = sides.map(side => side.values.length ? `${fixed(side.values[0].mean, 2)}° to ${fixed(side.values.at(-1).mean, 2)}°` : "–");
  return {
    data: traces, layout: axes("angle, ascending", "degrees", 320, {yaxis: {range: [0, 92], tickvals: [0, 15, 30, 45, 60, 75, 90]}, xaxis: {dtick: 1, showgrid: false, range: [0.5, last + 0.5]}}),
    caption: `${capital(here())}. Left, output (line): ${left}. Right, input (dashed): ${right}.${has ? "" : " Only the smallest and largest are on this page."}${said}`, table: numbers(...table),
  };
}

const capital = text => text[0].toUpperCase() + text.slice(1);
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

function spectraPlot() {
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const x = Array.from({length: data.side("run_modules.singular_values", 2)}, (_, i) => i + 1);
  const valuesOf = which => x.map((_, i) => spread(runsOf(which).map(run => data.at("run_modules.singular_values", run, module, i))));
  const [a, b] = [valuesOf(state.a), valuesOf(state.b)];
  const traces = both(x, valuesOf);
  return {
    data: traces, layout: axes("singular value", "σ", 320, {yaxis: logarithmic([...a, ...b].map(value => value.mean)), xaxis: {showgrid: false, nticks: 12}}),
    caption: `${capital(here())}. ● ${label(state.a)} (line): effective rank ${sized(ofRun("effective_rank", state.a, module))}, largest ${precise(a[0]?.mean)}. ◇ ${label(state.b)} (dashed): ${sized(ofRun("effective_rank", state.b, module))}, ${precise(b[0]?.mean)}.`,
    table: numbers(["σ", "●", "◇"], x.map((number, i) => [String(number), precise(a[i].mean), precise(b[i].mean)])),
  };
}

function normsPlot() {
  const x = head.layers;
  const valuesOf = which => x.map((_, layer) => ofRun("norm", which, moduleAt[layer][state.projection] ?? -1));
  const [a, b] = [valuesOf(state.a), valuesOf(state.b)];
  return {
    data: both(x, valuesOf), layout: axes("layer", `‖ΔW‖ of ${safe(head.projections[state.projection])}`, 320, {xaxis: {range: edges()}, yaxis: logarithmic([...a, ...b].map(value => value.mean)), shapes: [cursor(x[state.layer])]}),
    caption: `${head.projections[state.projection]} in each layer. At layer ${x[state.layer]}: ● ${label(state.a)} (line) ${sized(a[state.layer])}, ◇ ${label(state.b)} (dashed) ${sized(b[state.layer])}.`,
    table: numbers(["layer", "●", "◇"], x.map((layer, i) => [String(layer), precise(a[i].mean), precise(b[i].mean)])),
  };
}

const ckaPlaces = found => head.cka.keys.flatMap((key, place) => found(...key) ? [place] : []);
const ckaSeries = (name, places) => head.cka.states.map((_, state) => spread(places.map(place => data.at(`cka.${name}`, place, state))));
function ckaOfPair() {
  const ends = new Set(pairs().map(pair => symmetric(...head.pairs[pair])));
  const places = ckaPlaces((a, b) => ends.has(symmetric(a, b)));
  return {values: ckaSeries("cka_unbiased", places), without: ckaSeries("cka_without_outlier", places)};
}

function ckaPlot() {
  const {states} = head.cka, {values: pair, without} = ckaOfPair();
  const traces = [], table = [["layer"], states.map(state => [state < 0 ? "embeddings" : String(state)])];
  const add = (name, values) => { table[0].push(name); values.forEach((value, i) => table[1][i].push(fixed(value.mean, 5))); };
  for (const which of ["a", "b"]) {
    const values = ckaSeries("cka_unbiased", ckaPlaces((run, other) => other < 0 && runsOf(state[which]).includes(run)));
    if (!values.some(value => value.n)) continue;
    traces.push(line(`${label(state[which])} and the base`, states, values.map(value => value.mean), {...looks(which), width: 1.3, size: 5}));
    add(`${which === "a" ? "●" : "◇"} and the base`, values);
  }
  if (pair.some(value => value.n)) {
    traces.push(line("without the outlier dimension", states, without.map(value => value.mean), {colour: MUTED, dash: "2px,3px", width: 1.5}));
    if (average()) traces.push(band(states, pair.map(value => value.low), pair.map(value => value.high), SHADE));
    traces.push(line("the two", states, pair.map(value => value.mean), {width: 2.6, symbol: "circle", size: 5}));
    add("the two", pair);
    add("without outlier", without);
  }
  const last = ofWhole("cka_last_seeds").mean, least = ofWhole("cka_min_seeds").mean, shapes = [cursor(head.layers[state.layer])];
  if (Number.isFinite(last)) traces.push({type: "scatter", mode: "markers", x: [states.at(-1)], y: [last], marker: {symbol: "line-ew", size: 18, line: {color: INK, width: 2.5}}, hovertext: `other seeds, last layer: ${fixed(last, 5)}`, hoverinfo: "text", cliponaxis: false});
  if (Number.isFinite(least)) traces.push(line("other seeds, smallest", [states[0], states.at(-1)], [least, least], {width: 1.3, dash: "9px,5px"}));
  const now = states.indexOf(head.layers[state.layer]);
  const caption = pair.some(value => value.n)
    ? `Strong: the two, at layer ${head.layers[state.layer]} ${shown(pair[now] ?? spread([]), 5)}. Dotted: without the outlier dimension. In colour: each and the base.${Number.isFinite(last) ? " Bar at the last layer and dashed line: other seeds, there and at the smallest." : ""} −1: the embeddings.`
    : "Not measured for this pair. In colour: each and the base.";
  return {data: traces, layout: axes("layer", "CKA, unbiased", 320, {shapes}), caption, table: numbers(...table)};
}

function curvePlot() {
  const {alphas, pairs: measured} = head.curves;
  const curves = pairs().map(pair => ({pair, row: measured.indexOf(pair)})).filter(({row}) => row >= 0);
  const read = (name, {pair, row}) => {
    const values = alphas.map((_, i) => data.at(`curves.${name}`, row, i));
    return turned(pair) ? values.reverse() : values;
  };
  if (!curves.length) return {data: [], layout: axes("α", "loss (nats a token)", 320), caption: "Not measured for this pair.", table: numbers([], [])};
  const all = curves.map(curve => read("loss", curve));
  const loss = alphas.map((_, i) => spread(all.map(values => values[i])));
  const [low, high] = curves.length === 1 ? [read("loss_low", curves[0]), read("loss_high", curves[0])] : [loss.map(value => value.low), loss.map(value => value.high)];
  const values = loss.map(value => value.mean), [from, to] = [values[0], values.at(-1)];
  const traces = [
    band(alphas, low, high, SHADE),
    line("chord", [0, 1], [from, to], {colour: MUTED, width: 1.5, dash: "2px,3px"}),
    line("mean of the ends", [0, 1], [(from + to) / 2, (from + to) / 2], {colour: MUTED, width: 1.5, dash: "9px,5px"}),
    line("loss", alphas, values, {width: 2.4, symbol: "circle", size: 4}),
    ...["a", "b"].map((which, end) => ({...line(label(state[which]), [end], [end ? to : from], {...looks(which), size: 12}), mode: "markers", cliponaxis: false})),
  ];
  const barrier = form => shown(ofWhole(`barrier_${form}`), 5);
  return {
    data: traces, layout: axes("α, from ● to ◇", "loss (nats a token)", 320, {xaxis: {range: [-0.04, 1.04], tickvals: [0, 0.25, 0.5, 0.75, 1]}}),
    caption: `Barrier to the chord (dotted): ${barrier("chord")}; to the mean of the ends (dashed): ${barrier("mean")} nats a token. Band: ${curves.length === 1 ? "95% over sequences" : `from the smallest to the largest of ${curves.length} pairs`}.`,
    table: numbers(["α", "loss", "low", "high"], alphas.map((alpha, i) => [String(alpha), fixed(values[i], 5), fixed(low[i], 5), fixed(high[i], 5)])),
  };
}

function barriersPlot() {
  const traces = [], body = [];
  let highest = 0;
  ["chord", "mean"].forEach((form, y) => {
    const value = ofWhole(`barrier_${form}`), seeds = ofWhole(`barrier_${form}_seeds`).mean;
    if (!value.n) return;
    const ends = value.n === 1 ? ["low", "high"].map(end => ofWhole(`barrier_${form}_${end}`).mean) : [value.low, value.high];
    traces.push({
      type: "scatter", mode: "markers", x: [value.mean], y: [y], marker: {color: LINK, size: 11}, hovertext: `${shown(value, 5)} (${ends.map(end => fixed(end, 5)).join(" … ")})`, hoverinfo: "text",
      ...(ends.every(Number.isFinite) ? {error_x: {array: [ends[1] - value.mean], arrayminus: [value.mean - ends[0]], color: LINK, thickness: 2, width: 5}} : {}),
    });
    if (Number.isFinite(seeds)) traces.push({type: "scatter", mode: "markers", x: [seeds], y: [y], marker: {symbol: "line-ns", size: 20, line: {color: INK, width: 2.5}}, hovertext: `other seeds: ${fixed(seeds, 5)}`, hoverinfo: "text"});
    highest = Math.max(highest, ...[value.mean, ...ends, seeds].filter(Number.isFinite));
    body.push([`to the ${form}`, fixed(value.mean, 5), ...ends.map(end => fixed(end, 5)), fixed(seeds, 5)]);
  });
  const several = average() ? "from the smallest to the largest pair" : "95% over sequences; an interval that just excludes 0 is no proof of a barrier";
  return {
    data: traces, layout: axes("barrier (nats a token)", "", 200, {yaxis: {tickvals: [0, 1], ticktext: ["to the chord", "to the mean"], range: [1.6, -0.6], showgrid: false, ticks: ""}, xaxis: {...(highest < 0.01 ? {range: [-0.0005, 0.0105]} : {rangemode: "tozero"}), nticks: 5}}),
    caption: body.length ? `Bar: ${several}. Upright: the same methods at other seeds.` : "Not measured for this pair.", table: numbers(["barrier", "value", "low", "high", "seeds"], body),
  };
}

function mapPlot() {
  const points = head.runs.map((run, i) => ({...run, x: data.at("map", i, 0), y: data.at("map", i, 1)}));
  const [a, b] = [runsOf(state.a), runsOf(state.b)];
  const ring = (runs, symbol, size) => ({type: "scatter", mode: "markers", hoverinfo: "skip", showlegend: false, x: runs.map(run => points[run].x), y: runs.map(run => points[run].y), marker: {symbol, size, color: INK, line: {color: INK, width: 2}}});
  const methods = [...new Set(points.map(point => point.method))];
  const traces = methods.map(method => ({method, own: points.map((point, i) => ({...point, i})).filter(point => point.method === method)})).map(({method, own}) => ({
    type: "scatter", mode: "markers", name: safe(method), x: own.map(point => point.x), y: own.map(point => point.y), customdata: own.map(point => point.i),
    hoverinfo: "text", hovertext: own.map(point => safe(point.label)), marker: {color: own[0].colour, size: 10, line: {color: INK, width: 0.6}},
  }));
  return {
    data: [ring(a, "circle-open", 18), ring(b, "diamond-open", 18), ...traces],
    layout: axes("degrees", "degrees", 420, {yaxis: {scaleanchor: "x"}, showlegend: true, legend: {orientation: "h", y: 1, yanchor: "bottom", itemclick: false, itemdoubleclick: false}}),
    caption: `Each point is a run; distances stand for the angles between the updates (${head.map.kept === null ? "" : `the plane shows ${Math.round(100 * head.map.kept)}% of their variance; `}half of them are off by less than ${head.map.off}°). Rings: ● ${label(state.a)}; diamonds: ◇ ${label(state.b)}. Click a point to make it the second, with Shift the first.`,
    table: numbers(["run", "x", "y"], points.map(point => [point.label, precise(point.x), precise(point.y)])),
  };
}

// ---- The page ----

// Which plots there are, and what of the choice they depend on.
const PLOTS = {
  modules: {make: modulesPlot, needs: () => data.any("modules.cosine")},
  depth: {make: depthPlot, needs: () => data.any("modules.cosine")},
  angles: {make: anglesPlot, needs: () => data.any("modules.ends")},
  spectra: {make: spectraPlot, needs: () => data.any("run_modules.singular_values")},
  norms: {make: normsPlot, needs: () => data.any("run_modules.norm")},
  cka: {make: ckaPlot, needs: () => head.cka.keys.length > 0},
  curve: {make: curvePlot, needs: () => head.curves.pairs.length > 0, still: true},
  barriers: {make: barriersPlot, needs: () => data.any("pairs.barrier_chord"), still: true},
  map: {make: mapPlot, needs: () => head.map !== null, still: true},
};

function drawn(name) {
  const {data: traces, layout, caption, table} = PLOTS[name].make();
  const figure = $(name);
  figure.querySelector("figcaption").textContent = caption;
  const details = figure.querySelector("details");
  if (details.open) rows(details.querySelector("table"), table.heading, table.body);
  return {data: traces, layout};
}

let waiting = false;
// `still`: only the layer, the projection or the measure changed.
let moved = false;
function changed(still = false) {
  moved ||= !still;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    update(moved);
    moved = false;
  });
}

function update(all = true) {
  const layer = $("layer");
  $("layer-shown").textContent = `${head.layers[state.layer]} of ${head.layers[0]}–${head.layers.at(-1)}`;
  layer.setAttribute("aria-valuetext", `layer ${head.layers[state.layer]}`);
  status();
  pairTable();
  sizesTable();
  if (all) functionsTable();
  redraw(Object.entries(PLOTS).filter(([name, {still}]) => !$(name).hidden && (all || !still)).map(([name]) => $(name).querySelector(".plot")));
}

// A run is not compared with itself; an arm is, by its own runs.
const alone = value => !(arms() && armPairs.has(symmetric(value, value)));

function choose(which, value) {
  const other = which === "a" ? "b" : "a";
  if (value === state[other] && alone(value)) state[other] = state[which];
  state[which] = value;
  marked();
  changed();
}

// What is chosen; who goes through a list by the keyboard passes over the other one.
function marked() {
  for (const [which, other] of [["a", "b"], ["b", "a"]]) {
    $(which).value = state[which];
    [...$(which).options].forEach((option, i) => option.disabled = i === state[other] && alone(i));
  }
}

function list() {
  for (const which of ["a", "b"]) {
    $(which).replaceChildren(...things().map((thing, i) => element("option", arms() ? `${thing.label} (${thing.runs.length} run${thing.runs.length > 1 ? "s" : ""})` : thing.label, {value: i, ...(thing.name ? {title: thing.name} : {})})));
  }
  marked();
}

function controls() {
  for (const which of ["a", "b"]) $(which).addEventListener("change", event => choose(which, Number(event.target.value)));
  $("swap").addEventListener("click", () => {
    [state.a, state.b] = [state.b, state.a];
    marked();
    changed();
  });
  $("kind").hidden = !head.arms.length;
  for (const radio of $("kind").querySelectorAll("input")) {
    radio.checked = radio.value === state.kind;
    radio.addEventListener("change", () => {
      state.kind = radio.value;
      [state.a, state.b] = head.start[state.kind];
      list();
      changed();
    });
  }
  const layer = $("layer");
  Object.assign(layer, {min: 0, max: Math.max(0, head.layers.length - 1), value: state.layer});
  layer.addEventListener("input", () => {
    state.layer = Number(layer.value);
    changed(true);
  });
  head.projections.forEach((name, projection) => {
    const made = element("label"), radio = element("input", "", {type: "radio", name: "x-projection", value: projection});
    radio.checked = projection === state.projection;
    radio.addEventListener("change", () => {
      state.projection = projection;
      changed(true);
    });
    made.append(radio, element("span", name));
    $("projection").append(made);
  });
  $("measure").replaceChildren(...Object.entries(MEASURES).map(([key, {name}]) => element("option", name, {value: key})));
  $("measure").addEventListener("change", event => {
    state.measure = event.target.value;
    changed(true);
  });
  list();
}

function at(layer, projection) {
  if (layer in head.layers) $("layer").value = state.layer = layer;
  if (projection in head.projections) {
    state.projection = projection;
    $("projection").querySelectorAll("input")[projection].checked = true;
  }
  changed(true);
}

function clicks() {
  const box = name => $(name).querySelector(".plot");
  const on = (name, act) => {
    // Plotly gives a box its events when it draws there for the first time.
    const make = charts.get(box(name));
    charts.set(box(name), () => {
      queueMicrotask(() => {
        if (box(name).dataset.clicks || !box(name).on) return;
        box(name).dataset.clicks = "on";
        box(name).on("plotly_click", act);
      });
      return make();
    });
  };
  on("modules", ({points: [point]}) => at(head.layers.indexOf(point.x), point.y));
  on("depth", ({points: [point]}) => at(head.layers.indexOf(point.x)));
  on("map", ({points, event}) => {
    const point = points.find(({customdata}) => customdata !== undefined);
    if (!point) return;
    const run = point.customdata;
    choose(event.shiftKey ? "a" : "b", arms() ? head.arms.findIndex(({runs}) => runs.includes(run)) : run);
  });
}

async function explore() {
  data = await Packed.from($("data").content.textContent);
  head = data.header;
  runPairs = new Map(head.pairs.map((ends, pair) => [symmetric(...ends), [pair]]));
  armPairs = new Map(head.between.map(([a, b, numbers]) => [symmetric(a, b), numbers]));
  heldRows = new Map(head.held.map((pair, row) => [pair, row]));
  angledRows = new Map(head.angled.map((pair, row) => [pair, row]));
  moduleAt = head.layers.map(() => []);
  head.at.forEach(([layer, projection], module) => moduleAt[layer][projection] = module);
  state.kind = head.start.arms ? "arms" : "runs";
  [state.a, state.b] = head.start[state.kind];
  state.layer = Math.floor((head.layers.length - 1) / 2);
  document.querySelector("#explore .loading").remove();
  document.querySelector("#explore .controls").hidden = false;
  controls();
  for (const [name, {needs}] of Object.entries(PLOTS)) {
    const figure = $(name);
    figure.hidden = !needs();
    if (figure.hidden) continue;
    chart(figure.querySelector(".plot"), () => drawn(name));
    figure.querySelector("details").addEventListener("toggle", () => drawn(name));
  }
  clicks();
  update();
  // The watcher has seen by the second frame what is on the screen.
  requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("explorer")));
}

explore();
