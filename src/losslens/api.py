"""Python interface for scripts and notebooks: `compare` and `load_sweep`.

`losslens.compare` compares PEFT folders and checkpoints, without torch or PEFT; `losslens.load_sweep` reads what
`losslens train` and `losslens analyze` wrote. Figures need `pip install 'losslens[report]'`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from losslens.analysis.cohort import Cohort, SweepContents
from losslens.analysis.composition import tell_composition
from losslens.analysis.function_space import base_at
from losslens.analysis.gathering import gather_cohort
from losslens.core.errors import InputError
from losslens.core.extras import require_extras
from losslens.measures import run_weight_measures, weight_measures
from losslens.measures.comparison import compare as compare_updates
from losslens.measures.nulls import expected_angles
from losslens.measures.tables import ComparedWeights, WeightTables, weight_tables
from losslens.runs.run import Run, runs_of
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.updates.folder import open_adapter
from losslens.updates.places import AdapterPath, adapter_in, named_adapters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "Sweep", "compare", "load_sweep"]

_INITIAL = "the initial adapter"


@dataclass(frozen=True)
class Comparison:
    """Pairwise comparison of the weight updates of several adapters. Angles are in degrees.

    A measure's null stands beside it (`cosine_null`), if it has one: its value for two updates that share nothing but
    their shapes, ranks and singular values; for the cosine, the 95% bound of its absolute value.

    Attributes:
        folders: The folder of each adapter, by its label.
        runs: One row per adapter: norm, effective rank and the like.
        run_modules: One row per adapter and module, with its singular values.
        pairs: One row per pair: cosine, principal angles, overlap.
        layers: One row per pair and layer; layer −1 holds the modules outside the layers.
        modules: One row per pair and module, with every principal angle.
        left_out: What the comparison leaves out, with the reasons: weights that not all have, and rounding.
    """

    folders: Mapping[str, Path]
    runs: pd.DataFrame
    run_modules: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame
    left_out: Mapping[str, str]

    def matrix(self, measure: str = "cosine") -> pd.DataFrame:
        """Returns one measure as a symmetric matrix, labelled by adapter; on the diagonal, identical updates.

        Args:
            measure: A column of `pairs`.

        Raises:
            InputError: There is no such measure.
        """
        known = {each.name: each.identical for each in weight_measures()}
        if measure not in known:
            raise InputError(f"matrix: no measure {measure!r}; there are {', '.join(known)}")
        labels = list(self.folders)
        found = pd.DataFrame(math.nan, index=labels, columns=labels)
        for a, b, value in zip(self.pairs["run_a"], self.pairs["run_b"], self.pairs[measure], strict=True):
            found.loc[a, b] = found.loc[b, a] = value
        for label in labels:
            found.loc[label, label] = known[measure]
        return found

    def cosines(self) -> Figure:
        """Draws the cosine matrix (matplotlib)."""
        return self._draw("cosines", "two adapters")

    def norms(self) -> Figure:
        """Draws the norm of each update by layer, and its singular values (matplotlib)."""
        return self._draw("norms", "a nonzero update")

    def angles(self) -> Figure:
        """Draws the smallest left principal angle between each update and the first, by layer (matplotlib)."""
        return self._draw("angles", "two adapters")

    def _draw(self, name: str, needs: str) -> Figure:
        drawn = _draw(self._tables, [name]).get(name)
        if drawn is None:
            raise InputError(f"{name}: nothing to draw; needs {needs}")
        return drawn

    @property
    def _tables(self) -> AnalysisFolder:
        """The tables in the form of an analysis of external adapters: each adapter is an arm."""
        arms = {"arm": self.runs["run"], "method": self.runs["run"]}
        pairs = self.pairs.assign(arm_a=self.pairs["run_a"], arm_b=self.pairs["run_b"])
        ends = {f"{each.name}{end}": pairs[each.name] for each in weight_measures() for end in ("_min", "_max")}
        tables = {
            "runs": self.runs.assign(**arms), "run_modules": self.run_modules, "pairs": pairs, "layers": self.layers,
            "arm_pairs": pairs.assign(pairs=1, **ends),
        }  # fmt: skip
        return _InMemory(Path(os.devnull), tables, next(iter(self.folders)))

    def _repr_html_(self) -> str:
        """Shows the adapters with their main measures, and the cosine matrix."""
        main = [measure.name for measure in run_weight_measures("main")]
        runs = self.runs.set_index("run")[[name for name in main if self.runs[name].notna().any()]]
        shown = {"adapters": runs, "cosine of every two updates": self.matrix()}
        return "".join(f"<p>{title}</p>{table.to_html(float_format='%.3g')}" for title, table in shown.items())


def compare(
    folders: Mapping[str, AdapterPath] | Iterable[AdapterPath],
    *,
    base: AdapterPath | None = None,
    initial: AdapterPath | None = None,
    num_directions: int = 10,
) -> Comparison:
    """Compares adapters and whole models of one architecture by their weight updates.

    Whole models are compared on the modules of the adapters among them, if there are any (`Comparison.left_out`).

    Args:
        folders: Folders of PEFT (LoRA, DoRA) or of transformers, as a list or by label; the folder of a LossLens run
            stands for what it trained.
        base: Folder or hub id of the base, for DoRA and whole models.
        initial: The common initial adapter, if any: then the drift of A is measured, and the nulls are those of updates
            that share it.
        num_directions: Leading singular directions whose subspaces are compared.

    Raises:
        InputError: A folder has no readable adapter or model, a base is missing, or two are not comparable (different
            modules or shapes); names the folder or label.
    """
    named = named_adapters(folders)
    if num_directions < 1:
        raise InputError(f"num_directions={num_directions}: must be at least 1")
    started_from = None if initial is None else adapter_in(Path(initial))
    # The initial adapter goes through the same checks.
    cohort = gather_cohort(
        SweepContents([], [], [], set(), "compare: no adapter folder given", {}),
        named if started_from is None else {**named, _INITIAL: started_from},
        None if base is None else base_at(os.fspath(base)),
    )
    tables = _measured(cohort, named, started_from, num_directions)
    tell_composition(cohort)
    return Comparison(
        named, tables.runs, tables.run_modules, tables.pairs, tables.layers, tables.modules, cohort.left_out
    )


def _measured(cohort: Cohort, named: Mapping[str, Path], initial: Path | None, top: int) -> WeightTables:
    labels = list(named)
    top = min(top, max(rank for label in labels for rank in cohort.ranks[label]))
    with ExitStack() as stack:
        adapters = [stack.enter_context(cohort.by_name[label].point.open()) for label in labels]
        start = None if initial is None else stack.enter_context(open_adapter(initial))
        runs, pairs = compare_updates(adapters, cohort.modules, top=top, initial=[start] * len(labels))
    by_label = {(labels[a], labels[b]): pair for (a, b), pair in pairs.items()}
    return weight_tables(
        ComparedWeights(
            modules=cohort.modules,
            shapes=cohort.shapes,
            runs=dict(zip(labels, runs, strict=True)),
            pairs=by_label,
            top=top,
            ranks={label: cohort.ranks[label] for label in labels},
            same_a=dict.fromkeys(by_label, None if initial is None else True),
            draw=cache(expected_angles),  # layers and modules of the same shape have the same null
        )
    )


class Sweep:
    """The runs of a sweep and its analysis, read from disk. Nothing is computed.

    Args:
        folder: The sweep's folder, `outputs/<sweep>`.
        analysis: Name of the analysis in it.
    """

    def __init__(self, folder: Path, analysis: str) -> None:
        self.folder = folder
        self.analysis = folder / analysis
        self._found = {run.name: run for run in runs_of(folder.parent, folder.name)}

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.folder.name

    @property
    def report(self) -> Path:
        """Path of the report, one HTML file."""
        return self.analysis / "report.html"

    @property
    def adapters(self) -> dict[str, Path]:
        """Folders of the finished adapters, by run name: for `compare`."""
        return {name: run.adapter for name, run in self._found.items() if run.adapter.is_dir()}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Table with a row per run (including the base): state, method, learning rate, seeds, folder."""
        columns = ["run", "state", "method", "learning_rate", "seed", "init_seed", "folder"]
        return pd.DataFrame([_row(name, run) for name, run in self._found.items()], columns=columns)

    @cached_property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The tables of the analysis by name (`pairs`, `arm_pairs`, …), read on access.

        docs/reference/measures.md describes their columns.
        """
        return _Tables(AnalysisFolder(self._require_analysis()))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Manifest of the analysis: settings, versions, what was left out and why."""
        return AnalysisFolder(self._require_analysis()).manifest

    def figures(self) -> dict[str, Figure]:
        """Draws every figure that the analysis has data for, by name (matplotlib)."""
        return _draw(AnalysisFolder(self._require_analysis()))

    def _require_analysis(self) -> Path:
        if not (self.analysis / "manifest.json").is_file():
            raise InputError(f"{self.analysis}: no finished analysis; run `losslens analyze sweep={self.name}`")
        return self.analysis

    def _repr_html_(self) -> str:
        """Shows the runs."""
        return str(self.runs.drop(columns="folder").to_html(index=False, na_rep="", float_format="%.3g"))

    def __repr__(self) -> str:
        return f"Sweep({str(self.folder)!r}: {len(self._found)} runs)"


def load_sweep(name: str = "main", output_dir: AdapterPath = "outputs", analysis: str = "analysis") -> Sweep:
    """Opens a sweep.

    Args:
        name: Name of the sweep.
        output_dir: Output folder.
        analysis: Name of the analysis folder: `analysis-norm` for one with `checkpoint=norm`.

    Raises:
        InputError: There is no such sweep; names the folder.
    """
    return Sweep(Path(output_dir).expanduser() / name, analysis)


def _row(name: str, run: Run) -> dict[str, Any]:
    try:
        manifest = run.manifest
    except InputError:  # a queued run has none yet
        manifest = {}
    config = manifest.get("config") if isinstance(manifest.get("config"), dict) else {}
    return {
        "run": name, "state": run.status.get("state"), "method": manifest.get("method"),
        "learning_rate": manifest.get("learning_rate"), "seed": (config or {}).get("seed"),
        "init_seed": (config or {}).get("init_seed"), "folder": run.folder,
    }  # fmt: skip


class _Tables(Mapping[str, pd.DataFrame]):
    """Tables in an analysis folder."""

    def __init__(self, folder: AnalysisFolder) -> None:
        found = (file for kind in ("csv", "parquet") for file in sorted(folder.path.glob(f"*.{kind}")))
        self._files = {file.stem: file for file in found}
        self._folder = folder

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._files:
            raise InputError(f"{self._folder.path}: no table {name!r}; available: {', '.join(self._files)}")
        file = self._files[name]
        self._folder.require_intact(file)
        try:
            return pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
        except pd.errors.EmptyDataError:
            return pd.DataFrame()
        except (OSError, ValueError) as error:  # pyarrow raises the latter
            raise InputError(f"{file}: not a readable table ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class _InMemory(AnalysisFolder):
    """An analysis folder whose tables are in memory.

    Attributes:
        tables: The tables by name.
        reference: The reference adapter.
    """

    tables: Mapping[str, pd.DataFrame]
    reference: str

    @property
    def manifest(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def table(self, name: str, texts: Iterable[str], numbers: Iterable[str]) -> pd.DataFrame:
        texts, numbers = list(texts), list(numbers)
        found = self.tables[name].reindex(columns=[*texts, *numbers])
        return found.astype(dict.fromkeys(numbers, float)).assign(
            **{column: found[column].astype(object).fillna("") for column in texts}
        )

    def parquet(self, name: str, columns: Iterable[str]) -> pa.Table:
        return pa.Table.from_pandas(self.tables[name][list(columns)], preserve_index=False)


def _draw(analysis: AnalysisFolder, names: Iterable[str] | None = None) -> dict[str, Figure]:
    require_extras("report")
    from losslens.report.figures.write import draw_figures

    return draw_figures(analysis, names)
