"""An update while it grows: its size and shape, where it heads, and how near others it is, as cheap as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from losslens.geometry.comparison import RunGeometry, drift, padded
from losslens.geometry.measures import cosine
from losslens.geometry.subspaces import principal_angles
from losslens.geometry.tables import layer_of, median, run_measures
from losslens.updates.base import Array, Update, Updates

Point = Mapping[str, Update]


class LiveGeometry:
    """Measures one run's update again and again. What does not change is worked out once.

    The numbers are those of `runs.csv`, `pairs.csv` and `layers.csv` (docs/measures.md) at that moment; what has no
    direction (an update of 0) or no predecessor is left out. Of LoRA no product as large as ΔW is made.

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
            By name: `norm`, `norm/layer_<i>` (−1 outside the layers), `norm/<projection>`, `effective_rank`,
            `stable_rank`, `drift_min` and `drift_max` (degrees), `cosine_to_previous` (of ΔW to the ΔW measured
            before), `cosine_of_steps` (of what was added since then to what was added before that), and of each
            reference `cosine_to_<label>`, `angle_min_left_to_<label>`, `angle_min_right_to_<label>` (degrees).
        """
        values, drifts = [], []
        angles: dict[str, list[tuple[float, float]]] = {label: [] for label in self._references}
        # The factors are too thin for one product to fill several cores.
        with threadpool_limits(1, "blas"):
            for module in self.modules:
                svd = now[module].svd(self.top)
                values.append(svd.values)
                drifts.append(drift(self._start[module], now[module]))
                for label, reference in self._references.items():
                    left, right = reference.left[module], reference.right[module]
                    if svd.values.size and left.size:
                        angles[label].append(
                            (principal_angles(svd.left, left)[0], principal_angles(svd.right, right)[0])
                        )
            numbers = run_measures(RunGeometry(padded(values), padded(drifts)))
            numbers |= self._parts(values)
            numbers |= self._course(now)
            for label, reference in self._references.items():
                with_it = sum(now[module].inner(reference.updates[module]) for module in self.modules)
                numbers[f"cosine_to_{label}"] = cosine(with_it, numbers["norm"], reference.norm)
                for side, name in enumerate(("left", "right")):
                    numbers[f"angle_min_{name}_to_{label}"] = float(
                        np.degrees(median([pair[side] for pair in angles[label]]))
                    )
        self.before = [now, *self.before[:1]]
        return {name: value for name, value in numbers.items() if np.isfinite(value)}

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
        numbers = {"cosine_to_previous": cosine(rq, rr**0.5, qq**0.5)}
        if len(self.before) > 1:
            p = self.before[1]
            rp, qp, pp = self._inner(now, p), self._inner(q, p), self._inner(p, p)
            # Rounding can leave a tiny negative square of a step that went nowhere.
            step, last = max(rr - 2 * rq + qq, 0.0) ** 0.5, max(qq - 2 * qp + pp, 0.0) ** 0.5
            numbers["cosine_of_steps"] = cosine(rq - rp - qq + qp, step, last)
        return numbers

    def _inner(self, first: Point, second: Point) -> float:
        return sum(first[module].inner(second[module]) for module in self.modules)


class _Reference:
    """An adapter to compare with, its subspaces worked out."""

    def __init__(self, updates: Updates, modules: Sequence[str], top: int) -> None:
        self.updates = {module: updates[module] for module in modules}
        svds = {module: update.svd(top) for module, update in self.updates.items()}
        self.left = {module: svd.left for module, svd in svds.items()}
        self.right = {module: svd.right for module, svd in svds.items()}
        self.norm = float(np.sqrt(sum(np.sum(svd.values**2) for svd in svds.values())))
