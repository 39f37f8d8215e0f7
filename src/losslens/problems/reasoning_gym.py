"""Procedurally generated problems from the reasoning-gym library, verified by each task's own scorer."""

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

# The hash of a question determines its split, whatever seed generated it, so that splits never share a question.
# Separate seeds do not ensure this: reasoning-gym generates item i from seed + i, so neighbouring seeds overlap.
_DRAWS_PER_PROBLEM = 1000
_MAX_FAILED_DRAWS = 200_000  # in a row
_CHUNK = 10_000
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# Tasks whose scorers evaluate the answer with `eval` or `sympy.parse_expr`, and the condition that it must meet first.
_EVALUATED: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), is_literal),
    **dict.fromkeys(("countdown", "puzzle24"), is_arithmetic),
    **dict.fromkeys(("intermediate_integration", "polynomial_multiplication", "simple_integration"), is_formula),
}

Reading = Literal["answer_tag", "last_number", "last_word"]


def split_of(question: str, pretrain_share: float = 0.0) -> Split:
    """Returns the split of `question`; questions not reserved for pretraining are halved between train and eval."""
    at = position(question)
    if at < pretrain_share:
        return "pretrain"
    return "train" if at < (1 + pretrain_share) / 2 else "eval"


class ReasoningGym(ProblemSource):
    """One reasoning-gym task at one difficulty.

    Args:
        task: Name of the task, for example `chain_sum`.
        difficulty: Parameters of the task, for example `{"min_terms": 3}`; None: its defaults.
        template: Template of the prompt, which contains `{question}`.
        reads: Final answer of a completion: the content of the last `<answer>…</answer>`, as reasoning-gym requests it,
            or the last number or last word, for models that do not write tags.
        pretrain_share: Share of the questions excluded from both splits, on which the embedded models were pretrained.
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
            raise InputError(f"source.pretrain_share must be at least 0 and less than 1, not {pretrain_share!r}")
        if "{question}" not in template:
            raise InputError("source.template must contain {question}")
        if reads not in ("answer_tag", "last_number", "last_word"):
            raise InputError(f"source.reads must be answer_tag, last_number or last_word, not {reads!r}")

    def identity(self, _: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`."""
        names = (
            "task",
            "difficulty",
            "template",
            "reads",
            "pretrain_share",
        )  # include a new option only if it differs from its default
        return {"source": "reasoning_gym", **{name: getattr(self, name) for name in names}}

    @property
    def verifier(self) -> TaskScorer:
        """See `ProblemSource.verifier`."""
        return TaskScorer(self.task, json.dumps(self.difficulty, sort_keys=True), self.reads)

    def rollouts(self) -> None:
        """See `ProblemSource.rollouts`; always None."""

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        if size is None:
            raise InputError(f"source.task={self.task} generates any number of problems; set how many")
        problems: dict[str, Problem] = {}
        failed = 0
        # Only shown if it takes longer than two seconds.
        bar = tqdm(total=size, desc="problems", unit="problem", leave=False, delay=2, dynamic_ncols=True)
        for entry in self._draws(seed, _DRAWS_PER_PROBLEM * size):
            if len(problems) == size or failed == _MAX_FAILED_DRAWS:
                break
            question = entry["question"]
            failed += 1
            if question in problems or split_of(question, self.pretrain_share) != split:
                continue
            failed = 0
            bar.update()
            problems[question] = Problem(
                id=f"{self.task}-{question_hash(question)}",
                prompt=self.template.replace("{question}", question),
                answer=entry["answer"],
                metadata=entry,
            )
        bar.close()
        if len(problems) < size:
            raise InputError(
                f"source.task={self.task}: only {len(problems)} distinct problems in split {split!r}, not {size}; "
                "increase the difficulty or request fewer"
            )
        return list(problems.values())

    def _draws(self, seed: int, most: int) -> Iterator[dict[str, Any]]:
        """Yields the first `most` items of the stream of `seed`, in chunks, since some tasks prepare whole datasets."""
        # Spaced so that the streams of different seeds do not overlap.
        start = seed * 100_000_000
        for offset in range(0, most, _CHUNK):
            dataset = _dataset(self.task, self.difficulty, start + offset)
            for index in range(min(_CHUNK, most - offset)):
                yield dataset[index]


@dataclass(frozen=True)
class TaskScorer:
    """The verifier of a task: its own scorer; partial credit counts as incorrect.

    If the scorer evaluates answers, any answer that is neither a literal nor a formula is incorrect without evaluation.

    Attributes:
        task: Name of the task.
        difficulty: Parameters of the task as JSON.
        reads: See `ReasoningGym`.
    """

    task: str
    difficulty: str
    reads: Reading

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`."""
        answer = final_answer(completion, self.reads)
        if answer is None:
            return Verdict(None, False)
        # A composite task passes the answer to the scorer of the problem's own task.
        tasks = {self.task, str(problem.metadata.get("metadata", {}).get("source_dataset"))}
        if not all(_EVALUATED[task](answer) for task in tasks & _EVALUATED.keys()):
            return Verdict(answer, False)
        score = _scorer(self.task, self.difficulty).score_answer(answer, problem.metadata)
        return Verdict(answer, bool(score >= 1.0))


def final_answer(completion: str, reads: Reading) -> str | None:
    """Extracts the final answer from a completion; None if there is none."""
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
        raise InputError(f"source.task={task}: reasoning-gym has no such task; similar names: {near}")
    parameters = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    for name in difficulty:
        if name not in parameters:
            raise InputError(f"source.difficulty.{name}: {task} has no such parameter; it has {', '.join(parameters)}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **difficulty)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise InputError(f"source.task={task}: {first_line(error)}") from error
