"""One job of `train.py`: rollouts, training and evaluation of one run, each only when it is still to do."""

from __future__ import annotations

import shutil
import time
import traceback
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losslens.config.training import TrainConfig
from losslens.core import distributed, provenance
from losslens.core.errors import DivergedError, InputError, ProcessError, ServerError, first_line
from losslens.core.files import write_json, write_text
from losslens.core.notices import say_once
from losslens.core.preemption import Preempted
from losslens.evaluation.outcomes import read_outcomes
from losslens.evaluation.score import require_problems, score_base, score_run
from losslens.evaluation.statistics import wilson_interval
from losslens.losses.presentation import manifest_entry
from losslens.models.adapters import adapter_fingerprint, adapter_hashes, differs_from, initial_adapter
from losslens.models.loading import load_model, source_of
from losslens.pipeline.preflight import require_fit
from losslens.rollouts.frozen import FrozenRollouts, count_rollouts, load_rollouts
from losslens.rollouts.quality import require_usable, rollout_quality
from losslens.rollouts.sample import frozen_rollouts, problem_source, require_a_writer
from losslens.runs.integrity import bound_to
from losslens.runs.reference_adapters import describe_references, references_of
from losslens.runs.run import LockedError, Run, State, require_one_base
from losslens.runs.spec import RunSpec
from losslens.tracking import artifacts
from losslens.tracking.session import RunInfo, Session, catch_up, session

if TYPE_CHECKING:
    import pandas as pd

    from losslens.models.loading import LoadedModel
    from losslens.training.run import TrainingPlan
    from losslens.training.source import FrozenSource


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        run: Name of the run, or of what could not be started.
        state: `completed`, `skipped` (it was completed before), `failed`, `diverged` (now or before), or `held` (by
            another process, and not waited for).
        accuracy: Greedy pass@1 on the first benchmark; None when there is none.
        error: One line; empty unless it failed.
        exit_status: 0, 1 for a failure while working, 2 for bad input.
        held: What another process is at, this run or the base, so that the job is to be done once more; else None.
    """

    run: str
    state: str
    accuracy: float | None = None
    error: str = ""
    exit_status: int = 0
    held: Run | None = None


def train_job(config: TrainConfig, wait: bool = True) -> Outcome:
    """Trains and scores the run that `config` describes, and scores the base; skips what is done.

    A failure is written to the run's `status.json` and told in the outcome, so that the other jobs of a sweep go on.
    All that is the main process's; the others take part in its training.

    Args:
        config: The run.
        wait: Whether to wait for what another process is at; else the outcome says what that is.
    """
    if not distributed.is_main():
        return _train_along(config)
    name, folder = str(config.method.get("name")), None
    try:
        spec = RunSpec.of(config)
        try:
            run = spec.run
        except InputError:
            require_problems(config.benchmarks)  # what is wrong with them is told before who could answer them
            raise
        name, folder = run.name, run.folder
        if not run.is_trained():
            require_one_base(spec.sweep, config.model)
            require_problems(config.benchmarks)
            require_a_writer(config)
            config.optim.per_process_batch(distributed.world_size())
            require_fit(spec)
        with run.lock(wait):
            run = spec.run  # another process may have begun it by another name
            name, folder = run.name, run.folder
            if not name.startswith(f"{spec.loss.name}-{config.lr.name}-"):
                print(f"lr={config.lr.name} is the same rate for it, and the same run: {name}", flush=True)
            if diverged := run.divergence:
                return Outcome(
                    name, "diverged", error=f"{name}: {diverged}; to train it again, delete {folder}", exit_status=1
                )
            return _train_and_score(spec, run, wait)
    except LockedError as error:
        return Outcome(name, "held", held=error.run)
    except DivergedError as error:
        return Outcome(name, "diverged", error=f"{name}: {error}", exit_status=1)
    except InputError as error:
        _leave_the_queue(folder, error)
        return Outcome(name, "failed", error=str(error), exit_status=2)
    except ServerError as error:
        _leave_the_queue(folder, error)
        return Outcome(name, "failed", error=str(error), exit_status=1)
    except Exception as error:
        message = f"{type(error).__name__}: {first_line(error)}"
        if folder is not None and folder.is_dir():
            write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
            message += f" (see {folder / 'error.txt'})"
        return Outcome(name, "failed", error=message, exit_status=1)


def _leave_the_queue(folder: Path | None, error: Exception) -> None:
    """Says of a run that was submitted, and refused before it began, why it will not."""
    if folder is not None and Run(folder).status.get("state") == "queued":
        Run(folder).set_state("failed", error=first_line(error))


def _train_and_score(spec: RunSpec, run: Run, wait: bool) -> Outcome:
    config = spec.config
    done_before = run.status.get("state") == "completed" and run.is_trained()
    if done_before and config.optim.snapshot_steps and not run.snapshots:
        print(f"{run.name}: trained without snapshots; to have them, delete {run.folder}", flush=True)
    # W&B is told last: what the folder says must not wait for it.
    with ExitStack() as stack:
        try:
            todo = None if run.is_trained() else _prepare(spec, run)
            told = Session() if done_before else stack.enter_context(_session(config, run))
            told.tell(catch_up, run.folder / "metrics.jsonl")
            if todo is not None:
                if config.logger.artifacts:
                    artifacts.use(told, "rollouts", todo.rollouts.name, todo.rollouts)
                _train(config, run, todo, told)
            if config.logger.artifacts:
                artifacts.log(told, "adapter", run.name, run.adapter, run.adapter.iterdir())
            held = _score_base(config, wait)
            files = score_run(run, config.model, config.benchmarks, config.evaluation)
        except BaseException as error:
            # What was completed stays so: its adapter is as good as before.
            if not done_before:
                state: State = "preempted" if isinstance(error, (KeyboardInterrupt, Preempted)) else "failed"
                told_of = isinstance(error, (InputError, ServerError, DivergedError, Preempted))
                details = {"diverged": True} if isinstance(error, DivergedError) else {}
                reached = {name: run.status[name] for name in ("step", "max_steps") if name in run.status}
                message = ("" if told_of else f"{type(error).__name__}: ") + first_line(error)
                run.set_state(state, error=message, **reached, **details)
            raise
        steps = run.manifest["training"]["steps"]
        if not done_before:
            run.set_state("completed", step=steps, max_steps=steps, adapter_sha256=adapter_fingerprint(run.adapter))
            (run.folder / "error.txt").unlink(missing_ok=True)
            if not differs_from(run.adapter):
                print(f"{run.name}: its update is 0: training has not moved the weights", flush=True)
        told.log_late(steps, {f"eval/{name}": value for name, value in _accuracies(files).items()})
    accuracy = None
    if config.benchmarks:
        accuracy = float(read_outcomes(files[config.benchmarks[0].name])["correct"].mean())
    return Outcome(run.name, "skipped" if done_before else "completed", accuracy, held=held)


def _score_base(config: TrainConfig, wait: bool) -> Run | None:
    """Scores the base; gives it back where another process does that, and it is not to be waited for."""
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
        "rollouts_sha256": manifest["rollouts"]["sha256"],
        "base": manifest["base"],
        "initial_adapter_sha256": manifest["initial_adapter"]["sha256"],
        "references": manifest.get("references", {}),
    }
    tags = [str(config.method["name"]), f"r{config.lora_rank.r}", config.model.name]
    about = RunInfo(config.sweep, "train", run.name, tags, {**manifest["config"], "losslens": facts})
    return session(config.logger, config.output_dir, run.folder, about)


def _accuracies(files: dict[str, Path]) -> dict[str, float]:
    """Of each benchmark the accuracy and its 95% interval (Wilson), over problems."""
    numbers: dict[str, float] = {}
    for name, file in files.items():
        by_problem = read_outcomes(file).groupby("problem_id")["correct"].mean()
        low, high = wilson_interval(float(by_problem.sum()), len(by_problem))
        values = {"accuracy": float(by_problem.mean()), "ci_low": low, "ci_high": high, "n": len(by_problem)}
        numbers |= {f"{name}/{measure}": value for measure, value in values.items()}
    return numbers


@dataclass(frozen=True)
class _Prepared:
    """What a run is trained with."""

    plan: TrainingPlan
    base: LoadedModel
    source: FrozenSource
    rollouts: Path
    references: dict[str, Path]
    steps: int


def _prepare(spec: RunSpec, run: Run) -> _Prepared:
    """Makes the rollouts and the initial adapter when they are missing, and writes down what the run is."""
    config = spec.config
    started = datetime.now(UTC)
    run.set_state("running")
    rollouts = frozen_rollouts(config)
    _say_what_they_are_like(rollouts)
    _say_what_is_scored(config, rollouts)
    from losslens.models.limits import limits_of
    from losslens.models.tokens import decode
    from losslens.training.batches import filter_rollouts, tokenise

    base = load_model(source_of(config.model))
    tokenised = tokenise(rollouts.table, base.tokenizer, rollouts.manifest)
    usable = filter_rollouts(tokenised, config.train_on)
    met = tokenised if "reference" in spec.loss.needs else usable  # the base scores all of them, once
    ids = met["prompt_ids"].tolist(), met["completion_ids"].tolist()
    file = str(rollouts.folder / "rollouts.parquet")
    limits_of(source_of(config.model)).require_sequences(file, *ids, rows=met.index.tolist())
    source = _source(spec, base, tokenised)
    require_usable(rollouts, config.rollouts, spec.loss.uses_reward)
    steps = config.optim.steps(source.epoch_length)
    run.set_state("running", step=0, max_steps=steps)
    initial = initial_adapter(config.output_dir, spec.base, base.model, spec.lora, config.init_seed)
    precision = {"dtype": str(base.model.dtype), "device": base.model.device.type}
    plan = _plan(spec, initial)
    before = run.manifest if (run.folder / "manifest.json").exists() else {}
    before = before if isinstance(before, dict) else {}
    if before and before.get("precision") != precision:
        # Half a run in one precision and half in another would be neither.
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    manifest: dict[str, Any] = {
        "run": run.name,
        "method": spec.loss.name,
        "options": spec.loss.options,
        "loss": manifest_entry(spec.loss),
        "conventional_lr_scale": spec.loss.conventional_lr_scale,
        "learning_rate": plan.learning_rate,
        "config": config.model_dump(mode="json"),
        "identity": spec.identity,
        "rollouts": {"folder": rollouts.folder.name, "sha256": rollouts.sha256, **count_rollouts(rollouts.table)},
        "trained_on": count_rollouts(usable),
        "base": spec.base,
        "initial_adapter": {"folder": initial.name, "sha256": adapter_fingerprint(initial)},
        "precision": precision,
        "prompt_example": decode(base.tokenizer, tokenised["prompt_ids"].iloc[0]),
        **provenance.describe_environment(),
        "started": started.isoformat(timespec="seconds"),
        "outcomes": before.get("outcomes") or {},
    }
    plan = replace(plan, identity=bound_to(manifest))
    references = references_of(config.weight_tracking.references, run, initial, manifest)
    write_json(run.folder / "manifest.json", {**manifest, "references": describe_references(references)})
    return _Prepared(plan, base, source, rollouts.folder, references, steps)


def _say_what_they_are_like(rollouts: FrozenRollouts) -> None:
    lines = [f"  {name}: {value}" for name, value in rollout_quality(rollouts).items()]
    say_once("\n".join([str(rollouts.folder), *lines]))


class _Pace:
    """How long a step takes: the mean since the first one that was told of, before which much is done only once."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def at(self, step: int) -> dict[str, float]:
        """`seconds_per_step`, as soon as it is known; called at `step`."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return {}
        return {"seconds_per_step": round((now - self._first[1]) / (step - self._first[0]), 6)}


def _say_what_is_scored(config: TrainConfig, rollouts: FrozenRollouts) -> None:
    """Says when rollouts from a folder answer other problems than those that runs are scored on by default."""
    about = rollouts.manifest.get("identity")
    source = about.get("source") if isinstance(about, dict) else None
    if config.rollouts.path is None or config.benchmark or config.data.eval_size == 0 or not isinstance(source, dict):
        return
    if source != problem_source(config.data).identity("train"):
        say_once(
            f"rollouts.path={config.rollouts.path}: these answer other problems than data={config.data.name}, whose "
            "held-out problems the runs are scored on; benchmark=… names others, data.eval_size=0 none"
        )


def _train(config: TrainConfig, run: Run, todo: _Prepared, told: Session) -> None:
    from losslens.training.run import train_run

    pace = _Pace()

    def note(step: int, values: dict[str, float]) -> None:
        rate = {"tokens_per_second": values["train/tokens_per_second"], **pace.at(step)}
        run.set_state("running", step=step, max_steps=todo.steps, loss=values["train/loss"], **rate)
        told.log(step, values)

    orders = {"run": str(run.folder), "rollouts": str(todo.rollouts), "initial": str(todo.plan.initial_adapter)}
    with distributed.lockstep(orders):
        facts = train_run(todo.plan, todo.base, todo.source, run.folder, note, todo.references)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        run.folder / "manifest.json", {**run.manifest, "training": facts, "ended": ended, **adapter_hashes(run.adapter)}
    )


def _source(spec: RunSpec, base: LoadedModel, tokenised: pd.DataFrame) -> FrozenSource:
    from losslens.training.reference import ReferenceCache
    from losslens.training.source import FrozenSource

    about = {"base": spec.base, "dtype": str(base.model.dtype), "device": base.model.device.type}
    kept, config = ReferenceCache(spec.config.output_dir / "references", about), spec.config
    return FrozenSource(tokenised, spec.loss, config.optim, config.seed, config.train_on, kept)


def _plan(spec: RunSpec, initial: Path) -> TrainingPlan:
    from losslens.training.run import TrainingPlan

    return TrainingPlan(
        loss=spec.loss,
        learning_rate=spec.learning_rate,
        lora=spec.lora,
        initial_adapter=initial,
        optim=spec.config.optim,
        seed=spec.config.seed,
    )


def _train_along(config: TrainConfig) -> Outcome:
    """What a process does that is not the main one: it trains, when that one says so, what that one has prepared."""
    name, folder = str(config.method.get("name")), None
    try:
        orders = distributed.wait_for_plan()
        if orders is None:
            return Outcome(name, "skipped")
        folder = Path(orders["run"])
        name = folder.name
        with distributed.lockstep():
            from losslens.training.batches import tokenise
            from losslens.training.run import train_run

            base = load_model(source_of(config.model))
            rollouts = load_rollouts(Path(orders["rollouts"]))
            tokenised = tokenise(rollouts.table, base.tokenizer, rollouts.manifest)
            spec = RunSpec.of(config)
            plan, source = _plan(spec, Path(orders["initial"])), _source(spec, base, tokenised)
            train_run(plan, base, source, folder, lambda step, values: None)
    except DivergedError:
        return Outcome(name, "diverged")
    except ProcessError as error:
        return Outcome(name, "failed", error=str(error), exit_status=1)
    except Exception as error:
        if folder is None:
            raise
        # The main process may be ended before it hears of it.
        message = f"process {distributed.rank()}: {type(error).__name__}: {first_line(error)}"
        Run(folder).set_state("failed", error=message)
        write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
        return Outcome(name, "failed", error=f"{name}: {message}", exit_status=1)
    return Outcome(name, "completed")
