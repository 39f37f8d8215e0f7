"""The map: every update a point of a plane, near to those whose direction is nearly its own."""

from __future__ import annotations

import numpy as np
import pandas as pd

from losslens.geometry.plane import angles, plane


def map_table(pairs: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """One row a run that has a direction, and the share of the variance that the plane shows.

    Args:
        pairs: One row a pair of runs, with their cosine; empty where a run has no direction.
    """
    known = pairs[pairs["cosine"].notna()]
    names = list(dict.fromkeys([*known["run_a"], *known["run_b"]]))
    number = {name: place for place, name in enumerate(names)}
    cosines = np.eye(len(names))
    a, b = known["run_a"].map(number).to_numpy(dtype=int), known["run_b"].map(number).to_numpy(dtype=int)
    cosines[a, b] = cosines[b, a] = known["cosine"].to_numpy(dtype=float)
    if not names:
        return pd.DataFrame(columns=["run", "x", "y"]), float("nan")
    found = plane(angles(cosines))
    return pd.DataFrame({"run": names, "x": found.points[:, 0], "y": found.points[:, 1]}), found.kept
