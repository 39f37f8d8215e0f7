"""Full option names in the messages of problem sources, which do not know their place in the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from losslens.core.errors import InputError
from losslens.problems import Problem, ProblemSource, Split, Verifier

if TYPE_CHECKING:
    import pandas as pd

# Places where a source's message names an option: at the beginning, or in the remedy.
_FIELD = re.compile(
    r"^(?=(?:path|eval_path|train_size|eval_size|source)[.=:])|(?<=\()(?=source\.columns\.)"
    r"|(?<=; )(?=\w+=null uses all$)"
)


@contextmanager
def with_field_names(field: str) -> Iterator[None]:
    """Completes option names in errors raised in the block: `eval_path=…` becomes `benchmark.file.eval_path=…`.

    Raises:
        InputError: The original error, with full names.
    """
    try:
        yield
    except InputError as error:
        error.args = (_FIELD.sub(f"{field}.", str(error)),)
        raise


class WithFieldNames:
    """A problem source whose messages contain full option names.

    Args:
        source: The source.
        field: Its key in the configuration: `data`, `benchmark.gsm8k`.
    """

    def __init__(self, source: ProblemSource, field: str) -> None:
        self._source = source
        self._field = field

    def __getattr__(self, name: str) -> Any:
        """Returns any other attribute of the source."""
        return getattr(self._source, name)

    def identity(self, split: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`."""
        with with_field_names(self._field):
            return self._source.identity(split)

    @property
    def verifier(self) -> Verifier:
        """See `ProblemSource.verifier`."""
        with with_field_names(self._field):
            return self._source.verifier

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        with with_field_names(self._field):
            return self._source.problems(split, size, seed)

    def rollouts(self) -> pd.DataFrame | None:
        """See `ProblemSource.rollouts`."""
        with with_field_names(self._field):
            return self._source.rollouts()
