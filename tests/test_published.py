"""The study's published adapters beside its figures, on a folder laid out like its repository; and offline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf

from losslens.cli import compare
from losslens.core import hub
from losslens.report.published import REPOSITORY, training_of
from losslens.updates.folder import write_adapter
from losslens.updates.lora import LoraUpdate
from tests.conftest import ROOT, script

pytestmark = pytest.mark.fast

PATHS = (
    "sft/lr5e-6_s42", "sft/lr5e-6_s123", "sft/lr5e-5_s42", "rft/lr5e-6_s42", "rift/lr5e-6_s42", "dft/lr5e-6_s42",
    "grpo/lr5e-6_s42", "dpo/lr5e-7_s42", "dpo/lr5e-6_s42", "online_grpo",
)  # fmt: skip
CONFIG = {
    "peft_type": "LORA", "target_modules": ["q_proj"], "bias": "none",
    "base_model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
}  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Adapters of two modules. RFT is SFT turned by 60°: its cosine to SFT is ½."""
    rng = np.random.default_rng(0)
    root = tmp_path / "repository"
    for number, path in enumerate(PATHS):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        b = {"sft/lr5e-6_s42": [1.0, 0.0], "rft/lr5e-6_s42": [0.5, 0.75**0.5]}.get(path)
        one = np.zeros((12, 1)) if b is not None else rng.normal(size=(12, 1))
        one[:2, 0] = b if b is not None else one[:2, 0]
        names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
        write_adapter(root / path, {name: LoraUpdate(one, np.eye(8)[:1], 1.0 + number) for name in names}, CONFIG)
    (root / "README.md").write_text("# adapters")
    return root


@pytest.mark.slow
def test_the_experiment(repository: Path, tmp_path: Path) -> None:
    """`analyze.py experiment=published` is the same on every adapter, with an analysis of its own."""
    assert OmegaConf.load(ROOT / "conf" / "experiment" / "published.yaml").published == REPOSITORY
    line = ["experiment=published", f"published={repository}", f"output_dir={tmp_path / 'out'}", "logger=none"]
    told = script("analyze.py", *line).stdout
    folder = tmp_path / "out" / "published" / "analysis"
    assert told.splitlines()[-1] == str(folder / "report.html")
    assert {path.replace("/", "-") for path in PATHS} <= set(pd.read_csv(folder / "runs.csv")["run"])
    table = pd.read_csv(folder / "published.csv").set_index(["measure", "first", "second"])
    assert table.loc[("cosine", "sft", "rft"), "here"] == pytest.approx(0.5)
    outcome = script("analyze.py", "experiment=published", f"published={tmp_path}/none", *line[2:], check=2)
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert f"{tmp_path}/none: no such folder" in outcome.stderr


def test_a_folder_laid_out_like_the_repository(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--published", str(repository), "--output-dir", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "adapters" / "analysis"
    runs = pd.read_csv(folder / "runs.csv")
    assert {path.replace("/", "-") for path in PATHS} <= set(runs["run"])
    table = pd.read_csv(folder / "published.csv").set_index(["measure", "first", "second"])
    cosine = table.loc[("cosine", "sft", "rft")]
    # The paper gives .977 and these updates ½; the norm of SFT is √(1 + 1) over two modules.
    assert cosine["adapters"] == "sft-lr5e-6_s42, rft-lr5e-6_s42"
    assert cosine[["paper_low", "here", "difference"]].tolist() == pytest.approx([0.977, 0.5, -0.477])
    norm = table.loc[("norm", "sft", np.nan)]
    assert norm[["here", "difference"]].tolist() == pytest.approx([math.sqrt(2), math.sqrt(2) - 2.84])
    # DPO is compared at its own rate; DAPO is not there.
    assert table.loc[("cosine", "sft", "dpo"), "adapters"] == "sft-lr5e-6_s42, dpo-lr5e-7_s42"
    assert table.loc[("orthogonal_share", "sft", "dapo"), "adapters"] == "no adapter is dapo"
    report = (folder / "report.html").read_text()
    assert "Beside the paper" in report
    assert "arXiv 2606.23740 beside the same measures" in report
    assert capsys.readouterr().out.endswith("report.html\n")


def test_a_figure_inside_its_range_differs_by_nothing(repository: Path, tmp_path: Path) -> None:
    assert (
        compare.main(["--published", str(repository), "--measures", "cosines", "--output-dir", str(tmp_path / "out")])
        == 0
    )
    table = pd.read_csv(tmp_path / "out" / "adapters" / "analysis" / "published.csv")
    known = table[table["here"].notna()]
    inside = known["here"].between(known["paper_low"], known["paper_high"])
    assert (known["difference"][inside] == 0).all()
    nearer = np.where(known["here"] > known["paper_high"], known["paper_high"], known["paper_low"])[~inside]
    np.testing.assert_allclose(known["difference"][~inside], known["here"][~inside] - nearer)
    # Without angles their figures stay, with an empty cell.
    assert table.loc[table["measure"] == "angle_min_left", "here"].isna().all()


@pytest.mark.parametrize(
    ("name", "loss", "rate", "seed"),
    [
        ("sft-lr5e-6_s42", "sft", 5e-6, 42),
        ("lr5e-7_s42-dpo", "dpo", 5e-7, 42),
        ("offline_grpo-lr5e-05-seed123", "grpo", 5e-5, 123),
        ("Online-GRPO", "online_grpo", math.nan, None),
        ("qwen3-4b-rift-lr=5e-6_s42", "rift", 5e-6, 42),
        ("sft-then-dpo-lr5e-6_s42", "", 5e-6, 42),
        ("drift", "", math.nan, None),
    ],
)
def test_names(name: str, loss: str, rate: float, seed: int | None) -> None:
    found = training_of(name)
    assert (found.loss, found.seed) == (loss, seed)
    assert found.learning_rate == pytest.approx(rate, nan_ok=True)


def test_only_the_settings_of_the_paper_are_compared() -> None:
    compared = [path for path in PATHS if training_of(path).is_compared]
    assert compared == [PATHS[place] for place in (0, 3, 4, 5, 6, 7, 9)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--published"], f"adapters={REPOSITORY}"),
        (["--published", "{empty}"], "no adapter_config.json in it or in its folders"),
        (["dpo-lr5e-7_s42={one}", "--published", "{root}"], "dpo-lr5e-7_s42: also the name of a published adapter"),
        (["--published", "nowhere"], "nowhere: no such folder, and not a hub id (owner/name)"),
    ],
)
def test_refusals(
    arguments: list[str],
    said: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line and status 2, without a network too."""
    hub.resolve_commit.cache_clear()
    hub._repo_info.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    line = [
        part.format(empty=tmp_path / "empty", root=repository, one=repository / "online_grpo") for part in arguments
    ]
    assert compare.main([*line, "--output-dir", str(tmp_path / "out")]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("losslens compare: ")
    assert said in told
    assert not (tmp_path / "out").exists()
