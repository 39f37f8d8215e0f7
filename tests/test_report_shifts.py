"""Sections of the report on where weights and hidden states moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from losslens.core.files import write_json
from losslens.report.sections import activation_shifts, weight_profile
from losslens.tables.analysis_folder import AnalysisFolder
from tests.test_report import run

pytestmark = pytest.mark.fast
RUNS = [run("sft-s0", "sft", seed=0), run("sft-s1", "sft", seed=1), run("dpo-s0", "dpo"), run("dpo-s1", "dpo", seed=1)]
ARMS = ("sft-conventional", "dpo-conventional")


def folder(path: Path, **tables: list[dict[str, Any]]) -> AnalysisFolder:
    write_json(path / "manifest.json", {"reference": "sft-s0"})
    for name, rows in tables.items():
        table = pd.DataFrame(rows)
        if name == "run_modules":
            table.to_parquet(path / f"{name}.parquet", index=False)
        else:
            table.to_csv(path / f"{name}.csv", index=False)
    return AnalysisFolder(path)


def modules(name: str, *norms: float) -> list[dict[str, Any]]:
    names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
    return [
        {"run": name, "module": module, "layer": int(module[7]), "norm": norm}
        for module, norm in zip(names, norms, strict=True)
    ]


class TestProfile:
    def test_shares_are_means_over_runs(self, tmp_path: Path) -> None:
        """SFT: 1 : 9 of squares and 1 : 0; q has .1 and 1 of them, .55 in the mean. A zero update has no profile."""
        rows = [*modules("sft-s0", 1, 0, 0, 3), *modules("sft-s1", 2, 0, 0, 0), *modules("dpo-s0", 1, 1, 1, 1)]
        found = weight_profile.section(folder(tmp_path, runs=RUNS, run_modules=[*rows, *modules("dpo-s1", 0, 0, 0, 0)]))
        assert found is not None
        bars, heat = (figure.plot for figure in found.figures)  # type: ignore[union-attr]
        assert list(bars.layout.yaxis.ticktext) == ["SFT", "DPO"]
        assert {bar.name: list(bar.x) for bar in bars.data} == {
            "q_proj": pytest.approx([0.55, 0.5]), "v_proj": pytest.approx([0.45, 0.5]),
        }  # fmt: skip
        assert list(heat.data[0].x) == ["0", "1"]
        assert heat.data[0].z.tolist() == [pytest.approx([0.55, 0.45]), pytest.approx([0.5, 0.5])]

    def test_one_module_has_no_profile(self, tmp_path: Path) -> None:
        assert weight_profile.section(folder(tmp_path, runs=RUNS)) is None
        one = [modules("sft-s0", 1, 1, 1, 1)[0]]
        assert weight_profile.section(folder(tmp_path, runs=RUNS, run_modules=one)) is None


class TestShifts:
    def shifts(self, a: str, b: str, cosine: float, null: float = 0.2) -> list[dict[str, Any]]:
        return [
            {"run_a": a, "run_b": b, "position": position, "layer": layer, "shift_cosine": cosine / (1 + layer),
             "shift_cosine_null": null}
            for position in ("prompt", "completion") for layer in (0, 1)
        ]  # fmt: skip

    def test_of_each_loss_against_the_reference(self, tmp_path: Path) -> None:
        """Means over the pairs at different seeds; pairs that share their seeds are not among them."""
        between = {"arm_a": ARMS[0], "arm_b": ARMS[1]}
        pairs = [
            {"run_a": a, "run_b": b, **between, "pairing": kind, "cosine": 0.1}
            for a, b, kind in (
                ("sft-s0", "dpo-s1", "same init"), ("sft-s1", "dpo-s0", "same init"), ("sft-s0", "dpo-s0", "same seeds")
            )
        ]  # fmt: skip
        tables = {
            "runs": RUNS, "pairs": pairs, "arm_pairs": [{**between, "pairing": "same init", "cosine": 0.1, "pairs": 2}],
            "shifts": [
                *self.shifts("sft-s0", "dpo-s1", 0.4), *self.shifts("sft-s1", "dpo-s0", 0.6, 0.3),
                *self.shifts("sft-s0", "dpo-s0", 0.9),
            ],
        }  # fmt: skip
        found = activation_shifts.section(folder(tmp_path, **tables))
        assert found is not None
        assert [figure.title for figure in found.figures] == ["Last token of the prompt", "Whole completion"]
        null, line = found.figures[0].plot.data  # type: ignore[union-attr]
        assert list(null.y) == pytest.approx([0.25, 0.25, -0.25, -0.25])
        assert (line.meta, list(line.x), list(line.y)) == (ARMS[1], [0, 1], pytest.approx([0.5, 0.25]))
        assert [table.file for table in found.tables] == ["shifts.csv"]

    def test_nothing_to_compare(self, tmp_path: Path) -> None:
        assert activation_shifts.section(folder(tmp_path, runs=RUNS)) is None
        own = {"runs": RUNS[:2], "shifts": self.shifts("sft-s0", "sft-s1", 0.9)}
        assert activation_shifts.section(folder(tmp_path, **own)) is None
