// What is known of a pair, and of a run.

// Name, digits after the point, unit; the module's value; the columns of the layer and of the whole, and of what
// it is judged by: `_null`, and what two that are one loss would show, the `_ceiling` of a cosine, the `_repeat` of others.
const angle = (end, side) => (row, module) => data.at("modules.ends", row, module, side, end);
const column = name => (row, module) => data.at(`modules.${name}`, row, module);
const share = cosine => Math.sqrt(1 - cosine * cosine);
const MEASURES = {
  cosine: {name: "cosine", digits: 4, module: column("cosine"), layer: "cosine", whole: "cosine", judged: "cosine", level: "ceiling", signed: true},
  orthogonal: {name: "orthogonal share", digits: 4, module: column("orthogonal_a_to_b"), layer: "orthogonal_a_to_b", whole: "orthogonal_a_to_b", judged: "cosine", level: "ceiling", of: share},
  left: {name: "smallest angle, left", digits: 2, unit: "°", module: angle(0, 0), layer: "angle_min_left", whole: "angle_min_left", judged: "angle_min_left"},
  right: {name: "smallest angle, right", digits: 2, unit: "°", module: angle(0, 1), whole: "angle_min_right", judged: "angle_min_right"},
  left_largest: {name: "largest angle, left", digits: 2, unit: "°", module: angle(1, 0), whole: "angle_max_left", judged: "angle_max_left"},
  right_largest: {name: "largest angle, right", digits: 2, unit: "°", module: angle(1, 1), whole: "angle_max_right", judged: "angle_max_right"},
  u1: {name: "agreement of u₁", digits: 4, module: column("u1"), whole: "u1", judged: "u1"},
  v1: {name: "agreement of v₁", digits: 4, module: column("v1"), whole: "v1", judged: "v1"},
};

// What the ends of a measure's colours stand for. They are the same for every choice, so that two pictures can be compared:
// of cosines and angles all that there can be, of the others what is the most in any pair on this page.
function scaleOf(measure) {
  if (measure.signed) return {from: -1, to: 1, said: "Colours: −1 to 1, whatever is chosen."};
  if (measure.unit === "°") return {from: 0, to: 90, said: "Colours: 0° to 90°, whatever is chosen."};
  if (measure.most === undefined) {
    measure.most = 0;
    for (let row = 0; row < head.held.length; row++) {
      for (let module = 0; module < head.modules.length; module++) {
        const value = measure.module(row, module);
        if (value > measure.most) measure.most = value;
      }
    }
  }
  return {from: 0, to: measure.most || 1, said: `Colours: 0 to ${fixed(measure.most, measure.digits)}, the most in any pair.`};
}

const SIZES = {
  norm: "‖ΔW‖", relative_norm: "of ‖W0‖", effective_rank: "effective rank", stable_rank: "stable rank",
  drift_min: "smallest drift of A (°)", drift_max: "largest drift of A (°)", off_principal: "off-principal share",
};
