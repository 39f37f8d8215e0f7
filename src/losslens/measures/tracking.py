"""Measures a growing update during training, cheaply: size, ranks, drift and similarity to reference adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from losslens.measures import run_weight_measures, weight_measures
from losslens.measures.comparison import PairGeometry, RunGeometry, drift, padded
from losslens.measures.subspaces import principal_angles
from losslens.measures.tables import ComparedWeights, layer_of, pair_weights, run_weights
from losslens.updates.base import Array, ThinSvd, Update, Updates, pair_products

Point = Mapping[str, Update]


class WeightTracker:
    """Measures the update of one run repeatedly; constant quantities are computed once.

    The numbers are those of `runs.csv`, `pairs.csv` and `layers.csv` (docs/reference/measures.md) at that step; those
    that need a direction are left out for a zero update, those that need a previous measurement are left out at first.
    For LoRA no product as large as ΔW is computed.

    Args:
        initial: The adapter that the run started from.
        references: Adapters to compare with, by the label used in the names of the numbers.
        modules: Names of the modules, the same for all adapters.
        top: Number of leading singular directions whose subspaces are compared.
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
        #: The two points measured last, the latest first.
        self.before: list[Point] = []

    def measure(self, now: Point) -> dict[str, float]:
        """Measures the update `now` and keeps it for comparison with the next one.

        Args:
            now: ΔW of each module.

        Returns:
            Numbers by name: the measures of a run; `norm/layer_<i>` (−1 outside the layers), `norm/<projection>`;
            `cosine_to_previous` (of ΔW to the previously measured ΔW), `cosine_of_steps` (of the last change of ΔW to
            the change before it); for each reference `<measure>_to_<label>`, the main measures of two runs.
        """
        svds, drifts = {}, []
        # The factors are too thin for one product to use several cores.
        with threadpool_limits(1, "blas"):
            for module in self.modules:
                svds[module] = now[module].svd(self.top)
                drifts.append(drift(self._start[module], now[module]))
            pairs = {label: self._compare(now, svds, reference) for label, reference in self._references.items()}
        values = [svd.values for svd in svds.values()]
        compared = ComparedWeights(
            modules=self.modules,
            shapes=[now[module].shape for module in self.modules],
            runs={"": RunGeometry(padded(values), padded(drifts))}
            | {label: reference.geometry for label, reference in self._references.items()},
            pairs={("", label): pair for label, pair in pairs.items()},
            top=self.top,
        )
        runs, both = run_weights(compared), pair_weights(compared)
        numbers = {measure.name: float(measure.value(runs)[0]) for measure in run_weight_measures() if measure.logged}
        numbers |= self._norms_by_part(values)
        numbers |= self._cosines_of_steps(now)
        for measure in weight_measures("main"):
            numbers |= {
                f"{measure.name}_to_{label}": float(value)
                for label, value in zip(pairs, measure.value(both), strict=True)
            }
        self.before = [now, *self.before[:1]]
        return {name: value for name, value in numbers.items() if np.isfinite(value)}

    def _compare(self, now: Point, svds: Mapping[str, ThinSvd], reference: _Reference) -> PairGeometry:
        """Compares the update with a reference by the rules of `measures.comparison.compare`."""
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

    def _norms_by_part(self, values: Sequence[Array]) -> dict[str, float]:
        """Computes ‖ΔW‖_F of each layer and of each projection."""
        squared: dict[str, float] = {}
        names = [[f"layer_{layer}" for layer in self._layers], self._projections]
        for part in names:
            for name, singular in zip(part, values, strict=True):
                squared[name] = squared.get(name, 0.0) + float(np.sum(singular**2))
        return {f"norm/{name}": value**0.5 for name, value in squared.items()}

    def _cosines_of_steps(self, now: Point) -> dict[str, float]:
        """Compares `now` (r) with the last two points (p, q); ⟨r − q, q − p⟩ comes from inner products alone."""
        if not self.before:
            return {}
        q = self.before[0]
        rr, rq, qq = self._inner(now, now), self._inner(now, q), self._inner(q, q)
        numbers = {"cosine_to_previous": _cosine(rq, rr**0.5, qq**0.5)}
        if len(self.before) > 1:
            p = self.before[1]
            rp, qp, pp = self._inner(now, p), self._inner(q, p), self._inner(p, p)
            # Rounding can make the square of a zero step slightly negative.
            step, last = max(rr - 2 * rq + qq, 0.0) ** 0.5, max(qq - 2 * qp + pp, 0.0) ** 0.5
            numbers["cosine_of_steps"] = _cosine(rq - rp - qq + qp, step, last)
        return numbers

    def _inner(self, first: Point, second: Point) -> float:
        return sum(first[module].inner(second[module]) for module in self.modules)


def _cosine(inner: float, norm: float, other_norm: float) -> float:
    return inner / (norm * other_norm) if norm > 0 and other_norm > 0 else float("nan")


class _Reference:
    """A reference adapter with precomputed subspaces."""

    def __init__(self, updates: Updates, modules: Sequence[str], top: int) -> None:
        self.updates = {module: updates[module] for module in modules}
        self.svds = {module: update.svd(top) for module, update in self.updates.items()}
        values = padded([svd.values for svd in self.svds.values()])
        self.geometry = RunGeometry(values, np.zeros((len(values), 0)))
