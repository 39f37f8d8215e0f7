"""What the runs of a sweep have logged so far, as it lies on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.losses.presentation import register_from_manifest
from losslens.runs.run import Run, arm_of, runs_of

_SEEDS = ("seed", "init_seed")
METHOD = "method.name"
# Where to look first for what tells two arms of a method apart, and where not at all.
_FIRST = ("method.", "lr.name", "lr.", "lora_rank.", "train_on", "optim.", "model.name")
_NEVER = (*_SEEDS, METHOD, "method._target_", "output_dir", "sweep", "logger.", "evaluation.", "benchmark.")


@dataclass(frozen=True)
class LoggedRun:
    """A run that was started.

    Attributes:
        name: Its folder's name.
        config: Its configuration, flat: `method.name`, `lr.name`, `seed`.
        learning_rate: Its peak learning rate.
        arm: What it shares with the runs that differ from it in their seeds only.
        steps: The lines of its `metrics.jsonl`.
        benchmarks: What it was scored on.
    """

    name: str
    config: Mapping[str, Any]
    learning_rate: float
    arm: str
    steps: Sequence[Mapping[str, float]]
    benchmarks: Sequence[str]

    @property
    def method(self) -> str:
        """The name of its method."""
        return str(self.config[METHOD])


@dataclass(frozen=True)
class LoggedSweep:
    """The runs of a sweep that were started, without the base.

    Attributes:
        name: Of the sweep.
        runs: By name.
    """

    name: str
    runs: Sequence[LoggedRun]

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all numbers that any run has logged, `step` left out."""
        return frozenset(name for run in self.runs for step in run.steps for name in step) - {"step"}

    @cached_property
    def benchmarks(self) -> list[str]:
        """What any run was scored on."""
        return sorted({name for run in self.runs for name in run.benchmarks})

    @cached_property
    def settings(self) -> list[str]:
        """The keys of the configuration that tell the arms apart: the method, and what differs between two of one."""
        keys = {key for run in self.runs for key in run.config if not key.startswith(_NEVER)}
        chosen = [METHOD]
        for key in sorted(keys, key=lambda key: (_place(key), key)):
            if any(_tells_apart(key, alike) for alike in self._alike(chosen)):
                chosen.append(key)
        return chosen

    @cached_property
    def arms(self) -> list[tuple[str, ...]]:
        """The values of `settings` of each arm, as W&B shows them; of methods with one arm too."""
        return list(dict.fromkeys(self.values(run) for run in self.runs))

    def values(self, run: LoggedRun) -> tuple[str, ...]:
        """The values of `settings` of a run."""
        return tuple(_shown(run.config.get(key)) for key in self.settings)

    def _alike(self, keys: Sequence[str]) -> list[list[LoggedRun]]:
        """The runs, those together that have the same values of `keys`."""
        groups: dict[tuple[str, ...], list[LoggedRun]] = {}
        for run in self.runs:
            groups.setdefault(tuple(_shown(run.config.get(key)) for key in keys), []).append(run)
        return list(groups.values())


def logged_sweep(output_dir: Path, sweep: str) -> LoggedSweep:
    """Reads what the runs of `sweep` have logged.

    Raises:
        InputError: There is no such sweep, none of its runs was started, or a file is damaged.
    """
    if Path(sweep).name != sweep:  # it is also the group that runs have on W&B
        raise InputError(f"sweep={sweep}: not the name of a sweep")
    runs = [run for run in runs_of(output_dir, sweep) if not run.name.startswith("base-")]
    started = [_read(run) for run in runs if (run.folder / "manifest.json").exists()]
    if not started:
        raise InputError(f"sweep={sweep}: no run in {output_dir / sweep} was started yet")
    return LoggedSweep(sweep, started)


def _read(run: Run) -> LoggedRun:
    manifest = run.manifest
    try:
        arm = arm_of(manifest["identity"])
        config, learning_rate = dict(_flat(manifest["config"])), float(manifest["learning_rate"])
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
            return  # the run is writing it
        try:
            values = {name: float(value) for name, value in json.loads(line).items()}
            _ = values["step"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file}: line {number} is not a logged step") from error
        yield values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _place(key: str) -> int:
    return next((place for place, first in enumerate(_FIRST) if key.startswith(first)), len(_FIRST))


def _tells_apart(key: str, runs: Sequence[LoggedRun]) -> bool:
    return len({run.arm for run in runs}) > 1 and len({_shown(run.config.get(key)) for run in runs}) > 1


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
