"""Views for the tests of measures, of which only what a test is about is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from losslens.measures.nulls import expected_angles
from losslens.measures.views import PairWeights, RunWeights


def pair_of(shapes: Sequence[tuple[int, int]], norms: Any = None, **given: Any) -> PairWeights:
    """One pair, by the shapes of its modules, and by the norms of both runs' modules, if they matter."""
    count = len(shapes)
    unknown: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("squared_a", "squared_b", "inner", "right_overlap", "u1", "v1", "widths", "inputs_met"), (1, count)
    )
    unknown |= {"gradients": (1, count, 4, 4), "gradient_overlap": (1, count)}
    unknown |= dict.fromkeys(("angles_left", "angles_right"), (1, count, 0))
    outputs, inputs = np.array(shapes, dtype=float).T
    known = {"same_a": np.array([np.nan]), **_arrays(given)}
    if norms is not None:
        known |= {
            f"squared_{side}": np.array([values], dtype=float) ** 2 for side, values in zip("ab", norms, strict=True)
        }
    return PairWeights(**{**_nan(unknown), "outputs": outputs, "inputs": inputs, "draw": expected_angles, **known})


# Of runs: axes after that of the modules.
_AXES = {"singular_values": (0,), "drift": (0,), "steps": (0,), "effects": (3, 4), "gradients": (4, 4)}


def run_of(shape: tuple[int, ...], outputs: Sequence[int], **given: Any) -> RunWeights:
    """Runs with these leading axes and modules, by the rows of ΔW of each module; the rest is unknown."""
    unknown: dict[str, tuple[int, ...]] = {
        field.name: (*shape, *_AXES.get(field.name, ())) for field in fields(RunWeights)
    }
    known = {name: np.array(values, dtype=float) for name, values in given.items()}
    return RunWeights(**{**_nan(unknown), "outputs": np.array(outputs, dtype=float), **known})


def _arrays(given: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array([values], dtype=float) for name, values in given.items()}


def _nan(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: np.full(shape, np.nan) for name, shape in shapes.items()}
