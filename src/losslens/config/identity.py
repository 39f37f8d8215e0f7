"""Parts of a run's identity: the options that decide an adapter, as plain JSON (docs/reference/identity.md).

An option that is renamed, or one of whose values is, says by `Formerly` what it was called. Identities keep the old
words, so no run gets another folder; manifests of earlier runs are read in the new ones; and a command line that uses
an old word ends in one line that says the new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

# Raised when identities are written in another form: losses, the optimiser and rollouts have versions of their own.
FORMAT = 4


@dataclass(frozen=True)
class Formerly:
    """An earlier name of an option, in the annotation of its field.

    Attributes:
        name: The earlier name.
        values: Earlier words for values, by today's.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)


def formerly(section: type[BaseModel]) -> dict[str, Formerly]:
    """Earlier names of a section's options, by today's names."""
    return {
        name: mark
        for name, option in section.model_fields.items()
        for mark in option.metadata
        if isinstance(mark, Formerly)
    }


def in_current_words(section: type[BaseModel], recorded: Any) -> Any:
    """Recorded options of a section with the names and values of today; anything but a mapping comes back as it is."""
    if not isinstance(recorded, Mapping):
        return recorded
    found = dict(recorded)
    for name, mark in formerly(section).items():
        if mark.name in found:
            found[name] = current_value(mark, found.pop(mark.name))
    return found


def current_value(mark: Formerly, value: Any) -> Any:
    """Today's word for a recorded value."""
    return next((new for new, old in mark.values.items() if type(old) is type(value) and old == value), value)


def identity_options(section: BaseModel, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Options of a section that belong into an identity, as JSON values.

    An option without a default is always among them; one that has a default only where its value differs. So a new
    option with a default changes nothing that was made before it was there.

    Args:
        section: A checked part of the configuration, or a loss.
        leave_out: Options that decide nothing, or that are told in another way.
    """
    values, marks = section.model_dump(mode="json"), formerly(type(section))
    found = {}
    for name, option in type(section).model_fields.items():
        value, default = getattr(section, name), option.get_default(call_default_factory=True)
        is_default = not option.is_required() and type(value) is type(default) and value == default
        if name not in leave_out and not is_default:
            mark = marks.get(name)
            # A set has no order, but JSON does: the same one in every process.
            plain = sorted(values[name]) if isinstance(value, (set, frozenset)) else values[name]
            if mark is None:
                found[option.serialization_alias or option.alias or name] = plain
            else:
                found[mark.name] = mark.values.get(plain, plain) if isinstance(plain, str) else plain
    return found


def renamed(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Old and new paths of all options below a section."""
    for name, option in section.model_fields.items():
        kind = option.annotation
        for mark in option.metadata:
            if isinstance(mark, Formerly) and mark.name != name:
                yield f"{prefix}{mark.name}", f"{prefix}{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from renamed(kind, f"{prefix}{name}.")
