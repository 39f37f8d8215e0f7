from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from losslens.core.errors import InputError
from losslens.core.files import atomic_file, atomic_folder, read_json, temporary_name, write_json
from losslens.core.hashing import hash_file, hash_json

pytestmark = pytest.mark.fast


def test_files_are_written_atomically(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "file"
    with pytest.raises(RuntimeError), atomic_file(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(file.parent.iterdir()) == []
    write_json(file, {"x": 1})
    with pytest.raises(RuntimeError), atomic_file(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"x": 1}


def test_folders_are_written_atomically(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text(text)
    assert (folder / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path: Path) -> None:
    """That of living ones, of other machines and of other files stays."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    dead, ours = f"{process.pid:x}", f"{os.getpid():x}"
    machine = temporary_name(tmp_path / "x").name.split(".")[2].split("-")[0]
    names = [
        f".file.{machine}-{dead}-0001.tmp", f".file.{machine}-{ours}-0002.tmp", f".file.0{machine[:3]}-{dead}-0003.tmp",
        f".file2.{machine}-{dead}-0004.tmp", ".file.tmp",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    for left in (f".folder.{machine}-{dead}-0001.tmp", f".folder.{machine}-{dead}-0001.old.tmp"):
        (tmp_path / left / "inside").mkdir(parents=True)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.touch()
    with atomic_folder(tmp_path / "folder"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "file", "folder"])


def test_broken_json_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"x": ')
    with pytest.raises(InputError, match=r"half\.json: not JSON"):
        read_json(tmp_path / "half.json")


def test_digests(tmp_path: Path) -> None:
    @dataclass
    class Point:
        x: int

    assert hash_json({"a": 1, "b": 2}, 8) == hash_json({"b": 2, "a": 1}, 8) != hash_json({"a": 1, "b": 3}, 8)
    assert hash_json(Point(1), 8) == hash_json({"x": 1}, 8)
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")  # of nothing, as is well known
