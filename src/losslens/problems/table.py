"""Rows of a table as problems: the columns that must be there, what stands in a cell, which answers can be read."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from losslens.core.errors import InputError
from losslens.core.notices import say_once
from losslens.problems import Problem, Split, Verifier, position
from losslens.problems.mathematics import MathVerify
from losslens.problems.questions import normalise

# Of a set that is not divided, the questions whose text hashes into the last tenth are held out.
_TRAINED_ON = 0.9
_SECONDS_TO_READ = 10.0  # of one reference; one that takes longer cannot be read
_REFUSED_SHARE = 0.5  # of the references: when so many cannot be read, it is the rule and not an accident


# What others call the columns.
_ALSO_CALLED = {
    "prompt": ("question", "problem", "query", "instruction", "input"),
    "answer": ("final_answer", "expected_answer", "solution", "target", "gold", "label", "output"),
    "completion": ("response", "output", "generation", "text"),
    "reward": ("correct", "is_correct", "score", "label"),
}


def require_columns(where: str, present: Iterable[str], needed: Mapping[str, str]) -> None:
    """Refuses a table that lacks a column.

    Args:
        where: The file or dataset, for messages.
        present: The columns of the table.
        needed: What the columns that must be there are called, by what they are for.

    Raises:
        InputError: It does.
    """
    names = list(present)
    for role, name in needed.items():
        if name not in names:
            there = ", ".join(map(repr, names)) or "none"
            like = next((other for other in _ALSO_CALLED.get(role, ()) if other in names), "NAME")
            raise InputError(f"{where}: no column {name!r}; there are {there} (source.columns.{role}={like})")


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, or text without a letter."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return type(value).__name__ in ("NAType", "NaTType")


def cell(where: str, number: int, column: str, value: Any, listed: bool = False) -> str:
    """The text of a cell, by the one rule of all sources.

    Text is itself. A whole number is its digits; another number is written out (`0.00005`, never `5e-05`); true and
    false are `True` and `False`; a date is written as ISO 8601 has it.

    Args:
        where: The file or dataset, for messages.
        number: The row's number, from 1, for messages.
        column: The column.
        value: What stands there.
        listed: Whether a list of exactly one stands for its element, as data sets put their answers.

    Raises:
        InputError: Nothing stands there, or something else.
    """
    place = f"{where}: row {number}, column {column!r}"
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if not listed or len(value) != 1:
            raise InputError(
                f"{place}: {_shown(value)} is not text, but a list of {len(value)}; one value a cell, please"
            )
        return cell(where, number, column, value[0], listed)
    if is_missing(value):
        raise InputError(f"{place}: {'empty' if isinstance(value, str) else 'missing'}")
    if isinstance(value, Mapping):
        names = ", ".join(map(str, value))
        raise InputError(f"{place}: {_shown(value)} is not text or a number, but fields of its own ({names[:80]})")
    text = value if isinstance(value, str) else _written(value)
    if text is None:
        raise InputError(f"{place}: {_shown(value)} is not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half of a surrogate pair is no text") from error
    return text


def _written(value: Any) -> str | None:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return np.format_float_positional(value, trim="-") if np.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return f"{value.normalize():f}" if value.is_finite() else None
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def text_in(where: str, number: int, column: str, row: Mapping[str, Any], listed: bool = False) -> str:
    """The text of a row's cell (see `cell`).

    Raises:
        InputError: The cell is empty, or holds something else.
    """
    return cell(where, number, column, row.get(column), listed)


class Divided:
    """Parts the questions of an undivided set: nine tenths are trained on, by the hash of their text.

    Questions that differ only in spacing, case or Unicode form go where the first of them goes.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def is_in(self, question: str, split: Split) -> bool:
        """Whether a question is in `split`. Ask in the order of the rows."""
        first = self._first.setdefault(normalise(question), question)
        return (position(first) >= _TRAINED_ON) == (split == "eval")


def select_split(problems: Sequence[Problem], size: int | None, seed: int, where: str, split: Split) -> list[Problem]:
    """`size` of the problems (None: all) in an order drawn from `seed`.

    Raises:
        InputError: There are not so many, or none.
    """
    if not problems:
        raise InputError(f"{where}: no problem in it for split {split!r}")
    if size is not None and size > len(problems):
        kind = "held-out problem" if split == "eval" else "problem"
        kind += "" if len(problems) == 1 else "s"
        raise InputError(f"{split}={size}: {where} has {len(problems)} {kind}; {split}=null takes all")
    return [problems[i] for i in np.random.default_rng(seed).permutation(len(problems))[:size]]


def require_readable(where: str, verifier: Verifier, problems: Sequence[Problem]) -> None:
    """Says which references the verifier cannot read, and refuses them when it is the rule.

    Verifiers of one's own read what they like, and are not asked.

    Raises:
        InputError: At least half of the references cannot be read.
    """
    if not isinstance(verifier, MathVerify):
        return
    reads = _reader()
    unread = [problem for problem, is_read in zip(problems, reads(problems), strict=True) if not is_read]
    if not unread:
        return
    share = f"{len(unread)} of {len(problems)} references cannot be read"
    named = ", ".join(f"{_place(problem)} {_shown(problem.answer)}" for problem in sorted(unread, key=_row)[:3])
    named += ", …" if len(unread) > 3 else ""
    if len(unread) >= _REFUSED_SHARE * len(problems):
        raise InputError(
            f"{where}: {share}, so hardly any completion could be right: {named}; name the column of the bare answers, "
            "or a verifier of your own as source.verifier"
        )
    say_once(f"{where}: {share}, and only their very words are right: {named}")


def _row(problem: Problem) -> int:
    return int(problem.metadata.get("row", 0))


def _place(problem: Problem) -> str:
    return f"row {_row(problem)}" if _row(problem) else problem.id


@lru_cache(maxsize=1)
def _reader() -> Callable[[Sequence[Problem]], list[bool]]:
    """Reads references, each text once: the plain ones here, the rest where answers are checked."""
    from losslens.problems.mathematics import ReadsReference
    from losslens.problems.verification import verdicts

    known: dict[str, bool] = {}

    def reads(problems: Sequence[Problem]) -> list[bool]:
        rest: dict[str, Problem] = {}
        for problem in problems:
            if problem.answer not in known:
                if MathVerify.reads_plainly(problem.answer):
                    known[problem.answer] = True
                else:
                    rest[problem.answer] = problem
        asked = list(rest.values())
        found = verdicts(ReadsReference(), asked, [""] * len(asked), _SECONDS_TO_READ) if asked else []
        known.update({problem.answer: verdict.correct for problem, verdict in zip(asked, found, strict=True)})
        return [known[problem.answer] for problem in problems]

    return reads
