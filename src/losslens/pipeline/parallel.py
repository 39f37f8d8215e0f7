"""Runs of a sweep in several processes on this machine, one per device (`hydra/launcher=local`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.pipeline.train_job import Outcome, train_job
from losslens.runs.run import Run
from losslens.runs.spec import RunSpec
from losslens.scheduling.local.devices import Device
from losslens.scheduling.local.live import live_table, printer
from losslens.scheduling.local.pool import MAX_DEATHS, Ended, Pool

_POLL_SECONDS = 1.0


def train_in_parallel(
    configs: Mapping[int, Mapping[str, Any]], devices: Sequence[Device], ended: Callable[[int, Outcome], None]
) -> None:
    """Trains and scores runs, as many at once as there are devices; each as `train_job` does it.

    A run whose process was killed is tried once more, from its last checkpoint, and then marked as failed. A run that
    another command has locked is left for later.

    Args:
        configs: Resolved configuration of each job, by its number.
        devices: The devices.
        ended: Called with the number and the outcome of each job that has ended; twice if only the base was locked.

    Raises:
        KeyboardInterrupt: The runs have stopped, with checkpoints.
    """
    _Queue(configs, ended).work_off(devices)


class _Queue:
    """The jobs of a command, and what has become of them."""

    def __init__(self, configs: Mapping[int, Mapping[str, Any]], ended: Callable[[int, Outcome], None]) -> None:
        self._configs, self._report = configs, ended
        self._waiting = deque(sorted(configs, key=self._work, reverse=True))  # a long run started last is waited for
        self._locked: dict[int, Run] = {}
        self._runs: dict[int, Run] = {}  # of the jobs that were started
        self._deaths: Counter[int] = Counter()
        self._done = 0
        self._reported: set[int] = set()
        self._print = printer()

    def work_off(self, devices: Sequence[Device]) -> None:
        """Runs all jobs."""
        train = partial(_train, jobs=len(self._configs), at_once=len(devices))
        with live_table() as update, Pool(train, devices, self._print) as pool:
            while self._waiting or self._locked or pool.working:
                self._start_jobs(pool)
                for task in pool.wait(_POLL_SECONDS):
                    self._ended(task)
                working = {self._runs[key]: device.name for key, device in pool.working.items() if key in self._runs}
                runs = list(dict.fromkeys(self._runs.values()))
                update(runs, working, f"{self._done} of {len(self._configs)} jobs done")

    def _start_jobs(self, pool: Pool) -> None:
        in_work = {self._runs[key].lock_file for key in pool.working if key in self._runs}
        for number, run in list(self._locked.items()):
            if run.lock_file not in in_work and not run.is_locked:
                del self._locked[number]
                self._waiting.append(number)
        if self._locked and not pool.working and not self._waiting:
            names = (f"{run.name} ({run.lock_holder})" for run in self._locked.values())
            self._print(f"waiting for {', '.join(sorted(set(names)))}", False)
        while self._waiting and pool.free:
            number, device = self._waiting.popleft(), pool.free[0]
            if (known := self._run_of(number)) is not None:
                self._runs[number] = known
                if known.lock_file in {self._runs[key].lock_file for key in pool.working if key in self._runs}:
                    self._locked[number] = known  # the same run under another name of its learning rate
                    continue
                if number not in self._reported:  # else only the base is still to be scored
                    self._print(f"{known.name}: on {device.name}", False)
            pool.start(device, number, self._configs[number])

    def _run_of(self, number: int) -> Run | None:
        """The run of a job; None if its configuration is invalid, which its outcome will say."""
        with suppress(InputError):
            return RunSpec.of(parse(TrainConfig, dict(self._configs[number]))).run
        return None

    def _work(self, number: int) -> tuple[bool, int]:
        """Says how long a job takes beside others: whether it samples, then the rollouts that it is trained on."""
        with suppress(InputError):
            spec = RunSpec.of(parse(TrainConfig, dict(self._configs[number])))
            optim = spec.config.optim
            of_pairs = isinstance(spec.method, Loss) and spec.method.unit == "pair"
            steps = optim.max_steps if optim.epochs is None else 1
            return spec.method.own_samples, steps * optim.batch_size * (2 if of_pairs else 1)
        return False, 0

    def _ended(self, task: Ended) -> None:
        outcome = self._after_death(task) if task.death else task.result
        if outcome is None:
            self._waiting.appendleft(task.key)
            return
        if outcome.locked is not None:
            self._locked[task.key] = outcome.locked
            if outcome.state == "locked":
                self._print(f"{outcome.run}: locked by {outcome.locked.lock_holder}; left for later", False)
                return
        else:
            self._done += 1
        self._reported.add(task.key)
        self._report(task.key, replace(outcome, locked=None))

    def _after_death(self, task: Ended) -> Outcome | None:
        """The outcome of a job whose process has died; None if it is to be tried once more."""
        run = self._runs.get(task.key)
        name = f"job {task.key}" if run is None else run.name
        self._deaths[task.key] += 1
        if self._deaths[task.key] < MAX_DEATHS:
            self._print(f"{name}: {task.death}; trying once more", True)
            return None
        error = f"{task.death}, and again when it was tried once more"
        with suppress(InputError, OSError):
            if run is not None and (status := run.status) and status["state"] != "completed":
                progress = {key: status[key] for key in ("step", "max_steps", "loss") if key in status}
                run.set_state("failed", error=error, **progress)
        return Outcome(name, "failed", error=f"{name}: {error}", exit_status=1)


def _train(config: dict[str, Any], jobs: int, at_once: int) -> Outcome:
    """Trains and scores a run in a worker; parsed there, so that its secrets are known there."""
    return train_job(parse(TrainConfig, config), wait=False, jobs=jobs, at_once=at_once)
