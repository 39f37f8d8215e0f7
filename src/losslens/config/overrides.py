"""`key=value` arguments in Hydra's grammar: parsing, quoting, and the keys whose values are paths."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from pydantic import BaseModel

from losslens.config.base import UserPath
from losslens.config.data import SOURCE_PATHS, Data
from losslens.config.training import TrainConfig

_PATH_MARK = get_args(UserPath)[1]  # marks paths in the schemas
_QUOTES = ('"', "'")


def number_of_jobs() -> int:
    """Returns the number of jobs of this command line: the product of its choices and of its experiment's."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return 1
    chosen = {key: f"{key}={value}" for key, value in (HydraConfig.get().sweeper.get("params") or {}).items()}
    chosen |= {line.partition("=")[0]: line for line in sys.argv[1:] if "=" in line and not line.startswith("-")}
    jobs = 1
    for line in chosen.values():
        with suppress(HydraException):
            [override] = OverridesParser.create().parse_overrides([line])
            jobs *= len(list(override.sweep_string_iterator())) if override.is_sweep_override() else 1
    return jobs


def quote(key: str, value: str, sweeps: bool) -> str:
    """Quotes a value for Hydra if it is a path or name that Hydra would otherwise parse as something else."""
    kind = value_kind(key.lstrip("+"))
    if not kind or not value or value == "null" or "${" in value or re.fullmatch(r"""(["']).*\1""", value, re.DOTALL):
        return value
    if kind == "paths":
        return value if parse_value(f"{key}={value}") else _quoted_mapping(value)
    override = parse_value(f"{key}={value}")
    if override is None:
        if kind != "path":
            return value
        return ",".join(map(quote_text, value.split(","))) if sweeps and "," in value else quote_text(value)
    if override.is_sweep_override():
        return quote_text(value) if kind == "path" and Path(value).expanduser().exists() else value
    read = override.value()
    if isinstance(read, (bool, int, float)) or (kind == "path" and not (isinstance(read, str) and read == value)):
        return quote_text(value)
    return value


def _quoted_mapping(value: str) -> str:
    """Quotes the paths in `{name: path, …}`; returns a value of any other form unchanged."""
    inside = re.fullmatch(r"\{(.*)\}", value, re.DOTALL)
    pairs = re.split(r",\s*(?=[\w.-]+:\s)", inside[1]) if inside else []
    named = [re.fullmatch(r"\s*([\w.-]+):\s*(.*?)\s*", pair, re.DOTALL) for pair in pairs]
    if not named or not all(named):
        return value
    parts = [(pair[1], pair[2]) for pair in named if pair]
    return "{" + ", ".join(f"{name}: {path if path[:1] in _QUOTES else quote_text(path)}" for name, path in parts) + "}"


def quote_text(text: str) -> str:
    """Quotes a text for Hydra's grammar."""
    # In Hydra's grammar a backslash escapes only in front of a quote.
    return '"' + re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ("\\" + match[2] if match[2] else ""), text) + '"'


def parse_value(argument: str) -> Override | None:
    """Parses an argument with Hydra's grammar; None if it is invalid."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def value_kind(key: str) -> Literal["", "path", "paths", "name"]:
    """Returns the kind of a key's value: path, mapping of names to paths, other string (`name`); else empty."""
    kinds = _string_keys()
    parts = key.split(".")
    for pattern, kind in kinds.items():
        expected = pattern.split(".")
        if len(parts) == len(expected) and all(e in ("*", p) for e, p in zip(expected, parts, strict=True)):
            return kind
        if kind == "path" and expected[-1] == "*" and expected[:-1] == parts:
            return "paths"
    return ""


@lru_cache(maxsize=1)
def _string_keys() -> dict[str, Literal["path", "name"]]:
    """Returns the kinds of all keys with string values in any script; `*` stands for any name."""
    from losslens.config.analysis import AnalyzeConfig
    from losslens.config.evaluation import EvaluateConfig

    keys: dict[str, Literal["path", "name"]] = {}
    for schema in (TrainConfig, EvaluateConfig, AnalyzeConfig):
        for name, types in leaves(schema):
            if _PATH_MARK in types:
                keys[name] = "path"
            elif str in types and not types & {int, float, bool}:
                keys.setdefault(name, "name")
    return keys


def leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, set[Any]]]:
    """Yields the dotted names of a schema's fields, each with its possible types and annotations."""
    for name, field in schema.model_fields.items():
        yield from _leaves_of_type(field.annotation, f"{prefix}{name}", set(field.metadata))
    if schema is Data:
        yield from ((f"{prefix}source.{name}", {_PATH_MARK}) for name in SOURCE_PATHS)


def _leaves_of_type(kind: Any, name: str, marks: set[Any]) -> Iterator[tuple[str, set[Any]]]:
    simple = set(marks)
    parts = [kind]
    while parts:
        part = parts.pop()
        origin, arguments = get_origin(part), get_args(part)
        if origin is Annotated:
            parts.append(arguments[0])
            simple |= {mark for mark in arguments[1:] if mark.__hash__}
        elif origin in (Union, UnionType):
            parts += arguments
        elif origin is dict:
            yield from _leaves_of_type(arguments[1], f"{name}.*", set())
        elif isinstance(part, type) and issubclass(part, BaseModel):
            yield from leaves(part, f"{name}.")
        elif origin is not list:
            simple.add(str if origin is Literal else part)
    yield name, simple
