"""`losslens compare`: adapters by folder, by run and by hub id, without a model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants

import losslens
from losslens.cli import compare
from losslens.core import hub
from losslens.updates.folder import write_adapter
from losslens.updates.lora import LoraUpdate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.fast


def adapter(folder: Path, seed: int) -> Path:
    """Random LoRA of two modules, r = 3."""
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    updates = {name: LoraUpdate(rng.normal(size=(12, 3)), rng.normal(size=(3, 8)), 2.0) for name in names}
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": "me/base"}
    write_adapter(folder, updates, config)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return adapter(tmp_path / "one", 0), adapter(tmp_path / "two", 1)


def compared(*arguments: str, output_dir: Path) -> pd.DataFrame:
    assert compare.main([*map(str, arguments), "--output-dir", str(output_dir)]) == 0
    folder = output_dir / "adapters" / "analysis"
    assert (folder / "report.html").is_file()
    return pd.read_csv(folder / "pairs.csv")


def test_is_what_the_function_finds(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [pair] = compared(f"mine={two[0]}", str(two[1]), output_dir=tmp_path / "out").to_dict("records")
    assert (pair["run_a"], pair["run_b"]) == ("mine", "two")
    expected = losslens.compare(two).pairs.iloc[0]
    for name in ("cosine", "cosine_null", "angle_min_left"):
        assert pair[name] == pytest.approx(expected[name], rel=1e-9)
    assert capsys.readouterr().out.endswith("report.html\n")


def test_a_folder_whose_name_has_an_equals_sign(two: tuple[Path, Path], tmp_path: Path) -> None:
    swept = two[0].rename(tmp_path / "lr=1e-3")
    pairs = compared(str(swept), f"b={two[1]}", output_dir=tmp_path / "out")
    assert pairs[["run_a", "run_b"]].to_numpy().tolist() == [["lr-1e-3", "b"]]


def test_a_folder_of_a_repository(two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local copy, offline, as the hub's client keeps it; the same name at another revision has none."""
    hub.resolve_commit.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = tmp_path / "hub" / "models--me--adapters"
    for name, folder in zip(("sft", "dpo"), two, strict=True):
        shutil.copytree(folder, copy / "snapshots" / COMMIT / "r32" / name)
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text(COMMIT)
    pairs = compared("me/adapters/r32/sft", f"me/adapters/r32/dpo@{COMMIT}", output_dir=tmp_path / "out")
    assert pairs[["run_a", "run_b"]].to_numpy().tolist() == [["sft", "dpo"]]
    assert pairs["cosine"].item() == pytest.approx(losslens.compare(two).pairs["cosine"].item(), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder, and not a hub id (owner/name or owner/name/folder)"),
        (["~no-such-user/x"], "~no-such-user/x: no such home folder"),
        (["a="], "a=: names no folder and no hub id"),
        (["me/../../x"], "me/../../x: no such folder, and not a hub id"),
        (["{one}", "{one}"], "given twice"),
        (["a={one}", "a={two}"], "two adapters are named a; give NAME=ADAPTER"),
        (["two={one}", "{two}"], "two adapters are named two; give NAME=ADAPTER"),
        (["{one}", "--completions", "x"], "--completions needs --base"),
        ([], "required: ADAPTER"),
    ],
)
def test_refusals(
    arguments: list[str], said: str, two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [part.format(one=two[0], two=two[1]) for part in arguments]
    try:
        status = compare.main([*line, "--output-dir", str(tmp_path / "out")])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("losslens compare: ")
    assert said in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_torch(two: tuple[Path, Path], tmp_path: Path) -> None:
    code = "import sys; from losslens.cli import compare; compare.main(sys.argv[1:]); print(sorted(sys.modules))"
    line = [sys.executable, "-c", code, *map(str, two), "--output-dir", str(tmp_path / "out")]
    loaded = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert "'numpy'" in loaded
    assert not any(f"'{name}'" in loaded for name in ("torch", "transformers", "peft", "wandb"))
