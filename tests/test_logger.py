"""W&B: a W&B run for each run, closed whatever happens, whose failures stop nothing."""

from __future__ import annotations

import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from losslens.config.tracking import Logger
from losslens.core.preemption import Preempted
from losslens.core.redaction import redact
from losslens.tracking.session import RunInfo, session

pytestmark = pytest.mark.fast

OFFLINE = Logger(name="wandb", mode="offline", project="losslens", entity=None, artifacts=True)


def about(name: str, **config: Any) -> RunInfo:
    return RunInfo("sweep", "train", name, ["sft", "r8"], config)


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """The records of the offline run below `folder`, which is finished: W&B's process writes a little later.

    wandb 0.31 has no reader in Python. Its file is a LevelDB log: 7 bytes of its own, then blocks of 32 KiB with
    chunks of crc (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and payload.
    """
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 20
    while not exit_codes(found := _parsed(file.read_bytes())):
        assert time.monotonic() < end, "the run was not finished"
        time.sleep(0.02)
    return found


def _parsed(data: bytes) -> list[wandb_internal_pb2.Record]:
    found, parts, position = [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def values_of(found: list[wandb_internal_pb2.Record], kind: str, name: str) -> list[str]:
    """What the history, the summary or the configuration was told of one name, as JSON."""
    return [
        item.value_json
        for record in found
        if record.HasField(kind)
        for item in (getattr(record, kind).item if kind == "history" else getattr(record, kind).update)
        if item.key == name or list(item.nested_key) == [name]
    ]


def exit_codes(found: list[wandb_internal_pb2.Record]) -> list[int]:
    return [record.exit.exit_code for record in found if record.HasField("exit")]


@pytest.mark.slow
def test_two_runs_of_one_process_are_separate(tmp_path: Path) -> None:
    """Also when both are open, and when somebody has a run of his own."""
    mine = wandb.init(mode="offline", dir=tmp_path, project="mine")
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    with session(OFFLINE, tmp_path, folders[0], about("a", rate=0.5)) as first:
        first.log(5, {"train/loss": 1.25})
        with session(OFFLINE, tmp_path, folders[1], about("b", rate=0.25)) as second:
            second.log(5, {"train/loss": 2.5})
            first.log(10, {"train/loss": 0.125})
    assert wandb.run is mine
    mine.finish()
    for folder, losses, rate in zip(folders, (["1.25", "0.125"], ["2.5"]), ("0.5", "0.25"), strict=True):
        found = records(folder)
        [run] = {
            (r.run.display_name, r.run.run_group, r.run.job_type, r.run.project, *r.run.tags)
            for r in found
            if r.HasField("run")
        }
        assert run == (folder.name, "sweep", "train", "losslens", "sft", "r8")
        assert values_of(found, "history", "train/loss") == losses
        [config] = [r.run.config.update for r in found if r.HasField("run")]
        assert [item.value_json for item in config if item.key == "rate"] == [rate]
        assert exit_codes(found) == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "exit_code", "said", "preempting"),
    [
        (RuntimeError("no luck"), 1, '"RuntimeError: no luck"', False),
        (KeyboardInterrupt(), 255, '"KeyboardInterrupt"', False),
        (Preempted(signal.SIGUSR2), 1, '"Preempted: stopped by SIGUSR2"', True),
    ],
)
def test_an_error_closes_the_run_and_is_its_status(
    error: BaseException, exit_code: int, said: str, preempting: bool, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), session(OFFLINE, tmp_path, tmp_path, about("a")):
        raise error
    assert wandb.run is None
    found = records(tmp_path)
    assert exit_codes(found) == [exit_code]
    assert values_of(found, "summary", "error")[-1:] == [said]
    assert any(record.HasField("preempting") for record in found) == preempting


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_wandb_failures_warn_once(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    with (
        pytest.warns(UserWarning, match="no space left") as warned,
        session(OFFLINE, tmp_path, tmp_path, about("a")) as told,
    ):
        told.log(1, {"x": 1.0})
        told.log(2, {"x": 1.0})
    assert len(warned) == 1
    monkeypatch.undo()
    wandb.teardown()


def test_nothing_about_the_machine_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-of-the-environment")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    model = str(tmp_path / "home" / "models" / "mine")
    folder = tmp_path / "home" / "run"
    folder.mkdir()
    with (
        pytest.raises(ValueError, match="models"),
        session(OFFLINE, tmp_path, folder, about("a", model={"path": model})),
    ):
        raise ValueError(f"{model}: no such file")
    found = records(folder)
    [run] = folder.glob("wandb/offline-run-*")
    sent = b"".join(file.read_bytes() for file in [*run.glob("*.wandb"), *run.glob("files/**/*")] if file.is_file())
    assert b"~/models/mine" in sent
    assert [record for record in found if record.HasField("environment")] == []
    for secret in ("a-secret-of-the-environment", "k" * 40, sys.executable, str(Path.cwd())):
        assert secret.encode() not in sent, secret
    assert str(tmp_path / "home").encode() not in sent


def test_only_the_home_folder_itself_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/al")
    assert redact({"a": ["/home/al/x", "/home/alice/x", "at /home/al: no"], "b": 1}) == {
        "a": ["~/x", "/home/alice/x", "at ~: no"],
        "b": 1,
    }


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as for a number of a container that has no name
    assert redact("/home/al/x") == "/home/al/x"


def test_none_writes_nothing(tmp_path: Path) -> None:
    with session(OFFLINE.model_copy(update={"name": "none"}), tmp_path, tmp_path, about("a")) as told:
        told.log(1, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []
