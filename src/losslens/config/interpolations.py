"""The interpolations of `conf/`: option values derived from other options.

Hydra resolves them, so they apply in every script, in experiments, and on Slurm. The embedded models have their own
defaults (teacher, learning rate, modules, lengths). For any other model or data, defaults are derived from the model
and printed (`describe_derived`), or the user has to set them.
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

from losslens.core.commands import typed_command
from losslens.core.hashing import hash_file

_STUDENT = Path(str(files("losslens") / "tiny" / "student"))
EMBEDDED_TEACHER = str(files("losslens") / "tiny" / "teacher")
_EMBEDDED_LENGTH = 96  # tokens; enough for the embedded models on reasoning_gym's chains of sums
# Full fine-tuning's best learning rate is about a tenth of LoRA's (Biderman et al. 2024, arXiv 2405.09673).
_FULL_RATE = 0.1
_LENGTH = 1024  # tokens; a worked solution of a school mathematics problem
_MIN_LENGTH = 128  # tokens; lower bound of the default, even for models with fewer than twice as many positions
_LAUNCHERS = ("hydra_plugins.losslens_slurm.SlurmLauncher", "hydra_plugins.losslens_local.LocalLauncher")

# Options that may be derived from the model, and how the derived value (`{}`) is described.
_DERIVED = {
    "model.name": "{}",
    "model.target_modules": "{}",
    "model.default_lr": "{} (LoRA's usual rate)",
    "rollouts.max_tokens": "{}",
}


def is_embedded(path: Any) -> bool:
    """True if a model's folder contains the weights of the embedded student, wherever it is."""
    file = Path(str(path)).expanduser() / "model.safetensors"
    embedded = _STUDENT / file.name
    try:
        return file.stat().st_size == embedded.stat().st_size and _sha256_of(file) == _sha256_of(embedded)
    except (OSError, RuntimeError):  # no such folder, or unknown home folder
        return False


@lru_cache(maxsize=16)
def _sha256_of(file: Path) -> str:
    return hash_file(file)


def describe_derived(config: DictConfig) -> str:
    """Describes in one line the options derived from the model; empty for the embedded models on generated problems.

    Args:
        config: The composed configuration, not resolved.
    """
    path = OmegaConf.select(config, "model.path")
    own_data = not _source(config).endswith(".ReasoningGym")
    if path is None or (path == str(_STUDENT) and not own_data):
        return ""
    derived = []
    for key, description in _DERIVED.items():
        if path == str(_STUDENT) and key != "rollouts.max_tokens":
            continue  # a default of the embedded student
        section, _, name = key.partition(".")
        if OmegaConf.select(config, section) is None or not OmegaConf.is_interpolation(config[section], name):
            continue
        if key == "model.default_lr" and not ("lr" in config and OmegaConf.is_interpolation(config.lr, "peak")):
            continue  # not used
        if _is_preset(config[section], name, path):
            continue
        value = config[section][name]
        if "lr" not in config and key.startswith("model."):
            continue  # rollout.py trains no adapter
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if key == "model.default_lr" and is_embedded(path):
            description = "{} (the embedded student's rate, since these are its weights)"
        derived.append(f"{key}={description.format(text)}")
    what = f"data={OmegaConf.select(config, 'data.name')}" if path == str(_STUDENT) else f"model.path={path}"
    pronoun = "them" if len(derived) > 1 else "it"
    return f"{what}: defaults to {', '.join(derived)}, unless you set {pronoun}" if derived else ""


def _is_preset(section: DictConfig, name: str, path: str) -> bool:
    """True if a value is what an option of `conf/model` sets for the model that it names."""
    written = OmegaConf.to_container(section, resolve=False)
    return isinstance(written, dict) and str(written[name]).startswith(f"${{when:${{.path}},{path},")


@lru_cache(maxsize=16)
def _package(path: str) -> str:
    """`${package:tiny/student}`: a folder installed with losslens."""
    return str(files("losslens") / path)


def _cycle(number: int, length: int) -> int:
    """`${cycle:4,3}`: 4 modulo 3, for experiments in which later seeds reuse the initial adapters of the first ones."""
    return number % length


def _when(value: Any, expected: Any, then: Any, otherwise: Any) -> Any:
    """`${when:${.path},Qwen/Qwen3-0.6B,COMMIT,null}`: the third value if the first two are equal, else the fourth."""
    return then if value == expected else otherwise


def _base_rate(adapter: str, default_lr: float) -> float:
    """`${base_rate:${adapter},${model.default_lr}}`: LoRA's base learning rate, or a tenth of it without an adapter."""
    return float(f"{default_lr * _FULL_RATE:.12g}") if adapter == "none" else default_lr


def _embedded(here: Any, elsewhere: Any, *, _root_: DictConfig) -> Any:
    """`${embedded:1.0e-3,2.0e-4}`: the first argument if model.path contains the embedded student's weights."""
    return here if is_embedded(OmegaConf.select(_root_, "model.path")) else elsewhere


def _embedded_teacher(*, _root_: DictConfig) -> str | None:
    """`${embedded_teacher:}`: the embedded teacher, for the embedded student on problems that are not from a file."""
    reads_a_file = "path" in list(OmegaConf.select(_root_, "data.source") or {})  # `in` is False for ??? without list()
    is_student = OmegaConf.select(_root_, "model.path") == str(_STUDENT)
    return EMBEDDED_TEACHER if is_student and not reads_a_file else None


def _name_of(path: Any) -> str:
    """`${name_of:${.path}}`: a short name for a model, from its folder or hub id, used in the names of runs."""
    place = Path(str(path)).expanduser()
    if place.is_dir():
        place = place.resolve()
    name = place.name
    if place.parent.name == "snapshots":  # the hub's cache names folders by commit
        name = place.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:40] or "own"


def _answer_length(*, _root_: DictConfig) -> int:
    """`${answer_length:}`: default limit of a rollout in tokens: half of the model's positions, at most 1024."""
    path = OmegaConf.select(_root_, "model.path")
    if is_embedded(path) and _source(_root_).endswith(".ReasoningGym"):
        return _EMBEDDED_LENGTH
    positions = _positions(path)
    return _LENGTH if positions is None else max(_MIN_LENGTH, min(_LENGTH, positions // 2))


def _positions(path: Any) -> int | None:
    """Returns the maximum sequence length from a local model's configuration; None if unknown."""
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
    """`${implied_mode:}`: multirun, as with `-m`, for experiments that sweep and for the launchers of LossLens.

    Args:
        roots: Config groups that the script reads; null: all. Sweeps over other groups are ignored.
        _root_: The configuration.
    """
    # Hydra uses launchers only for multirun, and would run a single job in this process.
    if OmegaConf.select(_root_, "hydra.launcher._target_") in _LAUNCHERS:
        return RunMode.MULTIRUN
    swept = OmegaConf.select(_root_, "hydra.sweeper.params") or {}
    if any(roots is None or re.split(r"[.@]", str(key).lstrip("+"))[0] in roots for key in swept):
        return RunMode.MULTIRUN
    return None


def _typed(script: str) -> str:
    """`${typed:train.py}`: how a command is called from the usual place, in what `--help` says."""
    return typed_command(script)


@lru_cache(maxsize=1)
def _scratch() -> str:
    """`${scratch:}`: a temporary folder for Hydra's own files of a sweep, deleted when the command ends."""
    folder = tempfile.mkdtemp(prefix="losslens-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def register() -> None:
    """Registers the interpolations with OmegaConf, and caches their parsing.

    OmegaConf parses an interpolation at each occurrence in every job, which took most of the time of planning a sweep.
    """
    omegaconf.base.parse = lru_cache(maxsize=4096)(omegaconf.base.parse)
    for resolver in (
        _package, _cycle, _when, _base_rate, _embedded, _embedded_teacher, _name_of, _answer_length, _implied_mode,
        _typed,
    ):  # fmt: skip
        OmegaConf.register_new_resolver(resolver.__name__[1:], resolver, replace=True)
    OmegaConf.register_new_resolver("scratch", lambda: _scratch(), replace=True)
