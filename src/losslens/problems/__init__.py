"""Problems: what is asked, what is right, and how an answer is checked. One file a source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal, Protocol

from losslens.core.hashing import hash_text

if TYPE_CHECKING:
    import pandas as pd

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
        correct: Whether the verifier gave it full marks.
        trouble: Why it could not be checked, and so counts as wrong; empty when it was.
    """

    answer: str | None
    correct: bool
    trouble: str = ""


class Verifier(Protocol):
    """Checks a completion. It is sent to another process (`verification.py`), so it is small and can be pickled.

    One that has to reach a server says so by an attribute, `needs_network: ClassVar[bool] = True`; without it, it is
    checked where there is no network.
    """

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """The verdict on `completion` as an answer to `problem`; it may take as long as it likes."""
        ...


class ProblemSource(Protocol):
    """A set of problems with disjoint splits, and the verifier that belongs to it.

    A class of LossLens's own inherits from it: a manifest may name it (`is_own_source`), so none of its values but
    `verifier` names code.
    """

    def identity(self, split: Split) -> dict[str, Any]:
        """What tells the problems of a split from others: settings and content, no path."""
        ...

    @property
    def verifier(self) -> Verifier:
        """Checks the answers to these problems."""
        ...

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """The same `size` distinct problems of `split` for the same `seed`, in the same order.

        Args:
            split: Which of them.
            size: How many; None for all that there are.
            seed: Which of them, and their order.

        Raises:
            InputError: There are not so many, or the source cannot be read.
        """
        ...

    def rollouts(self) -> pd.DataFrame | None:
        """The complete rollouts that the source holds; None when it holds problems only, to be sampled."""
        ...


def is_own_source(path: str) -> bool:
    """Whether a Python path is that of a source of problems that comes with LossLens; no other module is imported."""
    module, _, name = path.rpartition(".")
    package, _, file = module.rpartition(".")
    if package != __name__ or file not in {each.name for each in iter_modules(__path__)}:
        return False
    found = vars(import_module(module)).get(name)
    return isinstance(found, type) and ProblemSource in found.__bases__


def module_of(verifier: Verifier) -> str:
    """The module that a verifier needs: its class's own, or that of what it stands for (its attribute `module`)."""
    return str(getattr(verifier, "module", type(verifier).__module__))


def position(question: str) -> float:
    """Where a question lies between 0 and 1, by the SHA-256 of its text; splits are cut there, whatever the seed."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64


def question_hash(question: str) -> str:
    """The hash that a question is known by in ids."""
    return hash_text(question)[:12]
