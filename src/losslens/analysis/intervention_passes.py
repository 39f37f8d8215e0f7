"""Measures changed weights of runs: outputs and loss on the probe set, and greedy answers; all cached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.base_weights import BaseWeights
from losslens.analysis.cache import Arrays
from losslens.analysis.forward_passes import KEPT_TOKENS, ForwardPasses, bar
from losslens.analysis.greedy_answers import ANSWERS, GreedyBenchmark
from losslens.analysis.interventions import Change, Intervention
from losslens.analysis.probe_set import TeacherForced
from losslens.config.analysis import Cka
from losslens.measures.connectivity import SequenceNll
from losslens.measures.forward import observe
from losslens.measures.outputs import factor_at_kl, kl
from losslens.updates.base import ThinSvd, Update
from losslens.updates.merging import Merge, merged
from losslens.updates.orthonormal import random_frame
from losslens.updates.restoring import leading_directions, only, random_directions, without, without_outputs

_PASS = ("kl", "nll", "norm")
# Runs scaled to one KL differ from it by less than this share, after this many measurements at most.
_KL_TOLERANCE, _MOST_STEPS = 0.02, 8


@dataclass(frozen=True)
class Effect:
    """Behaviour of changed weights.

    Attributes:
        norm: ‖ΔW‖_F of the changed update.
        kl: KL from the base to the changed model on the probe set, in nats per token.
        loss: The loss on each sequence of the probe set.
        correct: Whether each problem is answered correctly, by problem id; None if no problems are answered.
    """

    norm: float
    kl: float
    loss: SequenceNll
    correct: pd.Series | None


class InterventionPasses:
    """Measures interventions, after `ForwardPasses.observe`.

    Args:
        passes: The passes over the probe set.
        sequences: The probe set.
        settings: The settings of these passes.
        weights: The leading directions of W0.
        benchmark: The problems to answer; None for none.
        recorded: The answers of runs, and of the base (None), from their scores: correct or not, by problem id.

    Attributes:
        off_target: Runs that could not be given the smallest KL, with the ratio of the KL reached to it.
    """

    def __init__(
        self,
        passes: ForwardPasses,
        sequences: TeacherForced,
        settings: Cka,
        weights: BaseWeights,
        benchmark: GreedyBenchmark | None,
        recorded: Mapping[str | None, pd.Series],
    ) -> None:
        self._passes, self._sequences, self._settings = passes, sequences, settings
        self._weights, self._benchmark, self._recorded = weights, benchmark, recorded
        self._cache = passes.cache
        self._about = [passes.identity, sequences.key, KEPT_TOKENS]
        self.off_target: dict[str, float] = {}
        # Interventions on one run follow each other.
        self._svds = lru_cache(1)(self._decomposed)

    def measure(self, interventions: Sequence[Intervention]) -> dict[Change, Effect]:
        """Measures the changes that are not cached."""
        changes = list(dict.fromkeys(intervention.change for intervention in interventions))
        missing = [change for change in changes if self._pass(change) is None or self._answers(change) is None]
        for change in bar(missing, "interventions", "model"):
            with self._model(change) as (model, norm):
                if self._pass(change) is None:
                    self._observe(change, model, norm)
                if self._answers(change) is None:
                    self._answer(change, model)
        return {change: self._effect(change) for change in changes}

    def equal_kl_factors(self, names: Sequence[str]) -> dict[str, float]:
        """Finds the factor at which each run that changes the outputs has the smallest KL among them."""
        reached = {name: self._kl_of(Change((name,))) for name in names}
        reached = {name: value for name, value in reached.items() if value > 0}
        target = min(reached.values(), default=0.0)
        return {name: self._factor(name, reached[name], target) for name in bar(list(reached), "equal KL", "run")}

    def _factor(self, name: str, reached: float, target: float) -> float:
        if reached == target:
            return 1.0
        key = [self._about, self._passes.sha256(name), f"{target:.6g}", _KL_TOLERANCE, _MOST_STEPS]
        known = self._cache.load("equal_kl", key, ["factor", "kl"])
        if known is None:
            factor, there = factor_at_kl(
                lambda factor: self._kl_of(Change((name,), "scaled", factor)), reached, target, _KL_TOLERANCE,
                _MOST_STEPS,
            )  # fmt: skip
            known = self._cache.save("equal_kl", key, {"factor": factor, "kl": there})
        if abs(float(known["kl"]) / target - 1) >= _KL_TOLERANCE:
            self.off_target[name] = float(known["kl"]) / target
        return float(known["factor"])

    def _kl_of(self, change: Change) -> float:
        known = self._pass(change)
        if known is None:
            with self._model(change) as (model, norm):
                known = self._observe(change, model, norm)
        return float(known["kl"])

    def _effect(self, change: Change) -> Effect:
        passed, answers = self._pass(change), self._answers(change)
        assert passed is not None
        assert answers is not None
        correct = pd.Series(answers["correct"], index=answers["problem_id"]) if answers else None
        loss = SequenceNll(passed["nll"], self._base_loss.tokens)
        return Effect(float(passed["norm"]), float(passed["kl"]), loss, correct)

    @cached_property
    def _base_outputs(self) -> np.ndarray:
        return self._passes.observation(None, self._sequences, self._settings).log_probs

    @cached_property
    def _base_loss(self) -> SequenceNll:
        return self._passes.sequence_nll(None, self._sequences, self._settings)

    def _pass(self, change: Change) -> Arrays | None:
        """Loads `kl`, `nll` and `norm`; None if they have not been measured."""
        if not change.is_a_model:
            return self._cache.load("intervention", [self._about, *self._key(change)], _PASS)
        name = next(iter(change.runs), None)
        outputs = self._passes.observation(name, self._sequences, self._settings).log_probs
        nll = self._passes.sequence_nll(name, self._sequences, self._settings).nll
        norm = _norm(self._updates(change)) if change.runs else 0.0
        return {"kl": np.array(kl(self._base_outputs, outputs).mean()), "nll": nll, "norm": np.array(norm)}

    def _observe(self, change: Change, model: Any, norm: float) -> Arrays:
        tokens, kept = self._passes.tokens(self._sequences), self._passes.kept(self._sequences, self._settings)
        batches = list(observe(model, tokens, self._passes.batch_size, None, kept))
        outputs = np.concatenate([batch.log_probs for batch in batches])
        found = {
            "kl": np.array(kl(self._base_outputs, outputs).mean()),
            "nll": np.concatenate([batch.nll for batch in batches]),
            "norm": np.array(norm),
        }
        return self._cache.save("intervention", [self._about, *self._key(change)], found)

    def _answers(self, change: Change) -> Arrays | None:
        """Loads the answers; empty if no problems are answered, None if they have not been yet."""
        if self._benchmark is None:
            return {}
        if change.is_a_model:
            ids = [problem.id for problem in self._benchmark.problems]
            recorded = self._recorded.get(next(iter(change.runs), None))
            if recorded is not None and set(ids) <= set(recorded.index):
                return {"problem_id": np.array(ids), "correct": recorded.reindex(ids).to_numpy()}
        return self._cache.load("answers", [self._benchmark.key(self._passes), *self._key(change)], ANSWERS)

    def _answer(self, change: Change, model: Any) -> None:
        assert self._benchmark is not None
        answers = self._benchmark.answer(self._passes, model, str(change))
        self._cache.save("answers", [self._benchmark.key(self._passes), *self._key(change)], answers)

    def _key(self, change: Change) -> list[Any]:
        return [change.how, change.value, change.draw, *self._fingerprints(change)]

    def _fingerprints(self, change: Change) -> list[str]:
        """Returns the hashes of the adapters; sorted, since no merge depends on the order."""
        return sorted(self._passes.sha256(name) for name in change.runs)

    @contextmanager
    def _model(self, change: Change) -> Iterator[tuple[Any, float]]:
        """Yields the changed model and ‖ΔW‖_F."""
        if not change.runs:
            with self._passes.model(None) as model:
                yield model, 0.0
        else:
            updates = self._updates(change)
            with self._passes.with_updates(updates) as (model, set_weights):
                set_weights([1.0])
                yield model, _norm(updates)

    def _updates(self, change: Change) -> dict[str, Update]:
        """Returns the changed update of each module."""
        rng = np.random.default_rng([*(int(sha256[:16], 16) for sha256 in self._fingerprints(change)), change.draw])
        modules = self._passes.modules
        if len(change.runs) == 1 and change.how != "scaled":
            [name] = change.runs
            return {module: self._restored(change, module, self._svds(name)[module], rng) for module in modules}
        names = sorted(change.runs, key=self._passes.sha256)
        with ExitStack() as stack:
            adapters = [stack.enter_context(self._passes.point(name).open()) for name in names]
            if change.how == "scaled":
                return {module: change.value * adapters[0][module] for module in modules}
            first, second = adapters
            how: Merge = change.how  # type: ignore[assignment]
            return {module: merged(how, first[module], second[module], rng) for module in modules}

    def _restored(self, change: Change, module: str, svd: ThinSvd, rng: np.random.Generator) -> Update:
        count = int(change.value)
        out = len(svd.left)
        if change.how == "without_base_top":
            return without_outputs(svd, self._weights.principal(module, (out, len(svd.right))).left[:, :count])
        if change.how == "without_random_outputs":
            return without_outputs(svd, random_frame((out, count), rng))
        keep = only if change.how.startswith("only") else without
        top = change.how.endswith("top")
        return keep(svd, leading_directions(svd, count) if top else random_directions(svd, count, rng))

    def _decomposed(self, name: str) -> dict[str, ThinSvd]:
        with self._passes.point(name).open() as adapter:
            return {module: adapter[module].svd() for module in self._passes.modules}


def _norm(updates: Mapping[str, Update]) -> float:
    return float(np.sqrt(sum(update.inner(update) for update in updates.values())))
