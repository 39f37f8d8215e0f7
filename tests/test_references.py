"""Selection of the reference adapters that a run is compared with during training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.models.adapters import adapter_fingerprint
from losslens.runs.reference_adapters import describe_references, resolve_references
from losslens.runs.run import Run

CONFIG = {"init_seed": 42, "seed": 42, "lora_rank": {"r": 2}, "train_on": "all", "optim": {}, "lr": {"peak": 1e-4}}
MANIFEST = {"method": "dpo", "base": {"sha256": "b"}, "rollouts": {"sha256": "r"}, "config": CONFIG}


def peft_folder(folder: Path, into: int = 4) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", {"r": 2, "lora_alpha": 4})
    module = "base_model.model.layers.0.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, into), f"{module}.lora_B.weight": torch.zeros(3, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def finished(sweep: Path, name: str, state: str = "completed", into: int = 4, **manifest: Any) -> Run:
    run = Run(sweep / name)
    peft_folder(run.adapter, into)
    write_json(run.folder / "status.json", {"state": state})
    content = {**MANIFEST, "method": "sft", "adapter_sha256": adapter_fingerprint(run.adapter), **manifest}
    write_json(run.folder / "manifest.json", content)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "main" / "dpo")
    run.folder.mkdir(parents=True)
    write_json(run.folder / "status.json", {"state": "running"})
    return run


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    return peft_folder(tmp_path / "init" / "x")


def test_the_sft_run_that_differs_least(run: Run, initial: Path) -> None:
    sweep = run.folder.parent

    def chosen() -> str | None:
        found = resolve_references("auto", run, initial, MANIFEST)
        return found["sft"].parent.name if found else None

    assert chosen() is None
    finished(sweep, "running", state="running")
    finished(sweep, "other-base", base={"sha256": "another"})
    finished(sweep, "other-method", method="rft")
    finished(sweep, "other-modules", into=5)
    assert chosen() is None
    finished(sweep, "a-other-rollouts", rollouts={"sha256": "another"})
    assert chosen() == "a-other-rollouts"
    finished(sweep, "b-other-init", config={**CONFIG, "init_seed": 1})
    assert chosen() == "b-other-init"
    finished(sweep, "c-other-seed", config={**CONFIG, "seed": 1})
    assert chosen() == "c-other-seed"
    finished(sweep, "z-same")
    assert chosen() == "z-same"
    # A run that goes on is compared with what it was compared with.
    write_json(
        run.folder / "manifest.json", {"references": describe_references({"sft": sweep / "c-other-seed" / "adapter"})}
    )
    assert chosen() == "c-other-seed"
    shutil.rmtree(sweep / "c-other-seed")
    assert chosen() == "z-same"


def test_a_damaged_run_is_no_reference_and_stops_no_other(run: Run, initial: Path) -> None:
    sweep = run.folder.parent
    (finished(sweep, "status").folder / "status.json").write_text("{")
    (finished(sweep, "manifest").folder / "manifest.json").write_text("{")
    (finished(sweep, "weights").adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)
    (finished(sweep, "gone").adapter / "adapter_model.safetensors").unlink()
    finished(sweep, "older", config={name: value for name, value in CONFIG.items() if name != "train_on"})
    assert resolve_references("auto", run, initial, MANIFEST) == {"sft": sweep / "older" / "adapter"}


def test_a_run_is_not_its_own_reference(run: Run, initial: Path) -> None:
    own = finished(run.folder.parent, "sft")
    assert resolve_references("auto", own, initial, MANIFEST) == {}


def test_named_references(run: Run, initial: Path, tmp_path: Path) -> None:
    sibling = finished(run.folder.parent, "sft-s1")
    elsewhere = peft_folder(tmp_path / "elsewhere")
    other_run = finished(tmp_path / "other", "rft")
    asked = {"sft": "sft-s1", "theirs": str(elsewhere), "rft": str(other_run.folder)}
    found = resolve_references(asked, run, initial, MANIFEST)
    assert found == {"sft": sibling.adapter, "theirs": elsewhere, "rft": other_run.adapter}
    assert describe_references(found)["theirs"] == {
        "name": "elsewhere",
        "adapter_sha256": adapter_fingerprint(elsewhere),
    }
    assert describe_references(found)["rft"]["name"] == "rft"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"sft": "nowhere"},
            "weight_tracking.references.sft: nowhere is neither a finished run of the sweep nor a PEFT folder",
        ),
        ({"sft": "other"}, "weight_tracking.references.sft: other does not adapt the modules of this run"),
        ({"a/b": "other"}, "weight_tracking.references: invalid label 'a/b'"),
        ({"previous": "other"}, "weight_tracking.references.previous: reserved"),
    ],
)
def test_refuses_invalid_references(asked: dict[str, str], message: str, run: Run, initial: Path) -> None:
    finished(run.folder.parent, "other", into=5)
    with pytest.raises(InputError, match=message):
        resolve_references(asked, run, initial, MANIFEST)
