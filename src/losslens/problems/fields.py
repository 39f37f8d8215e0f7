"""Names of fields as the user writes them: a source of problems does not know where in the configuration it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from losslens.core.errors import InputError
from losslens.problems import Problem, ProblemSource, Split, Verifier

if TYPE_CHECKING:
    import pandas as pd

# How a source's own message names a field: at its beginning, or as what would help.
_FIELD = re.compile(
    r"^(?=(?:path|eval_path|train|eval|source)[.=:])|(?<=\()(?=source\.columns\.)|(?<=; )(?=\w+=null takes all$)"
)


@contextmanager
def with_field_names(field: str) -> Iterator[None]:
    """Completes the names of fields in what is refused meanwhile: `eval_path=…` becomes `benchmark.file.eval_path=…`.

    Raises:
        InputError: As it was raised, with these names.
    """
    try:
        yield
    except InputError as error:
        error.args = (_FIELD.sub(f"{field}.", str(error)),)
        raise


class WithFieldNames:
    """A source of problems whose messages name the fields in full.

    Args:
        source: The source.
        field: Where it stands in the configuration: `data`, `benchmark.gsm8k`.
    """

    def __init__(self, source: ProblemSource, field: str) -> None:
        self._source = source
        self._field = field

    def __getattr__(self, name: str) -> Any:
        """What else the source has."""
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
