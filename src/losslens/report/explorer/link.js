// What is chosen stands in the address, so that a link or a reload shows the same; names are kept, which outlast numbers.
const LINK_BEGINS = "#explore?";
const nameOf = thing => thing.name ?? thing.label;

// The address is written when the choice rests: browsers refuse to have it rewritten many times a second.
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

// Takes the choice from the address; what is not in this analysis stays as it is. Whether there was one.
function recall() {
  if (!location.hash.startsWith(LINK_BEGINS)) return false;
  const chosen = new URLSearchParams(location.hash.slice(LINK_BEGINS.length));
  const kind = chosen.get("of"), known = {arms: head.start.arms ? head.arms : [], runs: head.runs}[kind] ?? [];
  const [a, b] = ["first", "second"].map(which => known.findIndex(thing => nameOf(thing) === chosen.get(which)));
  const compared = (kind === "arms" ? armPairs : runPairs).has(symmetric(a, b));
  if (compared) Object.assign(state, {kind, a, b});
  const place = (name, values) => {
    const found = values.map(String).indexOf(chosen.get(name));
    if (found >= 0) state[name] = found;
  };
  place("layer", head.layers);
  place("projection", head.projections);
  if (Object.hasOwn(MEASURES, chosen.get("measure"))) state.measure = chosen.get("measure");
  return true;
}
