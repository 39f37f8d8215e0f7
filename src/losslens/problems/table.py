"""Problems from the rows of a table: required columns, texts of cells, division into splits, readable references."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from losslens.core.errors import InputError
from losslens.core.notices import print_once
from losslens.problems import Problem, Split, Verifier, position
from losslens.problems.mathematics import MathVerify
from losslens.problems.questions import normalise

# Share of the questions, by hash, to train on in a dataset without splits; the others are held out.
_TRAIN_SHARE = 0.9
_REFERENCE_SECONDS = 10.0  # time limit for one reference; one that takes longer counts as unreadable
_REFUSED_SHARE = 0.5  # of the references; with this many unreadable ones, the column or verifier is wrong


# Common names of the columns in other datasets.
_COMMON_NAMES = {
    "prompt": ("question", "problem", "query", "instruction", "input"),
    "answer": ("final_answer", "expected_answer", "solution", "target", "gold", "label", "output"),
    "completion": ("response", "output", "generation", "text"),
    "reward": ("correct", "is_correct", "score", "label"),
}


def require_columns(where: str, present: Iterable[str], needed: Mapping[str, str]) -> None:
    """Checks that a table has all required columns.

    Args:
        where: The file or dataset, for messages.
        present: Columns of the table.
        needed: Names of the required columns, by role.

    Raises:
        InputError: A column is missing.
    """
    names = list(present)
    for role, name in needed.items():
        if name not in names:
            available = ", ".join(map(repr, names)) or "none"
            like = next((other for other in _COMMON_NAMES.get(role, ()) if other in names), "NAME")
            raise InputError(f"{where}: no column {name!r}; columns are {available} (source.columns.{role}={like})")


def is_missing(value: Any) -> bool:
    """True if a cell is empty: null, NaN, or whitespace."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return type(value).__name__ in ("NAType", "NaTType")


def cell_text(where: str, number: int, column: str, value: Any, listed: bool = False) -> str:
    """Converts a cell to text, in the same way for all sources.

    Strings are unchanged. Integers become their digits, other numbers positional decimals (`0.00005`, never `5e-05`),
    booleans `True` and `False`, and dates ISO 8601.

    Args:
        where: The file or dataset, for messages.
        number: Number of the row, from 1, for messages.
        column: The column, for messages.
        value: The cell.
        listed: Accepts a list with one element, in which some datasets put their answers.

    Raises:
        InputError: The cell is empty or of another type.
    """
    where_in = f"{where}: row {number}, column {column!r}"
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if not listed or len(value) != 1:
            raise InputError(f"{where_in}: {_shown(value)} is a list of {len(value)}; each cell must contain one value")
        return cell_text(where, number, column, value[0], listed)
    if is_missing(value):
        raise InputError(f"{where_in}: {'empty' if isinstance(value, str) else 'missing'}")
    if isinstance(value, Mapping):
        names = ", ".join(map(str, value))
        raise InputError(f"{where_in}: {_shown(value)} is a struct ({names[:80]}), not text or a number")
    text = value if isinstance(value, str) else _written(value)
    if text is None:
        raise InputError(f"{where_in}: {_shown(value)} is not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where_in}: the text contains a lone surrogate") from error
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


def row_text(where: str, number: int, column: str, row: Mapping[str, Any], listed: bool = False) -> str:
    """Converts a row's cell to text (see `cell_text`).

    Raises:
        InputError: The cell is empty or of another type.
    """
    return cell_text(where, number, column, row.get(column), listed)


class HashSplit:
    """Divides the questions of a dataset without splits by their hash: nine tenths for training, one held out.

    Questions that differ only in whitespace, case or Unicode form are put in the split of the first of them.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def is_in(self, question: str, split: Split) -> bool:
        """True if a question is in `split`. Must be called in the order of the rows."""
        first = self._first.setdefault(normalise(question), question)
        return (position(first) >= _TRAIN_SHARE) == (split == "eval")


def sample_problems(
    problems: Sequence[Problem], size: int | None, seed: int, where: str, split: Split
) -> list[Problem]:
    """Selects `size` of the problems (None: all) in random order, seeded by `seed`.

    Raises:
        InputError: There are fewer problems, or none.
    """
    if not problems:
        raise InputError(f"{where}: contains no problems for split {split!r}")
    if size is not None and size > len(problems):
        kind = "held-out problem" if split == "eval" else "problem"
        kind += "" if len(problems) == 1 else "s"
        raise InputError(f"{split}_size={size}: {where} has {len(problems)} {kind}; {split}_size=null uses all")
    return [problems[i] for i in np.random.default_rng(seed).permutation(len(problems))[:size]]


def require_readable(where: str, verifier: Verifier, problems: Sequence[Problem]) -> None:
    """Prints which references the verifier cannot parse, and refuses them if there are too many.

    User-defined verifiers are not checked.

    Raises:
        InputError: At least half of the references cannot be parsed.
    """
    if not isinstance(verifier, MathVerify):
        return
    reads = _reader()
    unreadable = [problem for problem, is_read in zip(problems, reads(problems), strict=True) if not is_read]
    if not unreadable:
        return
    share = f"{len(unreadable)} of {len(problems)} references cannot be parsed"
    examples = ", ".join(f"{_label(problem)} {_shown(problem.answer)}" for problem in sorted(unreadable, key=_row)[:3])
    examples += ", …" if len(unreadable) > 3 else ""
    if len(unreadable) >= _REFUSED_SHARE * len(problems):
        raise InputError(
            f"{where}: {share}, so hardly any completion could be correct: {examples}; set the column with the final "
            "answers, or your own source.verifier"
        )
    print_once(f"{where}: {share}; only verbatim answers are correct: {examples}")


def _row(problem: Problem) -> int:
    return int(problem.metadata.get("row", 0))


def _label(problem: Problem) -> str:
    return f"row {_row(problem)}" if _row(problem) else problem.id


@lru_cache(maxsize=1)
def _reader() -> Callable[[Sequence[Problem]], list[bool]]:
    """Returns a cached test if references can be parsed: plain ones here, others in the verification process."""
    from losslens.problems.mathematics import ReadsReference
    from losslens.problems.verification import verdicts

    known: dict[str, bool] = {}

    def reads(problems: Sequence[Problem]) -> list[bool]:
        others: dict[str, Problem] = {}
        for problem in problems:
            if problem.answer not in known:
                if MathVerify.reads_plainly(problem.answer):
                    known[problem.answer] = True
                else:
                    others[problem.answer] = problem
        rest = list(others.values())
        results = verdicts(ReadsReference(), rest, [""] * len(rest), _REFERENCE_SECONDS) if rest else []
        known.update({problem.answer: verdict.correct for problem, verdict in zip(rest, results, strict=True)})
        return [known[problem.answer] for problem in problems]

    return reads
