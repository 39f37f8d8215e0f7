"""How losses introduce themselves to tables, plots and pages: LossLens's own by their classes, others by their runs."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from losslens.core.errors import InputError
from losslens.losses import Loss, own_losses


def _printable(text: Any) -> Any:
    return "".join(filter(str.isprintable, text)).strip() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_printable)]


class Introduction(BaseModel):
    """What a reader is told of a loss; see `Loss` for what each is.

    Attributes:
        title: Never empty.
        place: None for those without one.
        diagnostic_titles: Of what it logs beside what all do.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: Annotated[Text, Field(min_length=1, max_length=100)]
    summary: Annotated[Text, Field(max_length=400)] = ""
    paper: Annotated[Text, Field(max_length=100)] = ""
    colour: str = Field(default="", pattern=r"^(#[0-9a-fA-F]{6})?$")
    place: float | None = Field(default=None, allow_inf_nan=False)
    diagnostic_titles: dict[str, Annotated[Text, Field(min_length=1, max_length=100)]] = Field(default_factory=dict)


# Those that runs have told of: losses outside the package.
_TOLD: dict[str, Introduction] = {}


def introduce(loss: Loss) -> Introduction:
    """What a loss says of itself.

    Raises:
        InputError: It is no introduction, or the title of one of LossLens's own.
    """
    kind = type(loss)
    told = {
        name: value for name in Introduction.model_fields if (value := _said(kind, name)) not in (None, float("inf"))
    }
    try:
        found = Introduction.model_validate({**told, "title": told.get("title") or loss.name})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{kind.__qualname__}.{first['loc'][0]}: {first['msg']}") from error
    if loss.name not in own_introductions() and found.title in _own_titles():
        raise InputError(f"{kind.__qualname__}.title: {found.title} is the title of a loss of LossLens's own")
    return found


def _said(kind: type[Loss], name: str) -> Any:
    """What a class says itself: one outside that is made of one of LossLens's own has another title and colour."""
    own = kind.__module__.startswith(f"{Loss.__module__}.")
    for base in kind.__mro__:
        if not own and base.__module__.startswith(f"{Loss.__module__}."):
            break
        if name in vars(base):
            return vars(base)[name]
    return None


def as_told(loss: Loss) -> dict[str, Any]:
    """What a run's manifest says of its loss, as JSON values."""
    return introduce(loss).model_dump(exclude_none=True) | {"unit": loss.unit, "normaliser": loss.normaliser}


def tell(name: str, told: Any) -> None:
    """Remembers what a manifest says of the loss `name`, unless it is LossLens's own; nonsense is left out."""
    if name in own_introductions() or not isinstance(told, dict):
        return
    known = {"title": name[:100], **told}
    if known["title"] in _own_titles():
        known["title"] = name[:100]
    try:
        _TOLD[name] = Introduction.model_validate(known)
    except ValidationError as error:
        wrong = {problem["loc"][0] for problem in error.errors()}
        kept = {field: value for field, value in known.items() if field not in wrong}
        _TOLD[name] = Introduction.model_validate({"title": _printable(name)[:100] or "?", **kept})


def introduction(name: str) -> Introduction:
    """What is known of a loss; of one that nobody has told of, its name."""
    known = own_introductions().get(name) or _TOLD.get(name)
    return known or Introduction(title=_printable(name)[:100] or "?")


def diagnostic_titles() -> dict[str, str]:
    """What plots call the diagnostics of all losses that are known, by the names under which they are logged."""
    known = [*_TOLD.values(), *own_introductions().values()]
    return {name: title for each in known for name, title in each.diagnostic_titles.items()}


def _own_titles() -> set[str]:
    return {known.title for known in own_introductions().values()}


@cache
def own_introductions() -> dict[str, Introduction]:
    """LossLens's own losses in their order."""
    kinds = sorted(own_losses().items(), key=lambda item: (item[1].place, item[0]))
    return {
        name: Introduction(**{field: getattr(kind, field) for field in Introduction.model_fields})
        for name, kind in kinds
    }
