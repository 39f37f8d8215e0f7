// The choice is kept in the address, so that a link or a reload shows the same; by names, which are more stable than indices.
const LINK_BEGINS = "#explore?";
const nameOf = thing => thing.name ?? thing.label;

// The address is written once the choice has settled: browsers limit how often it may be rewritten.
let writing;
function remember() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const chosen = {
      of: state.kind, first: nameOf(things()[state.a]), second: nameOf(things()[state.b]), layer: head.layers[state.layer],
      projection: head.projections[state.projection], measure: state.measure,
    };
    history.replaceState(null, "", LINK_BEGINS + new URLSearchParams(chosen));
  }, 300);
}

// Takes the choice from the address, ignoring what is not in this analysis. Returns true if the address has a choice.
function recall() {
  if (!location.hash.startsWith(LINK_BEGINS)) return false;
  const chosen = new URLSearchParams(location.hash.slice(LINK_BEGINS.length));
  const kind = chosen.get("of"), known = {arms: head.start.arms ? head.arms : [], runs: head.runs}[kind] ?? [];
  const [a, b] = ["first", "second"].map(which => known.findIndex(thing => nameOf(thing) === chosen.get(which)));
  const compared = (kind === "arms" ? armPairs : runPairs).has(symmetric(a, b));
  if (compared) Object.assign(state, {kind, a, b});
  const place = (name, values) => {
    const index = values.map(String).indexOf(chosen.get(name));
    if (index >= 0) state[name] = index;
  };
  place("layer", head.layers);
  place("projection", head.projections);
  if (Object.hasOwn(MEASURES, chosen.get("measure"))) state.measure = chosen.get("measure");
  return true;
}
