"""Commands that are disturbed, and what must hold of their output folder afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from tests.conftest import Started, start
from tests.faults.ledger import Outcome
from tests.faults.shim import Plan, operations

ROLLOUTS = [
    "data.train_size=8", "rollouts.samples_per_prompt=4", "rollouts.max_tokens=64", "rollouts.batch_size=16",
]  # fmt: skip
TRAIN = [
    *ROLLOUTS, "data.eval_size=4", "evaluation.max_tokens=24", "optim.max_steps=4", "optim.batch_size=2",
    "optim.save_steps=1", "optim.log_steps=1", "lora_rank.r=1", "logger=none",
    "weight_tracking.references={}",  # what is finished when a run starts depends on how many run at once
]  # fmt: skip
ANALYZE = [
    "probe_set.problems=12", "connectivity.points=3", "connectivity.midpoint_problems=2", "connectivity.resamples=100",
    "rotated_copies=1", "num_directions=2", "logger=none",
]  # fmt: skip

# What may differ between two runs of one command: times and durations, the number of the process, and how often and
# from where a run was resumed.
VOLATILE = {
    "code", "time", "made", "started", "ended", "seconds", "seconds_per_step", "process", "resumed_from",
    "content_sha256", "metrics_sha256",  # of what contains times
    "train/tokens_per_second", "geometry/share_of_time", "tokens_per_second",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command line that works in an output folder.

    Attributes:
        name: What it is called in the record of faults.
        line: Script and arguments without `output_dir`.
        before: Folder with which the output folder begins, None for an empty one.
    """

    name: str
    line: tuple[str, ...]
    before: Path | None = None

    def fresh(self, output: Path) -> Path:
        """Makes the output folder as it is before the command."""
        shutil.rmtree(output, ignore_errors=True)
        if self.before is None:
            output.mkdir(parents=True)
        else:
            shutil.copytree(self.before, output, symlinks=True)
        return output

    def start(self, output: Path, plan: Plan | None = None) -> Started:
        """Starts the command in the folder, following a plan."""
        environment = plan.environment if plan else {}
        return start(self.line[0], *self.line[1:], f"output_dir={output}", env=environment)


@dataclass(frozen=True)
class Ended:
    """A process that has ended: −N for signal N, else its exit status."""

    status: int
    stdout: str
    stderr: str
    left: Sequence[psutil.Process] = ()

    @property
    def trouble(self) -> Outcome | None:
        """What its end alone shows to be wrong: a traceback, or processes that outlive it."""
        if "Traceback (most recent call last)" in self.stdout + self.stderr:
            return "traceback"
        return "left over" if self.left else None


def ended(process: Started, timeout: float = 120) -> Ended:
    """Waits for a process and those that it has started."""
    status = process.wait(timeout)
    end = time.monotonic() + 20
    while (left := _group(process.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    return Ended(status, process.stdout, process.stderr, left)


def run(command: Command, output: Path, plan: Plan | None = None) -> Ended:
    """Runs the command to its end, which a plan may bring about."""
    with command.start(output, plan) as process:
        return ended(process)


def _group(leader: int) -> list[psutil.Process]:
    """Processes of the group of a process that led its own."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


@dataclass(frozen=True)
class Undisturbed:
    """What the command gives when nobody disturbs it, and the operations in which it writes."""

    tree: dict[str, str]
    operations: Sequence[tuple[int, str, str]]


_known: dict[str, Undisturbed] = {}


def undisturbed(command: Command, folder: Path) -> Undisturbed:
    """What the command gives undisturbed: run once in a process, counting."""
    if command.name not in _known:
        _known[command.name] = _measured(command, folder)
    return _known[command.name]


def _measured(command: Command, folder: Path) -> Undisturbed:
    output, log = command.fresh(folder / "outputs"), folder / "operations"
    outcome = run(command, output, Plan(str(output), str(log)))
    assert outcome.status == 0, f"{outcome.stdout[-2000:]}\n{outcome.stderr[-3000:]}"
    return Undisturbed(tree(output), operations(log))


def judge(
    command: Command, output: Path, expected: dict[str, str], plan: Plan | None = None, view: Path | None = None
) -> tuple[Outcome, str]:
    """Runs the command undisturbed where it was disturbed before, and compares what it leaves with what is expected.

    Args:
        command: The command.
        output: Its output folder.
        expected: The files that it leaves undisturbed.
        plan: Where it works, for one that works in another mount namespace.
        view: The output folder as this process reaches it, if that is another path.
    """
    outcome = run(command, output, plan)
    view = view or output
    said = f"{outcome.stdout[-1500:]}\n{outcome.stderr[-3000:]}"
    if outcome.trouble:
        return outcome.trouble, said
    if outcome.status:
        return "wrong status", f"status {outcome.status}\n{said}"
    if differences := compare(expected, tree(view, output)):
        return "different result", "\n".join(differences[:20])
    if left := leftovers(view):
        return "left over", "\n".join(left)
    return "same bytes", ""


def tree(folder: Path, output: Path | None = None) -> dict[str, str]:
    """The files of an output folder that are results, by path, without what may differ (`VOLATILE`).

    Args:
        folder: The folder.
        output: Its path in the command, if that is another one.
    """
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(".lock"))
    named = output or folder
    return {str(file.relative_to(folder)): _content(file, named) for file in files if not _is_left(file)}


def _content(file: Path, output: Path) -> str:
    content = file.read_bytes().replace(str(output).encode(), b"<output>")
    if file.suffix == ".json":
        return json.dumps(_lasting(json.loads(content)), sort_keys=True)
    if file.suffix == ".jsonl":
        return "\n".join(json.dumps(_lasting(json.loads(line)), sort_keys=True) for line in content.splitlines())
    if file.suffix == ".html":  # the minute in which it was written
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", content.decode())
    return content.hex()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if key not in VOLATILE}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def compare(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Describes the files that are missing, too many, or other ones."""
    lines = [f"missing: {name}" for name in expected.keys() - found.keys()]
    lines += [f"too many: {name}" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            lines.append(f"other content: {name}: {_first_difference(expected[name], found[name])}")
    return lines


def _first_difference(one: str, other: str) -> str:
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[max(0, place - 60) : place + 60]!r} is {other[max(0, place - 60) : place + 60]!r}"


def _is_left(file: Path) -> bool:
    return any(part.startswith(".") and part.endswith(".tmp") for part in file.parts) or (
        file.name.endswith(".partial.jsonl") or file.parent.name == ".partial"
    )


def leftovers(output: Path) -> list[str]:
    """What a finished command must not leave: temporary files, journals of what is done, checkpoints, locks."""
    left = [str(p.relative_to(output)) for p in sorted(output.rglob(".*.tmp"))]
    left += [str(p.relative_to(output)) for p in sorted(output.rglob("*.jsonl")) if _is_left(p)]
    for file in output.rglob("*.lock"):
        try:
            FileLock(file).acquire(blocking=False).lock.release()
        except Timeout:
            left.append(f"locked: {file.relative_to(output)}")
    return left


@dataclass(frozen=True)
class Target:
    """An operation: the number-th of a kind on a path."""

    kind: str
    path: str
    number: int
    when: str
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name} {self.when} {self.kind} {self.number} of {self.path}"

    def plan(self, output: Path, log: Path) -> Plan:
        """The plan that ends a process there."""
        once = log.with_suffix(".once")
        once.unlink(missing_ok=True)
        return Plan(str(output), str(log), (self.kind, self.path, self.number), self.when, self.signal, str(once))


def targets(found: Sequence[tuple[int, str, str]], sig: int = signal.SIGKILL) -> list[Target]:
    """All the places at which a command can be ended, in the order in which it comes by."""
    counts: dict[tuple[int, str, str], int] = {}
    places = []
    for process, kind, path in found:
        counts[process, kind, path] = number = counts.get((process, kind, path), 0) + 1
        whens = ("before", "after", "torn") if kind == "fsync" else ("before", "after")
        places += [Target(kind, path, number, when, sig) for when in whens]
    return list(dict.fromkeys(places))


def chosen(places: Sequence[Target], number: int, dice: Any) -> list[Target]:
    """A sample of places in their order: one of each kind and moment, then whichever the dice choose."""
    shuffled = dice.sample(list(enumerate(places)), len(places))
    kinds: dict[tuple[str, str], tuple[int, Target]] = {}
    for entry in shuffled:
        kinds.setdefault((entry[1].kind, entry[1].when), entry)
    first = list(kinds.values())
    rest = [entry for entry in shuffled if entry not in first]
    return [target for _, target in sorted([*first, *rest[: max(0, number - len(first))]], key=lambda entry: entry[0])]


def disturb(
    command: Command,
    folder: Path,
    expected: Undisturbed,
    places: Sequence[Target],
    chain: int,
    record: Callable[[str, Outcome, str], None],
) -> None:
    """Ends the command at each of these places; after `chain` of them it is let finish, and the folder compared.

    Args:
        command: The command.
        folder: Folder for its output folder.
        expected: What it gives undisturbed.
        places: Where it is ended. A place that the resumed command does not come by is tried again in a new folder.
        chain: How often it is ended in one folder: 1 tells the places apart, more takes less time.
        record: Called with the places of a folder, the outcome, and what is needed to look into it.
    """
    output, log = command.fresh(folder / "outputs"), folder / "operations"
    waiting, done = list(places), list[Target]()

    def finish() -> None:
        outcome, detail = judge(command, output, expected.tree)
        for target in done:
            others = f" (with {len(done) - 1} others in one folder)" if len(done) > 1 else ""
            record(f"{command.name}: {target}{others}", outcome, f"{detail}\n{[str(d) for d in done]}")
        done.clear()
        command.fresh(output)

    while waiting:
        target = waiting[0]
        is_fresh = not done
        log.unlink(missing_ok=True)
        plan = target.plan(output, log)
        stopped = run(command, output, plan)
        if not Path(plan.once).exists():
            assert not is_fresh, f"{command.name}: never came by {target}"
            finish()  # it is complete, or has done this part before
            continue
        waiting.pop(0)
        done.append(target)
        if stopped.trouble:
            record(f"{command.name}: {target}", stopped.trouble, stopped.stderr[-3000:])
        if len(done) == chain:
            finish()
    if done:
        finish()
