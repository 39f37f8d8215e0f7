"""Prepares `key=value` arguments for Hydra, and explains those that it rejects.

Some characters have a meaning in Hydra's grammar (`~`, `=`, parentheses, braces, commas). Paths and names that contain
them are quoted here where the meaning is unambiguous; what Hydra still rejects is explained in terms of our options.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from pydantic import BaseModel

from losslens.config.data import Data
from losslens.config.folders import ConfigFolders
from losslens.config.identity import formerly
from losslens.config.overrides import leaves, parse_value, quote, quote_text, value_kind
from losslens.config.parse import current_name
from losslens.config.training import TrainConfig
from losslens.core.commands import command_name
from losslens.core.errors import InputError
from losslens.losses import builtin_methods

# Common names from other tools, and the options that they correspond to.
_ALIASES = {
    "learning_rate": "lr.peak", "rank": "lora_rank.r", "lora_r": "lora_rank.r", "lora_alpha": "lora_rank.alpha",
    "num_train_epochs": "optim.epochs", "max_new_tokens": "rollouts.max_tokens", "teacher": "model.teacher",
    "warmup_ratio": "optim.warmup_ratio", "weight_decay": "optim.weight_decay",
    "num_generations": "rollouts.samples_per_prompt",
}  # fmt: skip
_RENAMED_CHOICES = {("experiment", "dpo_rows"): "paired_rollouts"}
_ANY_BELOW = ("difficulty", "files", "verifier")  # sections with free-form keys
# Options that name the user's files, and the one of a benchmark file.
_FILES, _FILE_TO_SCORE_ON = ("data.path", "data.eval_path"), "benchmark.file.eval_path"
_TABLE_FILE = re.compile(r"\.(jsonl?|ndjson|parquet|pq|csv|tsv)$", re.IGNORECASE)


def prepare_arguments(
    arguments: Sequence[str], script: str, schema: type[BaseModel], conf: Path | None = None
) -> list[str]:
    """Quotes paths and names that Hydra's grammar would otherwise parse as something else.

    `workers=2`, the short form, becomes `hydra/launcher=local hydra.launcher.workers=2`.

    Args:
        arguments: The command line without the script.
        script: The script's name, for messages.
        schema: The configuration that it reads.
        conf: The folder of the configuration; if given, unknown keys are reported before syntax errors.

    Raises:
        InputError: An argument cannot be parsed; the message shows the correct form.
    """
    arguments = in_full(arguments)
    folders = None if conf is None else ConfigFolders(conf, arguments)
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    found = []
    for place, argument in enumerate(arguments):
        key, separator, value = argument.partition("=")
        if not separator or argument.startswith(("-", "~")):
            found.append(argument)
            if not argument.startswith(("-", "~")) and not _takes_a_value(arguments[:place]):
                raise InputError(_not_a_pair(arguments, place))
            continue
        if not key:
            raise InputError(f"{argument}: an argument has the form key=value (--help lists the keys)")
        root = re.split(r"[.@]", key.lstrip("+"))[0]
        if root in set(TrainConfig.model_fields) - set(schema.model_fields):
            where = f"; a file to score on is benchmark=file {_FILE_TO_SCORE_ON}={value}" if key in _FILES else ""
            raise InputError(
                f"{argument}: {script} has no option {root}; it belongs to {command_name('train.py')} and "
                f"experiments{where}"
            )
        readable = f"{key}={quote(key, value, sweeps)}"
        if parse_value(readable) is None:
            if folders is not None and (why := _not_there(argument, key, arguments, folders, schema)):
                raise InputError(why)
            raise InputError(_unreadable(arguments, place))
        found.append(readable)
    return found


def in_full(arguments: Sequence[str]) -> list[str]:
    """Writes out `workers=2`."""
    found: list[str] = []
    for argument in arguments:
        is_short = argument.startswith("workers=")
        found += ["hydra/launcher=local", f"hydra.launcher.{argument}"] if is_short else [argument]
    return found


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Moves Hydra's flags and their values to the front: argparse accepts no `key=value` on both sides of a flag."""
    flags: list[str] = []
    others: list[str] = []
    for place, argument in enumerate(arguments):
        is_value = place > 0 and flags[-1:] == [arguments[place - 1]] and _takes_a_value(arguments[:place])
        # --info may also stand alone.
        is_value = is_value and ("=" not in argument or arguments[place - 1] not in ("--info", "-i"))
        (flags if argument.startswith("-") or is_value else others).append(argument)
    return [*flags, *others]


def _takes_a_value(before: Sequence[str]) -> bool:
    """Returns True if the last of these arguments is a flag of Hydra that takes a value."""
    flags = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"}
    return bool(before) and before[-1] in flags | {"--info", "-i", "--experimental-rerun"}


def _not_a_pair(arguments: Sequence[str], place: int) -> str:
    """Explains an argument without `=`."""
    before = next((n for n in range(place - 1, -1, -1) if "=" in arguments[n]), None)
    if before is not None:
        whole = " ".join(arguments[before : place + 1])
        if _is_open(arguments[before]) or value_kind(arguments[before].partition("=")[0]) == "path":
            return f"{arguments[place]}: no key=value; an argument with spaces goes into quotes: {shlex.quote(whole)}"
    return f"{arguments[place]}: an argument has the form key=value (--help lists the keys)"


def _unreadable(arguments: Sequence[str], place: int) -> str:
    """Explains how to write an argument that Hydra's grammar rejects."""
    argument = arguments[place]
    for end in range(place + 2, len(arguments) + 1):
        whole = " ".join(arguments[place:end])
        if _is_open(argument) and parse_value(whole):
            return f"{argument}: an argument with spaces goes into quotes: {shlex.quote(whole)}"
    key, _, value = argument.partition("=")
    if not re.fullmatch(r"\+{0,2}[\w.@/:*-]+", key):
        return f"{argument}: {key!r} is not a key (--help lists the keys)"
    if _is_open(argument):
        return f"{argument}: unbalanced brackets, braces or parentheses"
    written = shlex.quote(f"{key}={quote_text(value)}")
    return f"{argument}: the value contains characters of Hydra's grammar; quoted for Hydra and the shell: {written}"


def _is_open(argument: str) -> bool:
    return any(argument.count(left) != argument.count(right) for left, right in ("[]", "{}", "()"))


def explain_rejection(arguments: Sequence[str], conf: Path, schema: type[BaseModel]) -> str:
    """Explains in one line why Hydra rejected the arguments; empty if unknown.

    Args:
        arguments: The command line without the script.
        conf: The folder of the configuration.
        schema: The configuration that the script reads.
    """
    arguments = in_full(arguments)
    folders = ConfigFolders(conf, arguments)
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    for argument in arguments:
        override = parse_value(argument) if "=" in argument and not argument.startswith(("-", "~", "+")) else None
        if override is None:
            continue
        key, _, value = argument.partition("=")
        group = key.partition("@")[0]
        if folders.is_group(group):
            options = folders.options(group) + ["basic"] * (group == "hydra/launcher")
            for choice in _choices(override, value):
                if choice not in options:
                    return _no_such_option(group, choice, options)
        elif not override.is_hydra_override() and (why := _not_there(argument, key, arguments, folders, schema)):
            return why
        if override.is_sweep_override() and not sweeps:
            return f"{argument}: several values {_as_several(key, value, schema)}"
    return ""


def _as_several(key: str, value: str, schema: type[BaseModel]) -> str:
    """Explains how to give several values of a key: as a list, as a sweep, or either."""
    field: Any = schema
    for part in key.split("."):
        fields = field.model_fields if isinstance(field, type) and issubclass(field, BaseModel) else {}
        field = fields[part].annotation if part in fields else None
    kinds = [field, *get_args(field)]
    kinds += [inner for kind in kinds if get_origin(kind) is Annotated for inner in get_args(kind)[:1]]
    listed = key == "benchmark" or any(get_origin(kind) is list for kind in kinds)
    a_list = f"are a list: {shlex.quote(f'{key}=[{value}]')}"
    if listed and (key == "benchmark" or len(get_args(field)) < 2):
        return a_list
    return f"make a sweep: add -m{f', or {a_list}' if listed else ''}"


def _not_there(
    argument: str, key: str, arguments: Sequence[str], folders: ConfigFolders, schema: type[BaseModel]
) -> str:
    """Explains why a key does not exist: renamed, misspelt, or of an option that was not chosen; empty if it exists."""
    if folders.is_group(key.partition("@")[0]) or key.startswith(("+", "hydra.")):
        return ""
    value = argument.partition("=")[2]
    if key.startswith("benchmark.") and "benchmark" in schema.model_fields:
        why = _of_a_benchmark(key, value, arguments, folders)
    elif _is_known(key, folders, schema):
        why = _of_another_option(key, value, arguments, folders)
    else:
        hint = _hint(key, folders, schema)
        why = f"there is no {key}{hint and f'; {hint}'} (--help lists the keys)"
    return f"{argument}: {why}" if why else ""


def _of_a_benchmark(key: str, value: str, arguments: Sequence[str], folders: ConfigFolders) -> str:
    """Explains an unknown key below `benchmark`, such as `benchmark.eval_size` for `benchmark.gsm8k.eval_size`."""
    _, name, *rest = key.split(".")
    chosen = _chosen("benchmark", arguments, folders)
    options = folders.options("benchmark")
    name = next((now for now, mark in formerly(Data).items() if mark.name == name), name) if not rest else name
    if not rest and name in Data.model_fields and name not in options:
        whose = chosen[0] if chosen else "file" if name.endswith("path") else "NAME"
        setting = _FILE_TO_SCORE_ON if name.endswith("path") else f"benchmark.{whose}.{name}"
        added = "" if whose in (chosen or ()) else f"benchmark={whose} "
        return f"there is no {key}; did you mean {added}{shlex.quote(f'{setting}={value}')}?"
    if rest and name == "source":
        return f"there is no {key}; did you mean benchmark.{chosen[0] if chosen else 'NAME'}.{name}.{'.'.join(rest)}?"
    if name in options and chosen is not None and name not in chosen:
        every = f"[{','.join([*chosen, name])}]" if chosen else name
        return f"{name} is not among the benchmarks; add benchmark={every}"
    if rest and not _is_known(key, folders, TrainConfig):
        close = get_close_matches(rest[0], Data.model_fields, 1, 0.6)
        return f"there is no {key}{f'; did you mean benchmark.{name}.{close[0]}?' if close else ''}"
    return ""


def _of_another_option(key: str, value: str, arguments: Sequence[str], folders: ConfigFolders) -> str:
    """Finds the options of a group that have a key which the chosen option lacks."""
    group, _, below = key.partition(".")
    chosen = _chosen(group, arguments, folders) if group in ("data", "method") and below else None
    if not chosen or not set(chosen) <= set(folders.options(group)):
        return ""
    having = [option for option in folders.options(group) if _has(folders.files(group)[option], below)]
    lacking = [option for option in chosen if option not in having]
    if not lacking:
        return ""
    if now := _current_option(key, lacking):
        return f"{key} of {group}={','.join(lacking)} is called {now} now"
    if not having:
        names = {f"{group}.{name}" for option in chosen for name in _names_in(folders.files(group)[option])}
        close = get_close_matches(key, names, 1, 0.75)
        return f"there is no {key}{f'; did you mean {close[0]}?' if close else ''} (--help lists the keys)"
    said = f"{key} is no option of {group}={','.join(lacking)}; "
    if alone := [option for option in chosen if option in having]:
        return f"{said}sweep it with {group}={','.join(alone)} alone"
    setting = shlex.quote(f"{key}={value}")
    return f"{said}did you mean {group}={'file' if 'file' in having else having[0]} {setting}?"


def _chosen(group: str, arguments: Sequence[str], folders: ConfigFolders) -> list[str] | None:
    """Returns the options chosen on the command line or by default; None if an experiment may choose."""
    for argument in reversed(arguments):
        name, separator, value = argument.partition("=")
        if separator and name == group:
            override = parse_value(argument)
            found = _choices(override, value) if override else []
            return [] if found == ["null"] else found
    if any(argument.startswith(("experiment=", "+")) for argument in arguments):
        return None
    defaults = [entry for entry in OmegaConf.load(folders.conf / "train.yaml").defaults if OmegaConf.is_dict(entry)]
    return [str(entry[group]) for entry in defaults if entry.get(group)]


def _names_in(file: Path) -> list[str]:
    """Returns all dotted keys of an option's file, including sections."""

    def below(section: Any, prefix: str) -> Iterator[str]:
        for name, entry in section.items():
            yield f"{prefix}{name}"
            if isinstance(entry, dict):
                yield from below(entry, f"{prefix}{name}.")

    return list(below(OmegaConf.to_container(OmegaConf.load(file)), ""))


def _has(file: Path, key: str) -> bool:
    """Returns True if an option has a key, or accepts any key below a free-form section such as `source.difficulty`."""
    names = _names_in(file)
    return key in names or any(key.startswith(f"{name}.") for name in names if name.rpartition(".")[2] in _ANY_BELOW)


def _choices(override: Override, value: str) -> list[str]:
    """Returns the options of a group that an argument names, as written."""
    text = value[1:-1] if re.fullmatch(r"\[.*\]", value) else value
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return []
    return [part.strip().strip("\"'") for part in text.split(",") if part.strip()]


def _no_such_option(group: str, choice: str, options: list[str]) -> str:
    if (group, choice) in _RENAMED_CHOICES:
        return f"{group}={choice}: called {group}={_RENAMED_CHOICES[group, choice]} now"
    among = f"No {group}/{choice}.yaml; {group} takes one of {', '.join(options)}"
    number = bool(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", choice, re.IGNORECASE))
    path = "/" in choice or choice.startswith((".", "~")) or Path(choice).expanduser().exists()
    instead = ""
    if number:
        rank = f"lora_rank=r{choice}" if f"r{choice}" in options else f"lora_rank.r={choice}"
        instead = {"lr": f"lr.peak={choice}", "lora_rank": rank}.get(group, "")
    elif group == "model" and path:
        instead = shlex.quote(f"model.path={choice}")
    elif group in ("data", "benchmark") and (_TABLE_FILE.search(choice) or Path(choice).expanduser().is_file()):
        name = "data.path" if group == "data" else "benchmark.file.eval_path"
        instead = f"{group}=file {shlex.quote(f'{name}={choice}')}"
    elif group in ("data", "benchmark") and path:
        key = "data" if group == "data" else "benchmark.gsm8k"
        repo = shlex.quote(f"{key}.source.repo={choice}")
        instead = f"{group}=gsm8k {repo} with its columns (docs/guides/own_data.md)"
    elif close := get_close_matches(choice.lower(), options, 1, 0.6 if group == "model" else 0.5):
        instead = f"{group}={close[0]}"
    if group == "model":
        among += "; any other is model.path=FOLDER_OR_HUB_ID"
    if choice in ("null", "None", "none", "true", "false"):
        among += "; none of them is []"
    return f"{group}={choice}: {f'did you mean {instead}? ' if instead else ''}{among}"


def _is_known(key: str, folders: ConfigFolders, schema: type[BaseModel]) -> bool:
    parts = key.split(".")
    for known in _keys(folders, schema):
        expected = known.split(".")
        # Any key may stand below a mapping, and a whole section may be given.
        shared = min(len(parts), len(expected))
        same = all(e in ("*", p) for e, p in zip(expected[:shared], parts[:shared], strict=True))
        if same and (len(parts) <= len(expected) or known in ("data.source", "benchmark.*.source", *_OPEN)):
            return True
    return False


# Mappings with arbitrary keys.
_OPEN = ("model.chat_options", "rollouts.server.extra_body", "evaluation.server.extra_body", "resources.sbatch")


def _keys(folders: ConfigFolders, schema: type[BaseModel]) -> list[str]:
    """Returns all dotted keys of a command, including the options of the losses."""
    names = [name for name, _ in leaves(schema) if name != "method.*"]
    if "method" in schema.model_fields:
        for file in folders.files("method").values():
            names += [f"method.{name!s}" for name in map(str, OmegaConf.load(file))]
    return list(dict.fromkeys(names))


def _current_option(key: str, methods: Collection[str]) -> str | None:
    """Returns the current name of a renamed option of one of the methods; None for any other key."""
    kinds = [kind for name, kind in builtin_methods().items() if name in methods]
    names = {f"method.{mark.name}": name for kind in kinds for name, mark in formerly(kind).items()}
    return f"method.{names[key]}" if key in names else None


def _hint(key: str, folders: ConfigFolders, schema: type[BaseModel]) -> str:
    """Returns the current name of an unknown key, or similar keys; empty if there are none."""
    if now := current_name(key) or _current_option(key, builtin_methods()):
        return f"it is called {now} now"
    keys = _keys(folders, schema)
    plain = [name for name in keys if "*" not in name]
    for option in ("file", "gsm8k") if "data" in schema.model_fields else ():
        plain += [f"data.{name}" for name in _names_in(folders.files("data")[option])]
    plain = list(dict.fromkeys(plain))
    leaf = key.rpartition(".")[2]
    close: Iterable[str] = [_ALIASES[key]] if _ALIASES.get(key) in plain else []
    close = close or [name for name in plain if name.rpartition(".")[2] == leaf]
    close = close or get_close_matches(key, plain, 1, 0.75)
    if not close:
        leaves = {name.rpartition(".")[2] for name in plain}
        like = get_close_matches(leaf.lower().replace("-", "_"), leaves, 1, 0.75)
        close = [name for name in plain if like and name.rpartition(".")[2] == like[0]]
    return f"did you mean {' or '.join(list(close)[:3])}?" if close else ""
