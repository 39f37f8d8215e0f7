// The plots of function space: CKA, and the loss on the path from one model to the other.
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
    traces.push(line("the pair", states, pair.map(value => value.mean), {width: 2.6, symbol: "circle", size: 5}));
    add("the pair", pair);
    add("without outlier", without);
  }
  const last = ofWhole("cka_last_ceiling").mean, least = ofWhole("cka_min_ceiling").mean, shapes = [cursor(head.layers[state.layer])];
  if (Number.isFinite(last)) traces.push({type: "scatter", mode: "markers", x: [states.at(-1)], y: [last], marker: {symbol: "line-ew", size: 18, line: {color: INK, width: 2.5}}, hovertext: `ceiling, last layer: ${fixed(last, 5)}`, hoverinfo: "text", cliponaxis: false});
  if (Number.isFinite(least)) traces.push(line("ceiling, smallest", [states[0], states.at(-1)], [least, least], {width: 1.3, dash: "9px,5px"}));
  const now = states.indexOf(head.layers[state.layer]);
  const caption = pair.some(value => value.n)
    ? `Thick line: CKA of the pair, ${shown(pair[now] ?? spread([]), 5)} at layer ${head.layers[state.layer]}. Dotted: without the outlier dimension. Coloured: each of the two with the base.${Number.isFinite(last) ? " Bar at the last layer: the ceiling of its CKA; dashed line: the ceiling of the smallest CKA." : ""} Layer −1: the embeddings.`
    : "Not measured for this pair. Coloured: each of the two with the base.";
  return {data: traces, layout: axes("layer", "CKA, unbiased", 320, {shapes}), caption, table: numbers(...table)};
}

function curvePlot() {
  const {alphas, pairs: measured} = head.curves;
  const curves = pairs().map(pair => ({pair, row: measured.indexOf(pair)})).filter(({row}) => row >= 0);
  const read = (name, {pair, row}) => {
    const values = alphas.map((_, i) => data.at(`curves.${name}`, row, i));
    return turned(pair) ? values.reverse() : values;
  };
  if (!curves.length) return {data: [], layout: axes("α", "loss (nats per token)", 320), caption: "Not measured for this pair.", table: numbers([], [])};
  const all = curves.map(curve => read("loss", curve));
  const loss = alphas.map((_, i) => spread(all.map(values => values[i])));
  const [low, high] = curves.length === 1 ? [read("loss_low", curves[0]), read("loss_high", curves[0])] : [loss.map(value => value.low), loss.map(value => value.high)];
  const values = loss.map(value => value.mean), [from, to] = [values[0], values.at(-1)];
  const traces = [
    band(alphas, low, high, SHADE),
    line("chord", [0, 1], [from, to], {colour: MUTED, width: 1.5, dash: "2px,3px"}),
    line("mean of the endpoints", [0, 1], [(from + to) / 2, (from + to) / 2], {colour: MUTED, width: 1.5, dash: "9px,5px"}),
    line("loss", alphas, values, {width: 2.4, symbol: "circle", size: 4}),
    ...["a", "b"].map((which, end) => ({...line(label(state[which]), [end], [end ? to : from], {...looks(which), size: 12}), mode: "markers", cliponaxis: false})),
  ];
  const barrier = form => shown(ofWhole(`barrier_${form}`), 5);
  return {
    data: traces, layout: axes("α, from ● to ◇", "loss (nats per token)", 320, {xaxis: {range: [-0.04, 1.04], tickvals: [0, 0.25, 0.5, 0.75, 1]}}),
    caption: `Barrier above the chord (dotted): ${barrier("chord")}; above the mean of the endpoints (dashed): ${barrier("mean")} nats per token. Band: ${curves.length === 1 ? "95% interval over sequences" : `from the smallest to the largest of ${curves.length} pairs`}.`,
    table: numbers(["α", "loss", "low", "high"], alphas.map((alpha, i) => [String(alpha), fixed(values[i], 5), fixed(low[i], 5), fixed(high[i], 5)])),
  };
}

function barriersPlot() {
  const traces = [], body = [];
  let highest = 0;
  ["chord", "mean"].forEach((form, y) => {
    const value = ofWhole(`barrier_${form}`), repeat = ofWhole(`barrier_${form}_repeat`).mean;
    if (!value.n) return;
    const ends = value.n === 1 ? ["low", "high"].map(end => ofWhole(`barrier_${form}_${end}`).mean) : [value.low, value.high];
    traces.push({
      type: "scatter", mode: "markers", x: [value.mean], y: [y], marker: {color: LINK, size: 11}, hovertext: `${shown(value, 5)} (${ends.map(end => fixed(end, 5)).join(" … ")})`, hoverinfo: "text",
      ...(ends.every(Number.isFinite) ? {error_x: {array: [ends[1] - value.mean], arrayminus: [value.mean - ends[0]], color: LINK, thickness: 2, width: 5}} : {}),
    });
    if (Number.isFinite(repeat)) traces.push({type: "scatter", mode: "markers", x: [repeat], y: [y], marker: {symbol: "line-ns", size: 20, line: {color: INK, width: 2.5}}, hovertext: `repeat level: ${fixed(repeat, 5)}`, hoverinfo: "text"});
    highest = Math.max(highest, ...[value.mean, ...ends, repeat].filter(Number.isFinite));
    body.push([`above the ${form}`, fixed(value.mean, 5), ...ends.map(end => fixed(end, 5)), fixed(repeat, 5)]);
  });
  const bar = average() ? "from the smallest to the largest pair" : "95% interval over sequences; an interval that just excludes 0 does not prove a barrier";
  return {
    data: traces, layout: axes("barrier (nats per token)", "", 200, {yaxis: {tickvals: [0, 1], ticktext: ["above the chord", "above the mean"], range: [1.6, -0.6], showgrid: false, ticks: ""}, xaxis: {...(highest < 0.01 ? {range: [-0.0005, 0.0105]} : {rangemode: "tozero"}), nticks: 5}}),
    caption: body.length ? `Horizontal bar: ${bar}. Vertical tick: the repeat level, which two runs of the same loss would show.` : "Not measured for this pair.", table: numbers(["barrier", "value", "low", "high", "repeat"], body),
  };
}
