"""Answers of models that no run has saved, generated greedily: the midpoints of two runs, and rotated copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from losslens.analysis.behaviour import BehaviourPasses
from losslens.analysis.cache import Arrays
from losslens.analysis.forward_passes import ForwardPasses
from losslens.analysis.pairs import Pair
from losslens.config.data import Data
from losslens.config.evaluation import Evaluation
from losslens.core.errors import InputError, UnavailableError
from losslens.evaluation.outcomes import evaluate
from losslens.problems import Problem, ProblemSource
from losslens.rollouts.sample import held_out_problems, problem_source

# Arrays of each cached answer.
ANSWERS = ("problem_id", "correct")


@dataclass(frozen=True)
class GreedyBenchmark:
    """Held-out problems that changed models answer greedily.

    Attributes:
        data: The data set.
        evaluation: The decoding of the runs' own scores.
        source: The source of the problems.
        problems: The problems.
    """

    data: Data
    evaluation: Evaluation
    source: ProblemSource
    problems: Sequence[Problem]

    @classmethod
    def first_of(cls, data: Data, evaluation: Evaluation, count: int | None) -> GreedyBenchmark:
        """Loads the first `count` held-out problems; None: all.

        Raises:
            UnavailableError: The problems cannot be loaded.
        """
        try:
            return cls(data, evaluation, problem_source(data), held_out_problems(data)[:count])
        except InputError as error:
            raise UnavailableError(str(error)) from error

    def key(self, passes: ForwardPasses) -> list[Any]:
        """Returns what decides the answers of a given model, for cache keys."""
        about = [passes.identity, self.source.identity("eval"), self.data.seed, len(self.problems)]
        about += [self.evaluation.max_tokens, self.evaluation.batch_size if passes.half_precision else None]
        about += [self.data.eval_offset] if self.data.eval_offset else []
        return about + ([self.data.verification] if self.data.verification else [])

    def answer(self, passes: ForwardPasses, model: Any, description: str) -> Arrays:
        """Answers the problems greedily; returns `ANSWERS`."""
        outcomes = evaluate(
            model,
            passes.tokenizer,
            self.source.verifier,
            self.problems,
            max_tokens=self.evaluation.max_tokens,
            batch_size=self.evaluation.batch_size,
            seconds=self.data.verify_seconds,
            description=description,
        )
        return {
            "problem_id": outcomes["problem_id"].to_numpy(dtype=str),
            "correct": outcomes["correct"].to_numpy(dtype=bool),
        }


def midpoints(passes: ForwardPasses, pairs: Sequence[Pair], benchmark: GreedyBenchmark) -> dict[Pair, pd.Series]:
    """Scores ½ΔW_a + ½ΔW_b of each pair; True for correct answers, by problem id."""
    found = {}
    for number, pair in enumerate(pairs, 1):
        key = [benchmark.key(passes), *sorted(passes.sha256(name) for name in pair)]
        known = passes.cache.load("midpoint", key, ANSWERS)
        if known is None:
            with passes.between(pair) as (model, set_weights):
                set_weights([0.5, 0.5])
                known = benchmark.answer(passes, model, f"midpoint {number} of {len(pairs)}")
            known = passes.cache.save("midpoint", key, known)
        found[pair] = pd.Series(known["correct"], index=known["problem_id"])
    return found


def copy_answers(
    behaviour: BehaviourPasses, names: Sequence[str], draws: int, benchmark: GreedyBenchmark
) -> dict[str, list[pd.Series]]:
    """Scores the first `draws` rotated copies of each run, at its KL; True for correct answers, by problem id.

    Runs without such copies are left out.
    """
    passes = behaviour.passes
    found: dict[str, list[pd.Series]] = {}
    for name in names:
        for draw in range(min(draws, behaviour.copy_count(name))):
            key = [benchmark.key(passes), behaviour.copy_key(name, draw)]
            known = passes.cache.load("copy_answers", key, ANSWERS)
            if known is None:
                with behaviour.copy(name, draw) as model:
                    known = benchmark.answer(passes, model, f"{name}, copy {draw + 1} of {draws}")
                known = passes.cache.save("copy_answers", key, known)
            found.setdefault(name, []).append(pd.Series(known["correct"], index=known["problem_id"]))
    return found
