"""What the runs logged, as a table; and where they come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from losslens.analysis.cohort import Cohort, ComparedAdapter
from losslens.analysis.lineage import lineage
from losslens.analysis.scores import scores_of_runs
from losslens.analysis.training_table import training_table
from losslens.core import provenance
from losslens.core.files import write_json
from losslens.runs.run import Run

pytestmark = pytest.mark.fast


def member(folder: Path, *lines: str) -> ComparedAdapter:
    folder.mkdir()
    if lines:
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ComparedAdapter(folder.name, folder, folder.name, run=Run(folder))


def test_one_row_a_logged_step(tmp_path: Path) -> None:
    runs = [
        member(
            tmp_path / "sft",
            '{"step": 5, "train/loss": 0.5, "train/logps/correct": -1.5, "train/lr": 0.001, "train/grad_norm": 2}',
            '{"step": 10, "train/loss": NaN, "eval/loss": 7}',
        ),
        member(tmp_path / "dpo", '{"step": 5, "train/loss": 0.69, "train/rewards/margin": 0.1}'),
        member(tmp_path / "without"),
        ComparedAdapter("theirs", tmp_path, "theirs"),
    ]
    left_out: dict[str, str] = {}
    table = training_table(runs, left_out)
    assert table.columns.tolist() == ["run", "step", "loss", "grad_norm", "lr", "logps_correct", "rewards_margin"]
    assert table["run"].tolist() == ["sft", "sft", "dpo"]
    assert table["step"].tolist() == [5, 10, 5]
    assert table.loc[0].tolist()[2:6] == [0.5, 2.0, 0.001, -1.5]
    assert table.loc[1, ["loss", "lr"]].isna().all()
    assert left_out == {}


def test_the_geometry_of_the_whole_update_is_kept(tmp_path: Path) -> None:
    names = ("norm", "norm/layer_0", "norm/q_proj", "cosine_to_sft", "share_of_time")
    line = json.dumps({"step": 5, "train/loss": 0.5, **{f"geometry/{name}": 0.25 for name in names}})
    table = training_table([member(tmp_path / "sft", line)], {})
    assert table.columns.tolist() == [
        "run",
        "step",
        "loss",
        "grad_norm",
        "lr",
        "geometry_norm",
        "geometry_cosine_to_sft",
    ]
    assert table["geometry_norm"].tolist() == [0.25]


def test_no_run_that_logged(tmp_path: Path) -> None:
    table = training_table([member(tmp_path / "sft")], {})
    assert table.empty
    assert table.columns.tolist() == ["run", "step", "loss", "grad_norm", "lr"]


@pytest.mark.parametrize("line", ['{"step": 10, "tr', "7", '{"train/loss": 1}', '{"step": 10, "train/loss": "much"}'])
def test_a_damaged_file_is_left_out_and_said(tmp_path: Path, line: str) -> None:
    left_out: dict[str, str] = {}
    table = training_table([member(tmp_path / "sft", '{"step": 5, "train/loss": 1}', line)], left_out)
    assert table.empty
    assert left_out == {"training of sft": f"{tmp_path / 'sft' / 'metrics.jsonl'}: line 2 is not a logged step"}


def test_origins(tmp_path: Path) -> None:
    runs = []
    for name, rate, commit in (("sft", 1e-3, "aaa"), ("dpo", 1e-4, "bbb")):
        runs.append(member(tmp_path / name))
        manifest = {
            "command": "python train.py -m method=sft,dpo",
            "config": {
                "data": {"name": "quiz"}, "output_dir": "/here", "sweep": "main", "seed": 1, "init_seed": 1,
                "optim": {"max_steps": 100}, "lr": {"of_run": rate}, "method": {"name": name, "_target_": name},
                "evaluation": {"server": {"base_url": None}, "samples_per_prompt": 0}, "benchmark": {},
            },
            "rollouts": {"folder": "quiz-1", "sha256": "1", "pass_rate": 0.7}, "base": {"sha256": "b"},
            "initial_adapter": {"folder": "i", "sha256": "i"}, "precision": {"dtype": "float32"},
            "versions": {**provenance.versions(), "torch": "0.1"},
            "code": {"commit": commit, "dirty_diff": "+1" if name == "dpo" else ""},
            "started": "2026", "training": {"seconds": 7},
        }  # fmt: skip
        write_json(runs[-1].run.folder / "manifest.json", manifest)
    runs.append(ComparedAdapter("theirs", tmp_path, "theirs"))
    found = lineage(Cohort(runs, [], [], {}, [], scores_of_runs([]), [], {}))
    assert found["data"] == ["quiz"]
    assert found["rollouts"] == [{"folder": "quiz-1", "sha256": "1", "pass_rate": 0.7}]
    assert found["commands"] == ["python train.py -m method=sft,dpo"]
    assert found["configuration"] == {
        "data.name": "quiz", "optim.max_steps": 100, "evaluation.samples_per_prompt": 0, "benchmark": {},
    }  # fmt: skip
    assert list(found["runs"]) == ["sft", "dpo"]
    assert found["runs"]["dpo"] == {
        "commit": "bbb", "changed": True, "versions": {"torch": "0.1"}, "precision": {"dtype": "float32"},
        "initial_adapter": "i", "started": "2026", "seconds": 7, "own": {"lr.of_run": 1e-4},
    }  # fmt: skip
    assert not found["runs"]["sft"]["changed"]
    json.dumps(found)


def test_origins_of_adapters_made_elsewhere(tmp_path: Path) -> None:
    them = Cohort([ComparedAdapter("theirs", tmp_path, "theirs")], [], [], {}, [], scores_of_runs([]), [], {})
    assert lineage(them) == {
        "data": [], "rollouts": [], "base": [], "commands": [], "configuration": {}, "runs": {},
    }  # fmt: skip


def test_the_command_is_that_of_a_script_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/project/train.py", "-m", "method=sft,dpo", "pairs=[[a,b]]"])
    assert provenance.command_line() == "python train.py -m method=sft,dpo 'pairs=[[a,b]]'"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/submitit/core/_submit.py", "/a/folder"])
    assert provenance.command_line() is None
