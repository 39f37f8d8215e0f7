"""Several runs at once on this machine: `hydra/launcher=local`."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console
from rich.live import Live
from rich.table import Table

from losslens.analysis.pipeline import analyse
from losslens.cli.arguments import prepare_arguments
from losslens.config.analysis import AnalyzeConfig
from losslens.config.parse import parse
from losslens.core import preemption
from losslens.core.errors import InputError, ServerError, ServerStartError, UnavailableError, WorkerDiedError
from losslens.core.hashing import hash_file
from losslens.core.notices import print_once
from losslens.core.redaction import _RedactingStream
from losslens.pipeline import parallel, parallel_passes, parallel_rollouts, parallel_scores
from losslens.pipeline import sweep as pipeline_sweep
from losslens.pipeline.parallel_passes import sharing
from losslens.pipeline.parallel_rollouts import RolloutJobs
from losslens.pipeline.parallel_scores import evaluate_in_parallel
from losslens.pipeline.sweep import SweepJobs
from losslens.pipeline.train_job import Outcome
from losslens.runs.run import Run, runs_of
from losslens.scheduling.local import devices, pool
from losslens.scheduling.local.devices import Device, choose_devices
from losslens.scheduling.local.pool import Ended, Pool, run_all, server_did_not_start
from tests.conftest import Started, command, remove_outcomes, script, start
from tests.test_first_hour import SCHEMAS, composed
from tests.test_sweep import FEW, adapters
from tests.test_sweep_shared import _until

TWO = [Device("CPU 0", {"OMP_NUM_THREADS": "1"}), Device("CPU 1", {"OMP_NUM_THREADS": "1"})]
# The benchmark of the sweep's own scores.
SCORED_BEFORE = ("benchmark=arithmetic", "benchmark.arithmetic.eval_size=40", "evaluation.max_tokens=64")
LOCAL = ("-m", "hydra/launcher=local", "hydra.launcher.workers=2", FEW, "logger=none", "optim.save_steps=2")


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CONTEXT", multiprocessing.get_context("fork"))


def local(output_dir: Path, *arguments: str) -> list[str]:
    return command(output_dir, *LOCAL, *arguments)


def workers_of(process: Started) -> list[psutil.Process]:
    with_workers = [psutil.Process(process.pid)]
    return with_workers[0].children()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


# Devices


def test_one_worker_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["2", "GPU-1f"])
    assert [device.name for device in choose_devices(None)] == ["GPU 2", "GPU GPU-1f"]
    [only] = choose_devices(1)
    assert only.environment == {"CUDA_VISIBLE_DEVICES": "2"}


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [device.environment["OMP_NUM_THREADS"] for device in choose_devices(3)] == ["2", "2", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert choose_devices(3)[2] == Device("CPU 2", {"OMP_NUM_THREADS": "5"})


def test_the_longest_runs_start_first() -> None:
    """A pair is two rollouts, an on-policy method samples its own; of equal runs the command line's order stays."""
    lines = ["method=sft", "method=rft", "method=dpo", "method=online_grpo", "method=sft optim.max_steps=150", "seed=x"]
    configs = [OmegaConf.to_container(composed(*line.split()), resolve=True) for line in lines]
    queue = parallel._Queue(dict(enumerate(configs)), lambda number, outcome: None)
    assert list(queue._waiting) == [3, 2, 4, 0, 1, 5]


@pytest.mark.parametrize(
    ("workers", "gpus", "error"),
    [
        (0, [], "hydra.launcher.workers=0: the number of runs at once, at least 1"),
        (True, [], "hydra.launcher.workers=True: the number of runs at once, at least 1"),
        ("two", [], "hydra.launcher.workers=two: the number of runs at once, at least 1"),
        (8, [], "hydra.launcher.workers=8: more than the 7 cores of this machine"),
        (3, ["0", "1"], "hydra.launcher.workers=3: more than the 2 visible GPUs of this machine"),
        (None, [], "hydra/launcher=local: no GPU here; hydra.launcher.workers=N shares the 7 cores among N runs"),
    ],
)
def test_bad_numbers_are_one_line(workers: Any, gpus: list[str], error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    with pytest.raises(InputError) as raised:
        choose_devices(workers)
    assert str(raised.value) == error


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="not with torchrun"):
        choose_devices(2)


def test_a_bad_number_on_the_command_line(tmp_path: Path) -> None:
    outcome = script(*local(tmp_path, "hydra.launcher.workers=0", "method=sft,rft"), check=2)
    assert outcome.stderr == "train.py: hydra.launcher.workers=0: the number of runs at once, at least 1\n"
    assert not list(tmp_path.iterdir())


# The pool


def _act(task: tuple[str, Any]) -> Any:
    kind, value = task
    if kind == "die":
        os.kill(os.getpid(), value)
    if kind == "exit":
        sys.exit(value)
    if kind in ("cut", "tail"):
        os.write(1, value.encode())
        if kind == "cut":
            os._exit(3)
    if kind == "print":
        os.write(1, f"{value}\n".encode())
        print(f"{value}!", file=sys.stderr, flush=True)
    if kind == "deaf":
        with preemption.deferred():  # as in the middle of a step
            time.sleep(value)
    if kind == "sleep":
        time.sleep(value)
    return os.getpid() if kind == "pid" else os.environ["OMP_NUM_THREADS"] if kind == "threads" else value


def _results(tasks: list[tuple[str, Any]], say: Callable[[str, bool], None] = lambda *_: None) -> dict[int, Any]:
    """What becomes of tasks in a pool of two workers."""
    waiting, found = dict(enumerate(tasks)), {}
    with Pool(_act, TWO, say) as workers:
        while waiting or workers.working:
            while waiting and workers.free:
                key = next(iter(waiting))
                workers.start(workers.free[0], key, waiting.pop(key))
            found |= {ended.key: ended.death or ended.result for ended in workers.wait(5)}
    return found


def test_a_worker_that_dies_takes_only_its_task() -> None:
    tasks = [("die", signal.SIGKILL), ("give", 1), ("exit", 3), ("give", 2), ("die", signal.SIGUSR1), ("give", 3)]
    assert _results(tasks) == {
        0: "killed by SIGKILL, manually or because it ran out of memory",
        1: 1,
        2: "its process ended with exit status 3",
        3: 2,
        4: "killed by SIGUSR1",
        5: 3,
    }


def test_a_worker_is_kept_for_all_its_tasks() -> None:
    found = _results([("pid", None)] * 6)
    assert len(set(found.values())) <= 2
    assert os.getpid() not in found.values()


def test_a_worker_has_the_environment_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert set(_results([("threads", None)] * 2).values()) == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "9"


def test_what_workers_print_comes_through_in_whole_lines() -> None:
    said: list[tuple[str, bool]] = []
    _results([("print", "a"), ("print", "10%\r90%\rb")], lambda *line: said.append(line))
    assert [line for line, is_error in sorted(said) if not is_error] == ["a", "b"]
    assert ("a!", True) in said


def test_a_last_line_without_an_end_is_passed_on() -> None:
    said: list[tuple[str, bool]] = []
    found = _results([("cut", "a\nb"), ("cut", "c\n")], lambda *line: said.append(line))
    assert set(found.values()) == {"its process ended with exit status 3"}
    _results([("tail", "d")], lambda *line: said.append(line))
    assert sorted(line for line, is_error in said if not is_error) == ["a", "b", "c", "d"]


def test_no_task_is_started_after_a_server_that_does_not_start() -> None:
    with Pool(_act, TWO[:1], lambda *_: None) as pool:
        tasks = [("give", 1), ("give", ServerStartError("no")), ("give", 2)]
        ended = run_all(pool, tasks, until=server_did_not_start)
    assert [(task.key, str(task.result)) for task in ended] == [(0, "1"), (1, "no")]


@pytest.mark.parametrize("kind", [InputError, UnavailableError, ServerError, ServerStartError])
def test_a_worker_keeps_the_kind_of_an_error(
    kind: type[InputError | ServerError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise type("Special", (kind,), {})("why")  # a class that cannot be pickled

    monkeypatch.setattr(parallel_scores, "SweepScores", fail)
    monkeypatch.setattr(parallel_rollouts, "rollout_job", fail)
    found = [parallel_scores._score(({}, "run")), parallel_rollouts._sample(None)]
    if issubclass(kind, InputError):
        found.append(parallel_passes._call((fail, 0)))
    for error in found:
        assert type(error) is kind
        assert str(error) == "why"


def test_a_server_that_does_not_start_is_tried_for_no_other_run(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_here(pool: Pool, tasks: Any, until: Callable[[Ended], bool]) -> list[Ended]:
        asked.extend(name for _, name in tasks)
        return [Ended(0), Ended(1, ServerStartError("evaluation.server.command: the server ended"))]

    monkeypatch.setattr(parallel_scores, "run_all", run_here)
    monkeypatch.setattr(parallel_scores, "evaluate_job", lambda *_: pytest.fail("tried again"))
    with pytest.raises(ServerStartError):
        evaluate_in_parallel(composed(*SCORED_BEFORE, f"output_dir={sweep}", of="evaluate"), TWO)
    assert len(asked) == 7


def test_an_error_in_the_parent_stops_the_workers() -> None:
    with pytest.raises(ZeroDivisionError), Pool(_act, TWO, lambda *_: None) as workers:
        workers.start(TWO[0], 0, ("sleep", 600))
        workers.wait(0.2)
        processes = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        assert processes
        1 / 0  # noqa: B018
    assert gone(processes)


def test_a_second_interrupt_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts: list[float] = []

    def interrupted(_: Pool, seconds: float) -> None:
        interrupts.append(seconds)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Pool(_act, TWO, lambda *_: None) as workers:
        workers.start(TWO[0], 0, ("deaf", 600))
        workers.wait(0.3)
        processes = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        monkeypatch.setattr(Pool, "_forward", interrupted)
        raise KeyboardInterrupt
    assert len(interrupts) == 1
    assert processes
    assert gone(processes)


def test_a_live_table_passes_the_guard_of_the_streams() -> None:
    shown = io.StringIO()
    console = Console(file=_RedactingStream(shown), force_terminal=True)  # type: ignore[arg-type]
    with Live(Table("run"), console=console, transient=True):
        pass
    assert "\x1b[?25l" in shown.getvalue()
    assert r"\x1b" not in shown.getvalue()


# The queue of a sweep


def _die(_: dict[str, Any], **__: int) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _die_once(config: dict[str, Any], **_: int) -> Outcome:
    if not (marker := Path(config["marker"])).exists():
        marker.touch()
        _die(config)
    return Outcome("x", "completed")


@pytest.fixture
def one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that is in training at step 5."""
    run = Run(tmp_path / "main" / "sft-12345678")
    run.folder.mkdir(parents=True)
    run.set_state("running", step=5, max_steps=9)
    monkeypatch.setattr(parallel._Queue, "_run_of", lambda *_: run)
    return run


def test_a_run_whose_process_is_killed_is_tried_once_more(
    one_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: list[Outcome] = []
    monkeypatch.setattr(parallel, "_train", _die_once)
    config = {"marker": str(tmp_path / "marker")}
    parallel.train_in_parallel({0: config}, TWO, lambda _, outcome: outcomes.append(outcome))
    assert [outcome.state for outcome in outcomes] == ["completed"]
    assert (
        "sft-12345678: killed by SIGKILL, manually or because it ran out of memory; trying once"
        in capsys.readouterr().err
    )


def test_a_run_whose_process_is_killed_twice_has_failed(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[int, Outcome] = {}
    monkeypatch.setattr(parallel, "_train", _die)
    parallel.train_in_parallel({0: {}}, TWO, outcomes.__setitem__)
    assert (outcomes[0].state, outcomes[0].exit_status) == ("failed", 1)
    status = one_run.status
    assert (status["state"], status["step"]) == ("failed", 5)
    assert "killed by SIGKILL" in status["error"]
    assert outcomes[0].error == f"{one_run.name}: {status['error']}"


# Whole sweeps


def test_it_is_the_sweep_of_one_process(sweep: Path, tmp_path: Path) -> None:
    """A worker and then the command itself are killed; the same line ends in the bytes of a sweep in one process."""
    shutil.copytree(sweep / "rollouts", tmp_path / "rollouts")
    line = local(tmp_path, "method=sft,rft,grpo")

    def in_training(known: set[str] = frozenset()) -> list[Run]:  # type: ignore[assignment]
        found = [Run(file.parents[2]) for file in tmp_path.glob("main/*/checkpoints/checkpoint-*/sealed.json")]
        return [run for run in found if run.name not in known and run.status.get("state") == "running"]

    with start(*line) as process:
        _until(in_training)
        victim = in_training()[0]
        os.kill(victim.status["process"]["pid"], signal.SIGKILL)
        _until(lambda: f"{victim.name}: killed by SIGKILL" in process.stderr)
        _until(lambda: in_training({victim.name}) or process.poll() is not None)
        workers = workers_of(process)
        os.kill(process.pid, signal.SIGKILL)
        assert workers
        _until(lambda: gone(workers))
    outcome = script(*line)
    there = adapters(sweep)
    assert adapters(tmp_path) == {method: there[method] for method in ("sft", "rft", "grpo")}
    assert {run.status["state"] for run in runs_of(tmp_path, "main")} == {"completed"}
    assert "Compare the weights" in outcome.stdout
    for here in tmp_path.glob("main/*/status.json"):
        first = sweep / here.relative_to(tmp_path)
        assert json.loads(here.read_text()).keys() == json.loads(first.read_text()).keys()


def test_interrupted_runs_write_checkpoints(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "rollouts", tmp_path / "rollouts")
    line = local(tmp_path, "method=sft,rft", "optim.max_steps=400", "optim.save_steps=400")
    with start(*line) as process:
        running = lambda: [run for run in map(Run, tmp_path.glob("main/*ft-*")) if run.status.get("step", 0) > 1]  # noqa: E731
        _until(lambda: len(running()) == 2)
        workers = workers_of(process)
        for each in (psutil.Process(process.pid), *workers):
            each.send_signal(signal.SIGINT)  # as a terminal does
        assert process.wait() == 130
        assert process.stderr.endswith("train.py: interrupted; run the same command to resume\n"), process.stderr
        assert "Traceback" not in process.stderr
    assert gone(workers)
    runs = running()
    assert [run.status["state"] for run in runs] == ["preempted", "preempted"]
    for run in runs:
        [checkpoint] = run.checkpoints.glob("checkpoint-*")
        assert int(re.sub(r"\D", "", checkpoint.name)) >= 2


def test_two_commands_share_a_sweep(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "rollouts", tmp_path / "rollouts")
    line = local(tmp_path, "method=sft,rft")
    with start(*line) as first, start(*line) as second:
        assert first.wait() == second.wait() == 0, f"{first.stderr}\n{second.stderr}"
        both = first.stdout + second.stdout
    there = adapters(sweep)
    assert adapters(tmp_path) == {method: there[method] for method in ("sft", "rft")}
    assert both.count(": completed,") == both.count(": skipped,") == 2


def test_evaluate_shares_out_the_runs(sweep: Path) -> None:
    """Outcomes that training has written are removed, and written again to the byte."""
    files = sorted(sweep.glob("main/*/eval/arithmetic.parquet"))
    assert len(files) == 7
    again = shutil.copytree(sweep, sweep.with_name("again"))
    for file in files:
        remove_outcomes(again / file.relative_to(sweep))
    outcome = script("evaluate.py", *SCORED_BEFORE, f"output_dir={again}", "workers=2")
    for file in files:
        assert hash_file(again / file.relative_to(sweep)) == hash_file(file)
        assert file.parents[1].name in outcome.stdout[outcome.stdout.index("arithmetic (n = 40)") :]


def test_a_run_that_cannot_be_scored_stops_no_other(sweep: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(sweep, sweep.with_name("broken"))
    [weights] = broken.glob("main/dft-*/adapter/adapter_model.safetensors")
    weights.write_bytes(b"")
    with pytest.raises(InputError) as raised:
        evaluate_in_parallel(composed(*SCORED_BEFORE, f"output_dir={broken}", of="evaluate"), TWO)
    assert str(raised.value).count(str(weights.parent)) == 1
    shown = capfd.readouterr().out
    assert all(name in shown for name in ("base-", "sft-", "rft-", "rift-", "grpo-", "dpo-"))
    assert "dft-" not in shown


def test_several_gpus_are_worth_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline_sweep, "has_several_gpus", lambda: True)
    monkeypatch.setattr(pipeline_sweep, "train_job", lambda *_, **__: Outcome("x", "completed"))
    config = composed("logger=none")
    for is_sweep in (False, True):
        print_once.cache_clear()
        monkeypatch.setattr(pipeline_sweep, "_is_multirun", lambda is_sweep=is_sweep: is_sweep)
        jobs = SweepJobs()
        for _ in range(2):
            jobs.job(config)
        assert capsys.readouterr().out.count("hydra/launcher=local trains a run on each of them") == is_sweep


def test_the_short_form() -> None:
    line = ["hydra/launcher=local", "hydra.launcher.workers=2"]
    assert prepare_arguments(["-m", "workers=2", "seed=1"], "train.py", SCHEMAS["train"]) == ["-m", *line, "seed=1"]
    assert composed("workers=2", hydra=True).hydra.launcher.workers == 2
    assert composed("workers=2", of="evaluate", hydra=True).hydra.mode == RunMode.MULTIRUN


# Analyses and rollouts


def _refuse(argument: str) -> None:
    if argument == "x":
        raise InputError("x is refused")
    if argument == "y":
        os.kill(os.getpid(), signal.SIGKILL)


def test_shared_calls_raise_what_a_worker_raised() -> None:
    with sharing(()) as share:
        assert share is None
    with sharing(TWO) as share:
        assert share is not None
        share(_refuse, ["a", "b", "c"])
        with pytest.raises(InputError, match="x is refused"):
            share(_refuse, ["a", "x"])
        with pytest.raises(WorkerDiedError, match="y: killed by SIGKILL"):
            share(_refuse, ["y", "a"])


def test_workers_measure_all_that_an_analysis_needs_of_forward_passes(sweep: Path) -> None:
    """What is shared out can be sent to a worker, and this process then finds all of it in the cache."""
    passes = {"similarities", "losses", "outputs", "states", "line", "off_task", "rotated", "behaviour", "midpoint"}
    there: list[Path] = []

    def share(function: Callable[[Any], None], arguments: Sequence[Any]) -> None:
        for argument in arguments:
            pickle.loads(pickle.dumps(function))(argument)
        there[:] = sorted(sweep.glob("cache/*/*.npz"))

    asked = {"pairs": "[[rft,dpo]]", "rotated_copies": 1, "probe_set.problems": 10, "connectivity.midpoint_problems": 4}
    line = [f"{name}={value}" for name, value in asked.items()]
    config = parse(AnalyzeConfig, composed("logger=none", f"output_dir={sweep}", *line, of="analyze"))
    found = analyse(config, share=share)
    assert len(found.tables.connectivity) > 0
    assert there
    after = [file for file in sorted(sweep.glob("cache/*/*.npz")) if file.parent.name in passes]
    assert {file.parent.name for file in after} == passes
    assert after == [file for file in there if file.parent.name in passes]


def test_rollouts_of_several_jobs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    frozen = tmp_path / "nothing"
    jobs = RolloutJobs(TWO)
    for number in range(2):
        jobs.job(composed(f"rollouts.path={frozen}{number}", f"output_dir={tmp_path}", of="rollout"))
    assert jobs.end() == 2
    said = capfd.readouterr().err
    assert f"{frozen}0" in said
    assert f"{frozen}1" in said
    assert "Traceback" not in said
