"""From made-up runs and pairs of runs the tables that an analysis makes of them, by its own functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from losslens.analysis.arm_accuracy import COLUMNS
from losslens.analysis.repeats import MEASURES, arm_pairs, pairing, with_levels


def arm_tables(
    runs: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], accuracies: Sequence[dict[str, Any]] = ()
) -> dict[str, pd.DataFrame]:
    """`pairs.csv` with arms, pairings and levels, and `arm_pairs.csv`.

    Args:
        runs: Rows of `runs.csv`; runs with one `init_seed` share their initial adapter, those without seeds are made
            elsewhere.
        pairs: `run_a`, `run_b` and measures of each pair.
        accuracies: What is known of the accuracies of two arms.
    """
    by_name = {run["run"]: run for run in runs if run.get("method") != "base"}
    rows = []
    for pair in pairs:
        a, b = (by_name[pair[run]] for run in ("run_a", "run_b"))
        seeds = [(run["seed"], run["init_seed"]) if "seed" in run else None for run in (a, b)]
        same_init = seeds[0][1] == seeds[1][1] if seeds[0] and seeds[1] else None
        rows.append({**pair, "arm_a": a["arm"], "arm_b": b["arm"], "pairing": pairing(seeds[0], seeds[1], same_init)})
    table = pd.DataFrame(rows, columns=None if rows else ["run_a", "run_b", "arm_a", "arm_b", "pairing"])
    table = table.reindex(columns=[*table, *(measure for measure in MEASURES if measure not in table)])
    arms = list(dict.fromkeys(run["arm"] for run in by_name.values()))
    found = arm_pairs(table, {name: run.get("seed", float("nan")) for name, run in by_name.items()}, arms)
    tested = pd.DataFrame(accuracies, columns=list(COLUMNS))
    return {"pairs": with_levels(table, MEASURES), "arm_pairs": found.merge(tested, on=["arm_a", "arm_b"], how="outer")}
