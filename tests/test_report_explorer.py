"""What the explorer of the report is given: numbers as the tables have them, and names."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from plotly.offline import get_plotlyjs_version

from benchmarks.made_analysis import make_analysis
from losslens.analysis.repeats import arm_pairs
from losslens.core.errors import InputError
from losslens.measures import weight_measures
from losslens.report import explorer_data, page
from losslens.report.binary_pack import Packed
from losslens.report.explorer_index import find_modules, find_runs
from losslens.report.loss_comparison import LossComparison
from losslens.report.sections import explorer, training
from losslens.tables.analysis_folder import AnalysisFolder

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_analysis(tmp_path, methods=["sft", "dpo"], seeds=2, layers=3, top=4, rank=6)
    return tmp_path


def read(text: str) -> dict[str, Any]:
    """The header, and beside it the arrays, as explorer/packed.js reads them."""
    whole = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(whole[:4], "little")
    found = json.loads(whole[4 : 4 + length])
    start = 4 + length
    for block in found["blocks"]:
        kind = np.dtype(f"<{block['kind']}")
        count = int(np.prod(block["shape"]))
        planes = np.frombuffer(whole, np.uint8, count * kind.itemsize, start).reshape(kind.itemsize, count)
        values = np.ascontiguousarray(planes.T).view(kind).reshape(block["shape"])
        if kind.kind == "i":
            values = np.where(values == np.iinfo(kind).min, np.nan, values / 10.0 ** block["digits"])
        found[block["name"]] = values
        start += count * kind.itemsize
    assert start == len(whole)
    return found


def explorer_of(folder: Path) -> dict[str, Any]:
    section = explorer.section(AnalysisFolder(folder))
    assert section
    return read(section.explorer)


def test_numbers_are_kept_to_the_digits_that_are_shown() -> None:
    packed = Packed({"name": "x"})
    packed.fixed("cosines", np.array([[0.12345678, -1.0], [np.nan, 0.00004]]), 4)
    packed.fixed("large", np.array([4.0, 0.327684]), 5)
    packed.significant("sizes", np.array([0.0, 0.000123456, 29.3849, np.nan]))
    packed.fixed("none", np.zeros((0, 3)), 2)
    found = read(packed.text())
    assert found["name"] == "x"
    assert [[f"{value:.4f}" for value in row] for row in found["cosines"]] == [["0.1235", "-1.0000"], ["nan", "0.0000"]]
    assert [f"{value:.5f}" for value in found["large"]] == ["4.00000", "0.32768"]
    assert [f"{value:.4g}" for value in found["sizes"]] == ["0", "0.0001235", "29.38", "nan"]
    assert found["none"].shape == (0, 3)
    assert packed.text() == packed.text()


def test_every_table_is_there_and_says_the_same(folder: Path) -> None:
    found = explorer_of(folder)
    names = [run["name"] for run in found["runs"]]
    pairs = pd.read_csv(folder / "pairs.csv")
    ends = [[names.index(a), names.index(b)] for a, b in zip(pairs["run_a"], pairs["run_b"], strict=True)]
    assert found["pairs"] == ends
    np.testing.assert_allclose(found["pairs.cosine_null"], pairs["cosine_null"], atol=5.1e-5)
    modules = pd.read_parquet(folder / "modules.parquet")
    shape = (len(pairs), len(found["modules"]))
    np.testing.assert_allclose(found["modules.u1"], modules["u1"].to_numpy().reshape(shape), atol=5.1e-5)
    right = np.stack(modules["angles_right"]).reshape(*shape, 4)
    np.testing.assert_allclose(found["modules.angles"][:, :, 1], right, atol=5.1e-3)
    for place, end in ((0, "min"), (-1, "max")):
        np.testing.assert_allclose(found[f"modules.angle_{end}_right"], right[:, :, place], atol=5.1e-3)
    layers = pd.read_csv(folder / "layers.csv")
    np.testing.assert_allclose(found["layers.cosine"].ravel(), layers["cosine"], atol=5.1e-5)
    sizes = pd.read_parquet(folder / "run_modules.parquet")
    np.testing.assert_allclose(found["run_modules.norm"].ravel(), sizes["norm"], rtol=5.1e-4)
    assert found["run_modules.singular_values"].shape == (4, shape[1], 6)
    curves = pd.read_csv(folder / "connectivity.csv")
    np.testing.assert_allclose(found["curves.loss"].ravel(), curves["loss"], atol=5.1e-6)
    cka = pd.read_csv(folder / "cka.csv")
    np.testing.assert_allclose(found["cka.cka_unbiased"].ravel(), cka["cka_unbiased"], atol=5.1e-6)
    assert [end for end in found["cka"]["keys"] if end[1] == -1] == [[run, -1] for run in range(4)]
    assert found["map"].shape == (4, 2)


def test_arms_are_compared_by_runs_of_different_seeds_and_with_themselves(folder: Path) -> None:
    found = explorer_of(folder)
    assert [(arm["label"], arm["runs"]) for arm in found["arms"]] == [("SFT 1e-3", [0, 1]), ("DPO 1e-3", [2, 3])]
    between = {(a, b): [found["pairs"][pair] for pair in numbers] for a, b, numbers in found["between"]}
    assert between == {(0, 0): [[0, 1]], (0, 1): [[0, 3], [1, 2]], (1, 1): [[2, 3]]}
    assert found["start"] == {"runs": [0, 2], "arms": [0, 1]}


def test_what_is_said_of_two_arms_is_what_the_table_says(folder: Path) -> None:
    """Cosine, ceiling, accuracy and both verdicts: as everywhere on the page."""
    found = explorer_of(folder)
    analysis = AnalysisFolder(folder)
    table = pd.read_csv(folder / "arm_pairs.csv", keep_default_na=False)
    row = table.set_index(["arm_a", "arm_b"]).loc[("sft-0.001", "dpo-0.001")]
    place = [(a, b) for a, b, _ in found["between"]].index((0, 1))
    assert found["verdicts"][place] == [row["cosine_verdict"], row["accuracy_verdict"]]
    assert found["arms.accuracy_diff"][place] == pytest.approx(float(row["accuracy_diff"]), abs=5.1e-5)
    assert found["arms.p_holm"][place] == pytest.approx(float(row["p_holm"]))
    comparison = LossComparison(analysis)
    cosine = comparison.of("cosine", *comparison.losses)
    pairs = found["between"][place][2]
    assert np.mean(found["pairs.cosine"][pairs]) == pytest.approx(cosine.value, abs=5.1e-5)
    assert np.isnan(found["pairs.cosine_ceiling"][found["pairs"].index([0, 2])])  # of one seed
    angle = comparison.of("angle_min_left", *comparison.losses)
    assert found["pairs.angle_min_left_repeat"][pairs] == pytest.approx([angle.level] * 2, abs=5.1e-3)


def test_an_adapter_made_elsewhere_is_an_arm_of_its_own(folder: Path) -> None:
    theirs = "dpo-0.001-s1"
    runs, pairs = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "pairs.csv", keep_default_na=True)
    runs.loc[runs["run"] == theirs, ["learning_rate", "seed", "init_seed", "lr"]] = np.nan
    runs.loc[runs["run"] == theirs, "arm"] = theirs
    runs.to_csv(folder / "runs.csv", index=False)
    pairs.loc[pairs["run_b"] == theirs, "arm_b"] = theirs
    pairs.loc[pairs["run_b"] == theirs, "pairing"] = ""
    pairs.to_csv(folder / "pairs.csv", index=False)
    seeds = runs.set_index("run")["seed"].to_dict()
    arm_pairs(pairs, seeds, ["sft-0.001", "dpo-0.001", theirs]).to_csv(folder / "arm_pairs.csv", index=False)
    found = explorer_of(folder)
    assert [arm["label"] for arm in found["arms"]] == ["SFT 1e-3", "DPO 1e-3", theirs]
    assert found["runs"][3]["label"] == f"4 {theirs}"
    numbers = next(numbers for a, b, numbers in found["between"] if (a, b) == (0, 2))
    assert [found["pairs"][pair] for pair in numbers] == [[0, 3], [1, 3]]


def test_modules_are_named_by_layer_and_projection() -> None:
    attention = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 2, 11) for name in "kovq"]
    found = find_modules(pa.table({"module": [*attention, "model.layers.2.mlp.up_proj", "lm_head"]}))
    assert found.layers == [-1, 0, 2, 11]
    assert found.projections == ["q", "k", "v", "o", "up", "lm_head"]
    assert found.at[found.names.index("model.layers.2.mlp.up_proj")] == (2, 4)
    experts = find_modules(pa.table({"module": [f"model.layers.0.mlp.experts.{n}.up_proj" for n in (0, 1)]}))
    assert experts.projections == ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]


def test_of_many_pairs_the_page_holds_those_that_say_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_pair = 12 * len(explorer_data._module_columns()) + 3 * len(explorer_data._columns(weight_measures("more")))
    monkeypatch.setattr(explorer_data, "_MOST_NUMBERS", 5 * a_pair)
    monkeypatch.setattr(explorer_data, "_MOST_ANGLES", 2 * 12 * 2 * 4)
    section = explorer.section(AnalysisFolder(folder))
    assert section
    found = read(section.explorer)
    averaged = {pair for *_, numbers in found["between"] for pair in numbers}
    assert len(found["kept"]) == 5
    assert averaged <= set(found["kept"])
    # With connectivity and CKA.
    assert [found["pairs"][pair] for pair in found["angled"]] == [[0, 1], [0, 3]]
    assert not np.isnan(found["modules.angles"]).any()
    assert any("5 of 6 pairs" in note for note in section.notes)
    assert any(note.startswith("It holds all angles of 2 of 6 pairs") for note in section.notes)


def test_no_table_no_explorer(folder: Path) -> None:
    for name in ("cka.csv", "connectivity.csv", "mds.csv", "layers.csv"):
        (folder / name).unlink()
    found = explorer_of(folder)
    assert (found["cka"]["keys"], found["curves"]["pairs"]) == ([], [])
    assert np.isnan(found["layers.cosine"]).all()
    for name in ("modules.parquet", "run_modules.parquet"):
        (folder / name).write_bytes(b"none")
        with pytest.raises(InputError, match=f"{name}: not a (table|readable parquet file)"):
            explorer.section(AnalysisFolder(folder))
        (folder / name).unlink()
    assert explorer.section(AnalysisFolder(folder)) is None


def test_the_runs_have_the_numbers_of_their_section(folder: Path) -> None:
    runs = find_runs(AnalysisFolder(folder), pd.DataFrame([{"run_a": "sft-0.001-s1", "run_b": "dpo-0.001-s0"}]))
    assert [fact["label"] for fact in runs.facts] == ["2 SFT 1e-3 s1", "3 DPO 1e-3 s0"]


def test_training_curves(folder: Path) -> None:
    section = training.section(AnalysisFolder(folder))
    assert section
    assert [figure.title for figure in section.figures] == ["Loss", "Gradient norm"]
    table = pd.read_csv(folder / "training.csv")
    sft = table[table["run"].str.startswith("sft")].groupby("step")["loss"].mean()
    band, line, *_ = section.figures[0].plot.data
    assert line.x == tuple(sft.index)
    assert line.y == pytest.approx(sft.tolist(), rel=1e-3)
    assert len(band.x) == 2 * len(line.x)
    long = pd.DataFrame({"run": "sft-0.001-s0", "step": range(5000), "loss": np.arange(5000.0), "lr": 1e-3})
    long.to_csv(folder / "training.csv", index=False)
    section = training.section(AnalysisFolder(folder))
    assert section
    assert [figure.title for figure in section.figures] == ["Loss"]
    (line,) = section.figures[0].plot.data
    assert (len(line.x), line.x[0], line.x[-1]) == (200, 0, 4999)
    (folder / "training.csv").unlink()
    assert training.section(AnalysisFolder(folder)) is None


def test_the_vendored_bundle_is_the_one_that_plotly_writes_for() -> None:
    text = (Path(page.__file__).parent / "vendor" / "plotly-cartesian.min.js").read_text(encoding="utf-8")
    version = re.search(r"plotly\.js \(cartesian - minified\) v(\d+)\.", text)
    assert version
    assert version[1] == get_plotlyjs_version().partition(".")[0]
