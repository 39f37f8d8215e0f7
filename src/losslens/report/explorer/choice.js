// The current choice (two runs or two methods, a layer, a projection and a measure) and its numbers.
let data, head;
const state = {kind: "runs", a: 0, b: 1, layer: 0, projection: 0, measure: "cosine"};
const arms = () => state.kind === "arms";
const things = () => arms() ? head.arms : head.runs;
const runsOf = which => arms() ? head.arms[which].runs : [which];
const symmetric = (a, b) => `${Math.min(a, b)},${Math.max(a, b)}`;

// The pairs of runs that are averaged.
function pairs() {
  return (arms() ? armPairs : runPairs).get(symmetric(state.a, state.b)) ?? [];
}
// The row of arm_pairs.csv for the two arms chosen, or for two runs that are the only ones of their arms; -1 if none.
function armPair() {
  const armOf = run => head.arms.findIndex(({runs}) => runs.length === 1 && runs[0] === run);
  const [a, b] = arms() ? [state.a, state.b] : [armOf(state.a), armOf(state.b)];
  const row = a === b && !arms() ? undefined : armRows.get(symmetric(a, b));
  return row === undefined ? {row: -1} : {row, turned: head.between[row][0] !== a};
}
let armPairs, armRows, runPairs, keptRows, angledRows, moduleAt;

function spread(values) {
  const known = values.filter(Number.isFinite);
  if (!known.length) return {n: 0, mean: NaN, std: NaN, low: NaN, high: NaN};
  const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
  const squares = known.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const std = known.length > 1 ? Math.sqrt(squares / (known.length - 1)) : NaN;
  return {n: known.length, mean, std, low: Math.min(...known), high: Math.max(...known)};
}

const mean = values => spread(values).mean;
const ofModule = (name, layer, projection) => {
  const module = moduleAt[layer]?.[projection];
  return spread(pairs().map(pair => data.at(`modules.${name}`, keptRows.get(pair), module)));
};
const ofLayer = (name, layer) => spread(pairs().map(pair => data.at(`layers.${name}`, keptRows.get(pair), layer)));
const ofWhole = name => spread(pairs().map(pair => data.at(`pairs.${name}`, pair)));
const ofRun = (name, which, module) => spread(runsOf(which).map(run => module === undefined ? data.at(`runs.${name}`, run) : data.at(`run_modules.${name}`, run, module)));

// `0.951`, or `0.95 ± 0.02`: the averaged values were rounded, so their mean has a digit less.
function shown({n, mean, std}, digits, unit = "") {
  if (!n) return "–";
  return n === 1 ? fixed(mean, digits) + unit : `${fixed(mean, digits - 1)}${unit} ± ${fixed(std, digits - 1)}${unit}`;
}

function sized({n, mean, std}) {
  return n > 1 ? `${precise(mean, 3)} ± ${precise(std, 2)}` : precise(mean);
}
const label = which => things()[which].label;
const here = () => `layer ${head.layers[state.layer]}, ${head.projections[state.projection]}`;

const turned = pair => !runsOf(state.a).includes(head.pairs[pair][0]);
const average = () => pairs().length > 1;
