"""An update while it grows: its size and shape, where it heads, and how near others it is, as cheap as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from losslens.measures import run_measures, weight_measures
from losslens.measures.comparison import PairGeometry, RunGeometry, drift, padded
from losslens.measures.subspaces import principal_angles
from losslens.measures.tables import Compared, layer_of, pair_weights, run_weights
from losslens.updates.base import Array, ThinSvd, Update, Updates, pair_products

Point = Mapping[str, Update]


class WeightTracker:
    """Measures one run's update again and again. What does not change is worked out once.

    The numbers are those of `runs.csv`, `pairs.csv` and `layers.csv` (docs/reference/measures.md) at that moment; what
    has no direction (an update of 0) or no predecessor is left out. Of LoRA no product as large as ΔW is made.

    Args:
        initial: The adapter that the run started from.
        references: Adapters to compare with, by the label in the numbers' names.
        modules: Names of the modules, the same for all.
        top: Leading singular directions whose subspaces are compared.
    """

    def __init__(
        self, initial: Updates, references: Mapping[str, Updates], modules: Sequence[str], top: int = 10
    ) -> None:
        self.modules = list(modules)
        self.top = top
        self._layers = [layer_of(module) for module in modules]
        self._projections = [module.rpartition(".")[2] for module in modules]
        self._start = {module: initial[module].input_space() for module in modules}
        self._references = {label: _Reference(updates, self.modules, top) for label, updates in references.items()}
        #: The two points measured last, the latest one first.
        self.before: list[Point] = []

    def measure(self, now: Point) -> dict[str, float]:
        """The numbers of the update `now`, which is the predecessor of the next one.

        Args:
            now: ΔW of each module.

        Returns:
            By name: the measures of a run; `norm/layer_<i>` (−1 outside the layers), `norm/<projection>`;
            `cosine_to_previous` (of ΔW to the ΔW measured before), `cosine_of_steps` (of what was added since then to
            what was added before that); of each reference `<measure>_to_<label>`, the main measures of two runs.
        """
        svds, drifts = {}, []
        # The factors are too thin for one product to fill several cores.
        with threadpool_limits(1, "blas"):
            for module in self.modules:
                svds[module] = now[module].svd(self.top)
                drifts.append(drift(self._start[module], now[module]))
            pairs = {label: self._beside(now, svds, reference) for label, reference in self._references.items()}
        values = [svd.values for svd in svds.values()]
        compared = Compared(
            modules=self.modules,
            shapes=[now[module].shape for module in self.modules],
            runs={"": RunGeometry(padded(values), padded(drifts))}
            | {label: reference.geometry for label, reference in self._references.items()},
            pairs={("", label): pair for label, pair in pairs.items()},
            top=self.top,
        )
        runs, both = run_weights(compared), pair_weights(compared)
        numbers = {measure.name: float(measure.value(runs)[0]) for measure in run_measures() if not measure.needs_base}
        numbers |= self._parts(values)
        numbers |= self._course(now)
        for measure in weight_measures("main"):
            numbers |= {
                f"{measure.name}_to_{label}": float(value)
                for label, value in zip(pairs, measure.value(both), strict=True)
            }
        self.before = [now, *self.before[:1]]
        return {name: value for name, value in numbers.items() if np.isfinite(value)}

    def _beside(self, now: Point, svds: Mapping[str, ThinSvd], reference: _Reference) -> PairGeometry:
        """The update beside a reference, by the same rules as `geometry.comparison.compare`."""
        products = [pair_products([now[module], reference.updates[module]], 1) for module in self.modules]
        inner, right_overlap = np.concatenate(products, axis=1)
        angles: list[tuple[Array, Array]] = []
        first = np.full((2, len(self.modules)), np.nan)
        for m, module in enumerate(self.modules):
            ours, theirs = svds[module], reference.svds[module]
            k = min(ours.left.shape[1], theirs.left.shape[1])
            sides = [(ours.left[:, :k], theirs.left[:, :k]), (ours.right[:, :k], theirs.right[:, :k])]
            left, right = (principal_angles(*side) for side in sides)
            angles.append((left, right))
            if k:
                first[:, m] = [abs(a[:, 0] @ b[:, 0]) for a, b in sides]
        lefts, rights = (padded([pair[side] for pair in angles]) for side in (0, 1))
        return PairGeometry(inner, right_overlap, lefts, rights, *first)

    def _parts(self, values: Sequence[Array]) -> dict[str, float]:
        """‖ΔW‖_F of each layer and of each projection."""
        squared: dict[str, float] = {}
        names = [[f"layer_{layer}" for layer in self._layers], self._projections]
        for part in names:
            for name, singular in zip(part, values, strict=True):
                squared[name] = squared.get(name, 0.0) + float(np.sum(singular**2))
        return {f"norm/{name}": value**0.5 for name, value in squared.items()}

    def _course(self, now: Point) -> dict[str, float]:
        """Against the two points before: with p, q, r the points, ⟨r − q, q − p⟩ from inner products alone."""
        if not self.before:
            return {}
        q = self.before[0]
        rr, rq, qq = self._inner(now, now), self._inner(now, q), self._inner(q, q)
        numbers = {"cosine_to_previous": _cosine(rq, rr**0.5, qq**0.5)}
        if len(self.before) > 1:
            p = self.before[1]
            rp, qp, pp = self._inner(now, p), self._inner(q, p), self._inner(p, p)
            # Rounding can leave a tiny negative square of a step that went nowhere.
            step, last = max(rr - 2 * rq + qq, 0.0) ** 0.5, max(qq - 2 * qp + pp, 0.0) ** 0.5
            numbers["cosine_of_steps"] = _cosine(rq - rp - qq + qp, step, last)
        return numbers

    def _inner(self, first: Point, second: Point) -> float:
        return sum(first[module].inner(second[module]) for module in self.modules)


def _cosine(inner: float, norm: float, other_norm: float) -> float:
    return inner / (norm * other_norm) if norm > 0 and other_norm > 0 else float("nan")


class _Reference:
    """An adapter to compare with, its subspaces worked out."""

    def __init__(self, updates: Updates, modules: Sequence[str], top: int) -> None:
        self.updates = {module: updates[module] for module in modules}
        self.svds = {module: update.svd(top) for module, update in self.updates.items()}
        values = padded([svd.values for svd in self.svds.values()])
        self.geometry = RunGeometry(values, np.zeros((len(values), 0)))
