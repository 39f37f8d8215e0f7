// The registry of measures, as written into the page.

// The weight measures by name. Each has columns by module, by layer and over all modules; beside them are `_null` and, for
// what two runs of the same loss would show, `_ceiling` (similarities) or `_repeat` (others).
const MEASURES = {};
const SIGNED = measure => measure.bounds !== null && measure.bounds[0] < 0;

function known() {
  for (const measure of head.measures) MEASURES[measure.name] = measure;
}

// The values at the ends of a measure's colour scale. They are the same for every choice, so that two plots can be compared:
// the bounds of the measure, or 0 and the largest value of any pair on this page.
function scaleOf(measure) {
  if (measure.bounds) {
    const [from, to] = measure.bounds;
    return {from, to, text: `The colour scale is always ${signed(String(from))}${measure.unit} to ${to}${measure.unit}.`};
  }
  if (measure.most === undefined) {
    measure.most = 0;
    for (let row = 0; row < head.kept.length; row++) {
      for (let module = 0; module < head.modules.length; module++) {
        const value = data.at(`modules.${measure.name}`, row, module);
        if (value > measure.most) measure.most = value;
      }
    }
  }
  return {from: 0, to: measure.most || 1, text: `The colour scale is 0 to ${fixed(measure.most, measure.digits)}, the largest value of any pair.`};
}
