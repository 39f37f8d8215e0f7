"""The geometry that others report of updates, raw and beside that of copies and of noise, from dense matrices.

It works on whole models as on adapters, and shares no code with `losslens.measures.rotated`, whose ratios it checks.
Modules count together: each measure is of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ortho_group

Array = NDArray[np.float64]

# Directions of W0 that are compared; relative change below which bf16 tells no difference (2511.08567); the share of
# smallest weights of W0, and of largest changes, that may overlap (2606.07082); cosine below which a direction of
# W0 + ΔW is an intruder (2410.21228).
TOP = 10
UNCHANGED = 1e-3
SMALLEST = 0.3
INTRUDER = 0.5

MEASURES = ("unchanged", "spectral_shift", "rotation", "small_overlap", "intruders")
# Powers of the sums over modules that make a measure of the size of the update's first power.
_ROOTS = {"unchanged": 1.0, "spectral_shift": 0.5, "rotation": 0.5, "small_overlap": 1.0, "intruders": 1.0}


def geometry(
    updates: Iterator[tuple[str, Array]], weight_of: Callable[[str, tuple[int, int]], Array], copies: int
) -> dict[str, Array]:
    """Measures every run against W0.

    Args:
        updates: Each module with ΔW of every run, shape (N, out, in).
        weight_of: Returns W0 of a module of this shape.
        copies: Number of left-rotated copies, Q·ΔW with Q a random orthogonal matrix, and of Gaussian matrices that
            are scaled to the norm that the update has in each module; both are the same for all runs.

    Returns:
        For each of the `MEASURES` its value, shape (N,), and the mean over copies with `_copies` and over Gaussian
        matrices with `_noise` after its name; and `principal_left`, the share of the squared norm in W0's leading left
        directions, beside its chance k/out in `principal_left_chance`.
    """
    totals: dict[str, Array] = {}
    entries = 0
    inside, squared, chance = np.zeros((3, 1))
    for module, (name, changes) in enumerate(updates):
        weight = weight_of(name, changes.shape[1:])
        entries += weight.size
        left, values, _ = np.linalg.svd(weight, full_matrices=False)
        rng = np.random.default_rng(module)
        turns = [ortho_group.rvs(len(weight), random_state=rng) for _ in range(copies)]
        noise = rng.standard_normal((copies, *weight.shape))
        noise /= np.linalg.norm(noise, axis=(1, 2), keepdims=True)
        for number, change in enumerate(changes):
            kinds: dict[str, Sequence[Array]] = {
                "": [change],
                "_copies": [turn @ change for turn in turns],
                "_noise": list(np.linalg.norm(change) * noise),
            }
            for kind, matrices in kinds.items():
                effects = [_effects(weight, matrix, left, values) for matrix in matrices]
                for measure in MEASURES:
                    mean = np.mean([effect[measure] for effect in effects]) if effects else np.nan
                    totals.setdefault(f"{measure}{kind}", np.zeros(len(changes)))[number] += mean
        size = np.sum(changes**2, axis=(1, 2))
        inside = inside + np.sum((left[:, :TOP].T @ changes) ** 2, axis=(1, 2))
        squared = squared + size
        chance = chance + size * TOP / len(weight)
    shares = {"unchanged": entries, "small_overlap": round(SMALLEST * entries)}
    found = {}
    for column, total in totals.items():
        measure = column.removesuffix("_copies").removesuffix("_noise")
        found[column] = (total / shares.get(measure, 1)) ** _ROOTS[measure]
    known = np.where(squared > 0, squared, np.nan)
    return found | {"principal_left": inside / known, "principal_left_chance": chance / known}


def _effects(weight: Array, change: Array, left: Array, values: Array) -> dict[str, float]:
    """Computes the effects of one update of one module, which may be summed over modules.

    `unchanged`: number of entries that hardly change. `spectral_shift`: Σ(σ(W0 + ΔW) − σ(W0))² over the leading
    values. `rotation`: Σθ² in degrees² between leading left subspaces. `small_overlap`: number of entries among both
    the smallest of W0 and the largest of ΔW. `intruders`: number of leading left directions of W0 + ΔW whose cosine
    with every one of W0 is small.
    """
    after = weight + change
    new_left, new_values, _ = np.linalg.svd(after, full_matrices=False)
    cosines = np.linalg.svd(left[:, :TOP].T @ new_left[:, :TOP], compute_uv=False)
    same = np.abs(change) <= UNCHANGED * np.maximum(np.abs(weight), np.abs(after))
    count = round(SMALLEST * weight.size)
    smallest = np.argpartition(np.abs(weight), count - 1, axis=None)[:count]
    largest = np.argpartition(-np.abs(change), count - 1, axis=None)[:count]
    closest = np.abs(left.T @ new_left[:, :TOP]).max(axis=0)
    return {
        "unchanged": float(same.sum()),
        "spectral_shift": float(np.sum((new_values[:TOP] - values[:TOP]) ** 2)),
        "rotation": float(np.sum(np.degrees(np.arccos(np.clip(cosines, -1, 1))) ** 2)),
        "small_overlap": float(np.intersect1d(smallest, largest, assume_unique=True).size),
        "intruders": float(np.sum(closest < INTRUDER)),
    }
