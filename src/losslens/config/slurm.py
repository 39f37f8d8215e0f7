"""Configuration of the resources that a Slurm job requests."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from losslens.config.base import Section

# Flags of sbatch that have their own option in `resources`, or that the launcher depends on.
_SET_BY_LOSSLENS = (
    *("account", "constraint", "cpus-per-task", "gpus-per-node", "mem", "partition", "qos", "signal", "time"),
    *("array", "chdir", "clusters", "dependency", "error", "export", "input", "job-name", "kill-on-invalid-dep"),
    *(
        "nodes",
        "ntasks",
        "open-mode",
        "output",
        "parsable",
        "quiet",
        "requeue",
        "no-requeue",
        "test-only",
        "wait",
        "wrap",
    ),
)

_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d{1,2}){0,2})")


def _one_line(value: str) -> str:
    """Checks a value of an `#SBATCH` line, whose continuation on a further line the shell would run."""
    if not value.isprintable():
        raise ValueError(f"{value!r}: must be one line without control characters")
    return value


_Flag = Annotated[str, AfterValidator(_one_line)]


class Resources(Section):
    """Resources that one job requests from Slurm."""

    gpus: int = Field(ge=0)
    cpus: int = Field(ge=1)
    memory_gb: float = Field(gt=0, allow_inf_nan=False)
    time: int | str
    requeues: int = Field(ge=0)
    signal_seconds: int = Field(ge=1, lt=65536)
    partition: _Flag | None
    account: _Flag | None
    qos: _Flag | None
    constraint: _Flag | None
    max_running: int = Field(ge=1)
    sbatch: dict[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]*$")], _Flag | int | float | bool] | None
    setup: list[str]

    @field_validator("sbatch")
    @classmethod
    def _refuse_flags_set_elsewhere(cls, flags: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in flags or {}:
            if name in _SET_BY_LOSSLENS:
                raise ValueError(f"{name} is set by LossLens itself; use the other resources options")
        return flags

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if self.minutes < 1:
            raise ValueError(f"time={self.time}: must be at least one minute")
        if self.signal_seconds >= 60 * self.minutes:
            raise ValueError(f"signal_seconds={self.signal_seconds} must be shorter than time={self.time}")
        # submitit mistakes an earlier signal for preemption, which does not count as a timeout.
        if self.signal_seconds > max(600, 12 * self.minutes):
            raise ValueError(f"signal_seconds={self.signal_seconds}: must be at most 600, or a fifth of the time limit")
        if isinstance(self.time, int) and self.time > 1440:
            # YAML parses 8:00:00 as the number 28800, which Slurm would read as minutes.
            raise ValueError(
                f'time={self.time}: write more than a day (1440 minutes) as D-HH:MM:SS, and "H:MM:SS" in quotes'
            )
        return self

    @property
    def minutes(self) -> int:
        """`time` in minutes, rounded up.

        Raises:
            ValueError: It is not in one of Slurm's formats.
        """
        match = _SLURM_TIME.fullmatch(str(self.time))
        if match is None:
            raise ValueError(f"time={self.time}: must be minutes, M:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
        parts = [int(part) for part in match["parts"].split(":")]
        if match["days"] is not None:  # D-H, D-H:M, D-H:M:S
            hours, minutes, seconds = [*parts, 0, 0][:3]
            hours += 24 * int(match["days"])
        else:  # M, M:S, H:M:S
            hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        return math.ceil(hours * 60 + minutes + seconds / 60)


class Job(Section):
    """Options common to all entry scripts."""

    # Read by hydra/launcher=slurm before the job starts; not part of the job's manifest.
    resources: Resources | None = Field(default=None, exclude=True)
