"""Problems: what is asked, what is right, and how an answer is checked. One file a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["pretrain", "train", "eval"]


@dataclass(frozen=True)
class Problem:
    """One question with its known answer.

    Attributes:
        id: Stable name, the same wherever the same question appears.
        prompt: The text of the user's turn, before any chat template.
        answer: The reference answer.
        metadata: What the source's own scorer needs besides the answer.
    """

    id: str
    prompt: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """What was read out of a completion, and whether it is right.

    Attributes:
        answer: The answer found in the completion; None when there is none.
        correct: Whether the source's scorer gave it full marks.
    """

    answer: str | None
    correct: bool


class ProblemSource(Protocol):
    """A set of problems with disjoint splits, and the verifier that belongs to it."""

    def problems(self, split: Split, size: int, seed: int) -> list[Problem]:
        """The same `size` distinct problems of `split` for the same `seed`, in the same order."""
        ...

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Checks the answer that `completion` gives to `problem`."""
        ...
