"""One job of `train.py`: rollouts, training and evaluation of one run; steps that are done are skipped."""

from __future__ import annotations

import time
import traceback
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from losslens.config.training import TrainConfig
from losslens.core import distributed
from losslens.core.errors import (
    DivergedError,
    InputError,
    ProcessError,
    ServerError,
    describe_place_error,
    describe_storage_error,
    first_line,
)
from losslens.core.files import write_json, write_text
from losslens.core.hashing import hash_file
from losslens.core.preemption import Preempted
from losslens.evaluation.outcomes import read_outcomes
from losslens.evaluation.score import require_problems, score_base, score_run
from losslens.evaluation.statistics import wilson_interval
from losslens.models.trained_weights import weights_fingerprint, weights_hashes
from losslens.pipeline.disk_space import require_space
from losslens.pipeline.preflight import require_fit
from losslens.pipeline.prepare import Prepared, prepare, prepare_to_join
from losslens.rollouts.sample import require_suitable_teacher
from losslens.runs.run import LockedError, Run, State, require_one_base
from losslens.runs.spec import RunSpec
from losslens.tracking import artifacts
from losslens.tracking.session import RunInfo, Session, catch_up, session


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        run: Name of the run, or of the method or overrides of a job that could not be started.
        state: `completed`, `skipped` (completed before), `failed`, `diverged` (now or before), or `locked` (by another
            process).
        accuracy: Greedy pass@1 on the first benchmark; None if there is none.
        error: One line; empty unless the job failed.
        exit_status: 0, 1 for a failure during the work, 2 for invalid input.
        locked: The run, or the base, that another process has locked, so that the job must be repeated; else None.
    """

    run: str
    state: str
    accuracy: float | None = None
    error: str = ""
    exit_status: int = 0
    locked: Run | None = None


def train_job(config: TrainConfig, wait: bool = True, jobs: int = 1, at_once: int = 1) -> Outcome:
    """Trains and scores the run that `config` describes, and scores the base; skips steps that are done.

    A failure is written to the run's `status.json` and returned in the outcome, so that the other jobs of a sweep
    continue. Only the main process does all this; the others just take part in training.

    Args:
        config: Configuration of the run.
        wait: Wait for locks of other processes; otherwise return the locked run in the outcome.
        jobs: Number of jobs of the command, for the disk space that is told.
        at_once: How many of them are worked on at the same time.
    """
    if not distributed.is_main():
        return _join_training(config)
    name, folder = str(config.method.get("name")), None
    try:
        spec = RunSpec.of(config)
        try:
            run = spec.run
        except InputError:
            require_problems(config.benchmarks)  # errors in the benchmarks are reported first
            raise
        name, folder = run.name, run.folder
        if not run.is_trained():
            require_one_base(spec.sweep, config.model)
            require_problems(config.benchmarks)
            if not spec.method.own_samples:
                require_suitable_teacher(config)
            config.optim.per_process_batch(distributed.world_size())
            require_fit(spec)
            require_space(spec, jobs, at_once)
        with run.lock(wait):
            run = spec.run  # another process may have started it under another name
            name, folder = run.name, run.folder
            if not name.startswith(f"{spec.method.name}-{config.lr.name}-"):
                print(f"lr={config.lr.name}: same learning rate, and so the same run, as {name}", flush=True)
            if diverged := run.divergence:
                return Outcome(
                    name, "diverged", error=f"{name}: {diverged}; to train it again, delete {folder}", exit_status=1
                )
            return _train_and_score(spec, run, wait)
    except LockedError as error:
        return Outcome(name, "locked", locked=error.run)
    except DivergedError as error:
        return Outcome(name, "diverged", error=f"{name}: {error}", exit_status=1)
    except InputError as error:
        _mark_queued_as_failed(folder, error)
        return Outcome(name, "failed", error=str(error), exit_status=2)
    except ServerError as error:
        _mark_queued_as_failed(folder, error)
        return Outcome(name, "failed", error=str(error), exit_status=1)
    except Exception as error:
        if message := describe_storage_error(error, folder or config.output_dir):
            return Outcome(name, "failed", error=message, exit_status=1)
        if message := describe_place_error(error):
            _mark_queued_as_failed(folder, InputError(message))
            return Outcome(name, "failed", error=message, exit_status=2)
        message = f"{type(error).__name__}: {first_line(error)}"
        if folder is not None and folder.is_dir():
            with suppress(OSError):
                write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
                message += f" (see {folder / 'error.txt'})"
        return Outcome(name, "failed", error=message, exit_status=1)


def _mark_queued_as_failed(folder: Path | None, error: Exception) -> None:
    """Marks a submitted run as failed if its job was refused before the run started."""
    with suppress(InputError):  # its status is damaged, and may be what it was refused for
        if folder is not None and Run(folder).status.get("state") == "queued":
            Run(folder).set_state("failed", error=first_line(error))


def _is_completed(run: Run) -> bool:
    """True if nothing is left to do, nor to repair in the run's status."""
    status = run.status
    if status.get("state") != "completed" or not run.is_trained():
        return False
    return bool(status.get("adapter_sha256") == run.manifest["adapter_sha256"])


def _train_and_score(spec: RunSpec, run: Run, wait: bool) -> Outcome:
    config = spec.config
    done_before = _is_completed(run)
    if done_before and config.optim.snapshot_steps and not run.snapshots:
        print(
            f"{run.name}: was trained without snapshots; to train it again with snapshots, delete {run.folder}",
            flush=True,
        )
    # W&B comes last, since the status in the folder must not wait for it.
    with ExitStack() as stack:
        try:
            prepared = None if run.is_trained() else _prepare(spec, run)
            wandb_session = Session() if done_before else stack.enter_context(_session(config, run))
            wandb_session.run_safely(catch_up, run.folder / "metrics.jsonl")
            if prepared is not None:
                if config.logger.artifacts and prepared.rollouts is not None:
                    artifacts.use(wandb_session, "rollouts", prepared.rollouts.name, prepared.rollouts)
                _train(config, run, prepared, wandb_session)
            # Only now that the manifest has the adapter's hash: without it the run is trained again from them.
            run.remove_checkpoints()
            if config.logger.artifacts:
                artifacts.log(wandb_session, "adapter", run.name, run.adapter, run.adapter.iterdir())
            locked_base = _score_base(config, wait)
            files = score_run(run, config.model, config.benchmarks, config.evaluation)
        except BaseException as error:
            # A completed run stays completed: its adapter is unchanged.
            if not done_before:
                state: State = "preempted" if isinstance(error, (KeyboardInterrupt, Preempted)) else "failed"
                is_explained = isinstance(error, (InputError, ServerError, DivergedError, Preempted))
                details = {"diverged": True} if isinstance(error, DivergedError) else {}
                progress = {name: run.status[name] for name in ("step", "max_steps") if name in run.status}
                message = ("" if is_explained else f"{type(error).__name__}: ") + first_line(error)
                message = describe_storage_error(error, run.folder) or message
                with suppress(OSError):  # nothing can be written, and the first error says why
                    run.set_state(state, error=message, **progress, **details)
            raise
        steps = run.manifest["training"]["steps"]
        if not done_before:
            # First, since a completed run is not looked at again.
            (run.folder / "error.txt").unlink(missing_ok=True)
            run.set_state("completed", step=steps, max_steps=steps, adapter_sha256=weights_fingerprint(run.adapter))
        wandb_session.log_late(steps, {f"eval/{name}": value for name, value in _accuracies(files).items()})
    accuracy = None
    if config.benchmarks:
        accuracy = float(read_outcomes(files[config.benchmarks[0].name])["correct"].mean())
    return Outcome(run.name, "skipped" if done_before else "completed", accuracy, locked=locked_base)


def _prepare(spec: RunSpec, run: Run) -> Prepared:
    """Prepares a run, without a server of the last run's scores, since what is loaded needs the GPU's memory."""
    from losslens.sampling.vllm import free_gpu

    free_gpu()
    return prepare(spec, run)


def _score_base(config: TrainConfig, wait: bool) -> Run | None:
    """Scores the base; returns it if it is locked by another process and `wait` is false."""
    try:
        score_base(config.output_dir / config.sweep, config.model, config.benchmarks, config.evaluation, wait)
    except LockedError as error:
        return error.run
    return None


def _session(config: TrainConfig, run: Run) -> AbstractContextManager[Session]:
    manifest = run.manifest
    facts = {
        "run": run.name,
        "commit": manifest["code"]["commit"],
        "versions": manifest["versions"],
        "rollouts_sha256": (manifest["rollouts"] or {}).get("sha256"),
        "base": manifest["base"],
        "initial_adapter_sha256": (manifest["initial_adapter"] or {}).get("sha256"),
        "references": manifest.get("references", {}),
    }
    tags = [str(config.method["name"]), config.size, config.model.name]
    about = RunInfo(config.sweep, "train", run.name, tags, {**manifest["config"], "losslens": facts})
    return session(config.logger, config.output_dir, run.folder, about)


def _accuracies(files: dict[str, Path]) -> dict[str, float]:
    """Accuracy over problems on each benchmark, with its 95% Wilson interval."""
    metrics: dict[str, float] = {}
    for name, file in files.items():
        by_problem = read_outcomes(file).groupby("problem_id")["correct"].mean()
        low, high = wilson_interval(float(by_problem.sum()), len(by_problem))
        values = {"accuracy": float(by_problem.mean()), "ci_low": low, "ci_high": high, "n": len(by_problem)}
        metrics |= {f"{name}/{measure}": value for measure, value in values.items()}
    return metrics


class _Pace:
    """Mean duration of a step, from the first logged step on: before it there is one-time work."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def at(self, step: int) -> dict[str, float]:
        """Returns `seconds_per_step` after `step`; empty for the first logged step."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return {}
        return {"seconds_per_step": round((now - self._first[1]) / (step - self._first[0]), 6)}


def _train(config: TrainConfig, run: Run, prepared: Prepared, wandb_session: Session) -> None:
    from losslens.training.run import train_run

    pace = _Pace()

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        rate = {"tokens_per_second": metrics["train/tokens_per_second"], **pace.at(step)}
        run.set_state("running", step=step, max_steps=prepared.steps, loss=metrics["train/loss"], **rate)
        wandb_session.log(step, metrics)

    plan = prepared.plan
    folders = {"run": str(run.folder)}
    folders |= {"initial": str(plan.initial_adapter)} if plan.initial_adapter is not None else {}
    folders |= {"rollouts": str(prepared.rollouts)} if prepared.rollouts is not None else {}
    with distributed.lockstep(folders):
        facts = train_run(plan, prepared.base, prepared.source, run.folder, on_metrics, prepared.references)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    hashes = {**weights_hashes(run.adapter), "metrics_sha256": hash_file(run.folder / "metrics.jsonl")}
    manifest = {**run.manifest, "training": facts, "ended": ended, **hashes}
    write_json(run.folder / "manifest.json", manifest, sealed=True)


def _join_training(config: TrainConfig) -> Outcome:
    """Trains, in a process that is not the main one, what the main process has prepared."""
    name, folder = str(config.method.get("name")), None
    try:
        folders = distributed.wait_for_plan()
        if folders is None:
            return Outcome(name, "skipped")
        folder = Path(folders["run"])
        name = folder.name
        with distributed.lockstep():
            from losslens.training.run import train_run

            rollouts = Path(folders["rollouts"]) if "rollouts" in folders else None
            initial = Path(folders["initial"]) if "initial" in folders else None
            prepared = prepare_to_join(RunSpec.of(config), rollouts, initial)
            train_run(*prepared, folder, lambda step, values: None)
    except DivergedError:
        return Outcome(name, "diverged")
    except ProcessError as error:
        return Outcome(name, "failed", error=str(error), exit_status=1)
    except Exception as error:
        if folder is None:
            raise
        # The main process may be terminated before it learns of the failure.
        message = f"process {distributed.rank()}: {type(error).__name__}: {first_line(error)}"
        Run(folder).set_state("failed", error=message)
        write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
        return Outcome(name, "failed", error=f"{name}: {message}", exit_status=1)
    return Outcome(name, "completed")
