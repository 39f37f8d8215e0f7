"""W&B: a run of its own for each run, closed whatever happens, and no reason to stop."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from losslens.config import Logger
from losslens.logger.training import logged

OFFLINE = Logger(name="wandb", mode="offline", project="losslens", entity=None)


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """The records of the offline run below `folder`.

    wandb 0.31 has no reader in Python. Its file is a LevelDB log: 7 bytes of its own, then blocks of 32 KiB with
    chunks of crc (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and payload.
    """
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    data, found, parts, position = file.read_bytes(), [], b"", 7
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


def test_offline_runs_are_apart_and_closed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with logged(OFFLINE, tmp_path / name, "sweep", [name], {"learning_rate": 0.5}) as log:
            log(5, {"train/loss": 1.25 if name == "a" else 2.5})
        assert wandb.run is None
    for name, loss in (("a", "1.25"), ("b", "2.5")):
        found = records(tmp_path / name)
        [run] = {(r.run.display_name, r.run.run_group, r.run.project) for r in found if r.HasField("run")}
        assert run == (name, "sweep", "losslens")
        losses = [
            item.value_json
            for record in found
            if record.HasField("history")
            for item in record.history.item
            if item.key == "train/loss" or list(item.nested_key) == ["train/loss"]
        ]
        assert losses == [loss]
        assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]


def test_an_error_closes_the_run_with_its_status(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), logged(OFFLINE, tmp_path, "sweep", [], {}):
        raise RuntimeError
    assert wandb.run is None
    assert [r.exit.exit_code for r in records(tmp_path) if r.HasField("exit")] == [1]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_what_goes_wrong_in_wandb_is_warned_of_once(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    with pytest.warns(UserWarning, match="no space left") as warned, logged(OFFLINE, tmp_path, "s", [], {}) as log:
        log(1, {"x": 1.0})
        log(2, {"x": 1.0})
    assert len(warned) == 1


def test_none_writes_nothing(tmp_path: Path) -> None:
    with logged(OFFLINE.model_copy(update={"name": "none"}), tmp_path, "sweep", [], {}) as log:
        log(1, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []
