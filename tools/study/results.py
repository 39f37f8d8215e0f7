"""Results of the study: everything that is measured of the runs of a sweep, as small parquet files.

A sweep has a folder: `runs.parquet` has a row for each run, `similarities.parquet` one for each pair of these rows (the
upper triangle, row by row), with a column for each kind of similarity, and `gradients.parquet` one for each two
gradients before step 1. `left-out.json` says what was not measured, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from tqdm import tqdm

from losslens.analysis.base_weights import BaseWeights
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort, ComparedAdapter
from losslens.analysis.forward_passes import ForwardPasses
from losslens.analysis.function_space import base_of, external_base, locate_bases, own_benchmark, trust_of
from losslens.analysis.gathering import find_runs, gather_cohort
from losslens.analysis.intervention_passes import Effect, InterventionPasses
from losslens.analysis.interventions import Change, Intervention
from losslens.analysis.manifests import RunFacts
from losslens.analysis.probe_set import TeacherForced, probe_set
from losslens.analysis.snapshots import at_checkpoint, score_snapshots
from losslens.config import interpolations
from losslens.config.analysis import AnalyzeConfig
from losslens.config.parse import parse
from losslens.core.errors import InputError
from losslens.core.files import atomic_folder, read_object, read_parquet, write_json
from losslens.evaluation.outcomes import read_outcomes
from losslens.measures.outputs import kl
from losslens.pipeline.initial_gradients import PARTS, initial_gradients
from losslens.runs.run import Run
from losslens.updates.folder import open_adapter
from tools.study.geometry import geometry
from tools.study.similarities import (
    activation_products,
    dense_updates,
    flip_products,
    input_second_moments,
    kl_products,
    normalised,
    output_products,
    weight_products,
)

Array = NDArray[np.float64]
CONF = Path(__file__).parents[2] / "conf"

KINDS = ("weights", "inputs", "function", "kl", "activations", "behaviour")
# Order of the runs. The first draw first: the probe set is of the problems of the first run.
SORTED_BY = ("start", "draw", "order", "loss")
# By how much rounding on another machine changes the measures of a run (relative) and its similarities.
SAME = 1e-3


@dataclass(frozen=True)
class Results:
    """What was measured of one sweep.

    Attributes:
        runs: A row for each run.
        similarities: For each of the `KINDS` the cosine of every two runs, shape (N, N).
        gradients: A row for each two gradients before step 1, of every loss, draw and start.
        left_out: What was not measured, with the reasons.
    """

    runs: pd.DataFrame
    similarities: Mapping[str, Array]
    gradients: pd.DataFrame
    left_out: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, sweep: str) -> None:
        """Writes the files of a sweep into a folder of its own, all of them or none."""
        upper = np.triu_indices(len(self.runs), 1)
        pairs = pd.DataFrame({kind: matrix[upper].astype(np.float32) for kind, matrix in self.similarities.items()})
        with atomic_folder(folder / sweep) as temporary:
            for name, table in (("runs", self.runs), ("similarities", pairs), ("gradients", self.gradients)):
                table.to_parquet(temporary / f"{name}.parquet", index=False, compression="zstd")
            write_json(temporary / "left-out.json", dict(self.left_out))

    @classmethod
    def read(cls, folder: Path, sweep: str) -> Results:
        """Reads what `write` wrote.

        Raises:
            InputError: A file is missing or damaged, or the files do not belong together.
        """
        runs, pairs, gradients = (
            read_parquet(folder / sweep / f"{name}.parquet").to_pandas()
            for name in ("runs", "similarities", "gradients")
        )
        upper = np.triu_indices(len(runs), 1)
        if len(pairs) != len(upper[0]):
            raise InputError(f"{folder / sweep}: {len(pairs)} pairs of {len(runs)} runs; measure the sweep again")
        matrices = {}
        for kind in pairs:
            matrix = np.eye(len(runs))
            matrix[upper] = pairs[kind]
            matrices[str(kind)] = np.triu(matrix) + np.triu(matrix, 1).T
        return cls(runs, matrices, gradients, read_object(folder / sweep / "left-out.json"))

    def with_earlier(self, earlier: Results) -> Results:
        """Adds runs that were measured before, on another machine, and are not here.

        Some runs must have been measured both times, and alike; they are taken from here. Two runs that were never
        measured together have no similarity (NaN).

        Raises:
            InputError: No run was measured both times, or one differs by more than rounding.
        """
        both = [run for run in self.runs["run"] if run in set(earlier.runs["run"])]
        again = "remove the earlier results to measure the sweep anew"
        if not both or set(self.runs) != set(earlier.runs) or set(self.similarities) != set(earlier.similarities):
            raise InputError(f"the earlier results have no run that was measured again, or other columns; {again}")
        now, before = (results.runs.set_index("run").loc[both] for results in (self, earlier))
        for column in ("norm", "kl", "accuracy", "base_accuracy"):
            differs = ~np.isclose(now[column], before[column], rtol=SAME, atol=0)
            if differs.any():
                raise InputError(f"{now.index[differs][0]}: its {column} is not that of the earlier results; {again}")
        for kind, matrix in self.similarities.items():
            new, old = (
                own[np.ix_(places, places)]
                for results, own in ((self, matrix), (earlier, earlier.similarities[kind]))
                for places in [pd.Index(results.runs["run"]).get_indexer(both)]
            )
            # What was not compared before may be compared now.
            if (np.abs(new - old)[np.isfinite(new) & np.isfinite(old)] > SAME).any():
                raise InputError(f"similarities in {kind} are not those of the earlier results; {again}")
        kept = ~earlier.runs["run"].isin([*self.runs["run"], *self.left_out])
        runs = pd.concat([self.runs, earlier.runs[kept]], ignore_index=True)
        runs = runs.sort_values(list(SORTED_BY), ignore_index=True)
        matrices = {}
        for kind, matrix in self.similarities.items():
            joined = np.full((len(runs), len(runs)), np.nan)
            for results, own in ((earlier, earlier.similarities[kind]), (self, matrix)):
                places = pd.Index(results.runs["run"]).get_indexer(runs["run"])
                here = np.flatnonzero(places >= 0)
                joined[np.ix_(here, here)] = own[np.ix_(places[here], places[here])]
            matrices[kind] = joined
        known_gradients = [table for table in (self.gradients, earlier.gradients) if len(table)]
        gradients = pd.concat(known_gradients, ignore_index=True) if known_gradients else self.gradients
        left_out = {
            run: why for run, why in {**earlier.left_out, **self.left_out}.items() if run not in set(runs["run"])
        }
        return Results(runs, matrices, gradients[~_pairs_of(gradients).duplicated()].reset_index(drop=True), left_out)


def _pairs_of(gradients: pd.DataFrame) -> pd.Series:
    """Names the two gradients of each row, whichever comes first."""
    return pd.Series(
        [
            (row.start, *sorted([(row.loss_a, row.draw_a), (row.loss_b, row.draw_b)]))
            for row in gradients.itertuples(index=False)
        ]
    )


def measure(
    sweeps: Sequence[str],
    output_dir: Path,
    *,
    keep: Callable[[RunFacts], bool] = lambda _: True,
    at: Literal["end", "norm"] = "end",
    equal_kl: bool = False,
    with_geometry: bool = False,
    copies: int = 4,
) -> Results:
    """Measures the finished runs of sweeps.

    Args:
        sweeps: Their names.
        output_dir: The folder of the sweeps.
        keep: Which runs are measured.
        at: At their ends, or where each first has the largest norm that all reach.
        equal_kl: Also scales each update to the smallest KL of all, and answers the problems with it.
        with_geometry: Also measures what each update does to its base weights, beside rotated copies.
        copies: Number of rotated copies.
    """
    config = _config(sweeps, output_dir)
    contents = find_runs(config.output_dir, config.sweeps, config.allow_different)
    contents.members = [member for member in contents.members if member.facts and keep(member.facts)]
    contents.members.sort(key=lambda member: [_factors(member)[name] for name in SORTED_BY])
    contents.members = at_checkpoint(contents.members, at, None, contents.left_out)
    if at != "end":
        score_snapshots(contents.members, config.model_path, trust_of(config), contents.left_out)
    locate_bases(contents, config)
    cohort = gather_cohort(contents, {}, external_base(contents, config))
    source, identity = base_of(config.model_path, cohort.first, trust_of(config))
    passes = ForwardPasses(source, identity, cohort, Cache(config.output_dir / "cache"), config.batch_size)
    frozen = probe_set(config.probe_set, config.output_dir, cohort.first, trust_of(config), config.model_path)
    sequences = TeacherForced(frozen, answer_only=False)
    members, modules = cohort.members, cohort.modules

    passes.observe(cohort.names, sequences, config.cka)
    base = passes.observation(None, sequences, config.cka)
    observed = [passes.observation(name, sequences, config.cka) for name in cohort.names]
    with passes.model(None) as model:
        moments = input_second_moments(model, modules, passes.tokens(sequences))
    weights, inputs = weight_products(dense_updates(members, modules), moments)
    assert cohort.first is not None
    benchmark = cohort.first.benchmark
    assert benchmark is not None
    correct, of_base, ids = _correct(cohort, benchmark)
    products = {
        "weights": weights,
        "inputs": inputs,
        "function": output_products(base, observed),
        "kl": kl_products(base, observed),
        "activations": activation_products(base, observed),
        "behaviour": flip_products(correct, of_base),
    }
    runs = pd.DataFrame([_factors(member) for member in members])
    runs["norm"] = np.sqrt(np.diag(weights))
    runs["kl"] = [float(kl(base.log_probs, run.log_probs).mean()) for run in observed]
    runs["output_shift"] = np.sqrt(np.diag(products["function"]))
    runs["accuracy"], runs["base_accuracy"] = correct.mean(axis=1), of_base.mean()
    for other in set(cohort.scores.benchmarks(cohort.bases[0].run)) - {benchmark}:
        runs[f"accuracy_{other}"] = _correct(cohort, other)[0].mean(axis=1)
    runs["correct"] = [row.astype(np.int8).tolist() for row in correct]
    runs["base_correct"] = [of_base.astype(np.int8).tolist()] * len(runs)
    if equal_kl:
        weights_of_base = BaseWeights(passes, cohort, config.num_directions)
        problems = own_benchmark(config, cohort.first, None)
        scaled = InterventionPasses(passes, sequences, config.cka, weights_of_base, problems, {})
        factors = scaled.equal_kl_factors(cohort.names)
        changes = {name: Change((name,), "scaled", factors[name]) for name in cohort.names}
        effects = scaled.measure([Intervention("equal_kl", change) for change in changes.values()])
        runs["equal_kl_norm"] = [effects[changes[name]].norm for name in cohort.names]
        runs["equal_kl_correct"] = [
            [int(answer) for answer in _answers(effects[changes[name]]).reindex(ids)] for name in cohort.names
        ]
    if with_geometry:
        weight_of: Callable[[str, tuple[int, int]], Array] = passes.base_weight
        for column, values in geometry(dense_updates(members, modules), weight_of, copies).items():
            runs[column] = values
    gradients = _gradients(config, cohort, runs)
    similarities = {kind: normalised(matrix) for kind, matrix in products.items()}
    return Results(runs, similarities, gradients, {**contents.left_out, **cohort.left_out})


def _config(sweeps: Sequence[str], output_dir: Path) -> AnalyzeConfig:
    interpolations.register()
    overrides = [f"sweep=[{','.join(sweeps)}]", f"output_dir={output_dir}", "allow_different=rollouts", "logger=none"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(AnalyzeConfig, compose("analyze", overrides))


def _factors(member: ComparedAdapter) -> dict[str, Any]:
    assert member.facts is not None
    config = member.facts.config
    return {
        "run": member.name, "loss": member.facts.method, "draw": str((config.data.model_extra or {})["seed"]),
        "order": str(config.seed), "start": "base" if config.init_seed is None else str(config.init_seed),
        "rate": config.lr.name, "learning_rate": member.facts.learning_rate, "steps": member.facts.training.steps,
    }  # fmt: skip


def _answers(effect: Effect) -> pd.Series:
    assert effect.correct is not None
    return effect.correct


def _correct(cohort: Cohort, benchmark: str) -> tuple[Array, Array, list[str]]:
    """Returns whether each run, and the base, answers each problem: shape (N, problems) and (problems,), and ids.

    Raises:
        InputError: A run was scored on other problems than the base.
    """

    def column(run: Run | None) -> pd.Series:
        assert run is not None
        outcomes = read_outcomes(cohort.scores.file(run, benchmark))
        return outcomes.set_index("problem_id")["correct"].astype(float)

    base = column(cohort.bases[0].run)
    runs = [column(member.run).reindex(base.index) for member in cohort.members]
    for member, run in zip(cohort.members, runs, strict=True):
        if run.isna().any():
            raise InputError(f"{member.name}: not scored on the problems of the base ({benchmark}); run train.py again")
    return np.stack([run.to_numpy() for run in runs]), base.to_numpy(), [str(problem) for problem in base.index]


def _gradients(config: AnalyzeConfig, cohort: Cohort, runs: pd.DataFrame) -> pd.DataFrame:
    """Compares the gradients before step 1 of every loss, draw and start, and adds `gradient_to_end` to `runs`."""
    folders = initial_gradients(config, cohort)
    runs["gradient_to_end"] = np.nan
    if not folders:
        return pd.DataFrame(columns=["start", "loss_a", "draw_a", "loss_b", "draw_b", "cosine", "halves_a", "halves_b"])
    known = runs[runs["run"].isin(list(folders))]
    first = known.drop_duplicates(["loss", "draw", "start"])
    with ExitStack() as stack:
        parts = [stack.enter_context(open_adapter(folders[run] / part)) for run in first["run"] for part in PARTS]
        ends = [stack.enter_context(open_adapter(cohort.by_name[run].adapter)) for run in known["run"]]
        of_parts = np.zeros((len(parts), len(parts)))
        with_ends, of_ends = np.zeros((len(first), len(ends))), np.zeros(len(ends))
        for module in tqdm(cohort.modules, "gradients", leave=False):
            steps, updates = (
                np.stack([update[module].dense().reshape(-1) for update in opened]) for opened in (parts, ends)
            )
            of_parts = of_parts + steps @ steps.T
            with_ends = with_ends + steps[::2] @ updates.T
            of_ends = of_ends + np.sum(updates**2, axis=1)
    whole, half, between = of_parts[::2, ::2], np.diag(of_parts)[1::2], np.diag(of_parts[::2, 1::2])
    cosines = normalised(whole)
    # The other half is the whole less the half.
    rest = np.diag(whole) - 2 * between + half
    of_halves = (between - half) / np.sqrt(half * rest)
    names = ["loss", "draw", "start"]
    for row, about in enumerate(first[names].itertuples(index=False)):
        same = (known[names] == list(about)).all(axis=1).to_numpy()
        runs.loc[known.index[same], "gradient_to_end"] = with_ends[row, same] / np.sqrt(whole[row, row] * of_ends[same])
    rows: list[dict[str, Any]] = []
    levels = first[names].to_dict("records")
    for i, a in enumerate(levels):
        for j, b in enumerate(levels[i:], i):
            if a["start"] == b["start"]:
                rows.append(
                    {
                        "start": a["start"], "loss_a": a["loss"], "draw_a": a["draw"], "loss_b": b["loss"],
                        "draw_b": b["draw"], "cosine": cosines[i, j], "halves_a": of_halves[i],
                        "halves_b": of_halves[j],
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
