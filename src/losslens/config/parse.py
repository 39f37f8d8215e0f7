"""Checks a composed configuration against its schema; what is wrong ends in one line that names the field."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, TypeVar

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ValidationError,
)

from losslens.config import interpolations
from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import Data
from losslens.config.evaluation import EvaluateConfig
from losslens.config.identity import Formerly, current_value, formerly, renamed
from losslens.config.slurm import Job
from losslens.config.training import TRAIN_ON, TrainConfig
from losslens.core.errors import InputError, first_line

interpolations.register()

_TYPE = re.compile(r"\[|^(constrained-)?(str|int)$|^function-")

T = TypeVar("T")

Schema = TypeVar("Schema", bound=BaseModel)


@cache
def renamed_options() -> dict[str, str]:
    """Options that had another name, or another place: old paths and today's."""
    found = {
        "lr.pointwise_factor": "lr.factor", "lr.pairwise_factor": "lr.factor",
        "logger.references": "weight_tracking.references",
    }  # fmt: skip
    for schema in (TrainConfig, EvaluateConfig, AnalyzeConfig):
        found |= dict(renamed(schema))
    return found


def current_name(path: str) -> str | None:
    """Today's name of an option that had another one; None for any other path."""
    if benchmark := re.fullmatch(r"(benchmark\.[^.]+)\.(\w+)", path):
        names = {mark.name: name for name, mark in formerly(Data).items()}
        return f"{benchmark[1]}.{names[benchmark[2]]}" if benchmark[2] in names else None
    head, dot, rest = path.partition(".")
    names = renamed_options()
    return names.get(path) or (f"{names[head]}.{rest}" if dot and head in names else None)


def _require_current_values(field: str, marks: Mapping[str, Formerly], values: Mapping[str, Any]) -> None:
    """Refuses an earlier word for a value.

    Raises:
        InputError: Says today's.
    """
    for name, mark in marks.items():
        if name in values and (now := current_value(mark, values[name])) != values[name]:
            raise InputError(f"{field}{name}={values[name]}: called {field}{name}={now} now")


def parse(schema: type[Schema], config: DictConfig | dict[str, Any], field: str = "") -> Schema:
    """`config`, resolved and checked against `schema`; `field` is where it stands in the whole configuration.

    Raises:
        InputError: A value is missing, unknown, of another type or out of its range.
    """
    content = resolved(schema, config) if isinstance(config, DictConfig) else config
    if not field:
        _require_current_values("", {"train_on": TRAIN_ON}, content)
    return _checked(field, partial(schema.model_validate, content))


def resolved(schema: type[BaseModel], config: DictConfig) -> dict[str, Any]:
    """The values of `config` that `schema` asks for, resolved, and any that no script knows.

    An experiment sets for `train.py` what other scripts do not have.

    Raises:
        InputError: A value that has to be given is not.
    """
    others = set(TrainConfig.model_fields) | {"hydra"} if issubclass(schema, Job) else set()
    names = [name for name in map(str, config) if name in schema.model_fields or name not in others]
    try:
        values = {name: config[name] for name in names}
        return {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in values.items()
        }
    except OmegaConfBaseException as error:
        if missing := re.search(r"Missing mandatory value: (\S+)", str(error)):
            value = "FILE" if missing[1].endswith("path") else "…"
            raise InputError(f"{missing[1]}: not given, and needed ({missing[1]}={value})") from None
        raise


def build(field: str, section: dict[str, Any]) -> Any:
    """The object that a section of the configuration describes: its `_target_`, called with its other values.

    Raises:
        InputError: There is no such class, or it does not take these values.
    """
    values = dict(section)
    try:
        target = get_class(values.pop("_target_"))
    except (KeyError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"{field}._target_: {first_line(error)}") from error
    if isinstance(target, type) and issubclass(target, BaseModel):
        for name, mark in formerly(target).items():
            if mark.name in values:
                raise InputError(f"{field}.{mark.name}: called {field}.{name} now")
        _require_current_values(f"{field}.", formerly(target), values)
    return _checked(field, partial(target, **values))


def _checked(field: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValidationError as error:
        errors = error.errors()
        where = _where(field, errors[0]["loc"])
        if now := current_name(where):
            raise InputError(f"{where}: called {now} now") from error
        # Of a choice between types each has its own error, and any of them would do.
        said = [each["msg"].removeprefix("Value error, ") for each in errors if _where(field, each["loc"]) == where]
        given = "" if errors[0]["type"] in ("missing", "value_error") else f", got {errors[0]['input']!r}"
        raise InputError(f"{where}: {', or '.join(dict.fromkeys(said))}{given}") from error
    except TypeError as error:
        raise InputError(f"{field}: {error}") from error


def _where(field: str, loc: tuple[int | str, ...]) -> str:
    # Of a choice between types pydantic names the one it tried, for example `list[str]`.
    return ".".join(str(part) for part in (field, *loc) if part != "" and not _TYPE.search(str(part)))
