"""How losses introduce themselves to tables, plots and pages: LossLens's own by their classes, others by their runs."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from losslens.core.errors import InputError
from losslens.losses import Loss, builtin_losses


def _printable(text: Any) -> Any:
    return "".join(filter(str.isprintable, text)).strip() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_printable)]


class Presentation(BaseModel):
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
_TOLD: dict[str, Presentation] = {}


def presentation_of(loss: Loss) -> Presentation:
    """What a loss says of itself.

    Raises:
        InputError: It is no introduction, or the title of one of LossLens's own.
    """
    kind = type(loss)
    told = {
        name: value for name in Presentation.model_fields if (value := _said(kind, name)) not in (None, float("inf"))
    }
    try:
        found = Presentation.model_validate({**told, "title": told.get("title") or loss.name})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{kind.__qualname__}.{first['loc'][0]}: {first['msg']}") from error
    if loss.name not in builtin_presentations() and found.title in _own_titles():
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


def manifest_entry(loss: Loss) -> dict[str, Any]:
    """What a run's manifest says of its loss, as JSON values."""
    return presentation_of(loss).model_dump(exclude_none=True) | {"unit": loss.unit, "normaliser": loss.normaliser}


def register_from_manifest(name: str, told: Any) -> None:
    """Remembers what a manifest says of the loss `name`, unless it is LossLens's own; nonsense is left out."""
    if name in builtin_presentations() or not isinstance(told, dict):
        return
    known = {"title": name[:100], **told}
    if known["title"] in _own_titles():
        known["title"] = name[:100]
    try:
        _TOLD[name] = Presentation.model_validate(known)
    except ValidationError as error:
        wrong = {problem["loc"][0] for problem in error.errors()}
        kept = {field: value for field, value in known.items() if field not in wrong}
        _TOLD[name] = Presentation.model_validate({"title": _printable(name)[:100] or "?", **kept})


def get_presentation(name: str) -> Presentation:
    """What is known of a loss; of one that nobody has told of, its name."""
    known = builtin_presentations().get(name) or _TOLD.get(name)
    return known or Presentation(title=_printable(name)[:100] or "?")


def diagnostic_titles() -> dict[str, str]:
    """What plots call the diagnostics of all losses that are known, by the names under which they are logged."""
    known = [*_TOLD.values(), *builtin_presentations().values()]
    return {name: title for each in known for name, title in each.diagnostic_titles.items()}


def _own_titles() -> set[str]:
    return {known.title for known in builtin_presentations().values()}


@cache
def builtin_presentations() -> dict[str, Presentation]:
    """LossLens's own losses in their order."""
    kinds = sorted(builtin_losses().items(), key=lambda item: (item[1].place, item[0]))
    return {
        name: Presentation(**{field: getattr(kind, field) for field in Presentation.model_fields})
        for name, kind in kinds
    }
