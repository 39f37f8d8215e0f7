"""How losses introduce themselves to tables, plots and pages: LossLens's own by their classes, others by their runs."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from losslens.losses import Loss, own_losses


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())


class Introduction(BaseModel):
    """What a reader is told of a loss; see `Loss` for what each is.

    Attributes:
        title: Never empty.
        place: Infinite for those without one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: Annotated[str, Field(min_length=1, max_length=40), AfterValidator(_printable)]
    summary: Annotated[str, Field(max_length=400), AfterValidator(_printable)] = ""
    paper: Annotated[str, Field(max_length=100), AfterValidator(_printable)] = ""
    colour: str = Field(default="", pattern=r"^(#[0-9a-fA-F]{6})?$")
    place: float = Field(default=float("inf"))


# Those that runs have told of: losses outside the package.
_TOLD: dict[str, Introduction] = {}


def as_told(loss: Loss) -> dict[str, Any]:
    """What a run's manifest says of its loss, as JSON values."""
    kind = type(loss)
    told = {"title": kind.title or loss.name, "summary": kind.summary, "paper": kind.paper, "colour": kind.colour}
    place = {} if kind.place == float("inf") else {"place": kind.place}
    return {**told, **place, "unit": kind.unit, "conventional_rate": kind.conventional_rate}


def tell(name: str, told: Any) -> None:
    """Remembers what a manifest says of the loss `name`, unless it is LossLens's own or no introduction."""
    if name in own_introductions() or not isinstance(told, dict):
        return
    try:
        _TOLD[name] = Introduction.model_validate(told)
    except ValidationError:
        _TOLD.pop(name, None)


def introduction(name: str) -> Introduction:
    """What is known of a loss; of one that nobody has told of, its name."""
    known = own_introductions().get(name) or _TOLD.get(name)
    return known or Introduction(title=name[:40] or "?")


@cache
def own_introductions() -> dict[str, Introduction]:
    """LossLens's own losses in their order."""
    kinds = sorted(own_losses().items(), key=lambda item: (item[1].place, item[0]))
    return {
        name: Introduction(
            title=kind.title, summary=kind.summary, paper=kind.paper, colour=kind.colour, place=kind.place
        )
        for name, kind in kinds
    }
