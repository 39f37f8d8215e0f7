"""Products of 8-bit rows: by hand, without bias where rows are alike, and close to float64 with outliers too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from losslens.cli import compare
from losslens.measures import get_measure
from losslens.measures.comparison import in_parallel
from losslens.measures.int8 import Int8Rows, RoundingNoise, use_one_core
from losslens.measures.products import all_products, product_weights
from losslens.updates.folder import write_adapter
from losslens.updates.lora import LoraUpdate

pytestmark = pytest.mark.fast

vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")


def test_codes_by_hand() -> None:
    """126 steps to the largest entry, 63: 63 → 126, −31.5 → −63, 0 → 0; a row of zeros has scale 0."""
    found = Int8Rows.rounded(np.array([[63.0, -31.5, 0.0], [0.0, 0.0, 0.0]]), np.random.default_rng(0))
    assert found.codes.tolist() == [[126, -63, 0], [0, 0, 0]]
    assert found.scales.tolist() == [0.5, 0.0]


def test_codes_are_right_in_the_mean_and_stay_in_range() -> None:
    """0.3 of a step becomes 1 in 30% of the cases (standard error .003 of 20,000), and 126 never 127 or −128."""
    rows = np.full((20_001, 2), 0.3 / 126)
    rows[:, 1] = [1.0, -1.0, 1.0] * 6667
    codes = Int8Rows.rounded(np.concatenate([rows, [[0.3 / 126, 1.0]]]), np.random.default_rng(1)).codes.numpy()
    assert set(codes[:, 0]) == {0, 1}
    assert codes[:, 0].mean() == pytest.approx(0.3, abs=0.015)
    assert np.abs(codes[:, 1].astype(int)).tolist() == [126] * len(codes)


@vnni
def test_sums_of_long_rows_are_exact() -> None:
    """300,000 · 126² is past 2³¹: rows of ones, and of ones and minus ones, whose product is 0.

    Of so many random numbers one or two are so close to 1 that float32 rounds 126 and them to 127: 1/126 each.
    """
    ones = np.ones((1, 300_000))
    turned = ones.copy()
    turned[:, ::2] = -1.0
    rows = Int8Rows.rounded(np.concatenate([ones, turned]), np.random.default_rng(0))
    np.testing.assert_allclose(rows.products(rows), [[300_000, 0], [0, 300_000]], rtol=1e-6, atol=0.1)


@vnni
@pytest.mark.parametrize("length", [1, 2, 3, 70, 2**17 + 1])
def test_products_equal_those_of_the_codes(length: int) -> None:
    rng = np.random.default_rng(2)
    one, two = (Int8Rows.rounded(rng.normal(size=(n, length)), rng) for n in (5, 9))
    dense = [rows.scales[:, np.newaxis] * rows.codes.numpy().astype(np.float64) for rows in (one, two)]
    np.testing.assert_allclose(one.products(two), dense[0] @ dense[1].T, rtol=1e-6, atol=1e-7 * length)


def test_rows_of_denormal_numbers_count_as_zero(recwarn: pytest.WarningsRecorder) -> None:
    rows = np.array([[1e-40, -1e-45], [1.0, 1e-40]], dtype=np.float32)
    found = Int8Rows.rounded(rows, np.random.default_rng(0))
    noise = RoundingNoise.of(rows[np.newaxis])
    assert found.codes.tolist() == [[0, 0], [126, 0]]
    assert found.scales[0] == 0
    assert noise.squares.tolist() == [[1.0, 0.0]]
    assert noise.variances.max() < 1e-38
    assert not recwarn.list


def test_noise_by_hand() -> None:
    """(126, ½) becomes (126, c) with c = 0 or 1: E(126² + cc')² − (126² + ¼)² = ¼ − 1/16 = 3/16.

    Of two such rows in a group, squares and variances add up: four products have four times the excess.
    """
    row = np.array([126, 0.5], dtype=np.float32)
    one, two = (RoundingNoise.of(np.tile(row, (1, n, 1))) for n in (1, 2))
    np.testing.assert_array_equal(one.squares, [[126**2, 0.25]])
    np.testing.assert_array_equal(one.variances, [[0, 0.25]])
    np.testing.assert_array_equal(one.excess(one), [[3 / 16]])
    np.testing.assert_array_equal(two.excess(two), [[3 / 4]])


@vnni
def test_noise_is_what_rounding_adds_in_the_mean() -> None:
    """Two groups of three rows with an entry 200 times as large, rounded 4000 times: within 3 standard errors."""
    rng = np.random.default_rng(4)
    groups = rng.normal(size=(2, 3, 40)).astype(np.float32)
    groups[0, :, 3] *= 200
    groups[1, :, 7] *= 200
    rounds = [[Int8Rows.rounded(rows, rng) for rows in groups] for _ in range(4000)]
    added = np.array([(one.products(two) ** 2).sum() for one, two in rounds]) - ((groups[0] @ groups[1].T) ** 2).sum()
    noise = [RoundingNoise.of(rows[np.newaxis]) for rows in groups]
    excess = noise[0].excess(noise[1]).item()
    error = added.std() / len(added) ** 0.5
    assert excess > 10 * error
    assert abs(added.mean() - excess) < 3 * error


@vnni
def test_nulls_of_rows_with_outlier_columns_are_not_biased() -> None:
    """Each adapter's A has two columns 200 times as large; without the correction nulls were too large by 27%."""
    rng = np.random.default_rng(6)

    def adapter() -> dict[str, LoraUpdate]:
        found = {}
        for name in ("m0", "m1", "m2", "m3"):
            a = rng.normal(size=(8, 200))
            a[:, rng.choice(200, 2, replace=False)] *= 200
            found[name] = LoraUpdate(rng.normal(size=(300, 8)), a, 1.0)
        return found

    adapters, measure = [adapter() for _ in range(20)], get_measure("cosine")
    exact, found = (
        product_weights(all_products(adapters, list(adapters[0]), precision=p), [(300, 200)] * 4, slice(None))
        for p in ("float64", "int8")
    )
    assert found.right_overlap.sum() == pytest.approx(exact.right_overlap.sum(), rel=0.01)
    assert np.mean(measure.null(found) / measure.null(exact)) == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(measure.null(found), measure.null(exact), atol=1e-3)
    np.testing.assert_allclose(measure.value(found), measure.value(exact), atol=1e-3)


@vnni
@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1)])
def test_modules_of_one_output_or_input(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    adapters = [
        {"m": LoraUpdate(rng.normal(size=(shape[0], 4)), rng.normal(size=(4, shape[1])), 1.0)} for _ in range(5)
    ]
    exact, found = (
        product_weights(all_products(adapters, ["m"], precision=p), [shape], slice(None)) for p in ("float64", "int8")
    )
    for quantity in (get_measure("cosine").value, get_measure("cosine").null):
        np.testing.assert_allclose(quantity(found), quantity(exact), atol=0.01)


def drawn(rng: np.random.Generator, heavy: bool) -> list[dict[str, LoraUpdate]]:
    """Twelve adapters: of one A and one B, each with a part of its own; the first two are the same."""
    draw = (lambda size: rng.standard_t(2, size=size)) if heavy else (lambda size: rng.normal(size=size))
    modules = [f"m{number}" for number in range(6)]
    b, a = ({name: draw(size) for name in modules} for size in ((300, 8), (8, 200)))
    adapters = [
        {name: LoraUpdate(b[name] + draw((300, 8)), a[name] + 0.1 * draw((8, 200)), 1.0) for name in modules}
        for _ in range(11)
    ]
    return [adapters[0], *adapters]


@vnni
@pytest.mark.parametrize("heavy", [False, True])
def test_cosines_are_close_to_those_of_float64_and_not_biased(heavy: bool) -> None:
    """Of 48 rows in all; the paper's adapters have 100 times as many, and a tenth of the error."""
    adapters = drawn(np.random.default_rng(3), heavy)
    modules, measure = list(adapters[0]), get_measure("cosine")
    exact, found = (
        product_weights(all_products(adapters, modules, precision=p), [(300, 200)] * 6, slice(None))
        for p in ("float64", "int8")
    )
    differences = measure.value(found) - measure.value(exact)
    within = 5e-3 if heavy else 1e-3
    assert 1e-6 < np.abs(differences).max() < within
    # Rounded to the nearest, the same rows twice had a product too large by 1e-4 (Student's t: .02).
    assert abs(differences[0]) < within / 2
    np.testing.assert_allclose(measure.null(found), measure.null(exact), rtol=within)
    np.testing.assert_array_equal(found.squared_a, exact.squared_a)


@vnni
def test_a_zero_update_has_no_direction() -> None:
    adapters = [
        {"m": LoraUpdate(np.zeros((4, 2)), np.ones((2, 3)), 1.0)},
        {"m": LoraUpdate(np.ones((4, 1)), np.ones((1, 3)), 1.0)},
    ]
    view = product_weights(all_products(adapters, ["m"], precision="int8"), [(4, 3)], slice(None))
    assert np.isnan(get_measure("cosine").value(view)).all()


def test_each_thread_uses_one_core_and_others_keep_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(in_parallel(lambda _: torch.get_num_threads(), ["a", "b"], start=use_one_core)) == [1, 1]
        assert list(in_parallel(lambda _: torch.get_num_threads(), ["a", "b"])) == [2, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(5)
    name = "model.layers.0.self_attn.q_proj"
    found = []
    for number in range(3):
        found.append(str(tmp_path / f"x{number}"))
        update = LoraUpdate(rng.normal(size=(60, 4)), rng.normal(size=(4, 80)), 2.0)
        write_adapter(
            Path(found[-1]), {name: update}, {"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "none"}
        )
    return found


@vnni
def test_the_command_writes_the_precision_and_its_error(folders: list[str], tmp_path: Path) -> None:
    manifests, pairs = {}, {}
    for precision in ("float32", "int8"):
        out = tmp_path / precision
        asked = ["--measures", "cosines", "--precision", precision, "--output-dir", str(out)]
        assert compare.main([*folders, *asked]) == 0
        manifests[precision] = json.loads((out / "adapters" / "analysis" / "manifest.json").read_text())
        pairs[precision] = pd.read_csv(out / "adapters" / "analysis" / "pairs.csv")
        assert manifests[precision]["precision"] == precision
        page = (out / "adapters" / "analysis" / "report.html").read_text()
        assert ("Cosines are of 8-bit products: of 3 pairs the largest" in page) == (precision == "int8")
    assert "cosine_error" not in manifests["float32"]
    differences = (pairs["int8"]["cosine"] - pairs["float32"]["cosine"]).abs()
    of_null = (pairs["int8"]["cosine_null"] - pairs["float32"]["cosine_null"]).abs()
    assert manifests["int8"]["cosine_error"] == {
        "of_pairs": 3,
        "largest": pytest.approx(differences.max(), abs=1e-8),
        "largest_of_null": pytest.approx(of_null.max(), abs=1e-8),
    }
    assert 0 < differences.max() < 0.01
    assert 0 < of_null.max() < 0.01


@vnni
def test_large_errors_are_told(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*folders, "--measures", "cosines", "--precision", "int8", "--output-dir"]
    said = []
    for tolerated in (1e-9, 1.0):
        monkeypatch.setattr("losslens.analysis.adapter_map._TOLERATED", tolerated)
        assert compare.main([*line, str(tmp_path / str(tolerated))]) == 0
        said.append("".join(capsys.readouterr()))
    told = r"--precision int8: of 3 pairs, cosines by up to \S+ and their nulls by up to \S+ differ from float32\n"
    assert re.search(told, said[0])
    assert "differ from float32" not in said[1]


def test_refusals(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    out = ["--output-dir", str(tmp_path / "out")]
    for arguments, said in (
        (
            ["--measures", "cosines", "--precision", "int8"],
            "--precision int8: this processor has no VNNI (fast 8-bit products); leave the option out",
        ),
        (["--precision", "int8"], "--precision needs --measures cosines"),
    ):
        assert compare.main([*folders, *arguments, *out]) == 2
        [told] = capsys.readouterr().err.splitlines()
        assert told == f"losslens compare: {said}"
