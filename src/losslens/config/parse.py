"""Validates a composed configuration against its schema; errors are one line that names the field."""

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
    """Returns the current paths of renamed or moved options, by their earlier paths."""
    paths = {
        "lr.pointwise_factor": "lr.factor", "lr.pairwise_factor": "lr.factor",
        "logger.references": "weight_tracking.references",
    }  # fmt: skip
    for schema in (TrainConfig, EvaluateConfig, AnalyzeConfig):
        paths |= dict(renamed(schema))
    return paths


def current_name(path: str) -> str | None:
    """Returns the current path of a renamed option; None for any other path."""
    if benchmark := re.fullmatch(r"(benchmark\.[^.]+)\.(\w+)", path):
        names = {mark.name: name for name, mark in formerly(Data).items()}
        return f"{benchmark[1]}.{names[benchmark[2]]}" if benchmark[2] in names else None
    head, dot, rest = path.partition(".")
    names = renamed_options()
    return names.get(path) or (f"{names[head]}.{rest}" if dot and head in names else None)


def _require_current_values(field: str, marks: Mapping[str, Formerly], values: Mapping[str, Any]) -> None:
    """Refuses earlier names of values.

    Raises:
        InputError: A value has been renamed; the message gives its current name.
    """
    for name, mark in marks.items():
        if name in values and (now := current_value(mark, values[name])) != values[name]:
            raise InputError(f"{field}{name}={values[name]}: called {field}{name}={now} now")


def parse(schema: type[Schema], config: DictConfig | dict[str, Any], field: str = "") -> Schema:
    """Resolves `config` and validates it against `schema`; `field` is its key in the whole configuration.

    Raises:
        InputError: A value is missing, unknown, of another type or out of range.
    """
    content = resolved(schema, config) if isinstance(config, DictConfig) else config
    if not field:
        _require_current_values("", {"train_on": TRAIN_ON}, content)
    return _checked(field, partial(schema.model_validate, content))


def resolved(schema: type[BaseModel], config: DictConfig) -> dict[str, Any]:
    """Resolves the values of `config` that `schema` declares, and those that no script declares.

    Values of other scripts are skipped, since an experiment may set options that only `train.py` or `analyze.py` has.

    Raises:
        InputError: A mandatory value is missing.
    """
    others = {*TrainConfig.model_fields, *AnalyzeConfig.model_fields, "hydra"} if issubclass(schema, Job) else set()
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
            raise InputError(f"{missing[1]} is required: {missing[1]}={value}") from None
        raise


def build(field: str, section: dict[str, Any]) -> Any:
    """Instantiates the `_target_` of a section of the configuration with the section's other values.

    Raises:
        InputError: The class does not exist or does not accept these values.
    """
    values = dict(section)
    try:
        path = values.pop("_target_")
        if not isinstance(path, str):
            raise InputError(f"{field}._target_: must be the path of a class, not {path!r}")
        target = get_class(path)
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
        # A union has one error for each of its types, any of which would be accepted.
        messages = [e["msg"].removeprefix("Value error, ") for e in errors if _where(field, e["loc"]) == where]
        given = "" if errors[0]["type"] in ("missing", "value_error") else f", got {errors[0]['input']!r}"
        prefix = f"{where}: " if where else ""  # a rule between options of the whole configuration names them itself
        raise InputError(f"{prefix}{', or '.join(dict.fromkeys(messages))}{given}") from error
    except TypeError as error:
        raise InputError(f"{field}: {error}") from error


def _where(field: str, loc: tuple[int | str, ...]) -> str:
    # For a union, pydantic includes the type that it tried, for example `list[str]`.
    return ".".join(str(part) for part in (field, *loc) if part != "" and not _TYPE.search(str(part)))
