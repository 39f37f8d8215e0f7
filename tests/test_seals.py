"""What lies on disk is believed only where it is what was written: checkpoints, outcomes, manifests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from losslens.adapters import adapter_sha256
from losslens.methods.sft import Sft
from losslens.models import LoadedModel
from losslens.training.run import last_checkpoint, train_run


class TestCheckpoints:
    """Only a checkpoint of this run, of its step and with all its files is gone on from."""

    @pytest.fixture(scope="class")
    def cut(
        self, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, Any]:
        """A run with checkpoints of steps 2 and 4 that was cut at step 5, and its plan."""

        def stop(step: int, values: dict[str, float]) -> None:
            if step == 5:
                raise KeyboardInterrupt

        folder = tmp_path_factory.mktemp("cut")
        plan = make_plan(Sft(name="sft"), max_steps=6, batch_size=4, save_steps=2, log_steps=1)
        plan = replace(plan, identity="mine")
        with pytest.raises(KeyboardInterrupt):
            train_run(plan, base, tokenised, folder, stop)
        return folder, plan

    @staticmethod
    def without_optimizer(checkpoint: Path) -> None:
        """Its file is gone, and so is the line of the seal."""
        (checkpoint / "optimizer.pt").unlink()
        seal = json.loads((checkpoint / "sealed.json").read_text())
        del seal["files"]["optimizer.pt"]
        (checkpoint / "sealed.json").write_text(json.dumps(seal))

    @staticmethod
    def changed_seal(**values: Any) -> Callable[[Path], None]:
        def change(checkpoint: Path) -> None:
            file = checkpoint / "sealed.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

        return change

    @staticmethod
    def flipped(checkpoint: Path) -> None:
        file = checkpoint / "optimizer.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    @staticmethod
    def linked(checkpoint: Path) -> None:
        file = checkpoint / "optimizer.pt"
        shutil.move(file, checkpoint.parent / "elsewhere.pt")
        file.symlink_to(checkpoint.parent / "elsewhere.pt")

    FAULTS: dict[str, Callable[[Path], Any]] = {
        "a flipped bit": flipped,
        "a missing file": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
        "a missing file that its seal does not know": without_optimizer,
        "a further file": lambda checkpoint: (checkpoint / "training_args.pkl").write_bytes(b"x"),
        "a further file in a folder": lambda checkpoint: shutil.copytree(checkpoint, checkpoint / "old"),
        "a link": linked,
        "no seal": lambda checkpoint: (checkpoint / "sealed.json").unlink(),
        "a list as seal": lambda checkpoint: (checkpoint / "sealed.json").write_text("[]"),
        "no UTF-8": lambda checkpoint: (checkpoint / "sealed.json").write_bytes(b"\xff\xfe{"),
        "a deep seal": lambda checkpoint: (checkpoint / "sealed.json").write_text("[" * 200_000),
        "a seal of another run": changed_seal(run="yours"),
        "a seal of another step": changed_seal(step=3),
        "a seal of no step": changed_seal(step="4"),
        "a seal of lists": changed_seal(files=["optimizer.pt"]),
        "the one before": lambda checkpoint: (
            shutil.rmtree(checkpoint), shutil.copytree(checkpoint.with_name("checkpoint-2"), checkpoint),
        ),
        "a file of that name": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.write_text("x")),
    }  # fmt: skip

    @pytest.mark.parametrize("fault", FAULTS)
    def test_the_one_before_is_taken(self, fault: str, cut: tuple[Path, Any], tmp_path: Path, capsys: Any) -> None:
        checkpoints = shutil.copytree(cut[0] / "checkpoints", tmp_path / "checkpoints")
        assert last_checkpoint(checkpoints, "mine") == checkpoints / "checkpoint-4"
        self.FAULTS[fault](checkpoints / "checkpoint-4")
        assert last_checkpoint(checkpoints, "mine") == checkpoints / "checkpoint-2"
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{checkpoints / 'checkpoint-4'}: ")
        assert not (checkpoints / "checkpoint-4").exists()

    def test_those_of_another_run_are_not_gone_on_from(self, cut: tuple[Path, Any], tmp_path: Path) -> None:
        checkpoints = shutil.copytree(cut[0] / "checkpoints", tmp_path / "checkpoints")
        assert last_checkpoint(checkpoints, "of another seed") is None

    def test_among_strays_it_goes_on_to_the_same_bytes(
        self, cut: tuple[Path, Any], base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, capsys: Any
    ) -> None:
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        whole.mkdir()
        folder, plan = cut
        train_run(plan, base, tokenised, whole, lambda step, values: None)
        shutil.copytree(folder, resumed)
        checkpoints = resumed / "checkpoints"
        (checkpoints / "checkpoint-abc").mkdir()
        (checkpoints / "checkpoint-").write_text("x")
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-5")
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-04")
        facts = train_run(plan, base, tokenised, resumed, lambda step, values: None)
        assert facts["resumed_from"] == 4
        assert adapter_sha256(resumed / "adapter") == adapter_sha256(whole / "adapter")
        said = capsys.readouterr().out
        assert said.count("; left out") == 4
