// The tables and tiles, and the announcements for screen readers.
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

// The null and the ceiling or repeat level of a measure.
function references(measure, at) {
  const values = {};
  for (const kind of ["null", measure.level]) {
    const name = `${measure.name}_${kind}`;
    values[kind] = at === "whole" ? ofWhole(name).mean
      : at === "layer" ? ofLayer(name, state.layer).mean
      : ofModule(name, state.layer, state.projection).mean;
  }
  return values;
}

function beside(measure, at) {
  const lines = Object.entries(references(measure, at)).filter(([, value]) => Number.isFinite(value))
    .map(([kind, value]) => `${kind} ${kind === "null" && SIGNED(measure) ? "±" : ""}${fixed(value, measure.digits)}`);
  return [...lines, ...(measure.name === "cosine" && at === "whole" ? verdict() : [])].join("\n");
}

// The ratio of the cosine over all modules to its ceiling, its interval, and the verdict.
function verdict() {
  const {row} = armPair();
  if (row < 0) return [];
  const [ratio, low, high] = ["relative", "low", "high"].map(end => data.at(`arms.cosine_${end}`, row));
  const interval = Number.isFinite(low) ? ` [${fixed(low, 2)}, ${fixed(high, 2)}]` : "";
  return [Number.isFinite(ratio) ? `ratio ${fixed(ratio, 2)}${interval}` : "", head.verdicts[row][0]].filter(Boolean);
}

function pairTable() {
  const body = head.measures.map(measure => {
    const {name, label, digits, unit} = measure;
    const cell = (value, at) => ({text: shown(value, digits, unit), below: beside(measure, at), key: `${name}-${at}`});
    return [
      label,
      cell(ofModule(name, state.layer, state.projection), "module"),
      cell(ofLayer(name, state.layer), "layer"),
      cell(ofWhole(name), "whole"),
    ];
  });
  rows($("pair"), ["", here(), `layer ${head.layers[state.layer]}`, "all modules"], body);
}

function sizesTable() {
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const body = [];
  for (const [name, title] of head.sizes) {
    const cells = [[state.a, module], [state.b, module], [state.a], [state.b]].map(([which, where], place) => ({
      text: sized(ofRun(name, which, where)), key: `${name}-${"abab"[place]}-${place < 2 ? "module" : "whole"}`,
    }));
    if (cells.some(cell => cell.text !== "–")) body.push([title, ...cells]);
  }
  rows($("sizes"), ["", `● ${here()}`, `◇ ${here()}`, "● all", "◇ all"], body);
}

function functionsTable() {
  const body = [];
  const interval = (name, digits) => {
    const [one] = pairs();
    const ends = [`${name}_low`, `${name}_high`].map(end => data.at(`pairs.${end}`, one));
    return pairs().length === 1 && ends.every(Number.isFinite) ? `95% ${ends.map(end => fixed(end, digits)).join(" … ")}` : "";
  };
  for (const {name, label, digits} of head.functions) {
    const value = ofWhole(name);
    const below = [interval(name, digits), level(name)];
    if (value.n) body.push([label, {text: shown(value, digits), below: below.filter(Boolean).join("\n"), key: `${name}-whole`}]);
  }
  const {row, turned: backwards} = armPair();
  const one = row < 0 && pairs().length === 1 ? pairs()[0] : -1;
  const [from, place, back] = row < 0 ? ["pairs", one, one >= 0 && turned(one)] : ["arms", row, backwards];
  const difference = data.at(`${from}.accuracy_diff`, place) * (back ? -100 : 100);
  if (Number.isFinite(difference)) {
    const facts = [];
    const [low, high] = ["diff_low", "diff_high"].map(name => data.at(`${from}.${name}`, place) * 100);
    if (Number.isFinite(low)) facts.push(`95% ${back ? `${fixed(-high, 1)} … ${fixed(-low, 1)}` : `${fixed(low, 1)} … ${fixed(high, 1)}`}`);
    const p = row < 0 ? NaN : data.at("arms.p_holm", row);
    if (Number.isFinite(p)) facts.push(`p (Holm) ${p < 0.001 ? "<0.001" : precise(p)}`);
    const result = row < 0 ? "of two runs; verdicts are given only on losses" : head.verdicts[row][1];
    facts.push({better: back ? "◇ better" : "● better", worse: back ? "● better" : "◇ better"}[result] ?? result);
    body.push(["accuracy, ● minus ◇", {text: `${fixed(difference, 2)} points`, below: facts.filter(Boolean).join("\n"), key: "accuracy_diff"}]);
  }
  const middle = spread(pairs().map(pair => data.at("pairs.accuracy_mid", pair) * 100));
  if (middle.n) {
    // Measured on fewer problems than elsewhere, so the endpoints' accuracies on the same problems are shown with it.
    const end = which => mean(pairs().map(pair => data.at(`pairs.accuracy_mid_${turned(pair) === (which === "a") ? "b" : "a"}`, pair) * 100));
    const ends = [["●", end("a")], ["◇", end("b")]].filter(([, value]) => Number.isFinite(value)).map(([mark, value]) => `${mark} ${fixed(value, 1)}%`);
    const count = Math.max(...pairs().map(pair => data.at("pairs.accuracy_mid_n", pair)).filter(Number.isFinite));
    const same = ends.length ? `${ends.join(", ")} on the same${count > 0 ? ` ${count}` : ""} problems` : "";
    body.push(["accuracy at the midpoint", {text: `${fixed(middle.mean, 1)}%`, below: same, key: "accuracy_mid"}]);
  }
  if (!body.length) body.push(["not measured for this pair", ""]);
  rows($("functions"), ["", "value"], body);
}

function sentence() {
  const many = pairs();
  const both = `● ${label(state.a)} and ◇ ${label(state.b)}`;
  if (!many.length) return `${both}: no pair of their runs was compared.`;
  if (!many.some(pair => keptRows.has(pair))) return `${both}: this page has no layers or modules of this pair; see the notes below.`;
  const of = arms() ? `, ${many.length === 1 ? "1 pair" : `mean ± standard deviation of ${many.length} pairs`} of runs` : "";
  const kinds = new Set(many.map(pair => head.pairings[pair]));
  const initial = kinds.size > 1 ? "" : {
    "same seeds": ", of the same seeds", "same init": ", of different seeds, from the same initial adapter",
    "same order": ", of the same seed, from different initial adapters", other: ", of different seeds, from different initial adapters",
  }[[...kinds][0]] ?? "";
  return `${both}${of}${initial}; ${here()}.`;
}

function tiles() {
  const entries = head.measures.filter(measure => measure.main).map(measure => {
    const {name, label, digits, unit} = measure;
    const around = beside(measure, "whole").replaceAll("\n", ", ");
    const own = beside(measure, "module").replaceAll("\n", ", "), whole = shown(ofWhole(name), digits, unit);
    return [label, shown(ofModule(name, state.layer, state.projection), digits, unit), [own, `all modules ${whole}`, around && `(${around})`]];
  });
  const module = moduleAt[state.layer]?.[state.projection] ?? -1;
  const [a, b] = [ofRun("norm", state.a, module), ofRun("norm", state.b, module)];
  entries.push(["‖ΔW‖ of ● and ◇", `${precise(a.mean)}, ${precise(b.mean)}`, ["all modules", `${precise(ofRun("norm", state.a).mean)}, ${precise(ofRun("norm", state.b).mean)}`]]);
  const {values} = ckaOfPair(), here = values[head.cka.states.indexOf(head.layers[state.layer])];
  if (here?.n) entries.push([`CKA after layer ${head.layers[state.layer]}`, shown(here, 5), []]);
  for (const {name, label, digits} of head.functions.filter(measure => measure.main)) {
    const value = ofWhole(name);
    if (value.n) entries.push([label, shown(value, digits), [level(name)]]);
  }
  return entries;
}

function level(name) {
  const measure = head.functions.find(entry => entry.name === name);
  return [measure.level, "null"].map(kind => [kind, ofWhole(`${name}_${kind}`).mean]).filter(([, value]) => Number.isFinite(value))
    .map(([kind, value]) => `${kind} ${kind === "null" && SIGNED(measure) ? "±" : ""}${fixed(value, measure.digits)}`).join(", ");
}

let announcing;

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
  // Screen readers announce the final choice only, not each step towards it.
  clearTimeout(announcing);
  announcing = setTimeout(() => {
    const values = tiles().slice(0, 3).map(([name, value]) => `${name} ${value}`).join("; ");
    $("announcement").textContent = `${sentence()} ${values}.`;
  }, 600);
}
