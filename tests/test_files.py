from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from losslens.analysis.cache import Cache
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


def test_what_killed_processes_left_goes_with_the_first_write(tmp_path: Path) -> None:
    """That of living ones stays, for a day that of other machines, and for ever what has no such name."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    dead, ours = f"{process.pid:x}", f"{os.getpid():x}"
    machine = temporary_name(tmp_path / "elsewhere" / "x").name.split(".")[2].split("-")[0]
    kept = [f".file.{machine}-{ours}-0002.tmp", f".file.0{machine[:3]}-{dead}-0003.tmp", ".file.tmp"]
    gone = [f".file.{machine}-{dead}-0001.tmp", f".other.{machine}-{dead}-0004.tmp"]
    old = [
        f".file.{machine}-{ours}-0005.tmp",
        f".file.0{machine[:3]}-{dead}-0006.tmp",
        ".o.0123abcd.tmp",
        ".0123-4.tmp",
    ]
    for name in (*kept, *gone, *old):
        (tmp_path / name).touch()
    for name in old:
        os.utime(tmp_path / name, (0, 0))
    for left in (f".folder.{machine}-{dead}-0001.tmp", f".folder.{machine}-{dead}-0001.old.tmp"):
        (tmp_path / left / "inside").mkdir(parents=True)
    write_json(tmp_path / "file", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, old[0], *old[2:], "file"])


def test_a_folder_that_appears_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system shows a moment later what another machine has made."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "theirs").touch()
    with monkeypatch.context() as patches:
        patches.setattr(Path, "exists", lambda self: False)
        with atomic_folder(folder) as temporary:
            (temporary / "ours").touch()
    assert [path.name for path in folder.iterdir()] == ["ours"]
    assert list(tmp_path.iterdir()) == [folder]


def test_results_are_used_as_they_are_read_back(tmp_path: Path) -> None:
    """Sums and products depend on the order in memory, so that a resumed analysis would differ in the last digits."""
    matrix = np.arange(24.0).reshape(4, 6)
    cache = Cache(tmp_path)
    arrays = {"slice": matrix[:, :2], "transpose": matrix.T, "number": 1.5}
    saved, loaded = cache.save("kind", "key", arrays), cache.load("kind", "key", arrays)
    assert loaded is not None
    for name, value in arrays.items():
        assert np.array_equal(saved[name], value)
        assert saved[name].strides == loaded[name].strides
        assert saved[name].shape == loaded[name].shape == np.shape(value)


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
