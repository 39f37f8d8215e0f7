"""Procedural problems from the reasoning-gym library, checked by each task's own scorer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

from tqdm import tqdm

from losslens.core.errors import InputError, first_line
from losslens.problems import Problem, ProblemSource, Split, Verdict, position, question_hash
from losslens.problems.plain import is_arithmetic, is_formula, is_literal

# A question belongs to the split that its text hashes into, whatever seed drew it, so that no two splits can share a
# question. Seeds alone cannot give this: reasoning-gym draws item i from seed + i, so neighbouring seeds overlap.
_DRAWS_PER_PROBLEM = 1000
_DRAWS_IN_VAIN = 200_000
_CHUNK = 10_000
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# The tasks whose scorers evaluate the answer, with `eval` or `sympy.parse_expr`, and what it has to be before they may.
_EVALUATED: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), is_literal),
    **dict.fromkeys(("countdown", "puzzle24"), is_arithmetic),
    **dict.fromkeys(("intermediate_integration", "polynomial_multiplication", "simple_integration"), is_formula),
}

Reading = Literal["answer_tag", "last_number", "last_word"]


def split_of(question: str, pretrain_share: float = 0.0) -> Split:
    """The split that `question` belongs to: what is not kept for pretraining is halved."""
    where = position(question)
    if where < pretrain_share:
        return "pretrain"
    return "train" if where < (1 + pretrain_share) / 2 else "eval"


class ReasoningGym(ProblemSource):
    """One reasoning-gym task at one difficulty.

    Args:
        task: Name of the task, for example `chain_sum`.
        difficulty: The task's own settings, for example `{"min_terms": 3}`; None: its defaults.
        template: The prompt, with `{question}` in it.
        reads: What of a completion is the final answer: the last `<answer>…</answer>`, as reasoning-gym asks for it, or
            for models that do not write tags, its last number or its last word.
        pretrain_share: Share of the questions that is kept from both splits: the embedded models were made with it.
    """

    def __init__(
        self,
        task: str,
        difficulty: dict[str, Any] | None,
        template: str = "{question}",
        reads: Reading = "answer_tag",
        pretrain_share: float = 0.0,
    ) -> None:
        self.task = task
        self.difficulty = difficulty or {}
        self.template = template
        self.reads = reads
        self.pretrain_share = pretrain_share
        if not 0 <= pretrain_share < 1:
            raise InputError(f"source.pretrain_share: at least 0 and below 1, got {pretrain_share!r}")
        if "{question}" not in template:
            raise InputError("source.template: no {question} in it")
        if reads not in ("answer_tag", "last_number", "last_word"):
            raise InputError(f"source.reads: answer_tag, last_number or last_word, got {reads!r}")

    def identity(self, _: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`."""
        names = (
            "task",
            "difficulty",
            "template",
            "reads",
            "pretrain_share",
        )  # a new option: only where it is not default
        return {"source": "reasoning_gym", **{name: getattr(self, name) for name in names}}

    @property
    def verifier(self) -> TaskScorer:
        """See `ProblemSource.verifier`."""
        return TaskScorer(self.task, json.dumps(self.difficulty, sort_keys=True), self.reads)

    def rollouts(self) -> None:
        """See `ProblemSource.rollouts`: there are none."""

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        if size is None:
            raise InputError(f"source.task={self.task}: its problems are drawn without end; say how many")
        found: dict[str, Problem] = {}
        in_vain = 0
        # The bar is for what takes longer than a moment.
        bar = tqdm(total=size, desc="problems", unit="problem", leave=False, delay=2, dynamic_ncols=True)
        for entry in self._draws(seed, _DRAWS_PER_PROBLEM * size):
            if len(found) == size or in_vain == _DRAWS_IN_VAIN:
                break
            question = entry["question"]
            in_vain += 1
            if question in found or split_of(question, self.pretrain_share) != split:
                continue
            in_vain = 0
            bar.update()
            found[question] = Problem(
                id=f"{self.task}-{question_hash(question)}",
                prompt=self.template.replace("{question}", question),
                answer=entry["answer"],
                metadata=entry,
            )
        bar.close()
        if len(found) < size:
            raise InputError(
                f"source.task={self.task}: only {len(found)} distinct problems in split {split!r}, not {size}; "
                "raise the difficulty or ask for fewer"
            )
        return list(found.values())

    def _draws(self, seed: int, most: int) -> Iterator[dict[str, Any]]:
        """The first `most` items of the endless stream of `seed`; some tasks prepare a whole dataset, so by chunks."""
        # Far apart, so that the streams of different seeds do not overlap.
        start = seed * 100_000_000
        for offset in range(0, most, _CHUNK):
            dataset = _dataset(self.task, self.difficulty, start + offset)
            for index in range(min(_CHUNK, most - offset)):
                yield dataset[index]


@dataclass(frozen=True)
class TaskScorer:
    """The verifier of a task: its own scorer; partial credit counts as wrong.

    Where that scorer would evaluate an answer that is neither literal nor formula, the answer is wrong unseen.

    Attributes:
        task: Name of the task.
        difficulty: The task's settings as JSON.
        reads: As for `ReasoningGym`.
    """

    task: str
    difficulty: str
    reads: Reading

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`."""
        answer = final_answer(completion, self.reads)
        if answer is None:
            return Verdict(None, False)
        # A composite task hands the answer on to the scorer of the task that the problem is from.
        tasks = {self.task, str(problem.metadata.get("metadata", {}).get("source_dataset"))}
        if not all(_EVALUATED[task](answer) for task in tasks & _EVALUATED.keys()):
            return Verdict(answer, False)
        score = _scorer(self.task, self.difficulty).score_answer(answer, problem.metadata)
        return Verdict(answer, bool(score >= 1.0))


def final_answer(completion: str, reads: Reading) -> str | None:
    """The final answer in a completion; None when there is none."""
    if reads == "answer_tag":
        from reasoning_gym.utils import extract_answer

        found: str | None = extract_answer(completion)
        return found
    if reads == "last_number":
        numbers = _NUMBER.findall(completion)
        return numbers[-1].replace(",", "") if numbers else None
    words = re.findall(r"\w+", completion)
    return words[-1] if words else None


@lru_cache(maxsize=8)
def _scorer(task: str, difficulty: str) -> Any:
    return _dataset(task, json.loads(difficulty), seed=0, size=1)


def _dataset(task: str, difficulty: dict[str, Any], seed: int, size: int = _CHUNK) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = ", ".join(get_close_matches(task, DATASETS, 5, 0)) or "none"
        raise InputError(f"source.task={task}: reasoning-gym has no such task; near it are {near}")
    knobs = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    for name in difficulty:
        if name not in knobs:
            raise InputError(f"source.difficulty.{name}: {task} has no such knob; it has {', '.join(knobs)}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **difficulty)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise InputError(f"source.task={task}: {first_line(error)}") from error
