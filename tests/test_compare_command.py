"""`losslens compare`: adapters by folder, by run and by hub id, without a model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import losslens
from losslens.cli import compare
from losslens.core import hub
from losslens.core.errors import InputError
from losslens.updates.folder import write_adapter
from losslens.updates.lora import LoraUpdate

STUDENT = Path(losslens.__file__).parent / "tiny" / "student"
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
        (["me/adapters/../../x"], "me/adapters/../../x: no such folder, and not a hub id"),
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


def whole_model(folder: Path, seed: int) -> Path:
    """The embedded student with every matrix changed."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(STUDENT / "model.safetensors")
    changed = {name: w.float() + 0.01 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    folder.mkdir(parents=True)
    save_file(changed, folder / "model.safetensors")
    (folder / "config.json").write_text((STUDENT / "config.json").read_text())
    return folder


def test_whole_models_with_their_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model, and a run of full fine-tuning; W0's measures are there, too."""
    model, run = whole_model(tmp_path / "mine", 1), whole_model(tmp_path / "run" / "model", 2).parent
    [pair] = compared(str(model), str(run), "--base", str(STUDENT), output_dir=tmp_path / "out").to_dict("records")
    assert (pair["run_a"], pair["run_b"]) == ("mine", "run")
    expected = losslens.compare([model, run], base=STUDENT)
    assert pair["cosine"] == pytest.approx(expected.pairs["cosine"].iloc[0], abs=1e-12)
    said = capsys.readouterr().out
    assert expected.left_out["further weights of mine"] in said
    assert "the base of mine: a whole model names none" in said
    runs = pd.read_csv(tmp_path / "out" / "adapters" / "analysis" / "runs.csv").set_index("run")
    before = load_file(STUDENT / "model.safetensors")
    size = sum(float(w.double().square().sum()) for n, w in before.items() if w.ndim == 2 and "embed" not in n)
    # 0.01² a weight, of as many weights.
    count = sum(w.numel() for n, w in before.items() if w.ndim == 2 and "embed" not in n)
    assert runs.loc["mine", "norm"] == pytest.approx(0.01 * count**0.5, rel=0.02)
    assert runs.loc["mine", "relative_norm"] == pytest.approx(runs.loc["mine", "norm"] / size**0.5, rel=1e-5)


def test_a_whole_model_without_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = whole_model(tmp_path / "mine", 1)
    assert compare.main([str(model), "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{model}: a whole model is compared with its base; give model_path=FOLDER (losslens compare: --base" in said


def test_a_whole_model_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside no adapter_config.json: in the repository itself, and in a folder of it."""
    asked = []

    def download(repo: str, revision: str, local_files_only: bool = False, allow_patterns: object = None) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("no copy")
        asked.append(allow_patterns)
        return str(tmp_path / "copy")

    whole_model(tmp_path / "copy" / "sub", 1)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.adapter_from_hub(f"me/models/sub@{COMMIT}") == tmp_path / "copy" / "sub"
    assert asked[-1] == ["sub/config.json", "sub/model*.safetensors", "sub/model.safetensors.index.json"]
    with pytest.raises(
        InputError, match=r"me/models@0123.*: the repository has no adapter_config\.json .*and no model"
    ):
        hub.adapter_from_hub(f"me/models@{COMMIT}")


def test_folders_whose_names_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "seed=1" / "lr=0.1"
    folder.mkdir(parents=True)
    assert compare._parted(str(folder)) == ("", str(folder))
    assert compare._parted(f"x={folder}") == ("x", str(folder))
    assert compare._parted("x=owner/name") == ("x", "owner/name")
    assert compare._parted("owner/name") == ("", "owner/name")
