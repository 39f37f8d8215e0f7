// The plots of weight space.
function modulesPlot() {
  const measure = MEASURES[state.measure];
  const all = head.projections.map((_, projection) => head.layers.map((_, layer) => ofModule(measure.name, layer, projection).mean));
  const nulls = data.arrays.has(`modules.${measure.name}_null`) ? head.projections.map((_, projection) => head.layers.map((_, layer) => ofModule(`${measure.name}_null`, layer, projection).mean)) : null;
  const flat = all.flat().filter(Number.isFinite);
  const {from, to, text: scale} = scaleOf(measure);
  const middle = dark() ? "#20242a" : "#f7f7f7";
  const colours = {zmin: from, zmax: to, colorscale: from < 0 ? [[0, head.against], [0.5, middle], [1, head.along]] : dark() ? [[0, "#20242a"], [1, "#8cc8ff"]] : [[0, "#f3f6fa"], [1, "#0b4f8a"]]};
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
    hoverinfo: "text", hovertext: all.map((row, p) => row.map((value, l) => `layer ${head.layers[l]}, ${safe(head.projections[p])}: ${fixed(value, measure.digits)}${measure.unit}`)),
    colorbar: {orientation: "h", thickness: 8, yref: "container", y: 0, yanchor: "bottom", ypad: 4, outlinewidth: 0, nticks: 5, ticksuffix: measure.unit},
    ...(within ? {text: dots, texttemplate: "%{text}", textfont: {color: INK, size: 14}} : {}),
  };
  const [low, high] = [Math.min(...flat), Math.max(...flat)];
  const caption = flat.length
    ? `${measure.label} of each module, from ${fixed(low, measure.digits)} to ${fixed(high, measure.digits)}${measure.unit}. ${scale}${nulls ? ` Dots (${within} of ${flat.length}): within the null, as for two updates with nothing in common.` : ""} Click a module to choose it.`
    : "Not measured for this pair.";
  return {data: [trace], layout, caption, table: numbers(["layer", ...head.projections], head.layers.map((layer, l) => [String(layer), ...all.map(row => fixed(row[l], measure.digits))]))};
}

function depthPlot() {
  const measure = MEASURES[state.measure];
  const x = head.layers, chosen = x.map((_, layer) => ofModule(measure.name, layer, state.projection));
  const traces = [], notes = [], table = [["layer"], x.map(layer => [String(layer)])];
  const add = (name, values) => { table[0].push(name); values.forEach((value, i) => table[1][i].push(fixed(value, measure.digits))); };
  const layers = name => x.map((_, layer) => ofLayer(name, layer).mean);
  const [nulls, levels] = ["null", measure.level].map(judge => layers(`${measure.name}_${judge}`));
  if (nulls.some(Number.isFinite)) {
    if (SIGNED(measure)) traces.push(band(x, nulls.map(value => -value), nulls, SHADE));
    else traces.push(line("null", x, nulls, {colour: MUTED, width: 1.5, dash: "2px,3px"}));
    notes.push(`${SIGNED(measure) ? "Grey band" : "Dotted"}: the null of the layer.`);
    add("null", nulls);
  }
  if (levels.some(Number.isFinite)) {
    traces.push(line(measure.level, x, levels, {colour: INK, width: 1.5, dash: "9px,5px"}));
    notes.push(`Dashed: the ${measure.level === "repeat" ? "repeat level" : measure.level} of the layer, which two runs of the same loss would show.`);
    add(measure.level, levels);
  }
  head.projections.forEach((name, projection) => {
    const values = x.map((_, layer) => ofModule(measure.name, layer, projection).mean);
    if (projection !== state.projection) traces.push(line(name, x, values, {colour: MUTED, width: 1}));
    add(name, values);
  });
  const whole = layers(measure.name);
  traces.push(line("all modules of the layer", x, whole, {width: 1.8}));
  notes.unshift("Plain line: all modules of the layer.");
  add("layer", whole);
  if (average()) traces.push(band(x, chosen.map(value => value.low), chosen.map(value => value.high), "rgba(60,130,200,0.22)"));
  traces.push(line(head.projections[state.projection], x, chosen.map(value => value.mean), {colour: LINK, width: 3, symbol: "circle", size: 6}));
  const layout = axes("layer", `${measure.label}${measure.unit ? ` (${measure.unit})` : ""}`, 330, {
    xaxis: {range: edges()}, yaxis: {automargin: false}, margin: {l: 64, r: 16, t: 8, b: 44}, shapes: [cursor(x[state.layer]), ...(SIGNED(measure) ? [across(0)] : [])],
  });
  const others = head.projections.filter((_, p) => p !== state.projection);
  const caption = `Thick: ${head.projections[state.projection]}${average() ? ", with a band from the smallest to the largest pair" : ""}${others.length ? `; thin: ${others.join(", ")}` : ""}. ${notes.join(" ")} Click a layer to choose it.`;
  return {data: traces, layout, caption, table: numbers(...table)};
}

function anglesPlot() {
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const count = data.side("modules.angles", 3), traces = [], table = [["angle"], []];
  const has = pairs().some(pair => angledRows.has(pair));
  const sides = ["left", "right"].map((name, side) => {
    let values = Array.from({length: count}, (_, i) => spread(pairs().map(pair => data.at("modules.angles", angledRows.get(pair), module, side, i))));
    let x = values.map((_, i) => i + 1);
    if (!has) [values, x] = [[0, 1].map(end => ofModule(`angle_${end ? "max" : "min"}_${name}`, state.layer, state.projection)), [1, Math.max(count, 2)]];
    const kept = values.map(value => value.n > 0);
    return {name, x: x.filter((_, i) => kept[i]), values: values.filter((_, i) => kept[i])};
  });
  for (const {name, x, values} of sides) {
    const left = name === "left";
    if (average()) traces.push(band(x, values.map(value => value.low), values.map(value => value.high), SHADE));
    traces.push(line(`${name} (${left ? "output" : "input"})`, x, values.map(value => value.mean), {colour: left ? LINK : INK, dash: left ? "solid" : DASH, symbol: left ? "circle" : "square-open", size: 7}));
  }
  const last = Math.max(1, ...sides.map(side => side.x.at(-1) ?? 1));
  const marks = {null: {symbol: "circle-open", size: 8, color: MUTED, line: {width: 1.5}}, repeat: {symbol: "line-ew", size: 16, line: {color: INK, width: 2.5}}};
  const known = new Set();
  for (const kind of ["null", "repeat"]) {
    const points = [["min", 1], ["max", last]].flatMap(([end, x]) => ["left", "right"].map(side => ({x, y: ofWhole(`angle_${end}_${side}_${kind}`).mean, text: `${kind}, ${end === "min" ? "smallest" : "largest"} ${side}`}))).filter(({y}) => Number.isFinite(y));
    if (!points.length) continue;
    known.add(kind);
    traces.push({type: "scatter", mode: "markers", x: points.map(point => point.x), y: points.map(point => point.y), marker: marks[kind], hovertext: points.map(point => `${point.text}: ${fixed(point.y, 2)}°`), hoverinfo: "text"});
  }
  const rowsOf = Math.max(...sides.map(side => side.x.length), 0);
  table[0].push("left (°)", "right (°)");
  for (let i = 0; i < rowsOf; i++) table[1].push([String(sides[0].x[i] ?? sides[1].x[i]), ...sides.map(side => fixed(side.values[i]?.mean, 2))]);
  const symbols = [known.has("null") ? "circles: the null" : "", known.has("repeat") ? "bars: the repeat level" : ""].filter(Boolean).join("; ");
  const levels = symbols ? ` ${capital(symbols)} (of the smallest and the largest angle, median over all modules).` : "";
  const [left, right] = sides.map(side => side.values.length ? `${fixed(side.values[0].mean, 2)}° to ${fixed(side.values.at(-1).mean, 2)}°` : "–");
  return {
    data: traces, layout: axes("angle, ascending", "degrees", 320, {yaxis: {range: [0, 92], tickvals: [0, 15, 30, 45, 60, 75, 90]}, xaxis: {dtick: 1, showgrid: false, range: [0.5, last + 0.5]}}),
    caption: `${capital(here())}. Left, output (line): ${left}. Right, input (dashed): ${right}.${has ? "" : " This page has only the smallest and the largest angle of this pair."}${levels}`, table: numbers(...table),
  };
}

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

function mapPlot() {
  const points = head.runs.map((run, i) => ({...run, x: data.at("map", i, 0), y: data.at("map", i, 1)}));
  const [a, b] = [runsOf(state.a), runsOf(state.b)];
  const ring = (runs, symbol, size) => ({type: "scatter", mode: "markers", hoverinfo: "skip", showlegend: false, x: runs.map(run => points[run].x), y: runs.map(run => points[run].y), marker: {symbol, size, color: INK, line: {color: INK, width: 2}}});
  const losses = [...new Set(points.map(point => point.loss))];
  const traces = losses.map(loss => points.map((point, i) => ({...point, i})).filter(point => point.loss === loss)).map(own => ({
    type: "scatter", mode: "markers", meta: own[0].loss, x: own.map(point => point.x), y: own.map(point => point.y), customdata: own.map(point => point.i),
    hoverinfo: "text", hovertext: own.map(point => safe(point.label)), marker: {color: own[0].colour, symbol: own[0].symbol, size: 11, line: {color: INK, width: 0.7}},
  }));
  return {
    data: [ring(a, "circle-open", 18), ring(b, "diamond-open", 18), ...traces],
    layout: axes("degrees", "degrees", 420, {yaxis: {scaleanchor: "x"}}),
    caption: `Each point is a run, with the mark of its loss; distances approximate the angles between the updates (${head.map.kept === null ? "" : `the plane shows ${Math.round(100 * head.map.kept)}% of their variance; `}half of them are off by less than ${head.map.off}°). Rings: ● ${label(state.a)}; diamonds: ◇ ${label(state.b)}. Click a point to choose it as the second, Shift-click as the first.`,
    table: numbers(["run", "x", "y"], points.map(point => [point.label, precise(point.x), precise(point.y)])),
  };
}
