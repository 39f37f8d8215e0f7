"""Norms, cosines, a map and clusters of hundreds of adapters, for which every pair in full would take hours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from losslens.analysis.cohort import Cohort, SweepContents
from losslens.analysis.gathering import gather_cohort
from losslens.analysis.replacement import EarlierAnalysis, write_analysis
from losslens.core import provenance
from losslens.core.files import atomic_file, write_json
from losslens.core.hashing import hash_file
from losslens.core.notices import print_once
from losslens.measures import WeightMeasure, get_measure, run_weight_measures
from losslens.measures.clustering import cluster
from losslens.measures.comparison import RunGeometry
from losslens.measures.int8 import require_vnni
from losslens.measures.mds import angles, mds
from losslens.measures.products import Precision, Products, all_products, product_weights
from losslens.measures.tables import ComparedWeights, run_weights
from losslens.measures.views import Array
from losslens.updates.base import Updates
from losslens.updates.folder import open_adapter

# Pairs whose measures are computed at once.
_CHUNK = 4096
# Adapters whose cosines in int8 are compared with those in float32.
_CHECKED = 16
# Largest difference of a cosine, or of its null, that is not told on the terminal.
_TOLERATED = 1e-3


def map_adapters(
    adapters: Mapping[str, Path],
    output_dir: Path,
    *writers: Callable[[Path], object],
    precision: Precision = "float32",
) -> Path:
    """Computes norms, cosines, map and clusters of adapters; writes runs.csv, pairs.csv, mds.csv, and a manifest.

    Args:
        adapters: The folder of each adapter, by its name in the tables.
        output_dir: The folder of the outputs.
        writers: Functions that write further files into the folder before it replaces an earlier analysis.
        precision: Precision of the products of two adapters (`all_products`).

    Returns:
        The folder of the analysis, `output_dir/adapters/analysis`.

    Raises:
        InputError: An adapter cannot be read, two cannot be compared, or the processor lacks what int8 needs.
    """
    if precision == "int8":
        require_vnni()
    folder = output_dir / "adapters" / "analysis"

    def made(_: EarlierAnalysis) -> tuple[dict[str, Any], Callable[[Path], None]]:
        cohort = gather_cohort(SweepContents([], [], [], set(), "compare: no adapter given", {}), adapters)
        with ExitStack() as stack:
            opened = [stack.enter_context(open_adapter(member.adapter)) for member in cohort.members]
            progress = _progress(len(cohort.modules))
            products = all_products(opened, cohort.modules, precision=precision, progress=progress)
            error = _int8_error(opened, cohort.modules, cohort.shapes, products) if precision == "int8" else None
        runs, pairs, plane, kept = adapter_tables(cohort.names, cohort.modules, cohort.shapes, products)
        facts = _facts(cohort, kept) | {"precision": precision}
        if error is not None:
            facts["cosine_error"] = error

        def write(new: Path) -> None:
            hashes = {}
            for name, table in (("runs", runs), ("pairs", pairs), ("mds", plane)):
                file = new / f"{name}.csv"
                with atomic_file(file) as temporary:
                    # Cosines of float32 have no more digits.
                    table.to_csv(temporary, index=False, float_format="%.9g")
                hashes[file.name] = hash_file(file)
            about = {**facts, "tables": hashes, **provenance.describe_environment()}
            write_json(new / "manifest.json", about, sealed=True)
            for writer in writers:
                writer(new)

        return facts, write

    write_analysis(folder, made)
    return folder


def adapter_tables(
    names: Sequence[str], modules: Sequence[str], shapes: Sequence[tuple[int, int]], products: Products
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, float]:
    """Builds the tables from the products of N adapters.

    Args:
        names: Names of the adapters.
        modules: Names of the modules.
        shapes: (out, in) of each module.
        products: Their products.

    Returns:
        A row per adapter (measures of the update; `cluster`, numbered from 1; `place` in the order of the clusters;
        `nearest` and `nearest_cosine`), a row per pair (cosine with its null), a point per adapter with a direction,
        and the share of the variance that the points show.
    """
    geometry = {
        name: RunGeometry(values, np.zeros((len(modules), 0)))
        for name, values in zip(names, products.singular_values, strict=True)
    }
    view = run_weights(ComparedWeights(modules, shapes, geometry, {}, top=1))
    runs = pd.DataFrame({"run": names} | {measure.name: measure.value(view) for measure in run_weight_measures()})
    runs = runs.dropna(axis="columns", how="all")
    first, second = np.triu_indices(len(names), 1)
    cosines, nulls = _cosines(products, shapes)
    labels = np.array(names, dtype=object)
    pairs = pd.DataFrame({"run_a": labels[first], "run_b": labels[second], "cosine": cosines, "cosine_null": nulls})
    matrix = np.full((len(names), len(names)), np.nan)
    matrix[first, second] = matrix[second, first] = cosines
    pointing = np.flatnonzero(runs["norm"] > 0)
    known = matrix[np.ix_(pointing, pointing)]
    if len(pointing) > 1:
        nearest = np.nanargmax(known, axis=1)
        runs.loc[pointing, "nearest"] = labels[pointing[nearest]]
        runs.loc[pointing, "nearest_cosine"] = known[np.arange(len(pointing)), nearest]
    np.fill_diagonal(known, 1.0)
    distances = angles(known)
    found = cluster(distances)
    runs["cluster"] = pd.Series(found.labels, index=pointing, dtype="Int64")
    runs["place"] = pd.Series(found.places, index=pointing, dtype="Int64")
    plane = mds(distances)
    points = pd.DataFrame({"run": labels[pointing], "x": plane.points[:, 0], "y": plane.points[:, 1]})
    return runs, pairs, points, plane.kept


def _cosines(products: Products, shapes: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """Returns the cosine of each pair and its null; a part of the pairs at a time, to bound the memory."""
    measure = get_measure("cosine")
    assert isinstance(measure, WeightMeasure)
    assert measure.null is not None
    count = len(products.inner)
    found = np.empty((2, count))
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        view = product_weights(products, shapes, part)
        found[0, part], found[1, part] = measure.value(view), measure.null(view)
    return found[0], found[1]


def _int8_error(
    opened: Sequence[Updates], modules: Sequence[str], shapes: Sequence[tuple[int, int]], products: Products
) -> dict[str, Any]:
    """Returns by how much cosines and nulls of some adapters, of all parts of the list, differ from float32's."""
    chosen = np.unique(np.linspace(0, len(opened) - 1, _CHECKED).astype(int))
    exact = _cosines(all_products([opened[number] for number in chosen], modules), shapes)
    largest: list[float | None] = []
    for found, expected in zip(_cosines(products, shapes), exact, strict=True):
        matrix = np.full((len(opened), len(opened)), np.nan)
        matrix[np.triu_indices(len(opened), 1)] = found
        difference = np.abs(matrix[np.ix_(chosen, chosen)][np.triu_indices(len(chosen), 1)] - expected)
        known = difference[np.isfinite(difference)]
        largest.append(float(known.max()) if len(known) else None)
    told = [
        f"{what} by up to {value:.1g}"
        for what, value in zip(("cosines", "their nulls"), largest, strict=True)
        if value is not None and value > _TOLERATED
    ]
    count = int(np.isfinite(exact[0]).sum())
    if told:
        print_once(f"--precision int8: of {count} pairs, {' and '.join(told)} differ from float32")
    return {"of_pairs": count, "largest": largest[0], "largest_of_null": largest[1]}


def _facts(cohort: Cohort, kept: float) -> dict[str, Any]:
    left_out = dict(cohort.left_out)
    left_out["angles, overlaps, layers and modules"] = "norms and cosines alone (losslens compare --measures all)"
    return {
        "sweeps": [],
        "adapters": {member.name: member.sha256 for member in cohort.members},
        "measures": "cosines",
        "measured_pairs": [],
        "mds": {"variance_kept": None if np.isnan(kept) else kept},
        "left_out": left_out,
    }


def _progress(modules: int) -> Callable[[Any], Any]:
    return lambda steps: tqdm(steps, desc="cosines", unit="module", total=modules, leave=False, dynamic_ncols=True)
