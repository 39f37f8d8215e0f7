"""Procedural problems from the reasoning-gym library, checked by each task's own scorer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from losslens.errors import InputError, first_line
from losslens.problems import Problem, Split, Verdict

# A question belongs to the split that its text hashes into, whatever seed drew it, so that no two splits can share a
# question. Seeds alone cannot give this: reasoning-gym draws item i from seed + i, so neighbouring seeds overlap.
_SPLIT_ENDS: dict[Split, float] = {"pretrain": 0.8, "train": 0.9, "eval": 1.0}
_DRAWS_PER_PROBLEM = 1000
_CHUNK = 10_000


def split_of(question: str) -> Split:
    """The split that `question` belongs to, from the SHA-256 of its text."""
    position = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in _SPLIT_ENDS.items() if position < end)


class ReasoningGym:
    """One reasoning-gym task at one difficulty.

    Args:
        task: Name of the task, for example `chain_sum`.
        difficulty: The task's own settings, for example `{"min_terms": 3}`.
        instruction: Text put after each question; empty for models that answer in the expected form by themselves.

    The final answer is what stands in the last `<answer>…</answer>` of a completion.
    """

    def __init__(self, task: str, difficulty: dict[str, Any], instruction: str = "") -> None:
        self.task = task
        self.difficulty = difficulty
        self.instruction = instruction
        self._scorer = self._dataset(seed=0)

    def _dataset(self, seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self.task, seed=seed, size=_CHUNK, **self.difficulty)
        except (ValueError, TypeError, AssertionError) as error:
            raise InputError(f"data.source.task={self.task}: {first_line(error)}") from error

    def problems(self, split: Split, size: int, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`.

        Raises:
            InputError: The task cannot give so many distinct problems.
        """
        found: dict[str, Problem] = {}
        for entry in self._draws(seed, _DRAWS_PER_PROBLEM * size):
            if len(found) == size:
                break
            question = entry["question"]
            if question in found or split_of(question) != split:
                continue
            found[question] = Problem(
                id=f"{self.task}-{hashlib.sha256(question.encode()).hexdigest()[:12]}",
                prompt=f"{question}\n{self.instruction}" if self.instruction else question,
                answer=entry["answer"],
                metadata=entry,
            )
        if len(found) < size:
            raise InputError(
                f"data.source.task={self.task}: only {len(found)} distinct problems in split {split!r}, not {size}; "
                "raise the difficulty or ask for fewer"
            )
        return list(found.values())

    def _draws(self, seed: int, most: int) -> Iterator[dict[str, Any]]:
        """The first `most` items of the endless stream of `seed`; some tasks prepare a whole dataset, so by chunks."""
        # Far apart, so that the streams of different seeds do not overlap.
        start = seed * 100_000_000
        for offset in range(0, most, _CHUNK):
            dataset = self._dataset(start + offset)
            for index in range(min(_CHUNK, most - offset)):
                yield dataset[index]

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """See `ProblemSource.verify`. Partial credit of a scorer counts as wrong."""
        answer = extract_answer(completion)
        return Verdict(answer, bool(self._scorer.score_answer(answer, problem.metadata) >= 1.0))
