"""`losslens.compare` and `losslens.load_sweep`: what notebooks use, without anything that trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file

import losslens
from benchmarks.made_analysis import make_analysis
from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.updates.folder import open_adapter, write_adapter
from losslens.updates.lora import LoraUpdate
from tests.conftest import ROOT

MODULES = {f"model.layers.{layer}.self_attn.{name}": (24, 16) for layer in (0, 1) for name in ("q_proj", "v_proj")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters in a folder: a, one that is near to it from the same A, and one from elsewhere."""
    folder, draw = tmp_path_factory.mktemp("made") / "adapters", np.random.default_rng(0)
    folder.mkdir()
    a = {name: LoraUpdate(draw.normal(size=(24, 4)), draw.normal(size=(4, 16)), 0.5) for name in MODULES}
    near = {name: LoraUpdate(u.b + 0.3 * draw.normal(size=u.b.shape), u.a, 0.5) for name, u in a.items()}
    other = {name: LoraUpdate(draw.normal(size=(24, 3)), draw.normal(size=(3, 16)), 0.5) for name in MODULES}
    for name, updates in {"a": a, "near": near, "other": other}.items():
        write_adapter(folder / name, updates, {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]})
    return folder


def dense(folder: Path) -> np.ndarray:
    with open_adapter(folder) as adapter:
        return np.concatenate([adapter[module].dense().ravel() for module in adapter.modules])


def test_the_numbers_are_those_of_the_dense_matrices(adapters: Path) -> None:
    comparison = losslens.compare([adapters / "a", adapters / "near", adapters / "other"])
    assert list(comparison.folders) == ["a", "near", "other"]
    whole = {name: dense(folder) for name, folder in comparison.folders.items()}
    for row in comparison.pairs.itertuples():
        a, b = whole[row.run_a], whole[row.run_b]
        assert row.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
        assert 0 < row.cosine_null < 0.5
    assert comparison.runs["norm"].tolist() == pytest.approx([np.linalg.norm(v) for v in whole.values()])
    assert comparison.matrix().loc["near", "near"] == 1
    assert comparison.matrix().loc["near", "a"] > 0.9 > comparison.matrix().loc["other", "a"]
    assert (len(comparison.layers), len(comparison.modules), len(comparison.run_modules)) == (3 * 2, 3 * 4, 3 * 4)
    assert "near" in comparison._repr_html_()


def test_an_initial_adapter_gives_drift_and_another_null(adapters: Path) -> None:
    folders = {"A": adapters / "a", "B": adapters / "near"}
    alone, together = losslens.compare(folders), losslens.compare(folders, initial=adapters / "a")
    assert alone.runs["drift_max"].isna().all()
    assert together.runs["drift_max"].tolist() == pytest.approx([0, 0], abs=1e-3)  # both have the A of the first
    assert alone.pairs["angle_min_right_null"].isna().all()
    assert together.pairs["angle_min_right_null"].tolist() == pytest.approx([0], abs=1e-6)


def test_one_adapter_alone_and_the_folder_of_a_run(adapters: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        shutil.copytree(adapters / "a", tmp_path / name / "adapter")
    assert list(losslens.compare([tmp_path / "x", tmp_path / "y" / "adapter"]).folders) == ["x", "y"]
    alone = losslens.compare([tmp_path / "x"])
    assert len(alone.runs) == 1
    assert alone.pairs.empty
    with pytest.raises(InputError, match="angles: nothing to draw"):
        alone.angles()


def test_what_does_not_compare_is_named(adapters: Path, tmp_path: Path) -> None:
    for folders, said in (
        ([tmp_path / "none"], "none: no such folder"),
        ([tmp_path], "not a readable PEFT adapter"),
        ([], "no adapter folder given"),
        ([adapters / "a", adapters / "a"], "given twice"),
        (str(adapters / "a"), "a list of folders"),
    ):
        with pytest.raises(InputError, match=said) as error:
            losslens.compare(folders)
        assert "\n" not in str(error.value)
    with open_adapter(adapters / "a") as opened:
        some = {module: opened[module] for module in opened.modules[:2]}
    write_adapter(tmp_path / "fewer", some, {"peft_type": "LORA"})
    with pytest.raises(InputError, match="fewer: adapts different modules than a"):
        losslens.compare([adapters / "a", tmp_path / "fewer"])
    with pytest.raises(InputError, match="no measure 'cosin'"):
        losslens.compare([adapters / "a"]).matrix("cosin")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_stored_is_read_without_torch_as_torch_reads_it(
    dtype: torch.dtype, adapters: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapters / "a", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    tensors = {name: torch.where(tensor.abs() < 0.05, tensor * 1e-4, tensor) for name, tensor in tensors.items()}
    save_file(tensors, file)
    with open_adapter(tmp_path / "a") as adapter:
        for module in adapter.modules:
            for factor, values in (("A", adapter[module].a), ("B", adapter[module].b)):
                stored = tensors[f"base_model.model.{module}.lora_{factor}.weight"]
                np.testing.assert_array_equal(values, stored.double().numpy())


def test_figures(adapters: Path) -> None:
    comparison = losslens.compare({"a": adapters / "a", "near": adapters / "near"})
    for figure in (comparison.cosines(), comparison.norms(), comparison.angles()):
        assert figure.axes
    texts = [text.get_text() for text in comparison.cosines().axes[0].texts]
    assert texts[1] == texts[2] == f"{comparison.matrix().loc['a', 'near']:.3f}"[1:]
    assert "trained again" not in comparison.cosines().axes[0].get_xlabel()


def test_a_sweep_as_it_lies_on_the_disk(tmp_path: Path, adapters: Path) -> None:
    folder = tmp_path / "outputs" / "main"
    write_json(folder / "sft-1" / "status.json", {"state": "completed"})
    manifest = {"method": "sft", "learning_rate": 1e-3, "config": {"seed": 3, "init_seed": 4}}
    write_json(folder / "sft-1" / "manifest.json", manifest)
    shutil.copytree(adapters / "a", folder / "sft-1" / "adapter")
    write_json(folder / "dpo-1" / "status.json", {"state": "queued"})
    sweep = losslens.load_sweep("main", tmp_path / "outputs")
    assert sweep.runs["state"].tolist() == ["queued", "completed"]
    assert sweep.runs.iloc[1][["method", "learning_rate", "seed", "init_seed"]].tolist() == ["sft", 1e-3, 3, 4]
    assert list(sweep.adapters) == ["sft-1"]
    assert "queued" in sweep._repr_html_()
    with pytest.raises(InputError, match=r"main/analysis: no finished analysis; run `losslens analyze sweep=main`"):
        _ = sweep.tables
    make_analysis(folder / "analysis", methods=("sft", "dpo"), layers=2)
    assert len(sweep.tables["pairs"]) == 1
    assert set(sweep.tables) >= {"runs", "layers", "run_modules"}
    assert {"cosines", "norms"} <= sweep.figures().keys()
    with pytest.raises(InputError, match="no table 'paris'"):
        _ = sweep.tables["paris"]
    with pytest.raises(InputError, match=r"sweep=other: no such sweep: .*outputs/other does not exist"):
        losslens.load_sweep("other", tmp_path / "outputs")


def test_importing_it_takes_nothing_and_what_it_lacks_is_told() -> None:
    code = "import sys, losslens; assert {'compare', 'load_sweep'} <= set(dir(losslens)); print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "losslens" in imported
    assert not {"numpy", "pandas", "torch", "hydra"} & set(imported)
    with pytest.raises(AttributeError, match="no attribute 'comapre'"):
        losslens.comapre  # noqa: B018


def test_the_notebook_runs(adapters: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "compare_adapters.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(adapters.parent)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert "near" in json.dumps(shown[0]["data"])
