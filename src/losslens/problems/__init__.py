"""Problems: questions, reference answers and verifiers. One module per problem source."""

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
    """One question with its reference answer.

    Attributes:
        id: Stable identifier; the same question always has the same id.
        prompt: Text of the user turn, before any chat template.
        answer: The reference answer.
        metadata: Further data for the source's own scorer.
    """

    id: str
    prompt: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """The answer extracted from a completion, and the verifier's judgement.

    Attributes:
        answer: The answer found in the completion; None if there is none.
        correct: True if the answer is correct, with full marks.
        trouble: Why the answer could not be verified and counts as incorrect; empty if it was verified.
    """

    answer: str | None
    correct: bool
    trouble: str = ""


class Verifier(Protocol):
    """Verifies completions. It is sent to another process (`verification.py`), so it must be small and picklable.

    A verifier that has to reach a server declares `needs_network: ClassVar[bool] = True`; any other runs without
    network access.
    """

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges `completion` as an answer to `problem`; the caller limits the time."""
        ...


class ProblemSource(Protocol):
    """A set of problems with disjoint splits, and its verifier.

    LossLens's own sources inherit from this class. Since manifests may name them (`is_own_source`), none of their
    settings except `verifier` may name code.
    """

    def identity(self, split: Split) -> dict[str, Any]:
        """Returns the identity of the problems of a split: settings and content, but no path."""
        ...

    @property
    def verifier(self) -> Verifier:
        """Verifier of the answers to these problems."""
        ...

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """Selects `size` distinct problems of `split`; the same ones in the same order for the same `seed`.

        A smaller `size` selects the first of them: `eval_offset` relies on it.

        Args:
            split: The split.
            size: Number of problems; None for all.
            seed: Determines the selection and the order.

        Raises:
            InputError: The split has fewer problems, or the source cannot be read.
        """
        ...

    def rollouts(self) -> pd.DataFrame | None:
        """Returns the complete rollouts in the source; None if it contains only problems to sample rollouts for."""
        ...


def is_own_source(path: str) -> bool:
    """True if a Python path names one of LossLens's own problem sources; imports no other module."""
    module, _, name = path.rpartition(".")
    package, _, file = module.rpartition(".")
    if package != __name__ or file not in {info.name for info in iter_modules(__path__)}:
        return False
    source = vars(import_module(module)).get(name)
    return isinstance(source, type) and ProblemSource in source.__bases__


def module_of(verifier: Verifier) -> str:
    """Returns the module that a verifier needs: that of its class, or the one in its attribute `module`."""
    return str(getattr(verifier, "module", type(verifier).__module__))


def position(question: str) -> float:
    """Maps a question to a number in [0, 1) by the SHA-256 of its text; splits are divided by it, for any seed."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64


def question_hash(question: str) -> str:
    """Returns the hash of a question that is part of its problem's id."""
    return hash_text(question)[:12]
