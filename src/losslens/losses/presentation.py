"""Presentation of losses in tables, plots and pages: built-in losses by their classes, others by their runs."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from losslens.core.errors import InputError
from losslens.losses import Loss, Method, builtin_methods


def _printable(text: Any) -> Any:
    return "".join(filter(str.isprintable, text)).strip() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_printable)]


class Presentation(BaseModel):
    """Presentation of a loss or another method; the fields are those of `Method`.

    Attributes:
        title: Never empty.
        place: None for losses without one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: Annotated[Text, Field(min_length=1, max_length=100)]
    summary: Annotated[Text, Field(max_length=400)] = ""
    paper: Annotated[Text, Field(max_length=100)] = ""
    colour: str = Field(default="", pattern=r"^(#[0-9a-fA-F]{6})?$")
    place: float | None = Field(default=None, allow_inf_nan=False)
    diagnostic_titles: dict[str, Annotated[Text, Field(min_length=1, max_length=100)]] = Field(default_factory=dict)


# Losses outside the package, as read from the manifests of their runs.
_REGISTERED: dict[str, Presentation] = {}


def presentation_of(loss: Method) -> Presentation:
    """Returns the presentation that the class of a loss declares.

    Raises:
        InputError: A declared value is invalid, or the title is that of a built-in loss.
    """
    kind = type(loss)
    declared = {
        name: value
        for name in Presentation.model_fields
        if (value := _declared(kind, name)) not in (None, float("inf"))
    }
    try:
        presentation = Presentation.model_validate({**declared, "title": declared.get("title") or loss.name})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{kind.__qualname__}.{first['loc'][0]}: {first['msg']}") from error
    if loss.name not in builtin_presentations() and presentation.title in _builtin_titles():
        raise InputError(f"{kind.__qualname__}.title: {presentation.title} is the title of a built-in loss")
    return presentation


def _declared(kind: type[Method], name: str) -> Any:
    """Value of a class attribute; a class outside the package does not inherit it from a built-in loss."""
    builtin = kind.__module__.startswith(f"{Method.__module__}.")
    for base in kind.__mro__:
        if not builtin and base.__module__.startswith(f"{Method.__module__}."):
            break
        if name in vars(base):
            return vars(base)[name]
    return None


def manifest_entry(loss: Method) -> dict[str, Any]:
    """Returns the description of a loss for a run's manifest, as JSON values."""
    shown = presentation_of(loss).model_dump(exclude_none=True)
    if not isinstance(loss, Loss):
        return shown
    factors = {} if loss.factors is None else {"factors": asdict(loss.factors)}
    return {**shown, "unit": loss.unit, "divisor": loss.divisor, **factors}


def register_from_manifest(name: str, entry: Any) -> None:
    """Registers the presentation of the loss `name` from a manifest, unless it is built in; drops invalid values."""
    if name in builtin_presentations() or not isinstance(entry, dict):
        return
    values = {"title": name[:100], **entry}
    if values["title"] in _builtin_titles():
        values["title"] = name[:100]
    try:
        _REGISTERED[name] = Presentation.model_validate(values)
    except ValidationError as error:
        invalid = {problem["loc"][0] for problem in error.errors()}
        valid = {field: value for field, value in values.items() if field not in invalid}
        _REGISTERED[name] = Presentation.model_validate({"title": _printable(name)[:100] or "?", **valid})


def get_presentation(name: str) -> Presentation:
    """Returns the presentation of a loss; for an unknown one, just its name."""
    known = builtin_presentations().get(name) or _REGISTERED.get(name)
    return known or Presentation(title=_printable(name)[:100] or "?")


def diagnostic_titles() -> dict[str, str]:
    """Returns the titles of the diagnostics of all known losses, by the names under which they are logged."""
    known = [*_REGISTERED.values(), *builtin_presentations().values()]
    return {name: title for presentation in known for name, title in presentation.diagnostic_titles.items()}


def _builtin_titles() -> set[str]:
    return {presentation.title for presentation in builtin_presentations().values()}


@cache
def builtin_presentations() -> dict[str, Presentation]:
    """Returns the presentations of the built-in losses, in the order of tables and plots."""
    kinds = sorted(builtin_methods().items(), key=lambda item: (item[1].place, item[0]))
    return {
        name: Presentation(**{field: getattr(kind, field) for field in Presentation.model_fields})
        for name, kind in kinds
    }
