"""The entry scripts: quick to answer, and clear about bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from losslens.rollouts.frozen import freeze
from tests.conftest import ROOT, cold, script

SCRIPTS = ("train.py", "rollout.py", "evaluate.py", "analyze.py")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags", [("--help",), ("--cfg", "job")])
def test_answers_without_torch(name: str, flags: tuple[str, ...]) -> None:
    outcome = subprocess.run(
        [sys.executable, "-X", "importtime", name, *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "trl", "peft", "datasets", "wandb"}
    assert outcome.stdout.strip()


def test_help_helps() -> None:
    text = cold("train.py", "--help").stdout
    for word in ("-m method=sft,rft,dft,rift,grpo,dpo", "lora_rank: r16, r32, r4, r64, r8", "Exit status", "max_steps"):
        assert word in text


def refused(name: str, *arguments: str) -> str:
    """The one line with which a script refuses its arguments."""
    outcome = script(name, *arguments, check=2)
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith(f"{name}: ")
    return lines[0]


def test_a_model_folder_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    arguments = (f"model.path={tmp_path / 'model'}", f"output_dir={tmp_path}")
    assert "no config.json" in refused("train.py", *arguments)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert f"model.path={tmp_path / 'model'}" in refused(
        "train.py", *arguments, "rollouts.policy=base", "data.train_size=2"
    )


def test_rollouts_without_a_right_one_or_without_a_mixed_group(tmp_path: Path, rollouts: pd.DataFrame) -> None:
    """One line a job that cannot be done; the rollouts are not touched."""
    wrong = freeze(rollouts.assign(reward=0.0), tmp_path, "wrong", {})
    common = (f"output_dir={tmp_path}", f"rollouts.path={wrong}", "logger=none", "optim.max_steps=1")
    assert "none of the " in refused("train.py", "method=rft", *common)
    outcome = script("train.py", "-m", "method=rft,dpo", *common, check=2)
    assert [line.split(":")[1].strip() for line in outcome.stderr.strip().splitlines()] == ["method=rft", "method=dpo"]
    assert outcome.stderr.count("nothing to learn from these rollouts: none of the ") == 2
    assert script("launch/status.py", "sweep=main", f"output_dir={tmp_path}", check=1).stdout.count("failed") == 2


def test_rollouts_that_were_edited(tmp_path: Path, frozen: Path, rollouts: pd.DataFrame) -> None:
    rollouts.assign(reward=1.0).to_parquet(frozen / "rollouts.parquet")
    assert "rollouts.parquet" in refused("train.py", f"rollouts.path={frozen}", f"output_dir={tmp_path}")


def test_flags_stand_anywhere(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    shown = script("launch/status.py", "sweep=main", "--watch", f"output_dir={tmp_path}", check=1)
    assert "state" in shown.stdout


def test_a_reader_that_has_seen_enough_stops_nothing(tmp_path: Path) -> None:
    code = (
        "import pathlib; from losslens.core.redaction import guard_streams; guard_streams()\n"
        "for n in range(5000): print('line', n, flush=n % 50 == 0)\n"
        f"pathlib.Path({str(tmp_path / 'done')!r}).write_text('yes')"
    )
    outcome = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c \"$0\" | head -1; exit ${{PIPESTATUS[0]}}", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "line 0\n", "")
    assert (tmp_path / "done").exists()
