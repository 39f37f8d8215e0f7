"""What a manifest records, as configuration again: values alone. Nothing that it names is imported, obeyed or asked.

A run folder may be a stranger's. Classes, permission to run code, servers and the keys for them come from the command
line of whoever reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from losslens.config.data import Data
from losslens.config.model import Model
from losslens.core.errors import UnavailableError
from losslens.problems import is_own_source

# What names code in a section of the configuration.
_NAMES_CODE = ("_target_", "verifier")


@dataclass(frozen=True)
class Trust:
    """What this command line lets a manifest ask for.

    Attributes:
        remote_code: Whether code that comes with the base may run.
        sources: Classes of problems of one's own, and of their verifiers, that a manifest may name.
    """

    remote_code: bool = False
    sources: tuple[str, ...] = ()


def model_of(recorded: Mapping[str, Any], trust: Trust) -> Model:
    """The base of a run; whether its own code may run is not for the manifest to say.

    Raises:
        ValidationError: It is not the configuration of a model.
    """
    return Model.model_validate({**recorded, "trust_remote_code": trust.remote_code})


def data_of(recorded: Mapping[str, Any], trust: Trust) -> Data:
    """The problems of a run.

    Raises:
        ValidationError: They are not the configuration of problems.
        UnavailableError: It names code that this command line does not name.
    """
    data = Data.model_validate(recorded)
    for name in _code_named_in(data.model_dump()):
        if name not in trust.sources and not is_own_source(name):
            raise UnavailableError(
                f"the manifest names code for the problems, {name[:100]!r}, which is not run unless this command line "
                "names it too, as sources=[…]"
            )
    return data


def _code_named_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key in _NAMES_CODE and entry is not None and not isinstance(entry, Mapping):
                yield str(entry)
            yield from _code_named_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _code_named_in(entry)
