"""The interpolations of `conf/`: values that follow from other values.

Hydra resolves them, so they hold in every script, in experiments, and on Slurm. What the embedded models were made with
(their teacher, rate, modules, lengths) holds for them alone. A model or data of one's own gets what follows from the
model itself, and is told so (`describe_derived`), or is asked.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import omegaconf.base
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from losslens.core.commands import spoken
from losslens.core.hashing import hash_file

_STUDENT = Path(str(files("losslens") / "tiny" / "student"))
EMBEDDED_TEACHER = str(files("losslens") / "tiny" / "teacher")
_EMBEDDED_LENGTH = 96  # tokens: what the embedded models need for reasoning_gym's chains of sums
_LENGTH = 1024  # tokens: a worked solution of school mathematics
_SHORTEST = 128  # a model with fewer positions than twice this is not asked for less without being told to
_SLURM = "hydra_plugins.losslens_slurm.SlurmLauncher"

# What may follow from the model, and why it is this value; `{}` is the value.
_DERIVED = {
    "model.name": "{}",
    "model.target_modules": "{}",
    "model.default_lr": "{} (LoRA's usual rate)",
    "rollouts.max_tokens": "{}",
}


def is_embedded(path: Any) -> bool:
    """Whether a model's folder holds the weights of the embedded student, wherever it lies."""
    file = Path(str(path)).expanduser() / "model.safetensors"
    ours = _STUDENT / file.name
    try:
        return file.stat().st_size == ours.stat().st_size and _sha256_of(file) == _sha256_of(ours)
    except (OSError, RuntimeError):  # no such folder; no such home
        return False


@lru_cache(maxsize=16)
def _sha256_of(file: Path) -> str:
    return hash_file(file)


def describe_derived(config: DictConfig) -> str:
    """What was not given and follows from the model, in one line; empty for the embedded models on their own problems.

    Args:
        config: The composed configuration, not resolved.
    """
    path = OmegaConf.select(config, "model.path")
    own_data = not _source(config).endswith(".ReasoningGym")
    if path is None or (path == str(_STUDENT) and not own_data):
        return ""
    found = []
    for key, reason in _DERIVED.items():
        if path == str(_STUDENT) and key != "rollouts.max_tokens":
            continue  # its own
        section, _, name = key.partition(".")
        if OmegaConf.select(config, section) is None or not OmegaConf.is_interpolation(config[section], name):
            continue
        if key == "model.default_lr" and not ("lr" in config and OmegaConf.is_interpolation(config.lr, "peak")):
            continue  # not used
        if _is_of_the_option(config[section], name, path):
            continue
        value = config[section][name]
        if "lr" not in config and key.startswith("model."):
            continue  # of rollout.py, which puts no adapter on it
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if key == "model.default_lr" and is_embedded(path):
            reason = "{} (the embedded student's, whose weights these are)"
        found.append(f"{key}={reason.format(text)}")
    what = f"data={OmegaConf.select(config, 'data.name')}" if path == str(_STUDENT) else f"model.path={path}"
    return f"{what}: {', '.join(found)}, unless you set {'them' if len(found) > 1 else 'it'}" if found else ""


def _is_of_the_option(section: DictConfig, name: str, path: str) -> bool:
    """Whether a value is the one that an option of `conf/model` has for the model that it names."""
    written = OmegaConf.to_container(section, resolve=False)
    return isinstance(written, dict) and str(written[name]).startswith(f"${{when:${{.path}},{path},")


def _package(path: str) -> str:
    """`${package:tiny/student}`: a folder that is installed with losslens."""
    return str(files("losslens") / path)


def _cycle(number: int, length: int) -> int:
    """`${cycle:4,3}`: 4 modulo 3, in an experiment file: which of a few seeds a further one repeats."""
    return number % length


def _when(value: Any, expected: Any, then: Any, otherwise: Any) -> Any:
    """`${when:${.path},Qwen/Qwen3-0.6B,COMMIT,null}`: the third where the first two are equal, else the fourth."""
    return then if value == expected else otherwise


def _embedded(here: Any, elsewhere: Any, *, _root_: DictConfig) -> Any:
    """`${embedded:1.0e-3,2.0e-4}`: the first where model.path holds the embedded student's weights."""
    return here if is_embedded(OmegaConf.select(_root_, "model.path")) else elsewhere


def _embedded_teacher(*, _root_: DictConfig) -> str | None:
    """`${embedded_teacher:}`: the embedded teacher, for the embedded student and on no file of one's own."""
    reads_a_file = "path" in list(OmegaConf.select(_root_, "data.source") or {})  # listed: `in` says no where it is ???
    is_ours = OmegaConf.select(_root_, "model.path") == str(_STUDENT)
    return EMBEDDED_TEACHER if is_ours and not reads_a_file else None


def _name_of(path: Any) -> str:
    """`${name_of:${.path}}`: what the runs of a model are called after its folder or hub id."""
    place = Path(str(path)).expanduser()
    if place.is_dir():
        place = place.resolve()
    name = place.name
    if place.parent.name == "snapshots":  # in the hub's cache a folder is called by its commit
        name = place.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:40] or "own"


def _answer_length(*, _root_: DictConfig) -> int:
    """`${answer_length:}`: how many tokens an answer may have: half of the positions that a model has, at most 1024."""
    path = OmegaConf.select(_root_, "model.path")
    if is_embedded(path) and _source(_root_).endswith(".ReasoningGym"):
        return _EMBEDDED_LENGTH
    positions = _positions(path)
    return _LENGTH if positions is None else max(_SHORTEST, min(_LENGTH, positions // 2))


def _positions(path: Any) -> int | None:
    """How long a sequence may be, as a local model's configuration says."""
    try:
        config = json.loads((Path(str(path)).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return None
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(part, dict) and isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None


def _source(root: DictConfig) -> str:
    return str(OmegaConf.select(root, "data.source._target_", default=""))


def _implied_mode(roots: Sequence[str] | None = None, *, _root_: DictConfig) -> RunMode | None:
    """`${implied_mode:}`: an experiment that sweeps makes a sweep, as `-m` would, and so does Slurm's launcher.

    Args:
        roots: What of a configuration the script reads; null: all. Sweeping over the rest is not for it.
        _root_: The configuration.
    """
    # Hydra has launchers for sweeps only, and would run a single job here.
    if OmegaConf.select(_root_, "hydra.launcher._target_") == _SLURM:
        return RunMode.MULTIRUN
    swept = OmegaConf.select(_root_, "hydra.sweeper.params") or {}
    if any(roots is None or re.split(r"[.@]", str(key).lstrip("+"))[0] in roots for key in swept):
        return RunMode.MULTIRUN
    return None


def _typed(script: str) -> str:
    """`${typed:train.py}`: how a command is called from the usual place, in what `--help` says."""
    return spoken(script)


@lru_cache(maxsize=1)
def _scratch() -> str:
    """`${scratch:}`: a folder for what Hydra notes of a sweep, which nobody reads; gone when the command ends."""
    folder = tempfile.mkdtemp(prefix="losslens-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def register() -> None:
    """Teaches OmegaConf the interpolations, and to parse each of them once.

    It parses them anew wherever it meets them, in every job of a sweep: that took most of the time of planning one.
    """
    omegaconf.base.parse = lru_cache(maxsize=4096)(omegaconf.base.parse)
    for resolver in (
        _package, _cycle, _when, _embedded, _embedded_teacher, _name_of, _answer_length, _implied_mode, _typed,
    ):  # fmt: skip
        OmegaConf.register_new_resolver(resolver.__name__[1:], resolver, replace=True)
    OmegaConf.register_new_resolver("scratch", lambda: _scratch(), replace=True)
