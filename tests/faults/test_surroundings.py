"""Several processes at once, a clock that jumps, a file system without locks, and one that shows writes late."""

from __future__ import annotations

import errno
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from losslens.runs.links import OWNER
from tests.faults.campaign import Command, ended, judge, run, tree, undisturbed
from tests.faults.conftest import dice, per_kind
from tests.faults.ledger import record
from tests.faults.prepared import Prepared
from tests.faults.shim import Plan

DAY = 86_400.0
LONG = per_kind(0) > 0
TOGETHER = [("train", 3), ("sweep", 2), ("rollout", 2), ("analyze", 2)][: None if LONG else 2]


def together(
    command: Command, output: Path, count: int, plan: Plan | None = None, kill_after: float | None = None
) -> str:
    """Starts the command several times at once, kills one of them if asked to, and says what was wrong, or nothing."""
    with ExitStack() as stack:
        processes = [stack.enter_context(command.start(output, plan)) for _ in range(count)]
        if kill_after is not None:
            time.sleep(kill_after)
            processes[0].signal(signal.SIGKILL)
        outcomes = [ended(process) for process in processes]
    killed = [outcome for outcome in outcomes if outcome.status == -signal.SIGKILL]
    wrong = [outcome for outcome in outcomes if outcome not in killed and (outcome.status or outcome.trouble)]
    return "\n".join(f"status {o.status}, {o.trouble}\n{o.stdout[-800:]}\n{o.stderr[-2000:]}" for o in wrong)


@pytest.mark.parametrize(
    ("name", "count"), [("rollout", 2), ("train", 3), ("sweep", 2), ("analyze", 2)][: None if LONG else 3]
)
@pytest.mark.parametrize("kills", [False, True])
def test_several_processes_at_once(name: str, count: int, kills: bool, prepared: Prepared, tmp_path: Path) -> None:
    command = getattr(prepared, name)
    expected = undisturbed(command, tmp_path).tree
    random = dice(f"together {name} {kills}")
    for _ in range(min(per_kind(1), 5)):
        output = command.fresh(tmp_path / "outputs")
        moment = round(random.uniform(0.1, 3), 2) if kills else None
        wrong = together(command, output, count, kill_after=moment)
        outcome, detail = judge(command, output, expected)
        fault = f"{command.name}: {count} at once{f', one killed after {moment} s' if kills else ''}"
        record("several processes", fault, "wrong status" if wrong else outcome, wrong or detail)


@pytest.mark.parametrize("name", ["train", "rollout", "evaluate", "analyze"][: None if LONG else 1])
@pytest.mark.parametrize("seconds", [-365 * DAY, DAY], ids=["a year back", "a day on"])
def test_a_clock_that_jumps(name: str, seconds: float, prepared: Prepared, tmp_path: Path) -> None:
    """Before the command, and at one of its writes."""
    command = getattr(prepared, name)
    known = undisturbed(command, tmp_path)
    places = [("", "", 0), *dice(f"clock {name} {seconds}").sample(known.operations, 1)]
    for number, (_, kind, path) in enumerate(places):
        output = command.fresh(tmp_path / "outputs")
        at = (kind, path, 1) if number else None
        outcome = run(command, output, Plan(str(output), str(tmp_path / "log"), at, clock=seconds))
        same = outcome.status == 0 and not outcome.trouble and tree(output) == known.tree
        fault = f"{command.name}: {seconds:.0f} s at {at or 'its start'}"
        record("clock", fault, "same bytes" if same else "different result", outcome.stderr[-3000:])


@pytest.mark.parametrize("name", ["train", "rollout", "analyze"][: None if LONG else 1])
@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"][: None if LONG else 2])
def test_a_file_system_without_locks(name: str, error: str, prepared: Prepared, tmp_path: Path) -> None:
    command = getattr(prepared, name)
    known = undisturbed(command, tmp_path)
    output = command.fresh(tmp_path / "outputs")
    outcome = run(command, output, Plan(str(output), str(tmp_path / "log"), flock=error))
    said = outcome.stderr.strip().splitlines()
    if outcome.status == 0 and not outcome.trouble and tree(output) == known.tree:
        record("no locks", f"{command.name}: {error}", "same bytes")
    elif outcome.status in (1, 2) and not outcome.trouble and said and "lock" in said[-1]:
        record("no locks", f"{command.name}: {error}", "clear line")
    else:
        detail = f"status {outcome.status}\n{outcome.stdout[-1000:]}\n{outcome.stderr[-3000:]}"
        record("no locks", f"{command.name}: {error}", outcome.trouble or "wrong status", detail)
    assert errno.errorcode[getattr(errno, error)]


def test_checkpoints_on_another_disk(prepared: Prepared, tmp_path: Path) -> None:
    """A link that the user has put in place of the folder: a killed run goes on from there, and leaves it empty."""
    command, scratch = prepared.train, tmp_path / "scratch"
    known = undisturbed(command, tmp_path)
    output = command.fresh(tmp_path / "linked")
    path = next(path for _, kind, path in known.operations if kind == "rename" and "/checkpoint-3/" in path)
    scratch.mkdir()
    link = output / path.partition("/checkpoint-3/")[0]
    link.parent.mkdir(parents=True)
    link.symlink_to(scratch)
    plan = Plan(
        str(output), str(tmp_path / "log"), ("rename", path, 1), "after", signal.SIGKILL, str(tmp_path / "once")
    )
    assert run(command, output, plan).status == -signal.SIGKILL
    assert list(scratch.glob("checkpoint-*"))
    outcome, detail = judge(command, output, known.tree)
    record("linked checkpoints", f"{command.name}: SIGKILL after rename of {path}", outcome, detail)
    assert [entry.name for entry in scratch.iterdir()] == [OWNER]


@pytest.mark.skipif(not LONG, reason="in make faults only: four commands, twice each")
@pytest.mark.parametrize("name", ["rollout", "train", "sweep", "analyze"])
def test_a_file_system_that_shows_writes_late(name: str, prepared: Prepared, tmp_path: Path) -> None:
    """What one process makes the other one sees half a second and two seconds later."""
    command = getattr(prepared, name)
    expected = undisturbed(command, tmp_path).tree
    for late in (0.5, 2.0):
        output = command.fresh(tmp_path / "outputs")
        log = tmp_path / f"log-{late}"
        wrong = together(command, output, 2, Plan(str(output), str(log), late=late))
        outcome, detail = judge(command, output, expected)
        record("late writes", f"{command.name}: {late} s", "wrong status" if wrong else outcome, wrong or detail)
