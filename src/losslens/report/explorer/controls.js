// The controls: every number and plot follows from what is chosen here.

// The plots, the data they need, and whether only the choice of runs or methods changes them (`still`).
const PLOTS = {
  modules: {make: modulesPlot, needs: () => data.any("modules.cosine")},
  depth: {make: depthPlot, needs: () => data.any("modules.cosine")},
  angles: {make: anglesPlot, needs: () => data.any("modules.angles")},
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
  if (details.open) {
    rows(details.querySelector("table"), table.heading, table.body);
    details.querySelector("a").href = `data:text/csv;charset=utf-8,${encodeURIComponent(csv(table))}`;
  }
  return {data: traces, layout};
}

let waiting = false;
// `still`: only the layer, the projection or the measure changed.
let moved = false;

function changed(still = false) {
  remember();
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

// A run is not compared with itself; an arm is, by its repeats.
const alone = value => !(arms() && armPairs.has(symmetric(value, value)));

function choose(which, value) {
  const other = which === "a" ? "b" : "a";
  if (value === state[other] && alone(value)) state[other] = state[which];
  state[which] = value;
  marked();
  changed();
}

// Shows the choice in both lists; in each, the other's entry is disabled so that the keyboard skips it.
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

// Sets all controls to the current choice.
function showChoice() {
  for (const radio of $("kind").querySelectorAll("input")) radio.checked = radio.value === state.kind;
  list();
  $("layer").value = state.layer;
  $("projection").querySelectorAll("input")[state.projection].checked = true;
  $("measure").value = state.measure;
}

function controls() {
  for (const which of ["a", "b"]) $(which).addEventListener("change", event => choose(which, Number(event.target.value)));
  $("swap").addEventListener("click", () => {
    [state.a, state.b] = [state.b, state.a];
    marked();
    changed();
  });
  $("kind").hidden = !head.start.arms;
  for (const radio of $("kind").querySelectorAll("input")) {
    radio.addEventListener("change", () => {
      state.kind = radio.value;
      [state.a, state.b] = head.start[state.kind];
      list();
      changed();
    });
  }
  const layer = $("layer");
  Object.assign(layer, {min: 0, max: Math.max(0, head.layers.length - 1)});
  layer.addEventListener("input", () => {
    state.layer = Number(layer.value);
    changed(true);
  });
  head.projections.forEach((name, projection) => {
    const made = element("label"), radio = element("input", "", {type: "radio", name: "x-projection", value: projection});
    radio.addEventListener("change", () => {
      state.projection = projection;
      changed(true);
    });
    made.append(radio, element("span", name));
    $("projection").append(made);
  });
  $("measure").replaceChildren(...head.measures.map(({name, label}) => element("option", label, {value: name})));
  $("measure").addEventListener("change", event => {
    state.measure = event.target.value;
    changed(true);
  });
  showChoice();
  addEventListener("hashchange", () => {
    if (!recall()) return;
    showChoice();
    changed();
  });
}

function at(layer, projection) {
  if (layer in head.layers) state.layer = layer;
  if (projection in head.projections) state.projection = projection;
  showChoice();
  changed(true);
}

function clicks() {
  const box = name => $(name).querySelector(".plot");
  const on = (name, act) => {
    // Plotly adds its event functions to a box when it first draws there.
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
  known();
  runPairs = new Map(head.pairs.map((ends, pair) => [symmetric(...ends), [pair]]));
  armPairs = new Map(head.between.map(([a, b, numbers]) => [symmetric(a, b), numbers]));
  armRows = new Map(head.between.map(([a, b], row) => [symmetric(a, b), row]));
  keptRows = new Map(head.kept.map((pair, row) => [pair, row]));
  angledRows = new Map(head.angled.map((pair, row) => [pair, row]));
  moduleAt = head.layers.map(() => []);
  head.at.forEach(([layer, projection], module) => moduleAt[layer][projection] = module);
  state.kind = head.start.arms ? "arms" : "runs";
  [state.a, state.b] = head.start[state.kind];
  state.layer = Math.floor((head.layers.length - 1) / 2);
  const linked = recall();
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
  // On a link, but not on a reload, which returns to the reader's scroll position.
  if (linked && performance.getEntriesByType("navigation")[0].type !== "reload") document.getElementById("explore").scrollIntoView({behavior: "instant"});
  // By the second frame the observer has reported what is on the screen.
  requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("explorer")));
}

explore();
