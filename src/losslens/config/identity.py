"""Parts of a run's identity: what of a configuration decides an adapter, as plain JSON (docs/identity.md)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

# Raised when identities are written in another form: losses, the optimiser and rollouts have versions of their own.
FORMAT = 4


def identity_options(section: BaseModel, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Options of a section that belong into an identity, as JSON values.

    An option without a default is always among them; one that has a default only where its value differs. So a new
    option with a default changes nothing that was made before it was there. An option that gets another name keeps
    the one of before as its `alias`.

    Args:
        section: A checked part of the configuration, or a loss.
        leave_out: Options that decide nothing, or that are told in another way.
    """
    values = section.model_dump(mode="json", by_alias=True)
    found = {}
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), field.get_default(call_default_factory=True)
        is_default = not field.is_required() and type(value) is type(default) and value == default
        if name not in leave_out and not is_default:
            key = field.serialization_alias or field.alias or name
            # What has no order has one here, the same in every process.
            found[key] = sorted(values[key]) if isinstance(value, (set, frozenset)) else values[key]
    return found


def with_loss_options(identity: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with all options of the loss, those at their defaults too: what a reader is shown.

    Args:
        identity: Of the run.
        options: Of its loss, as its manifest has them.
    """
    return {**identity, "method": {**identity["method"], **options}}
