"""Parts of a run's identity: the options that determine an adapter, as plain JSON (docs/reference/identity.md).

A renamed option or value declares its earlier name with `Formerly`. Identities keep the earlier names, so that no run
changes its folder; manifests of earlier runs are read with the current names; and a command line that uses an earlier
name is refused with a line that gives the current one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

# Incremented when the format of identities changes; losses, the optimiser and rollouts have their own versions.
FORMAT = 4


@dataclass(frozen=True)
class Formerly:
    """An earlier name of an option, as an annotation of its field.

    Attributes:
        name: The earlier name.
        values: Maps current values to earlier ones.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)


def formerly(section: type[BaseModel]) -> dict[str, Formerly]:
    """Returns the earlier names of a section's options, by their current names."""
    return {
        name: mark
        for name, option in section.model_fields.items()
        for mark in option.metadata
        if isinstance(mark, Formerly)
    }


def in_current_words(section: type[BaseModel], recorded: Any) -> Any:
    """Translates recorded options of a section to current names and values; returns non-mappings unchanged."""
    if not isinstance(recorded, Mapping):
        return recorded
    current = dict(recorded)
    for name, mark in formerly(section).items():
        if mark.name in current:
            current[name] = current_value(mark, current.pop(mark.name))
    return current


def current_value(mark: Formerly, value: Any) -> Any:
    """Returns the current name of a recorded value."""
    return next((new for new, old in mark.values.items() if type(old) is type(value) and old == value), value)


def identity_options(section: BaseModel, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Returns the options of a section that are part of an identity, as JSON values.

    Options without a default are always included; those with a default only if their value differs from it. Hence
    adding an option with a default does not change existing identities.

    Args:
        section: A validated section of the configuration, or a loss.
        leave_out: Options that do not affect the result, or that the identity contains in another form.
    """
    values, marks = section.model_dump(mode="json"), formerly(type(section))
    options = {}
    for name, option in type(section).model_fields.items():
        value, default = getattr(section, name), option.get_default(call_default_factory=True)
        is_default = not option.is_required() and type(value) is type(default) and value == default
        if name not in leave_out and not is_default:
            mark = marks.get(name)
            # The iteration order of a set differs between processes.
            plain = sorted(values[name]) if isinstance(value, (set, frozenset)) else values[name]
            if mark is None:
                options[option.serialization_alias or option.alias or name] = plain
            else:
                options[mark.name] = mark.values.get(plain, plain) if isinstance(plain, str) else plain
    return options


def renamed(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the earlier and the current path of each renamed option in a section."""
    for name, option in section.model_fields.items():
        kind = option.annotation
        for mark in option.metadata:
            if isinstance(mark, Formerly) and mark.name != name:
                yield f"{prefix}{mark.name}", f"{prefix}{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from renamed(kind, f"{prefix}{name}.")
