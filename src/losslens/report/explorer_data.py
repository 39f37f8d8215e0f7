"""The numbers that the explorer shows, packed for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from losslens.measures import PairMeasure, function_measures, pair_measures, run_weight_measures, weight_measures
from losslens.report.binary_pack import Packed
from losslens.report.explorer_index import Modules, Runs
from losslens.tables.analysis_folder import AnalysisFolder

_SHARE, _DEGREES, _FINE = 4, 2, 5
# Digits shown beyond those of the terminal.
_MORE = 1
# Columns of accuracies of pairs of runs.
_ACCURACIES = ("accuracy_mid", "accuracy_mid_a", "accuracy_mid_b", "accuracy_diff", "diff_low", "diff_high")


def _columns(measures: Iterable[PairMeasure]) -> dict[str, int]:
    """Returns the columns of each measure (value, null and level) and their numbers of digits."""
    return {
        f"{measure.name}{end}": measure.digits + _MORE
        for measure in measures
        for end in ("", *["_null"] * measure.has_null, f"_{measure.level}")
    }


def pair_columns() -> dict[str, int]:
    """Returns the columns of `pairs.csv` that are shown and their numbers of digits."""
    intervals = {
        f"{measure.name}_{end}": measure.digits + _MORE
        for measure in function_measures()
        if measure.interval is not None
        for end in ("low", "high")
    }
    return {**_columns(pair_measures()), **intervals, **dict.fromkeys(_ACCURACIES, _SHARE), "accuracy_mid_n": 0}


def _module_columns() -> dict[str, int]:
    shown = {measure.name: measure.digits + _MORE for measure in weight_measures()}
    # The nulls of other measures are nearly the same for all modules of one shape.
    return shown | {f"{m.name}_null": m.digits + _MORE for m in weight_measures() if m.bounds and m.bounds[0] < 0}


# Columns of pairs of arms, with their numbers of digits.
_ARM_COLUMNS = {
    **dict.fromkeys(("cosine_relative", "cosine_low", "cosine_high"), 2),
    **dict.fromkeys(("accuracy_diff", "diff_low", "diff_high"), _SHARE),
}
# Most numbers by layer and module, and most angles, that a page holds; beyond them it keeps the most important pairs.
_MOST_NUMBERS, _MOST_ANGLES = 3_000_000, 1_200_000


@dataclass(frozen=True)
class Pairs:
    """The pairs of runs.

    Attributes:
        table: One row per pair.
        ends: The numbers of the two runs of each pair.
    """

    table: pd.DataFrame
    ends: Sequence[tuple[int, int]]

    def numbers(self, runs: Runs, run_a: pd.Series, run_b: pd.Series) -> np.ndarray:
        """Returns the number of the pair in each row of another table; −1 for other pairs."""
        number = {name: place for place, name in enumerate(runs.names)}
        lookup = np.full((len(number) + 1, len(number) + 1), -1)
        for place, (a, b) in enumerate(self.ends):
            lookup[a, b] = lookup[b, a] = place
        first, second = (names.map(number).fillna(-1).to_numpy(dtype=int) for names in (run_a, run_b))
        numbers: np.ndarray = lookup[first, second]
        return numbers


def pack(analysis: AnalysisFolder, runs: Runs, modules: Modules, pairs: Pairs) -> tuple[Packed, list[str]]:
    """Packs all numbers, and returns them with notes on those that the page leaves out."""
    packed = Packed(
        {
            "runs": runs.facts, "arms": runs.arms, "pairs": pairs.ends, "pairings": pairs.table["pairing"].tolist(),
            "between": runs.between, "verdicts": runs.rows[["cosine_verdict", "accuracy_verdict"]].to_numpy().tolist(),
            "measures": [_entry(measure) for measure in weight_measures() if _is_known(measure, pairs)],
            "functions": [_entry(measure) for measure in function_measures()],
            "sizes": [
                [measure.name, f"{measure.label}{' (°)' * (measure.unit == '°')}"] for measure in run_weight_measures()
            ],
            "layers": modules.layers, "projections": modules.projections, "modules": modules.names, "at": modules.at,
        }
    )  # fmt: skip
    packed.significant("arms.p_holm", runs.rows["p_holm"].to_numpy(), digits=3)
    for name, digits in _ARM_COLUMNS.items():
        packed.fixed(f"arms.{name}", runs.rows[name].to_numpy(), digits)
    for name, digits in pair_columns().items():
        packed.fixed(f"pairs.{name}", pairs.table[name].to_numpy(), digits)
    order = _by_importance(pairs, runs.between)
    a_pair = len(modules.names) * len(_module_columns()) + len(modules.layers) * len(_columns(weight_measures("more")))
    kept = sorted(order[: max(1, _MOST_NUMBERS // max(1, a_pair))])
    _layers(packed, analysis, runs, modules, pairs, kept)
    angled = _modules(packed, analysis, runs, modules, pairs, kept, order)
    _runs(packed, analysis, runs, modules)
    _cka(packed, analysis, runs)
    _curves(packed, analysis, runs, pairs)
    _map(packed, analysis, runs, pairs)
    return packed, _omissions(len(pairs.ends), len(kept), angled)


def _is_known(measure: PairMeasure, pairs: Pairs) -> bool:
    """True unless a measure was not asked for; the main ones always are."""
    return measure in pair_measures("main") or bool(pairs.table[measure.name].notna().any())


def _entry(measure: PairMeasure) -> dict[str, Any]:
    """Returns the entry of a measure in the header of the page."""
    return {
        "name": measure.name, "label": f"{measure.label}{measure.in_unit}",
        "unit": measure.unit if measure.unit == "°" else "",
        "digits": measure.digits + _MORE, "level": measure.level, "bounds": measure.bounds,
        "main": measure in pair_measures("main"),
    }  # fmt: skip


def _by_importance(pairs: Pairs, between: Sequence[tuple[int, int, list[int]]]) -> list[int]:
    """Orders the pairs: first those over which arms are averaged, then those with the most measures."""
    averaged = {pair for *_, numbers in between for pair in numbers}
    measured = pairs.table[[measure.name for measure in function_measures()]].notna().sum(axis=1).tolist()
    return sorted(range(len(pairs.ends)), key=lambda pair: (pair not in averaged, -measured[pair]))


def _omissions(all_pairs: int, kept: int, angled: int) -> list[str]:
    notes = []
    if kept < all_pairs:
        notes.append(
            f"To keep the page small, it holds the layers and modules of {kept:,} of {all_pairs:,} pairs: those used "
            "in averages over seeds, and those with connectivity or CKA. layers.csv and modules.parquet have all pairs."
        )
    if angled < kept:
        notes.append(
            f"It holds all angles of {angled:,} of {all_pairs:,} pairs, and the smallest and the largest angle of the "
            "others; modules.parquet has all angles."
        )
    return notes


def _layers(
    packed: Packed, analysis: AnalysisFolder, runs: Runs, modules: Modules, pairs: Pairs, kept: Sequence[int]
) -> None:
    table = analysis.table("layers", ("run_a", "run_b"), ("layer", *_columns(weight_measures("more"))))
    row = _places(len(pairs.ends), kept)[pairs.numbers(runs, table["run_a"], table["run_b"])]
    layer = table["layer"].map({layer: place for place, layer in enumerate(modules.layers)}).fillna(-1).to_numpy(int)
    there = (row >= 0) & (layer >= 0)
    for name, digits in _columns(weight_measures("more")).items():
        values = np.full((len(kept), len(modules.layers)), np.nan)
        values[row[there], layer[there]] = table[name].to_numpy()[there]
        packed.fixed(f"layers.{name}", values, digits)


def _modules(
    packed: Packed,
    analysis: AnalysisFolder,
    runs: Runs,
    modules: Modules,
    pairs: Pairs,
    kept: Sequence[int],
    order: Sequence[int],
) -> int:
    """Packs the measures by module; returns the number of pairs packed with all angles."""
    sides = ("angles_left", "angles_right")
    table = analysis.parquet("modules", ["run_a", "run_b", "module", *_module_columns(), *sides])
    pair = pairs.numbers(runs, _texts(table, "run_a"), _texts(table, "run_b"))
    module = _texts(table, "module").map({name: m for m, name in enumerate(modules.names)}).fillna(-1).to_numpy(int)
    row = _places(len(pairs.ends), kept)[pair]
    there = (row >= 0) & (module >= 0)
    shape = (len(kept), len(modules.names))
    for name, digits in _module_columns().items():
        values = np.full(shape, np.nan)
        values[row[there], module[there]] = _numbers(table, name)[there]
        packed.fixed(f"modules.{name}", values, digits)
    angles = np.stack([_lists(table, side) for side in sides], axis=1) if table.num_rows else np.zeros((0, 2, 0))
    angled = sorted(set(order[: max(1, _MOST_ANGLES // max(1, len(modules.names) * 2 * angles.shape[2]))]) & set(kept))
    row = _places(len(pairs.ends), angled)[pair]
    there = (row >= 0) & (module >= 0)
    values = np.full((len(angled), len(modules.names), 2, angles.shape[2]), np.nan)
    values[row[there], module[there]] = angles[there]
    packed.fixed("modules.angles", values, _DEGREES)
    packed.add_header(kept=kept, angled=angled)
    return len(angled)


def _runs(packed: Packed, analysis: AnalysisFolder, runs: Runs, modules: Modules) -> None:
    sizes = [measure.name for measure in run_weight_measures()]
    whole = analysis.table("runs", ("run",), sizes).drop_duplicates("run").set_index("run").reindex(runs.names)
    table = analysis.parquet("run_modules", ["run", "module", *sizes, "singular_values"])
    run = _texts(table, "run").map({name: place for place, name in enumerate(runs.names)}).fillna(-1).to_numpy(int)
    module = _texts(table, "module").map({name: m for m, name in enumerate(modules.names)}).fillna(-1).to_numpy(int)
    there = (run >= 0) & (module >= 0)
    shape = (len(runs.names), len(modules.names))
    for name in sizes:
        values = np.full(shape, np.nan)
        values[run[there], module[there]] = _numbers(table, name)[there]
        packed.significant(f"runs.{name}", whole[name].to_numpy())
        packed.significant(f"run_modules.{name}", values)
    spectra = _lists(table, "singular_values")
    values = np.full((*shape, spectra.shape[1]), np.nan)
    values[run[there], module[there]] = spectra[there]
    packed.significant("run_modules.singular_values", values)


def _cka(packed: Packed, analysis: AnalysisFolder, runs: Runs) -> None:
    """Packs CKA by pair of runs; the base, like any other non-run, has the number −1."""
    table = analysis.table("cka", ("run_a", "run_b"), ("layer", "cka_unbiased", "cka_without_outlier"))
    number = {name: place for place, name in enumerate(runs.names)}
    states = sorted(table["layer"].dropna().unique())
    by_pair = list(table.groupby(["run_a", "run_b"], sort=False))
    for name in ("cka_unbiased", "cka_without_outlier"):
        values = np.full((len(by_pair), len(states)), np.nan)
        for place, (_, rows) in enumerate(by_pair):
            values[place] = rows.drop_duplicates("layer").set_index("layer")[name].reindex(states)
        packed.fixed(f"cka.{name}", values, _FINE)
    keys = [[number.get(a, -1), number.get(b, -1)] for (a, b), _ in by_pair]
    packed.add_header(cka={"keys": keys, "states": [int(state) for state in states]})


def _curves(packed: Packed, analysis: AnalysisFolder, runs: Runs, pairs: Pairs) -> None:
    names = ("loss", "loss_low", "loss_high")
    table = analysis.table("connectivity", ("run_a", "run_b"), ("alpha", *names))
    table["pair"] = pairs.numbers(runs, table["run_a"], table["run_b"])
    alphas = sorted(table["alpha"].dropna().unique())
    by_pair = [
        (pair, rows.drop_duplicates("alpha").set_index("alpha")) for pair, rows in table.groupby("pair") if pair >= 0
    ]
    for name in names:
        values = np.array([rows[name].reindex(alphas).to_numpy() for _, rows in by_pair]).reshape(
            len(by_pair), len(alphas)
        )
        packed.fixed(f"curves.{name}", values, _FINE)
    packed.add_header(curves={"pairs": [int(pair) for pair, _ in by_pair], "alphas": alphas})


def _map(packed: Packed, analysis: AnalysisFolder, runs: Runs, pairs: Pairs) -> None:
    table = analysis.table("mds", ("run",), ("x", "y")).drop_duplicates("run").set_index("run").reindex(runs.names)
    points = table[["x", "y"]].to_numpy(dtype=float)
    packed.significant("map", points)
    first, second = np.array(pairs.ends).T
    apart = np.linalg.norm(points[first] - points[second], axis=1)
    off = np.abs(apart - np.degrees(np.arccos(np.clip(pairs.table["cosine"].to_numpy(), -1, 1))))
    known = off[~np.isnan(off)]
    kept = (analysis.manifest.get("mds") or {}).get("variance_kept")
    packed.add_header(map={"off": round(float(np.median(known)), 1), "kept": kept} if known.size else None)


def _places(count: int, kept: Sequence[int]) -> np.ndarray:
    """Returns the index of each pair among those kept, −1 for the others and, in the last entry, for no pair."""
    places = np.full(count + 1, -1)
    places[list(kept)] = np.arange(len(kept))
    return places


def _texts(table: pa.Table, name: str) -> pd.Series:
    return table[name].to_pandas() if name in table.column_names else pd.Series(dtype=object)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    values: np.ndarray = table[name].to_pandas().to_numpy(dtype=float)
    return values


def _lists(table: pa.Table, name: str) -> np.ndarray:
    """Returns a column of lists as a matrix, shorter lists padded with NaN."""
    if name not in table.column_names:
        return np.zeros((table.num_rows, 0))
    lists = table[name].combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    values = np.full((len(lengths), lengths.max(initial=0)), np.nan)
    values[np.arange(values.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return values
