"""Runs of an earlier LossLens are taken over as they are: `tests/outputs_of_before.tar.gz` is what it left behind.

It was made by the code of 593e129 (identities of version 3): SFT and DPO with snapshots, GRPO with options of its own,
and RFT killed after its fourth step of twelve. Paths and the host's name were taken out.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from losslens import migration
from losslens.adapters import adapter_sha256
from losslens.analysis.manifests import RunFacts, StartedFacts, read_facts
from losslens.errors import InputError
from losslens.files import digest, write_json
from losslens.integrity import bound_to
from losslens.migration import migrate
from losslens.runs import Run, runs_of
from losslens.training import callbacks
from tests.conftest import script

SMALL = [
    "data.train=12", "data.eval=4", "rollouts.k=4", "rollouts.max_tokens=48", "rollouts.seed=1",
    "evaluation.max_tokens=48", "optim.max_steps=4", "optim.batch_size=4", "optim.save_steps=2", "optim.log_steps=2",
    "logger=none", "lora_rank.r=1",
]  # fmt: skip


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("outputs_of_before.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "outputs"


def of(outputs: Path, method: str) -> Run:
    (folder,) = outputs.glob(f"main/{method}-*")
    return Run(folder)


def adapters(outputs: Path) -> dict[str, str]:
    """Of every run, snapshot and checkpoint, by method and place."""
    found = {}
    for file in outputs.glob("main/**/adapter_model.safetensors"):
        run, *place = file.relative_to(outputs / "main").parts
        found["/".join([run.partition("-")[0], *place])] = adapter_sha256(file.parent)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".lock"
    }


def test_the_same_commands_know_them(outputs: Path) -> None:
    """What was finished is skipped, what was cut off goes on from its checkpoint; no adapter is another one."""
    before = adapters(outputs)
    names = {run.name for run in runs_of(outputs, "main")}
    told = script("launch/migrate.py", f"output_dir={outputs}").stdout
    assert told.count(": now ") == 4
    assert adapters(outputs) == before
    after = {run.name for run in runs_of(outputs, "main")}
    assert {name.rpartition("-")[0] for name in after} == {name.rpartition("-")[0] for name in names}
    assert len(after & names) == 1  # the base
    for method in ("sft", "dpo", "grpo"):
        run = of(outputs, method)
        facts = read_facts(run, RunFacts)
        assert facts.adapter_sha256 == adapter_sha256(run.adapter)
        assert run.is_trained()
        assert all(snapshot.is_trained() for snapshot in run.snapshots.values())
        assert {snapshot.manifest["run"] for snapshot in run.snapshots.values()} <= {bound_to(run.manifest)}
    assert of(outputs, "grpo").manifest["identity"]["method"] == {"name": "grpo", "version": 1, "bias": 0.2}
    line = ["train.py", *SMALL, f"output_dir={outputs}"]
    again = script("train.py", "-m", *line[1:], "method=sft,dpo", "optim.snapshot_steps=2").stdout
    again += script(*line, "method=grpo", "method.bias=0.2", "optim.warmup=0.1").stdout
    assert again.count(": skipped") == 3
    assert ": completed" not in again
    script(*line, "method=rft", "optim.max_steps=12")
    assert of(outputs, "rft").manifest["training"]["resumed_from"] == 4
    assert adapters(outputs).items() >= {k: v for k, v in before.items() if not k.startswith("rft")}.items()
    assert script("launch/migrate.py", f"output_dir={outputs}").stdout == ""


def test_killed_at_any_write_the_same_command_finishes_it(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = shutil.copytree(outputs, tmp_path / "undisturbed")
    migrate(undisturbed, "main")
    writes = 0
    left = -1

    def step() -> None:
        nonlocal writes, left
        writes += 1
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def write(file: Path, content: Any) -> None:
        step()
        write_json(file, content)

    rename = Path.rename

    def move(self: Path, target: Path) -> Path:
        if self.parent.name == "main":
            step()
        return rename(self, target)

    monkeypatch.setattr(migration, "write_json", write)
    monkeypatch.setattr(callbacks, "write_json", write)
    monkeypatch.setattr(Path, "rename", move)
    number = 0
    while True:
        number += 1
        killed = shutil.copytree(outputs, tmp_path / f"killed-{number}")
        left = number
        try:
            migrate(killed, "main")
        except KeyboardInterrupt:
            left = -1
            migrate(killed, "main")
            assert tree(killed) == tree(undisturbed)
            continue
        break
    assert number > 4 * 2 + 4 + 2  # a manifest and a name for each, four snapshots, two checkpoints


def test_other_commands_say_how_they_are_taken_over(outputs: Path) -> None:
    """Nothing is trained once more under another name without a word."""
    for line in (["analyze.py"], ["train.py", *SMALL, "method=sft"], ["evaluate.py", "benchmark=arithmetic"]):
        outcome = script(*line, f"output_dir={outputs}", check=2)
        assert f"python launch/migrate.py output_dir={outputs} takes it over" in outcome.stderr
    assert len(list(outputs.glob("main/sft-*"))) == 1


def test_what_is_at_work_is_let_end(outputs: Path) -> None:
    run, before = of(outputs, "rft"), tree(outputs)
    with FileLock(run.lock_file), pytest.raises(InputError, match="is at it; let it end"):
        migrate(outputs, "main")
    run.set_state("queued")
    outcome = script("launch/migrate.py", f"output_dir={outputs}", check=2)
    assert f"{run.name}: queued on Slurm" in outcome.stderr
    assert {k: v for k, v in tree(outputs).items() if "status" not in k} == {
        k: v for k, v in before.items() if "status" not in k
    }
    assert script("launch/migrate.py", "output_dir=/no/such/folder", check=2).stderr.startswith(
        "migrate.py: output_dir="
    )


def renamed(run: Run, **section: Any) -> Run:
    """The run as it would be, had its loss been another one."""
    manifest = json.loads((run.folder / "manifest.json").read_text())
    manifest["identity"]["method"] = manifest["config"]["method"] = section
    manifest["run"] = f"{run.name.rpartition('-')[0]}-{digest(manifest['identity'], 8)}"
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    return Run(run.folder.rename(run.folder.with_name(manifest["run"])))


def test_a_loss_of_ones_own_is_imported_only_when_it_is_named(outputs: Path) -> None:
    theirs = renamed(of(outputs, "sft"), _target_="tests.own_loss.Half", name="half", share=0.5, floor=0.25)
    (moved,) = [each for each in migrate(outputs, "main") if each.left]
    assert moved.run == moved.name == theirs.name
    assert moved.left == "its loss is tests.own_loss.Half; to take it over too: losses=tests.own_loss.Half"
    script("launch/migrate.py", f"output_dir={outputs}", check=1)
    script("launch/migrate.py", f"output_dir={outputs}", "losses=tests.own_loss.Half")
    manifest = of(outputs, "sft").manifest
    assert manifest["identity"]["method"] == {"name": "half", "version": 1, "floor": 0.25}  # share is at its default
    assert manifest["options"] == {"share": 0.5, "floor": 0.25}


def test_a_loss_under_the_name_of_another_is_left(outputs: Path) -> None:
    renamed(of(outputs, "sft"), _target_="tests.own_loss.Half", name="sft")
    (moved,) = [each for each in migrate(outputs, "main", ["tests.own_loss.Half"]) if each.left]
    assert "has the name of LossLens's own" in moved.left


def test_runs_of_version_2_stay_what_they_were_trained_on(outputs: Path) -> None:
    """Before rollouts kept their token ids: their like is not made by any configuration of today."""
    run = of(outputs, "dpo")
    manifest = run.manifest
    manifest["identity"]["version"] = 2
    manifest["run"] = f"{run.name.rpartition('-')[0]}-{digest(manifest['identity'], 8)}"
    write_json(run.folder / "manifest.json", manifest)
    run.folder.rename(run.folder.with_name(manifest["run"]))
    migrate(outputs, "main")
    facts = read_facts(of(outputs, "dpo"), StartedFacts)
    assert facts.identity["tokens"] == "of the text"
