"""Forward passes of runs and of rotated copies of their updates: outputs and hidden states; all cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np

from losslens.analysis.cache import Arrays
from losslens.analysis.forward_passes import KEPT_TOKENS, ForwardPasses, SetWeights, bar, joined
from losslens.analysis.off_task import OffTaskText
from losslens.analysis.pairs import Pair
from losslens.analysis.probe_set import TeacherForced
from losslens.config.analysis import Cka
from losslens.core.errors import InputError, UnavailableError
from losslens.measures.behaviour import (
    Observation,
    OffTask,
    PairBehaviour,
    RotatedCopies,
    RunBehaviour,
    Shifted,
    pair_behaviour,
    representation_rank,
    run_behaviour,
)
from losslens.measures.forward import observe
from losslens.measures.outputs import factor_at_kl, kl
from losslens.updates.base import Update

_OFF_TASK = ("log_probs", "nll", "tokens")
_COPY = ("kl", "scaled_kl", "factor", "off_task_kl", "off_task_change", "log_probs", "states")
# A copy has a run's KL if it differs by less than this share, after this many steps at most.
_KL_TOLERANCE, _MOST_STEPS = 0.2, 4
_PAIR = ("output_cosine", "output_cosine_null", "js", "js_null", "shift_cosine", "shift_cosine_null")
# Memory for the shifts of runs, bytes; those of two runs are in memory whatever their size.
_SHIFTS_IN_MEMORY = 4 * 2**30


class BehaviourPasses:
    """Measures what runs do, after `ForwardPasses.observe`.

    Args:
        passes: The passes over the probe set.
        sequences: The probe set.
        settings: The settings of these passes.
        draws: Number of rotated copies of each run.

    Attributes:
        passes: The passes over the probe set.
        off_task: The off-task text.
        without_copies: Runs that have no rotated copies, with the reasons.
        off_target: Runs with a copy that could not be given their KL, with the ratio of the two.
    """

    def __init__(self, passes: ForwardPasses, sequences: TeacherForced, settings: Cka, draws: int) -> None:
        self.passes, self._sequences, self._settings, self._draws = passes, sequences, settings, draws
        self._cache = passes.cache
        self.off_task = OffTaskText(passes.positions)
        self.without_copies: dict[str, str] = {}
        self.off_target: dict[str, float] = {}
        self._about = [passes.identity, sequences.key, self.off_task.key, KEPT_TOKENS]
        self._base = passes.observation(None, sequences, settings)
        a_model = 2 * self._base.log_probs.nbytes + self._base.states.nbytes
        self._kl_of = cache(lambda name: self._kl(self._observation(name).log_probs))
        self._shifted = lru_cache(max(2, _SHIFTS_IN_MEMORY // ((1 + draws) * max(a_model, 1))))(self._shifts)

    @property
    def base_rank(self) -> float:
        """Representation rank of the base."""
        return representation_rank(self._base)

    def runs(self, names: Sequence[str]) -> dict[str, RunBehaviour]:
        """Compares each run with the base."""
        base = self._off_task(None)
        return {
            name: run_behaviour(self._base, self._observation(name), base, self._off_task(name), self._copies(name))
            for name in bar(names, "rotated copies", "run")
        }

    def pairs(self, pairs: Sequence[Pair]) -> dict[Pair, PairBehaviour]:
        """Compares the runs of each pair."""
        found = {}
        for a, b in bar(pairs, "outputs", "pair"):
            key = [self._about, self._draws, *sorted(self.passes.sha256(name) for name in (a, b))]
            known = self._cache.load("behaviour", key, _PAIR)
            if known is None:
                values = vars(pair_behaviour(self._shifted(a), self._shifted(b)))
                known = self._cache.save("behaviour", key, {name: values[name] for name in _PAIR})
            found[a, b] = PairBehaviour(
                float(known["output_cosine"]), float(known["output_cosine_null"]), float(known["js"]),
                float(known["js_null"]), known["shift_cosine"], known["shift_cosine_null"],
            )  # fmt: skip
        return found

    def _observation(self, name: str) -> Observation:
        return self.passes.observation(name, self._sequences, self._settings)

    def _shifts(self, name: str) -> Shifted:
        return Shifted(self._base, self._observation(name), self._copies(name).observations)

    @cached_property
    def _base_off_task(self) -> Arrays:
        """Outputs of the base on the off-task text, with the tokens that are kept."""
        return self._off_task_arrays(None)

    def _off_task(self, name: str | None) -> OffTask:
        known = self._base_off_task if name is None else self._off_task_arrays(name)
        return OffTask(known["log_probs"], known["nll"])

    def _off_task_arrays(self, name: str | None) -> Arrays:
        key = [self._about[0], self._about[2:], None if name is None else self.passes.sha256(name)]
        known = self._cache.load("off_task", key, _OFF_TASK)
        if known is None:
            with self.passes.model(name) as model:
                known = self._off_task_pass(model, None if name is None else self._base_off_task["tokens"])
            known = self._cache.save("off_task", key, known)
        return known

    def _off_task_pass(self, model: Any, kept: np.ndarray | None) -> Arrays:
        sequences = self.off_task.tokens(self.passes.tokenizer)
        self.passes.require("the off-task text", sequences)
        batches = list(observe(model, sequences, self.passes.batch_size, None, kept))
        return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in _OFF_TASK}

    def copy_key(self, name: str, draw: int) -> Any:
        """Returns a cache key of a rotated copy."""
        return [self._about, self.passes.sha256(name), draw]

    def copy_count(self, name: str) -> int:
        """Returns the number of rotated copies of a run: all draws, or none if it has none."""
        return len(self._copies(name).observations)

    @contextmanager
    def copy(self, name: str, draw: int) -> Iterator[Any]:
        """Yields the base with a rotated copy of a run's update, scaled to the run's KL; one of `copy_count`."""
        known = self._cache.load("rotated", self.copy_key(name, draw), _COPY)
        if known is None:
            raise InputError(f"{self._cache.folder}: what was just measured cannot be read")
        with self._rotated(name, draw) as (model, set_weights):
            set_weights([float(known["factor"])])
            yield model

    @contextmanager
    def _rotated(self, name: str, draw: int) -> Iterator[tuple[Any, SetWeights]]:
        """Yields the base with a weighted rotated copy of a run's update.

        Raises:
            UnavailableError: Updates of this kind have no rotated copies.
        """
        rng = np.random.default_rng([int(self.passes.sha256(name)[:16], 16), draw])
        point = self.passes.point(name)
        if point.is_whole:
            raise UnavailableError("a whole model changes more than the matrices that could be rotated")
        with ExitStack() as stack:
            adapter = stack.enter_context(point.open())
            rotated: dict[str, Update] = {}
            for module in self.passes.modules:
                if (copy := adapter[module].left_rotated(rng)) is None:
                    raise UnavailableError("such updates have no rotated copies")
                rotated[module] = copy
            yield stack.enter_context(self.passes.with_updates(rotated))

    def _copies(self, name: str) -> RotatedCopies:
        copies = []
        for draw in range(self._draws):
            known = self._cache.load("rotated", self.copy_key(name, draw), _COPY)
            if known is None:
                known = self._copy(name, draw)
                if known is None:
                    break
                known = self._cache.save("rotated", self.copy_key(name, draw), known)
            copies.append(known)
            share = float(known["scaled_kl"]) / self._kl_of(name)
            if abs(share - 1) >= _KL_TOLERANCE:
                self.off_target[name] = share
        return RotatedCopies(
            kl=np.array([copy["kl"] for copy in copies]),
            off_task_kl=np.array([copy["off_task_kl"] for copy in copies]),
            off_task_change=np.array([copy["off_task_change"] for copy in copies]),
            observations=tuple(Observation(copy["log_probs"], copy["states"]) for copy in copies),
        )

    def _copy(self, name: str, draw: int) -> Arrays | None:
        """Draws a copy and measures it twice, at the update's norm and at its KL; None if there can be none."""
        target = self._kl_of(name)
        if target == 0:
            self.without_copies[name] = "it changes no output"
            return None
        try:
            with self._rotated(name, draw) as (model, set_weights):
                kept = self.passes.kept(self._sequences, self._settings)
                sequences = self.passes.tokens(self._sequences)
                set_weights([1.0])
                batches = list(observe(model, sequences, self.passes.batch_size, None, kept))
                reached = self._kl(np.concatenate([batch.log_probs for batch in batches]))
                arrays = self._off_task_pass(model, self._base_off_task["tokens"])
                off_task = OffTask(arrays["log_probs"], arrays["nll"])
                if reached == 0:
                    self.without_copies[name] = "a rotated copy changes no output"
                    return None
                scaled: list[Observation] = []

                def kl_at(factor: float) -> float:
                    set_weights([factor])
                    scaled[:] = [joined(list(observe(model, sequences, self.passes.batch_size, "mean", kept)))]
                    return self._kl(scaled[0].log_probs)

                factor, there = factor_at_kl(kl_at, reached, target, _KL_TOLERANCE, _MOST_STEPS)
        except UnavailableError as error:
            self.without_copies[name] = str(error)
            return None
        base = self._off_task(None)
        numbers = {
            "kl": reached, "scaled_kl": there, "factor": factor, "off_task_kl": off_task.kl(base),
            "off_task_change": off_task.change(base),
        }  # fmt: skip
        return {**{name: np.array(number) for name, number in numbers.items()}, **vars(scaled[0])}

    def _kl(self, log_probs: np.ndarray) -> float:
        return float(kl(self._base.log_probs, log_probs).mean())
