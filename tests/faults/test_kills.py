"""Commands are killed at their writes and at random moments; the same command then ends in the undisturbed bytes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.campaign import chosen, disturb, ended, judge, run, targets, undisturbed
from tests.faults.conftest import SEED, dice, per_kind
from tests.faults.ledger import record
from tests.faults.prepared import Prepared

# How many operations of a command are disturbed in `make test`. In `make faults` each kind comes once at least.
COMMANDS = {"rollout": 4, "train": 8, "evaluate": 4, "analyze": 4, "migrate": 4, "workers": 2}
# In one folder, one after the other: in `make test` several, for speed; in `make faults` few, to tell them apart.
CHAIN = 4 if per_kind(0) == 0 else 2


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_a_write(name: str, prepared: Prepared, tmp_path: Path) -> None:
    command = getattr(prepared, name)
    expected = undisturbed(command, tmp_path)
    places = chosen(targets(expected.operations), per_kind(COMMANDS[name]), dice(name))
    if per_kind(0) == 0:
        places = [places[n] for n in sorted(dice(f"few {name}").sample(range(len(places)), COMMANDS[name]))]
    disturb(command, tmp_path, expected, places, CHAIN, lambda *fault: record("SIGKILL at a write", *fault))


@pytest.mark.parametrize("name", ["train", "rollout", "evaluate", "analyze"][: None if per_kind(0) else 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_a_write(name: str, number: int, prepared: Prepared, tmp_path: Path) -> None:
    command = getattr(prepared, name)
    expected = undisturbed(command, tmp_path)
    kind = f"{signal.Signals(number).name} at a write"
    random = dice(f"{name} {number}")
    places = random.sample(targets(expected.operations, number), min(per_kind(1), len(expected.operations)))
    disturb(command, tmp_path, expected, places, CHAIN, lambda *fault: record(kind, *fault))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][: None if per_kind(0) else 1])
def test_at_random_moments(number: int, prepared: Prepared, tmp_path: Path) -> None:
    """The seed decides how long the command is left alone, up to the time that it takes."""
    command = prepared.train
    name = signal.Signals(number).name
    expected = undisturbed(command, tmp_path)
    started = time.monotonic()
    run(command, command.fresh(tmp_path / "timed"))
    whole = time.monotonic() - started
    random = dice(f"moments {number}")
    for _ in range(per_kind(1)):
        output, moments = command.fresh(tmp_path / "outputs"), []
        for _ in range(2):
            moments.append(round(random.uniform(0, whole), 3))
            with command.start(output) as process:
                time.sleep(moments[-1])
                process.signal(number)
                stopped = ended(process)
            if stopped.trouble:
                record(f"{name} at a random moment", f"{command.name}: seed {SEED}", stopped.trouble, stopped.stderr)
        outcome, detail = judge(command, output, expected.tree)
        for moment in moments:
            record(f"{name} at a random moment", f"{command.name}: after {moment} s, seed {SEED}", outcome, detail)
