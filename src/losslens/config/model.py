"""Configuration of the base model and its teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    StringConstraints,
    model_validator,
)

from losslens.config.base import FolderName, Section, UserPlace
from losslens.config.identity import Formerly
from losslens.core.redaction import remember_name


class Package(Section):
    """An installed Python package that ships a model from the hub."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    of: str


class Model(Section):
    """The base model to train, and the teacher that may sample the rollouts."""

    name: FolderName
    path: UserPlace
    revision: str | None
    package: Package | None
    teacher: UserPlace | None
    teacher_revision: str | None
    target_modules: Literal["attention", "all_linear"] | Annotated[list[str], Field(min_length=1)]
    default_lr: Annotated[float, Formerly("lr")] = Field(gt=0, allow_inf_nan=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    chat_options: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str] | None
    trust_remote_code: bool

    @model_validator(mode="after")
    def _remember_names(self) -> Self:
        remember_name(self.path)
        remember_name(self.teacher)
        return self
