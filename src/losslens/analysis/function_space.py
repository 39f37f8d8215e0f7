"""Measures that need the base: W0, and forward passes. What is not available is left out with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import ValidationError

from losslens.analysis.cache import Cache
from losslens.analysis.cohort import BaseFolder, Cohort, SweepContents
from losslens.analysis.manifests import RunFacts, StartedFacts
from losslens.analysis.pairs import Pair, SelectedPairs
from losslens.config.analysis import AnalyzeConfig
from losslens.config.evaluation import Evaluation
from losslens.core.errors import InputError, UnavailableError
from losslens.measures.behaviour import PairBehaviour, RunBehaviour
from losslens.measures.cka import CkaOfPair
from losslens.measures.connectivity import Curve
from losslens.measures.tables import BaseComparison
from losslens.models.loading import ModelSource, model_identity, source_of, weights_folder
from losslens.runs.recorded import Trust, data_of, model_of
from losslens.updates.base import Array
from losslens.updates.checkpoint import needs_base

if TYPE_CHECKING:
    from losslens.analysis.behaviour import BehaviourPasses
    from losslens.analysis.forward_passes import ForwardPasses
    from losslens.analysis.greedy_answers import GreedyBenchmark
    from losslens.analysis.probe_set import TeacherForced

# Calls a function with each of several arguments.
Share = Callable[[Callable[[Any], None], Sequence[Any]], None]

# Names of the measures by forward passes, where they are left out.
_BY_PASSES = "connectivity, CKA, KL, outputs and activations"


@dataclass
class FunctionSpaceResults:
    """Results of the measures; empty where not available.

    Attributes:
        against_base: Comparison of each run with W0.
        effects: Effects of each run on W0 beside those of rotated copies, if asked for.
        curves: The loss on the straight path between the runs of each chosen pair.
        ckas: CKA of each chosen pair, and of its runs with the base.
        run_behaviours: What each run of a chosen pair does, compared with the base.
        pair_behaviours: What the runs of each chosen pair do, compared with each other.
        base_rank: Representation rank of the base.
        off_task: Hash of the off-task text.
        midpoints: For each chosen pair, whether the midpoint answers each problem correctly.
        copy_answers: For each run of a chosen pair, whether its rotated copies do, if asked for.
        probe_set: Description of the probe set, for the manifest.
        left_out: What could not be measured, with the reasons.
    """

    against_base: dict[str, BaseComparison] = field(default_factory=dict)
    effects: dict[str, Array] = field(default_factory=dict)
    curves: dict[Pair, Curve] = field(default_factory=dict)
    ckas: dict[Pair, CkaOfPair] = field(default_factory=dict)
    run_behaviours: dict[str, RunBehaviour] = field(default_factory=dict)
    pair_behaviours: dict[Pair, PairBehaviour] = field(default_factory=dict)
    base_rank: float = math.nan
    off_task: dict[str, str] = field(default_factory=dict)
    midpoints: dict[Pair, pd.Series] = field(default_factory=dict)
    copy_answers: dict[str, list[pd.Series]] = field(default_factory=dict)
    probe_set: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def measure_function_space(
    config: AnalyzeConfig, cohort: Cohort, chosen: SelectedPairs, cache: Cache, share: Share | None = None
) -> FunctionSpaceResults:
    """Measures the chosen pairs in function space, and all runs against W0.

    Args:
        config: The configuration.
        cohort: The adapters.
        chosen: The pairs.
        cache: Cached results.
        share: Calls a function with each of several arguments, in other processes; what they measure is then in the
            cache. None: everything is measured in this process.

    Raises:
        InputError: The base or the completions are not the expected ones, or the adapters do not fit the base.
    """
    found = FunctionSpaceResults()
    if chosen.left_out:
        found.left_out[_BY_PASSES] = chosen.left_out
    missing = f"relative norm, principal shares, {_BY_PASSES}"
    try:
        source, identity = base_of(config.model_path, cohort.first, trust_of(config))
        # These load torch and transformers, for which who compares adapters alone does not wait.
        from losslens.analysis.base_weights import BaseWeights
        from losslens.analysis.behaviour import BehaviourPasses
        from losslens.analysis.forward_passes import ForwardPasses
        from losslens.analysis.probe_set import TeacherForced, probe_set

        passes = ForwardPasses(source, identity, cohort, cache, config.batch_size)
        weights = BaseWeights(passes, cohort, config.num_directions)
        found.against_base = weights.compared()
        if config.spectrum_copies:
            found.effects = weights.effects(config.spectrum_copies)
        if not chosen.pairs:
            return found
        missing = _BY_PASSES
        frozen = probe_set(config.probe_set, config.output_dir, cohort.first, trust_of(config), config.model_path)
    except UnavailableError as error:
        found.left_out[missing] = str(error)
        return found
    completions = TeacherForced(frozen, answer_only=False)
    targets = TeacherForced(frozen, config.connectivity.loss == "answer")
    if targets.answer_only and (targets.rows["answer"] == "").any():
        raise InputError(f"{frozen.folder}: an answer is empty; use connectivity.loss=completions")
    names = list(dict.fromkeys(name for pair in chosen.pairs for name in pair))
    if share is not None:
        _fill_cache(config, cohort.first, passes, (completions, targets), chosen.pairs, share)
    passes.observe(names, completions, config.cka)
    found.curves = passes.curves(chosen.pairs, targets, config.connectivity)
    found.ckas = passes.ckas(chosen.pairs, completions, config.cka)
    behaviour = BehaviourPasses(passes, completions, config.cka, config.rotated_copies)
    found.run_behaviours = behaviour.runs(names)
    found.pair_behaviours = behaviour.pairs(chosen.pairs)
    found.base_rank = behaviour.base_rank
    found.off_task = {"sha256": behaviour.off_task.sha256}
    if config.connectivity.midpoint_problems or config.answer_copies:
        _measure_answers(config, cohort.first, chosen.pairs, behaviour, found)
    for name, why in behaviour.without_copies.items():
        found.left_out[f"null of what {name} does"] = why
    for name, ratio in behaviour.off_target.items():
        found.left_out[f"equal KL of the copies of {name}"] = f"a copy has {ratio:.2g} times the run's KL"
    found.probe_set = {
        "folder": frozen.folder.name, "sha256": frozen.sha256, "sequences": len(completions.rows),
        "of": len(frozen.table),
    }  # fmt: skip
    return found


def _fill_cache(
    config: AnalyzeConfig,
    run: RunFacts | None,
    passes: ForwardPasses,
    sequences: tuple[TeacherForced, TeacherForced],
    pairs: Sequence[Pair],
    share: Share,
) -> None:
    """Measures the base, then in other processes each run, then each pair: all that is then found in the cache."""
    from losslens.analysis.behaviour import BehaviourPasses

    completions, _ = sequences
    passes.observe([], completions, config.cka)
    BehaviourPasses(passes, completions, config.cka, config.rotated_copies).runs([])
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    share(partial(_measure_run, config, passes, sequences), names)
    share(partial(_measure_pair, config, run, passes, sequences), pairs)


def _measure_run(
    config: AnalyzeConfig, passes: ForwardPasses, sequences: tuple[TeacherForced, TeacherForced], name: str
) -> None:
    from losslens.analysis.behaviour import BehaviourPasses

    completions, targets = sequences
    passes.observe([name], completions, config.cka)
    passes.losses_at_end(name, targets)
    BehaviourPasses(passes, completions, config.cka, config.rotated_copies).runs([name])


def _measure_pair(
    config: AnalyzeConfig,
    run: RunFacts | None,
    passes: ForwardPasses,
    sequences: tuple[TeacherForced, TeacherForced],
    pair: Pair,
) -> None:
    from losslens.analysis.behaviour import BehaviourPasses
    from losslens.analysis.greedy_answers import midpoints

    completions, targets = sequences
    passes.curves([pair], targets, config.connectivity)
    BehaviourPasses(passes, completions, config.cka, config.rotated_copies).pairs([pair])
    if run is not None and config.connectivity.midpoint_problems:
        with suppress(UnavailableError):  # left out with the reason by the caller's own call
            midpoints(passes, [pair], own_benchmark(config, run, config.connectivity.midpoint_problems))


def _measure_answers(
    config: AnalyzeConfig,
    run: RunFacts | None,
    pairs: Sequence[Pair],
    behaviour: BehaviourPasses,
    found: FunctionSpaceResults,
) -> None:
    """Adds the answers of midpoints and of rotated copies, if the runs were scored in process."""
    from losslens.analysis.greedy_answers import copy_answers, midpoints

    count = config.connectivity.midpoint_problems
    what = {"accuracy at the midpoint": count > 0, "null of flips": config.answer_copies > 0}
    try:
        if run is None:
            raise UnavailableError("no run records the problems")
        if count:
            found.midpoints = midpoints(behaviour.passes, pairs, own_benchmark(config, run, count))
        if config.answer_copies:
            names = list(dict.fromkeys(name for pair in pairs for name in pair))
            found.copy_answers = copy_answers(behaviour, names, config.answer_copies, own_benchmark(config, run, None))
    except UnavailableError as error:
        found.left_out |= {name: str(error) for name, wanted in what.items() if wanted}


def own_benchmark(config: AnalyzeConfig, run: RunFacts, problems: int | None) -> GreedyBenchmark:
    """Returns the first held-out problems of the runs' own data (None: all), answered as the runs were scored.

    Raises:
        UnavailableError: The runs were scored otherwise, or the problems cannot be loaded.
    """
    from losslens.analysis.greedy_answers import GreedyBenchmark

    try:
        evaluation = Evaluation.model_validate(run.config.evaluation)
        if run.benchmark_data is None or evaluation.engine != "transformers":
            raise UnavailableError("the runs were not scored in process")
        data = data_of(run.benchmark_data.model_dump(), trust_of(config))
    except ValidationError as error:
        raise UnavailableError("the runs were made by another version of LossLens") from error
    return GreedyBenchmark.first_of(data, evaluation, problems)


def locate_bases(contents: SweepContents, config: AnalyzeConfig) -> None:
    """Sets the folder of the base for the runs of full fine-tuning, whose updates are differences to it.

    Raises:
        InputError: The base is not where the runs recorded it, nor at `model_path`.
    """

    def located(facts: StartedFacts | None) -> Path | None:
        if facts is None or facts.start is not None:
            return None
        return weights_folder(base_of(config.model_path, facts, trust_of(config))[0])

    contents.members = [replace(member, base=located(member.facts)) for member in contents.members]
    contents.diverged = [replace(run, base=located(run.facts)) for run in contents.diverged]


def external_base(contents: SweepContents, config: AnalyzeConfig) -> BaseFolder | None:
    """Returns the base for adapters and models from elsewhere; None if their updates do not depend on it, or unknown.

    Raises:
        InputError: The base is not where the runs recorded it, nor at `model_path`.
    """
    first = next((member.facts for member in contents.members if member.facts), None)
    if not any(needs_base(folder) for folder in (config.adapters or {}).values()):
        return None
    if config.model_path is None and first is None:
        return None
    source, identity = base_of(config.model_path, first, trust_of(config))
    return BaseFolder(weights_folder(source), identity)


def base_at(place: str) -> BaseFolder:
    """Returns the base at a folder or hub id.

    Raises:
        InputError: There is none.
    """
    source = ModelSource("base", place, None, "auto", "auto", False)
    return BaseFolder(weights_folder(source), model_identity(source))


def trust_of(config: AnalyzeConfig) -> Trust:
    """Returns what the command line allows the runs' manifests to request."""
    return Trust(config.trust_remote_code, tuple(config.sources))


def base_of(
    model_path: str | None, run: StartedFacts | None, trust: Trust
) -> tuple[ModelSource, dict[str, str | None]]:
    """Returns the base of the runs, at its recorded path or at `model_path`."""
    if run is not None:
        try:
            source = source_of(model_of(run.config.model.model_dump(), trust))
        except ValidationError as error:
            raise UnavailableError("the runs were made by another version of LossLens") from error
        if model_path is not None and model_path != source.path:
            source = replace(source, field="model_path", path=model_path, revision=None, package=None)
    elif model_path is not None:
        source = ModelSource("model_path", model_path, None, "auto", "auto", trust.remote_code)
    else:
        raise UnavailableError("no run records the base; give model_path=FOLDER (losslens compare: --base)")
    try:
        identity = model_identity(source)
    except InputError as error:
        if model_path:
            raise
        raise UnavailableError(f"{error}; give model_path=FOLDER") from error
    if run and identity != run.base:
        what = f"{source.field}={source.path}: not the base that the runs were trained on"
        raise InputError(what) if model_path else UnavailableError(f"{what}; give model_path=FOLDER")
    return source, identity
