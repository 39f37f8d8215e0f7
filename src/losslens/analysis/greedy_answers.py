"""Answers of models that no run has saved, generated greedily: the midpoints of two runs, and rotated copies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import pandas as pd

from losslens.analysis.behaviour import BehaviourPasses
from losslens.analysis.forward_passes import ForwardPasses
from losslens.analysis.pairs import Pair
from losslens.config.data import Data
from losslens.config.evaluation import Evaluation
from losslens.core.errors import InputError, UnavailableError
from losslens.evaluation.outcomes import evaluate
from losslens.problems import Problem
from losslens.rollouts.sample import held_out_problems, problem_source


class GreedyAnswers:
    """Answers held-out problems as a run is scored; all outcomes are cached.

    Args:
        passes: The base and the adapters.
        data: The problems.
        evaluation: How the runs were scored.
    """

    def __init__(self, passes: ForwardPasses, data: Data, evaluation: Evaluation) -> None:
        self._passes, self._data, self._evaluation = passes, data, evaluation

    def midpoints(self, pairs: Sequence[Pair], count: int) -> dict[Pair, pd.Series]:
        """Scores ½ΔW_a + ½ΔW_b on the first `count` problems; True for correct answers, by problem id.

        Raises:
            UnavailableError: The problems cannot be read.
        """
        problems = self._problems[:count]
        found = {}
        for number, pair in enumerate(pairs, 1):
            key = [self._about(problems), *sorted(self._passes.sha256(name) for name in pair)]
            outcomes = self._load("midpoint", key)
            if outcomes is None:
                with ExitStack() as stack:
                    model, set_weights = stack.enter_context(self._passes.between(pair))
                    set_weights([0.5, 0.5])
                    outcomes = self._answer("midpoint", key, model, problems, f"midpoint {number} of {len(pairs)}")
            found[pair] = outcomes
        return found

    def copies(self, behaviour: BehaviourPasses, names: Sequence[str], draws: int) -> dict[str, list[pd.Series]]:
        """Scores the first `draws` rotated copies of each run, at its KL; True for correct answers, by problem id.

        Runs without such copies are left out.

        Raises:
            UnavailableError: The problems cannot be read.
        """
        found: dict[str, list[pd.Series]] = {}
        for name in names:
            for draw in range(min(draws, behaviour.copy_count(name))):
                key = [self._about(self._problems), behaviour.copy_key(name, draw)]
                outcomes = self._load("copy_answers", key)
                if outcomes is None:
                    with behaviour.copy(name, draw) as model:
                        label = f"{name}, copy {draw + 1} of {draws}"
                        outcomes = self._answer("copy_answers", key, model, self._problems, label)
                found.setdefault(name, []).append(outcomes)
        return found

    @cached_property
    def _problems(self) -> list[Problem]:
        try:
            return held_out_problems(self._data)
        except InputError as error:
            raise UnavailableError(str(error)) from error

    def _about(self, problems: Sequence[Problem]) -> list[Any]:
        data, evaluation = self._data, self._evaluation
        batch = evaluation.batch_size if self._passes.half_precision else None
        about = [self._passes.identity, problem_source(data).identity("eval"), data.seed, len(problems)]
        about += [evaluation.max_tokens, batch]
        about += [data.eval_offset] if data.eval_offset else []
        return about + ([data.verification] if data.verification else [])

    def _load(self, kind: str, key: Any) -> pd.Series | None:
        known = self._passes.cache.load(kind, key, ["problem_id", "correct"])
        return None if known is None else pd.Series(known["correct"], index=known["problem_id"])

    def _answer(self, kind: str, key: Any, model: Any, problems: Sequence[Problem], description: str) -> pd.Series:
        outcomes = evaluate(
            model,
            self._passes.tokenizer,
            problem_source(self._data).verifier,
            problems,
            max_tokens=self._evaluation.max_tokens,
            batch_size=self._evaluation.batch_size,
            seconds=self._data.verify_seconds,
            description=description,
        )
        found = {
            "problem_id": outcomes["problem_id"].to_numpy(dtype=str),
            "correct": outcomes["correct"].to_numpy(dtype=bool),
        }
        self._passes.cache.save(kind, key, found)
        return pd.Series(found["correct"], index=found["problem_id"])
