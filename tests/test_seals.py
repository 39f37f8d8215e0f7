"""Integrity checks of checkpoints, outcomes and manifests on disk."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from losslens.analysis.gathering import find_runs, gather_cohort
from losslens.config.model import Model
from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.evaluation import score
from losslens.losses.sft import Sft
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel
from losslens.runs import integrity
from losslens.runs.integrity import require_recorded_outcomes
from losslens.runs.run import Run, runs_of
from losslens.training.run import last_checkpoint
from tests.conftest import command, script, train_frozen


@pytest.fixture(scope="module")
def cut(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A run with checkpoints of steps 2 and 4 that was cut at step 5, and its plan."""

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("cut")
    plan = make_plan(Sft(name="sft"), max_steps=6, batch_size=4, save_steps=2, log_steps=1)
    plan = replace(plan, identity="mine")
    with pytest.raises(KeyboardInterrupt):
        train_frozen(plan, base, tokenised, folder, stop)
    return folder, plan


def without_optimizer(checkpoint: Path) -> None:
    """Removes a file together with its checksum."""
    (checkpoint / "optimizer.pt").unlink()
    checksums = json.loads((checkpoint / "sealed.json").read_text())
    del checksums["files"]["optimizer.pt"]
    (checkpoint / "sealed.json").write_text(json.dumps(checksums))


def changed_checksums(**values: Any) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "sealed.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def flipped(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def linked(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    shutil.move(file, checkpoint.parent / "elsewhere.pt")
    file.symlink_to(checkpoint.parent / "elsewhere.pt")


FAULTS: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flipped,
    "a missing file": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "a missing file without a checksum": without_optimizer,
    "a further file": lambda checkpoint: (checkpoint / "training_args.pkl").write_bytes(b"x"),
    "a further file in a folder": lambda checkpoint: shutil.copytree(checkpoint, checkpoint / "old"),
    "a link": linked,
    "no checksums": lambda checkpoint: (checkpoint / "sealed.json").unlink(),
    "a list as checksums": lambda checkpoint: (checkpoint / "sealed.json").write_text("[]"),
    "no UTF-8": lambda checkpoint: (checkpoint / "sealed.json").write_bytes(b"\xff\xfe{"),
    "deeply nested checksums": lambda checkpoint: (checkpoint / "sealed.json").write_text("[" * 200_000),
    "checksums of another run": changed_checksums(run="yours"),
    "checksums of another step": changed_checksums(step=3),
    "checksums with a step that is not an integer": changed_checksums(step="4"),
    "checksums with a list of files": changed_checksums(files=["optimizer.pt"]),
    "the one before": lambda checkpoint: (
        shutil.rmtree(checkpoint), shutil.copytree(checkpoint.with_name("checkpoint-2"), checkpoint),
    ),
    "a file of that name": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.write_text("x")),
}  # fmt: skip


class TestCheckpoints:
    """A run resumes only from a checkpoint of its own, with the right step and all files intact."""

    @pytest.mark.parametrize("fault", FAULTS)
    def test_resumes_from_the_previous_checkpoint(
        self, fault: str, cut: tuple[Path, Any], tmp_path: Path, capsys: Any
    ) -> None:
        checkpoints = shutil.copytree(cut[0] / "checkpoints", tmp_path / "checkpoints")
        assert last_checkpoint(checkpoints, "mine") == checkpoints / "checkpoint-4"
        FAULTS[fault](checkpoints / "checkpoint-4")
        assert last_checkpoint(checkpoints, "mine") == checkpoints / "checkpoint-2"
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{checkpoints / 'checkpoint-4'}: ")
        assert not (checkpoints / "checkpoint-4").exists()

    def test_ignores_checkpoints_of_another_run(self, cut: tuple[Path, Any], tmp_path: Path) -> None:
        checkpoints = shutil.copytree(cut[0] / "checkpoints", tmp_path / "checkpoints")
        assert last_checkpoint(checkpoints, "of another seed") is None

    def test_resumes_byte_identically_among_stray_folders(
        self, cut: tuple[Path, Any], base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, capsys: Any
    ) -> None:
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        whole.mkdir()
        folder, plan = cut
        train_frozen(plan, base, tokenised, whole)
        shutil.copytree(folder, resumed)
        checkpoints = resumed / "checkpoints"
        (checkpoints / "checkpoint-abc").mkdir()
        (checkpoints / "checkpoint-").write_text("x")
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-5")
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-04")
        facts = train_frozen(plan, base, tokenised, resumed)
        assert facts["resumed_from"] == 4
        assert adapter_fingerprint(resumed / "adapter") == adapter_fingerprint(whole / "adapter")
        assert capsys.readouterr().out.count("; ignored") == 4


def of(output_dir: Path, method: str) -> Run:
    [run] = [run for run in runs_of(output_dir, "main") if run.name.startswith(f"{method}-")]
    return run


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@contextmanager
def kept(file: Path) -> Iterator[None]:
    """Puts a file back as it was."""
    before = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(before)


def analysed(outputs: Path) -> None:
    """The part of an analysis that reads runs."""
    gather_cohort(find_runs(outputs, ["main"], None), {})


def without(content: dict[str, Any], *path: str, **value: Any) -> dict[str, Any]:
    """A copy of nested mappings with other values at `path`."""
    if not path:
        return {**content, **value}
    return {**content, path[0]: without(content[path[0]], *path[1:], **value)}


class TestRuns:
    """Outcomes and manifests of finished runs."""

    def test_any_flipped_bit_of_an_outcome_is_detected(self, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 4,000 random flips, 560 changed answers unnoticed."""
        monkeypatch.setattr(integrity, "_RETRY_SECONDS", 0.0)
        run = of(sweep, "sft")
        file = run.evaluation("arithmetic")
        rng = random.Random(0)
        message = r"arithmetic\.parquet: does not match the hash recorded"
        for _ in range(100):
            with kept(file):
                flip(file, rng)
                with pytest.raises(InputError, match=message):
                    require_recorded_outcomes(run.folder)
        analysed(sweep)
        with kept(file), pytest.raises(InputError, match=message):
            flip(file, rng)
            analysed(sweep)

    def test_training_rescores_changed_or_missing_outcomes(self, sweep: Path) -> None:
        run = of(sweep, "sft")
        base = of(sweep, "base")
        first, second = run.evaluation("arithmetic"), base.evaluation("arithmetic")
        before = [pd.read_parquet(file) for file in (first, second)]
        table = pq.read_table(first)
        turned = table.set_column(4, "correct", pc.invert(table["correct"]))
        pq.write_table(turned, first)
        second.unlink()
        with pytest.raises(InputError, match=r"base-.*arithmetic\.parquet: missing"):
            analysed(sweep)
        outcome = script(*command(sweep, "method=sft", "logger=none"))
        assert "arithmetic.parquet: damaged or outdated; scoring again" in outcome.stdout
        for file, expected in zip((first, second), before, strict=True):
            pd.testing.assert_frame_equal(pd.read_parquet(file), expected)
        analysed(sweep)

    def test_unrecorded_outcomes_are_refused(self, sweep: Path) -> None:
        run = of(sweep, "sft")
        other = run.evaluation("other")
        shutil.copy(run.evaluation("arithmetic"), other)
        with pytest.raises(InputError, match=r"other\.parquet: does not match the hash recorded"):
            analysed(sweep)
        other.unlink()

    def test_runs_without_recorded_hashes(self, sweep: Path) -> None:
        """They are compared, and that they cannot be checked is said; the next command notes their hashes."""
        run = of(sweep, "sft")
        write_json(run.folder / "manifest.json", {k: v for k, v in run.manifest.items() if k != "outcomes"})
        cohort = gather_cohort(find_runs(sweep, ["main"], None), {})
        assert f"a check of the outcomes of {run.name}" in cohort.left_out
        script(*command(sweep, "method=sft", "logger=none"))
        cohort = gather_cohort(find_runs(sweep, ["main"], None), {})
        assert f"a check of the outcomes of {run.name}" not in cohort.left_out

    @pytest.mark.parametrize(
        ("method", "path", "value"),
        [
            ("sft", ("config",), {"seed": 43}),
            ("sft", ("config",), {"init_seed": 43}),
            ("sft", ("identity",), {"seed": 43}),
            ("sft", (), {"learning_rate": 7e-3}),
            ("sft", ("config", "lr"), {"base": 7e-3}),
            ("sft", ("config", "lr"), {"name": 5}),
            ("dpo", ("config", "lr"), {"factor": 1.0}),
            ("dpo", (), {"conventional_lr_scale": 1.0}),
            ("dpo", ("config", "method"), {"beta": 0.5}),
            ("sft", (), {"method": "rft"}),
            ("sft", ("config", "method"), {"name": "rft"}),
            ("sft", ("config", "lora_rank"), {"r": 4}),
            ("sft", ("config", "optim"), {"batch_size": 16}),
            ("sft", (), {"base": {"sha256": "0"}}),
            ("sft", (), {"run": "sft-conventional-r8-tiny-s43-00000000"}),
            ("base", (), {"base": {"sha256": "0"}}),
            ("base", ("config", "model"), {"name": "other"}),
        ],
    )
    def test_a_manifest_that_was_changed_is_refused(
        self, method: str, path: tuple[str, ...], value: dict[str, Any], sweep: Path
    ) -> None:
        run = of(sweep, method)
        file = run.folder / "manifest.json"
        with kept(file):
            write_json(file, without(run.manifest, *path, **value))
            with pytest.raises(InputError, match=r"manifest\.json: ") as refused:
                analysed(sweep)
            assert "\n" not in str(refused.value)
            assert run.name in str(refused.value)
            if method != "base":
                with pytest.raises(InputError, match=r"manifest\.json: "):
                    run.is_trained()

    def test_a_run_in_the_folder_of_another_is_refused(self, sweep: Path) -> None:
        run, other = of(sweep, "sft"), of(sweep, "rft")
        shutil.copytree(other.folder, sweep / "kept")
        shutil.rmtree(other.folder)
        shutil.copytree(run.folder, other.folder)
        with pytest.raises(InputError, match=f"{other.name}/manifest.json: identity is"):
            analysed(sweep)
        shutil.rmtree(other.folder)
        shutil.move(sweep / "kept", other.folder)

    @pytest.mark.parametrize("content", [b"[]", b"\xff", b"{", b"[" * 200_000])
    def test_a_damaged_manifest_of_the_base_is_rewritten(self, content: bytes, sweep: Path) -> None:
        base = of(sweep, "base")
        file = base.folder / "manifest.json"
        with kept(file):
            file.write_bytes(content)
            with pytest.raises(InputError, match=r"base-.*manifest\.json"):
                analysed(sweep)
            # What `train.py` does for each of its runs.
            score._write_base_manifest(base, Model.model_validate(of(sweep, "sft").manifest["config"]["model"]))
            assert base.manifest["outcomes"] == {}
