"""Planning of the jobs of a command line: their folders, whether they are done, and their dependencies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.parse import parse, resolved
from losslens.config.slurm import Resources
from losslens.config.training import TrainConfig
from losslens.core.errors import InputError
from losslens.core.hashing import hash_json
from losslens.rollouts.frozen import find_rollouts
from losslens.rollouts.sample import rollouts_identity
from losslens.runs.run import Run, runs_of
from losslens.runs.spec import RunSpec
from losslens.scheduling.record import record_file


@dataclass(frozen=True)
class JobSpec:
    """One job of a command line.

    Attributes:
        script: Path of the entry script.
        config: Its resolved configuration, without the resources.
        resources: Resources to request from Slurm.
        name: Name of its result.
        record: File of its submission record.
        folder: Folder of logs, pickles and code snapshots.
        done: Why it need not be submitted; empty if it must be.
        run: The run of a job of `train.py`; None for other jobs.
        waits_for: Submission records of jobs whose results it reads; it starts after those that have not ended yet.
        needs: Jobs that must succeed first.
    """

    script: Path
    config: dict[str, Any]
    resources: Resources
    name: str
    record: Path
    folder: Path
    done: str = ""
    run: Run | None = None
    waits_for: list[Path] = field(default_factory=list)
    needs: list[JobSpec] = field(default_factory=list)

    @property
    def key(self) -> Path:
        """Key shared by jobs with the same result; a run that has not started yet may have several names."""
        return self.record if self.run is None else self.run.lock_file


def plan_job(script: Path, config: DictConfig) -> JobSpec:
    """Returns the job of an entry script with a composed configuration.

    Raises:
        InputError: The configuration is invalid.
    """
    schema, kind = _KINDS[script.stem]
    content = resolved(schema, config)
    resources = parse(Resources, content.pop("resources"), "resources")
    # Expanded here, since the home folder may differ on the node.
    content["output_dir"] = str(parse(schema, content).output_dir)
    return kind(script, content, resources)


def _training(script: Path, config: dict[str, Any], resources: Resources) -> JobSpec:
    checked = parse(TrainConfig, config)
    spec = RunSpec.of(checked)
    run = spec.run
    done = ""
    if run.status.get("state") == "completed" and run.is_trained():
        done = "completed"
    elif run.divergence:
        done = f"diverged earlier; to train it again, delete {run.folder}"
    one_process = resources.model_copy(update={"gpus": min(resources.gpus, 1)})
    part = {name: config[name] for name in RolloutConfig.model_fields if name in config}
    rollouts = _rollouts(script.with_name("rollout.py"), part, one_process)
    return JobSpec(
        script,
        config,
        resources,
        run.name,
        record_file(run.folder),
        checked.output_dir / checked.sweep / "slurm",
        done,
        run,
        needs=[] if done or rollouts.done or spec.method.own_samples else [rollouts],
    )


def _rollouts(script: Path, config: dict[str, Any], resources: Resources) -> JobSpec:
    checked = parse(RolloutConfig, config)
    parent = checked.output_dir / "rollouts"
    identity = rollouts_identity(checked)
    key = hash_json(identity, 16)
    exists = checked.rollouts.path is not None or (parent.is_dir() and find_rollouts(parent, key) is not None)
    folder = parent / "slurm"
    name = f"rollouts {checked.data.name}-{key[:8]}"
    return JobSpec(script, config, resources, name, folder / f"{key}.json", folder, "completed" if exists else "")


def _evaluation(script: Path, config: dict[str, Any], resources: Resources) -> JobSpec:
    checked = parse(EvaluateConfig, config)
    runs = _runs(checked.output_dir, [checked.sweep])
    return _sweep_job(
        script, config, resources, checked.output_dir / checked.sweep, [record_file(run.folder) for run in runs]
    )


def _analysis(script: Path, config: dict[str, Any], resources: Resources) -> JobSpec:
    checked = parse(AnalyzeConfig, config)
    records = [record_file(run.folder) for run in _runs(checked.output_dir, checked.sweeps)]
    for sweep in checked.sweeps:
        records += (checked.output_dir / sweep / "slurm").glob("evaluate-*.json")
    return _sweep_job(script, config, resources, checked.folder.parent, records)


def _sweep_job(
    script: Path, config: dict[str, Any], resources: Resources, sweep: Path, waits_for: list[Path]
) -> JobSpec:
    name = f"{script.stem}-{hash_json(config, 8)}"
    folder = sweep / "slurm"
    return JobSpec(script, config, resources, name, folder / f"{name}.json", folder, waits_for=waits_for)


def _runs(output_dir: Path, sweeps: list[str]) -> list[Run]:
    runs = [run for sweep in sweeps for run in runs_of(output_dir, sweep)]
    if sweeps and not runs:
        raise InputError(f"sweep={','.join(sweeps)}: there are no runs in it")
    return runs


_Kind = Callable[[Path, dict[str, Any], Resources], JobSpec]
_KINDS: dict[str, tuple[type[RolloutConfig | EvaluateConfig | AnalyzeConfig], _Kind]] = {
    "train": (TrainConfig, _training),
    "rollout": (RolloutConfig, _rollouts),
    "evaluate": (EvaluateConfig, _evaluation),
    "analyze": (AnalyzeConfig, _analysis),
}
