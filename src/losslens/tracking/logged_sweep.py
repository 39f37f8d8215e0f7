"""Metrics and configurations that the runs of a sweep have logged so far, read from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.core.mappings import flatten
from losslens.losses.presentation import register_from_manifest
from losslens.runs.run import Run, arm_of, runs_of

_SEEDS = ("seed", "init_seed")
METHOD = "method.name"
# Prefixes of settings to prefer for distinguishing two arms of a loss, and of settings to ignore.
_PREFERRED = ("method.", "lr.name", "lr.", "lora_rank.", "train_on", "optim.", "model.name")
_IGNORED = (*_SEEDS, METHOD, "method._target_", "output_dir", "sweep", "logger.", "evaluation.", "benchmark.")


@dataclass(frozen=True)
class LoggedRun:
    """A run that was started.

    Attributes:
        name: Name of its folder.
        config: Its flattened configuration, with keys such as `method.name`, `lr.name` and `seed`.
        learning_rate: Peak learning rate.
        arm: Hash of its arm, see `arm_of`.
        steps: Lines of its `metrics.jsonl`.
        benchmarks: Names of the benchmarks it was scored on.
    """

    name: str
    config: Mapping[str, Any]
    learning_rate: float
    arm: str
    steps: Sequence[Mapping[str, float]]
    benchmarks: Sequence[str]

    @property
    def method(self) -> str:
        """Name of its loss."""
        return str(self.config[METHOD])


@dataclass(frozen=True)
class LoggedSweep:
    """The started runs of a sweep, without the base.

    Attributes:
        name: Name of the sweep.
        runs: The runs, sorted by name.
    """

    name: str
    runs: Sequence[LoggedRun]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all metrics that any run has logged, except `step`."""
        return frozenset(name for run in self.runs for step in run.steps for name in step) - {"step"}

    @cached_property
    def benchmarks(self) -> list[str]:
        """Names of all benchmarks that any run was scored on."""
        return sorted({name for run in self.runs for name in run.benchmarks})

    @cached_property
    def settings(self) -> list[str]:
        """Keys of the configuration that distinguish arms: the loss, and keys in which arms of one loss differ."""
        keys = {key for run in self.runs for key in run.config if not key.startswith(_IGNORED)}
        chosen = [METHOD]
        for key in sorted(keys, key=lambda key: (_rank(key), key)):
            if any(_distinguishes(key, group) for group in self._group_by(chosen)):
                chosen.append(key)
        return chosen

    @cached_property
    def arms(self) -> list[tuple[str, ...]]:
        """Values of `settings` of each arm, as W&B shows them."""
        return list(dict.fromkeys(self.values(run) for run in self.runs))

    def values(self, run: LoggedRun) -> tuple[str, ...]:
        """Returns the values of `settings` of a run."""
        return tuple(_format(run.config.get(key)) for key in self.settings)

    def _group_by(self, keys: Sequence[str]) -> list[list[LoggedRun]]:
        """Groups the runs by their values of `keys`."""
        groups: dict[tuple[str, ...], list[LoggedRun]] = {}
        for run in self.runs:
            groups.setdefault(tuple(_format(run.config.get(key)) for key in keys), []).append(run)
        return list(groups.values())


def logged_sweep(output_dir: Path, sweep: str) -> LoggedSweep:
    """Reads the logged metrics and configurations of a sweep.

    Raises:
        InputError: The sweep does not exist, none of its runs was started, or a file is damaged.
    """
    runs = [run for run in runs_of(output_dir, sweep) if not run.name.startswith("base-")]
    started = [_read(run) for run in runs if (run.folder / "manifest.json").exists()]
    if not started:
        raise InputError(f"sweep={sweep}: no run in {output_dir / sweep} has been started yet")
    return LoggedSweep(sweep, started)


def _read(run: Run) -> LoggedRun:
    manifest = run.manifest
    try:
        arm = arm_of(manifest["identity"])
        config, learning_rate = flatten(manifest["config"]), float(manifest["learning_rate"])
        register_from_manifest(str(config[METHOD]), manifest.get("loss"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{run.folder / 'manifest.json'}: not the manifest of a run") from error
    benchmarks = sorted(file.stem for file in run.folder.glob("eval/*.parquet"))
    steps = list(_steps(run.folder / "metrics.jsonl"))
    return LoggedRun(run.name, config, learning_rate, arm, steps, benchmarks)


def _steps(file: Path) -> Iterator[dict[str, float]]:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # still being written
        try:
            values = {name: float(value) for name, value in json.loads(line).items()}
            _ = values["step"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file}: line {number} is not a logged step") from error
        yield values


def _rank(key: str) -> int:
    return next((rank for rank, prefix in enumerate(_PREFERRED) if key.startswith(prefix)), len(_PREFERRED))


def _distinguishes(key: str, runs: Sequence[LoggedRun]) -> bool:
    return len({run.arm for run in runs}) > 1 and len({_format(run.config.get(key)) for run in runs}) > 1


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
