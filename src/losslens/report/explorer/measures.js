// What is known of a pair, and of a run: the registry of measures, as the page was told of it.

// Of the weights, by the name of its columns: that of the module, of the layer and of the whole, and beside each `_null`,
// and what two that are one loss would show, the `_ceiling` of similarities, the `_repeat` of others.
const MEASURES = {};
const SIGNED = measure => measure.bounds !== null && measure.bounds[0] < 0;

function known() {
  for (const measure of head.measures) MEASURES[measure.name] = measure;
}

// What the ends of a measure's colours stand for. They are the same for every choice, so that two pictures can be compared:
// of what is bounded all that there can be, of the others what is the most in any pair on this page.
function scaleOf(measure) {
  if (measure.bounds) {
    const [from, to] = measure.bounds;
    return {from, to, said: `Colours: ${signed(String(from))}${measure.unit} to ${to}${measure.unit}, whatever is chosen.`};
  }
  if (measure.most === undefined) {
    measure.most = 0;
    for (let row = 0; row < head.held.length; row++) {
      for (let module = 0; module < head.modules.length; module++) {
        const value = data.at(`modules.${measure.name}`, row, module);
        if (value > measure.most) measure.most = value;
      }
    }
  }
  return {from: 0, to: measure.most || 1, said: `Colours: 0 to ${fixed(measure.most, measure.digits)}, the most in any pair.`};
}
