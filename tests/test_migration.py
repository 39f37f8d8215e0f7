"""Runs of an earlier LossLens are taken over as they are: `tests/outputs_of_before.tar.gz` is what it left behind.

It was made by the code of 593e129 (identities of version 3): SFT and DPO with snapshots, GRPO with options of its own,
and RFT killed after its fourth step of twelve. Paths and the host's name were taken out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from losslens.analysis.arms import arms_of
from losslens.analysis.gathering import find_runs, gather_cohort
from losslens.analysis.manifests import RunFacts, StartedFacts, read_facts
from losslens.core import files
from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.core.hashing import hash_json
from losslens.losses import builtin_losses
from losslens.models.adapters import adapter_fingerprint
from losslens.pipeline import migration
from losslens.pipeline.migration import migrate
from losslens.runs.integrity import require_format, run_fingerprint
from losslens.runs.run import Run, runs_of
from losslens.scheduling.slurm.cluster import JobState
from losslens.scheduling.status import RunStatus
from losslens.training import callbacks
from tests.conftest import script

SMALL = [
    "data.train_size=12", "data.eval_size=4", "rollouts.samples_per_prompt=4", "rollouts.max_tokens=48",
    "rollouts.seed=1",
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
        found["/".join([run.partition("-")[0], *place])] = adapter_fingerprint(file.parent)
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
    (outputs / "main" / "analysis").mkdir()
    told = script("launch/migrate.py", f"output_dir={outputs}").stdout
    assert told.count(": now ") == 4
    assert told.count("run analyze.py sweep=main to update them") == 1
    assert adapters(outputs) == before
    after = {run.name for run in runs_of(outputs, "main")}
    assert {name.rpartition("-")[0] for name in after} == {name.rpartition("-")[0] for name in names}
    assert len(after & names) == 1  # the base
    for method in ("sft", "dpo", "grpo"):
        run = of(outputs, method)
        facts = read_facts(run, RunFacts)
        assert facts.adapter_sha256 == adapter_fingerprint(run.adapter)
        assert run.is_trained()
        assert all(snapshot.is_trained() for snapshot in run.snapshots.values())
        assert {snapshot.manifest["run"] for snapshot in run.snapshots.values()} <= {run_fingerprint(run.manifest)}
    assert of(outputs, "grpo").manifest["identity"]["method"] == {"name": "grpo", "version": 1, "bias": 0.2}
    line = ["train.py", *SMALL, f"output_dir={outputs}"]
    again = script("train.py", "-m", *line[1:], "method=sft,dpo", "optim.snapshot_steps=2").stdout
    again += script(*line, "method=grpo", "method.bias=0.2", "optim.warmup_ratio=0.1").stdout
    assert again.count(": skipped") == 3
    assert ": completed" not in again
    script(*line, "method=rft", "optim.max_steps=12")
    assert of(outputs, "rft").manifest["training"]["resumed_from"] == 4
    assert adapters(outputs).items() >= {k: v for k, v in before.items() if not k.startswith("rft")}.items()
    assert script("launch/migrate.py", f"output_dir={outputs}").stdout == ""


def test_a_factor_for_each_kind_of_loss(outputs: Path) -> None:
    """As manifests were before losses declared their rates: such runs are found, gone on with and compared."""
    migrate(outputs, "main")
    for run in runs_of(outputs, "main")[1:]:
        manifest = run.manifest
        assert manifest.pop("conventional_lr_scale") == (0.1 if manifest["method"] == "dpo" else 1.0)
        assert manifest["config"]["lr"].pop("factor") is None
        manifest["config"]["lr"] |= {"pointwise_factor": 1.0, "pairwise_factor": 0.1}
        write_json(run.folder / "manifest.json", {**manifest, "pairwise": manifest["method"] == "dpo"})
    arms = arms_of(gather_cohort(find_runs(outputs, ["main"], None), {}))
    found = {arm.method: (arm.learning_rate, arm.learning_rates, arm.at_conventional_rate) for arm in arms}
    usual = (1e-3, ["conventional"], True)
    assert found == {"sft": usual, "grpo": usual, "dpo": (1e-4, ["conventional"], True)}
    script("train.py", *SMALL, f"output_dir={outputs}", "method=rft", "optim.max_steps=12")
    assert of(outputs, "rft").manifest["training"]["resumed_from"] == 4


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

    with subprocess.Popen(["true"]) as dead:
        pass

    def write(file: Path, content: Any, **options: Any) -> None:
        if left == 1:  # what a killed process leaves, which must not count as a file of a checkpoint
            mine = files.temporary_name(file)
            mine.with_name(mine.name.replace(f"-{os.getpid():x}-", f"-{dead.pid:x}-")).touch()
        step()
        write_json(file, content, **options)

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
            for run in runs_of(killed, "main")[1:]:  # whoever reads it meanwhile is told what to do
                if run.name != run.manifest["run"]:
                    with pytest.raises(InputError, match=r"launch/migrate\.py output_dir="):
                        read_facts(run, StartedFacts)
                    with pytest.raises(InputError, match=r"launch/migrate\.py output_dir="):
                        require_format(run.folder, run.manifest)
            monkeypatch.setattr(files, "_visited", set())  # as in another process
            migrate(killed, "main")
            assert tree(killed) == tree(undisturbed)
            continue
        break
    assert number > 4 * 2 + 4 + 2  # a manifest and a name for each, four snapshots, two checkpoints


def test_other_commands_say_how_to_migrate(outputs: Path) -> None:
    """Nothing is trained once more under another name without a word."""
    for line in (["analyze.py"], ["train.py", *SMALL, "method=sft"], ["evaluate.py", "benchmark=arithmetic"]):
        outcome = script(*line, f"output_dir={outputs}", check=2)
        assert f"migrate it with python launch/migrate.py output_dir={outputs}" in outcome.stderr
    assert len(list(outputs.glob("main/sft-*"))) == 1


def test_active_runs_are_not_migrated(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are taken over meanwhile, and it later, as it is then."""
    held, queued, before = of(outputs, "rft"), of(outputs, "dpo"), tree(outputs)
    asked = migration.refresh_run_statuses

    def told(runs: Any) -> list[RunStatus]:
        live = JobState("PENDING", "Priority")
        return [
            replace(each, slurm=live, status={"state": "queued"}) if each.run == queued else each
            for each in asked(runs)
        ]

    monkeypatch.setattr(migration, "refresh_run_statuses", told)
    with FileLock(held.lock_file):
        left = {each.run: each.left for each in migrate(outputs, "main") if each.left}
    assert left.keys() == {held.name, queued.name}
    assert left[held.name].endswith("; wait for it to finish")
    assert left[queued.name] == "its Slurm job is queued: wait for it to finish, or cancel it (scancel)"
    for name in left:
        assert {k: v for k, v in tree(outputs).items() if name in k} == {k: v for k, v in before.items() if name in k}
    queued.set_state("completed", step=5)
    monkeypatch.undo()
    assert {each.run for each in migrate(outputs, "main") if not each.left} == left.keys()
    assert of(outputs, "dpo").status["step"] == 5


def test_bad_input(outputs: Path) -> None:
    assert script("launch/migrate.py", "output_dir=/no/such/folder", check=2).stderr.startswith(
        "migrate.py: output_dir="
    )
    assert (
        "not the name of a sweep"
        in script("launch/migrate.py", f"output_dir={outputs}", "sweep=../main", check=2).stderr
    )


def test_damaged_files_stop_no_other(outputs: Path) -> None:
    """A snapshot that is cut off stays as it is; a run without a whole manifest is left."""
    sft, grpo = of(outputs, "sft"), of(outputs, "grpo")
    cut = sft.folder / "snapshots" / "step-000002" / "manifest.json"
    cut.write_text(cut.read_text()[:20])
    (grpo.folder / "manifest.json").write_text("{")
    left = [each for each in migrate(outputs, "main") if each.left]
    assert [each.run for each in left] == [grpo.name]
    now = of(outputs, "sft")
    assert len((now.folder / "snapshots" / "step-000002" / "manifest.json").read_text()) == 20
    assert now.snapshots[4].is_trained()


def test_two_runs_that_are_one_today(outputs: Path) -> None:
    """One wrote an option as 0.2, the other as text: both meant the same adapter."""
    other = of(outputs, "grpo")
    copy = shutil.copytree(other.folder, outputs / "copy")
    migrate(outputs, "main")
    shutil.move(copy, other.folder)
    (moved,) = migrate(outputs, "main")
    assert moved.left.startswith("it is the same run as grpo-")
    assert moved.left.endswith("; move or delete one of the two")


def test_references_are_renamed(outputs: Path) -> None:
    """References are called as they are now, also when they were taken over in another call."""
    sft, dpo = of(outputs, "sft"), of(outputs, "dpo")
    assert dpo.manifest["references"]["sft"]["name"] == sft.name
    with FileLock(sft.lock_file):
        migrate(outputs, "main")
    assert of(outputs, "dpo").manifest["references"]["sft"]["name"] == sft.name
    migrate(outputs, "main")
    assert of(outputs, "dpo").manifest["references"]["sft"]["name"] == of(outputs, "sft").name != sft.name


def renamed(run: Run, **section: Any) -> Run:
    """The run as it would be, had its loss been another one."""
    manifest = json.loads((run.folder / "manifest.json").read_text())
    manifest["identity"]["method"] = manifest["config"]["method"] = section
    manifest["run"] = f"{run.name.rpartition('-')[0]}-{hash_json(manifest['identity'], 8)}"
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    return Run(run.folder.rename(run.folder.with_name(manifest["run"])))


def test_an_external_loss_is_imported_only_if_allowed(outputs: Path) -> None:
    theirs = renamed(of(outputs, "sft"), _target_="tests.own_loss.Half", name="half", share=0.5, floor=0.25)
    (moved,) = [each for each in migrate(outputs, "main") if each.left]
    assert moved.run == moved.name == theirs.name
    assert moved.left == "its loss tests.own_loss.Half must be allowed with losses=tests.own_loss.Half"
    script("launch/migrate.py", f"output_dir={outputs}", check=1)
    script("launch/migrate.py", f"output_dir={outputs}", "losses=tests.own_loss.Half")
    manifest = of(outputs, "sft").manifest
    assert manifest["identity"]["method"] == {"name": "half", "version": 1, "floor": 0.25}  # share is at its default
    assert manifest["options"] == {"share": 0.5, "floor": 0.25}


def test_a_loss_under_the_name_of_another_is_left(outputs: Path) -> None:
    renamed(of(outputs, "sft"), _target_="tests.own_loss.Half", name="sft")
    (moved,) = [each for each in migrate(outputs, "main", ["tests.own_loss.Half"]) if each.left]
    assert "has the name of the built-in loss" in moved.left


def test_runs_of_version_2_stay_what_they_were_trained_on(outputs: Path) -> None:
    """Before rollouts kept their token ids: their like is not made by any configuration of today."""
    run = of(outputs, "dpo")
    manifest = run.manifest
    manifest["identity"]["version"] = 2
    manifest["run"] = f"{run.name.rpartition('-')[0]}-{hash_json(manifest['identity'], 8)}"
    write_json(run.folder / "manifest.json", manifest)
    run.folder.rename(run.folder.with_name(manifest["run"]))
    migrate(outputs, "main")
    facts = read_facts(of(outputs, "dpo"), StartedFacts)
    assert facts.identity["tokens"] == "of the text"


@pytest.mark.parametrize(
    "change",
    [
        {"run": "../../elsewhere"},
        {"migrated_from": None},
        {"migrated_from": {"run": "sft-x", "identity": {}}},
        {"migrated_from": {"run": 5, "identity": [1]}},
    ],
)
def test_a_forged_manifest_does_not_rename_a_folder(outputs: Path, change: dict[str, Any]) -> None:
    """A manifest in today's form in a folder of another name: as a killed migration leaves it, or made up."""
    run = of(outputs, "sft")
    migrate(outputs, "main")
    manifest = of(outputs, "sft").manifest
    of(outputs, "sft").folder.rename(run.folder)
    write_json(run.folder / "manifest.json", {**manifest, **change})
    (moved,) = migrate(outputs, "main")
    assert moved == migration.MigrationResult(run.name, run.name, "its manifest.json belongs to another folder")


@pytest.mark.parametrize("identity", [[], {"version": 3}, {"version": 3, "method": 1, "optim": {}, "lora": {}}])
def test_invalid_identities(outputs: Path, identity: Any) -> None:
    run = of(outputs, "sft")
    folder = run.folder.with_name(f"sft-conventional-r1-tiny-s42-{hash_json(identity, 8)}")
    write_json(run.folder / "manifest.json", {**run.manifest, "identity": identity})
    run.folder.rename(folder)
    (moved,) = [each for each in migrate(outputs, "main") if each.left]
    assert moved.run == folder.name
    assert "identity" in moved.left


def test_classes_that_are_no_losses_are_refused(outputs: Path) -> None:
    for name, message in (
        ("pathlib.Path", "losses=pathlib.Path: not a subclass of"),
        ("no.such.Class", "losses=no.such.Class: not a subclass of"),
    ):
        renamed(of(outputs, "sft"), _target_=name, name="half")
        outcome = script("launch/migrate.py", f"output_dir={outputs}", f"losses={name}", check=2)
        assert message in outcome.stderr
        assert outcome.stderr.count("\n") == 1


def test_what_an_older_version_of_a_loss_made_can_still_be_read(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(outputs, "main")
    monkeypatch.setattr(builtin_losses()["grpo"], "version", 2)
    assert read_facts(of(outputs, "grpo"), RunFacts).options["bias"] == 0.2
    manifest = of(outputs, "grpo").manifest
    for change in ({"config": {**manifest["config"], "method": 5}}, {"options": {**manifest["options"], "bias": 0.3}}):
        write_json(of(outputs, "grpo").folder / "manifest.json", {**manifest, **change})
        with pytest.raises(InputError, match=r"manifest\.json: (config\.method|options)"):
            read_facts(of(outputs, "grpo"), RunFacts)


def test_an_option_may_be_written_in_more_than_one_way(outputs: Path) -> None:
    """`std_norm=no` is a text to Hydra, and false to the loss: the run is its own."""
    migrate(outputs, "main")
    run = of(outputs, "grpo")
    config = run.manifest["config"]
    section = {**config["method"], "std_norm": "no", "bias": "0.2"}
    write_json(run.folder / "manifest.json", {**run.manifest, "config": {**config, "method": section}})
    assert read_facts(run, RunFacts).options["std_norm"] is False
    section["std_norm"] = "yes"
    write_json(run.folder / "manifest.json", {**run.manifest, "config": {**config, "method": section}})
    with pytest.raises(InputError, match=r"manifest\.json: config\.method is"):
        read_facts(run, RunFacts)
    section["std_norm"] = "perhaps"
    write_json(run.folder / "manifest.json", {**run.manifest, "config": {**config, "method": section}})
    with pytest.raises(InputError, match=r"manifest\.json: config\.method\.std_norm: "):
        read_facts(run, RunFacts)
