"""Figures and tables for papers: what is drawn, that it can be printed, and that LaTeX takes it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from benchmarks.made_analysis import make_analysis
from losslens.core.errors import InputError
from losslens.report.figures import accuracies, angles, connectivity, cosines, learning_rate, norms
from losslens.report.figures.canvas import COLUMN, PAGE, style
from losslens.report.figures.write import write_figures
from losslens.report.loss_comparison import LossComparison
from losslens.report.paper_tables import escaped, write_tables
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import colour
from tests.arm_tables import arm_tables
from tests.labels import faults
from tests.test_glance import AGAIN, DPO, RFT, SFT, pair, run, seeds
from tests.test_report import MANIFEST, arm, base_run

NAN = math.nan
RUNS = [base_run(), SFT, AGAIN, RFT, DPO]
SEEDS = {
    "u1": 0.9,
    "v1": 0.8,
    "angle_min_left": 15.0,
    "angle_min_left_null": 59.5,
    "angle_min_right": 2.0,
    "cka_last": 0.9,
}
PAIRS = [
    pair(SFT, AGAIN, 0.8, **SEEDS),
    pair(SFT, RFT, 0.7, **SEEDS, barrier_chord=0.001),
    pair(DPO, SFT, -0.1, **SEEDS),
]
ARMS = [
    arm("sft", "conventional", 1e-3, seeds=1, cosine_to_sft=0.8, norm=0.9),
    arm("rft", "conventional", 1e-3, seeds=1, cosine_to_sft=0.7, norm=1.0),
    arm("dpo", "conventional", 1e-4, seeds=1),
]
MATCHED = arm("dpo", "matched", 1e-3, norm=1.2, accuracy=0.29, collapsed=1)
LAYERS = [
    {**{run: p[run] for run in ("run_a", "run_b")}, "layer": layer, "angle_min_left": value + layer,
     "angle_min_left_null": 60}
    for p, value in zip(PAIRS, (10.0, 20.0, 40.0), strict=True)
    for layer in range(3)
]  # fmt: skip
CURVES = [
    {"run_a": p["run_a"], "run_b": p["run_b"], "alpha": alpha, "loss": first + alpha}
    for p, first in zip(PAIRS, (1.0, 2.0, 3.0), strict=True)
    for alpha in (0.0, 0.5, 1.0)
]
REPEATS = [
    {
        "arm": "sft-conventional", "method": "sft", "lr": "conv_100%", "rank": 8, "repeat_kind": "order", "pairs": 1,
        "cosine": 0.8, "u1": 0.9,
    }
]  # fmt: skip


def write(folder: Path, manifest: dict[str, Any] | None = None, **tables: list[dict[str, Any]]) -> AnalysisFolder:
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **(manifest or {})}), encoding="utf-8")
    made = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    made |= arm_tables(tables["runs"], tables["pairs"]) if "pairs" in tables else {}
    for name, rows in made.items():
        rows.to_csv(folder / f"{name}.csv", index=False)
    return AnalysisFolder(folder)


@pytest.fixture
def analysis(tmp_path: Path) -> AnalysisFolder:
    """SFT twice, RFT, DPO at a tenth."""
    modules = [
        {"run": row["run"], "layer": layer, "norm": norm, "singular_values": [norm, 0.0]}
        for row in RUNS[1:]
        for layer, norm in ((0, 3.0), (0, 4.0), (1, 1.0))
    ]
    pd.DataFrame(modules).to_parquet(tmp_path / "run_modules.parquet")
    return write(tmp_path, runs=RUNS, pairs=PAIRS, arms=ARMS, layers=LAYERS, connectivity=CURVES, repeats=REPEATS)


def drawn(module: Any, analysis: AnalysisFolder) -> Figure:
    with style():
        figure = module.draw(analysis, LossComparison(analysis))
        assert isinstance(figure, Figure)
        figure.canvas.draw()
    return figure


class TestFiles:
    def test_every_figure_as_pdf_and_png(self, analysis: AnalysisFolder) -> None:
        written = write_figures(analysis.path)
        names = ("cosines", "accuracies", "norms", "angles", "connectivity")
        assert written == [analysis.path / "figures" / f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
        for file in written[1::2]:
            with Image.open(file) as image:
                assert image.width == round(COLUMN * 300)
                assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        for file in written[::2]:
            content = file.read_bytes()
            assert content.startswith(b"%PDF")
            assert b"/FontFile2" in content  # TrueType
            assert b"/Type3" not in content
            assert str(analysis.path).encode() not in content

    def test_the_same_tables_give_the_same_bytes(self, analysis: AnalysisFolder) -> None:
        before = {file: file.read_bytes() for file in write_figures(analysis.path)}
        assert {file: file.read_bytes() for file in write_figures(analysis.path)} == before

    def test_what_was_there_before_is_gone(self, analysis: AnalysisFolder) -> None:
        write_figures(analysis.path)
        (analysis.path / "connectivity.csv").unlink()
        write(analysis.path, arms=[*ARMS, MATCHED])
        names = {file.stem for file in write_figures(analysis.path)}
        assert names == {file.stem for file in (analysis.path / "figures").iterdir()}
        assert names == {"cosines", "accuracies", "norms", "angles", "learning_rate"}

    def test_an_analysis_with_nothing_to_draw(self, tmp_path: Path) -> None:
        write(tmp_path, runs=[SFT])
        assert write_figures(tmp_path) == []
        with pytest.raises(InputError, match=r"manifest\.json"):
            write_figures(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()

    def test_neither_pyplot_nor_the_settings_of_the_process(self, analysis: AnalysisFolder) -> None:
        before = dict(matplotlib.rcParams)
        write_figures(analysis.path)
        assert dict(matplotlib.rcParams) == before
        code = (
            "import sys; from pathlib import Path; from losslens.report.figures.write import write_figures; "
            f"write_figures(Path({str(analysis.path)!r})); sys.exit('matplotlib.pyplot' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_the_page_does_not_load_what_draws_for_papers(self) -> None:
        code = "import sys, losslens.report.page; sys.exit('matplotlib' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("module", [cosines, accuracies, norms, angles, connectivity, learning_rate])
def test_a_column_wide_and_readable(module: Any, analysis: AnalysisFolder) -> None:
    write(analysis.path, arms=[*ARMS, MATCHED])
    figure = drawn(module, analysis)
    assert figure.get_figwidth() == COLUMN
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(texts) > 5
    assert min(text.get_fontsize() for text in texts) >= 7
    box = figure.get_tightbbox(figure.canvas.get_renderer())  # inches
    assert box.x0 >= -0.01  # nothing is cut off
    assert box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01


class TestContent:
    def test_cosines(self, analysis: AnalysisFolder) -> None:
        figure = drawn(cosines, analysis)
        texts = {tuple(map(round, text.get_position())): text.get_text() for text in figure.axes[0].texts}
        assert texts == {
            (0, 0): ".800", (1, 0): ".700", (2, 0): "−.100", (0, 1): ".700", (1, 1): "–", (2, 1): "–", (0, 2): "−.100",
            (1, 2): "–", (2, 2): "–",
        }  # fmt: skip
        assert "< .020 (95%)" in figure.axes[0].get_xlabel()

    def test_many_losses_take_the_page(self, tmp_path: Path) -> None:
        runs = [run("dpo", arm=f"dpo-matched method.beta={n}", run=f"dpo-{n}") for n in range(9)]
        analysis = write(tmp_path, runs=runs, pairs=[pair(runs[0], runs[1], 0.5)])
        assert drawn(cosines, analysis).get_figwidth() == PAGE

    def test_accuracies(self, analysis: AnalysisFolder) -> None:
        axes = drawn(accuracies, analysis).axes[0]
        points = [line for line in axes.lines if line.get_marker() in ("o", "D", "p")]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(0.54, 0), (0.54, 1), (0.54, 2)]
        assert [to_hex(line.get_color()) for line in points] == [colour(m) for m in ("sft", "rft", "dpo")]
        assert [line.get_marker() for line in points] == ["o", "D", "p"]  # every loss has its own
        assert [label.get_text() for label in axes.get_yticklabels()] == ["SFT", "RFT", "DPO"]
        assert [text.get_text() for text in axes.texts] == ["base"]

    def test_norms(self, analysis: AnalysisFolder) -> None:
        """Norms 3 and 4 in layer 0: 5. The singular values are 3, 4 and 1 on average: 8/3; zeros are no dots."""
        by_layer, by_number = drawn(norms, analysis).axes
        assert np.asarray(by_layer.lines[0].get_ydata()).tolist() == pytest.approx([5, 1])
        assert np.asarray(by_number.lines[0].get_ydata()).tolist() == pytest.approx([8 / 3, 0])

    def test_angles(self, analysis: AnalysisFolder) -> None:
        rft, dpo, own, null = drawn(angles, analysis).axes[0].lines
        assert [list(line.get_ydata()) for line in (rft, dpo, own, null)] == [
            [20, 21, 22], [40, 41, 42], [10, 11, 12], [60, 60, 60],
        ]  # fmt: skip

    def test_connectivity_goes_out_from_the_reference(self, analysis: AnalysisFolder) -> None:
        """The pair of DPO is (DPO, SFT): from SFT on its losses are those backwards."""
        rft, dpo, own = drawn(connectivity, analysis).axes[0].lines
        assert [list(line.get_ydata()) for line in (rft, dpo, own)] == [[2, 2.5, 3], [4, 3.5, 3], [1, 1.5, 2]]
        assert list(dpo.get_xdata()) == [0, 0.5, 1]
        *_, own = drawn(connectivity, write(analysis.path, manifest={"reference": AGAIN["run"]})).axes[0].lines
        assert list(own.get_ydata()) == [2, 1.5, 1]

    def test_the_learning_rates(self, analysis: AnalysisFolder) -> None:
        assert learning_rate.draw(analysis, LossComparison(analysis)) is None
        write(analysis.path, arms=[*ARMS, MATCHED])
        directions, accuracy = drawn(learning_rate, AnalysisFolder(analysis.path)).axes
        assert not directions.findobj(PathCollection)
        points = {tuple(line.get_xydata()[0]) for line in accuracy.lines if line.get_marker() in ("o", "D", "p")}
        assert points == {(0.9, 0.54), (1.0, 0.54), (0.25, 0.54), (1.2, 0.29)}


class TestTables:
    def test_markdown(self, analysis: AnalysisFolder) -> None:
        markdown, latex = write_tables(analysis.path)
        assert (markdown.name, latex.name) == ("tables.md", "tables.tex")
        lines = markdown.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "# a"
        assert "| base | – | – | – | – | – | 57.6 | 55.6–64.2 | – | – |" in lines
        # Of a loss that was trained once the p of its arm, the only one there is.
        assert "| RFT | 1e-3 | 0 | 0 | 0.951 | 6.3 | 60.0 | 55.6–64.2 | +2.4 | 0.310 |" in lines
        assert "| SFT (repeat) | 0.800 | 0.020 | 15.0° | 59.5° | 2.0° | – | 0.9000 |" in lines
        assert "| RFT | 0.700 | 0.020 | 15.0° | 59.5° | 2.0° | 0.0010 | 0.9000 |" in lines
        assert "| SFT | conv\\_100% | order | 1 | 0.800 | 0.900 |" in lines
        assert sum(line.startswith("| ---") for line in lines) == 3  # no comparison of learning rates

    def test_value_ceiling_and_ratio_stand_together(self, tmp_path: Path) -> None:
        made = seeds(0.6, 0.8, 0.8)
        write(tmp_path, {"reference": made["runs"][0]["run"]}, **made)
        text = write_tables(tmp_path)[0].read_text(encoding="utf-8")
        assert "| Loss | cos | ceiling | ratio | null |" in text
        assert "| RFT | 0.600 | 0.800 | 0.75 \\[0.7" in text
        assert "Each loss against SFT, over runs at different seeds" in text

    def test_of_adapters_made_elsewhere_no_column_and_no_word_of_what_is_not_known(self, tmp_path: Path) -> None:
        theirs = [
            {"run": name, "arm": name, "method": "adapter", "norm": 1.0, "effective_rank": 6.0} for name in ("a", "b")
        ]
        pairs = [{"run_a": "a", "run_b": "b", "cosine": 0.5, "cosine_null": 0.02}]
        write(tmp_path, {"reference": "a"}, runs=theirs, pairs=pairs)
        text = write_tables(tmp_path)[0].read_text(encoding="utf-8")
        assert "| Loss | ‖ΔW‖ | Eff. rank |" in text
        assert "| Loss | cos | null |" in text
        assert not re.search("seeds|ceiling|initial|Wilson|CKA", text, re.IGNORECASE)

    def test_the_comparison_of_learning_rates(self, analysis: AnalysisFolder) -> None:
        write(analysis.path, arms=[*ARMS, MATCHED])
        lines = write_tables(analysis.path)[0].read_text(encoding="utf-8").splitlines()
        assert lines[-1] == (
            "| DPO | 1e-4 | 1 | 0.250 ± 0.013 | 6.5 ± 0.2 | −0.115 | 0.904 | 54.0 ± 1.5 | −3.6 | 0.310 |"
        )
        assert any(line.startswith("| DPO | 1e-3 | 4 (1 collapsed) | 1.200 ± 0.013 |") for line in lines)

    @pytest.mark.parametrize(
        ("pairing", "said"),
        [("same init", ", over runs at different seeds;"), ("same seeds", ", over runs of the same seed;"), ("", ";")],
    )
    def test_the_comparison_says_of_which_runs_it_is(self, analysis: AnalysisFolder, pairing: str, said: str) -> None:
        rows = [row | {"pairing": "same init" if row["method"] == "sft" else pairing} for row in [*ARMS, MATCHED]]
        write(analysis.path, arms=rows)
        text = write_tables(analysis.path)[0].read_text(encoding="utf-8")
        assert f"cos SFT: cosine to SFT{said} ceiling" in text

    def test_against_the_reference_by_two_kinds_of_pairs(self, tmp_path: Path) -> None:
        sft, rft, dft = run("sft"), run("rft", seed=1), run("dft")
        write(tmp_path, {"reference": sft["run"]}, runs=[sft, rft, dft], pairs=[pair(sft, rft, 0.5), pair(sft, dft, 1)])
        text = write_tables(tmp_path)[0].read_text(encoding="utf-8")
        assert "Each loss against SFT, over runs at different seeds where there are any: cosine" in text

    def test_repeats_on_other_rollouts_are_named(self, analysis: AnalysisFolder) -> None:
        rows = [{"arm": "sft", "method": "sft", "lr": "l", "repeat_kind": kind, "pairs": 1, "cosine": 0.5}
                for kind in ("order", "data")]  # fmt: skip
        write(analysis.path, repeats=rows)
        text = write_tables(analysis.path)[0].read_text(encoding="utf-8")
        assert "Repeats: the same loss trained again in a different data order, or on different rollouts." in text

    def test_escaped(self) -> None:
        assert escaped("50%_a & {b}#$") == r"50\%\_a \& \{b\}\#\$"
        assert (
            escaped(r"\input{/etc/passwd}^~")
            == r"\textbackslash{}input\{/etc/passwd\}\textasciicircum{}\textasciitilde{}"
        )
        assert escaped("‖ΔW‖ −0.1 ± 2° …") == r"$\|\Delta W\|$ $-$0.1 $\pm$ 2$^\circ$ \ldots{}"
        assert escaped("é 猫\n% x\x07") == r"e ? \% x?"

    def test_a_long_table_is_several(self, tmp_path: Path) -> None:
        runs = [run("sft", seed=seed) for seed in range(100)]
        latex = write_tables(write(tmp_path, runs=runs).path)[1].read_text(encoding="utf-8")
        assert latex.count(r"\begin{tabular}") == 3
        assert latex.count("SFT & 1e-3") == 100
        assert re.findall(r"\\label\{(.*?)\}", latex) == ["tab:runs", "tab:runs2", "tab:runs3"]

    @pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
    def test_latex_takes_it(self, analysis: AnalysisFolder, tmp_path: Path) -> None:
        evil = {
            **run("sft", seed=3),
            "run": "x_%&$#{}~^\\ 猫",
            "method": "ad_ap%ter",
            "benchmark": "gsm_8k%",
            "learning_rate": NAN,
        }
        write(
            analysis.path,
            runs=[*RUNS, {**evil, "arm": "x"}],
            arms=[*ARMS, MATCHED],
            manifest={"sweeps": ["a_%\nb"]},
        )
        write_tables(analysis.path)
        (tmp_path / "paper.tex").write_text(
            r"\documentclass{article}\usepackage[margin=1in]{geometry}\usepackage{booktabs}\begin{document}"
            r"\input{tables}\end{document}",
            encoding="utf-8",
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
        assert outcome.returncode == 0, outcome.stdout[-2000:]
        assert "Overfull" not in outcome.stdout
        assert (tmp_path / "paper.pdf").exists()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> AnalysisFolder:
    """Twenty losses, with names as long as one may be, at several rates."""
    folder = tmp_path_factory.mktemp("many")
    own = [f"a_name_of_sixty_letters_for_a_method_that_somebody_wrote_own{number}" for number in range(2)]
    settings = [f"method.bias={bias}" for bias in (0.0, 0.1)]
    losses = ["sft", "grpo", "dpo", *own]
    make_analysis(folder, losses, rates=(1e-3, 1e-4), settings=settings, layers=2, top=3, rank=4, steps=2)
    return AnalysisFolder(folder)


@pytest.mark.parametrize("module", [cosines, accuracies, norms, angles, connectivity, learning_rate])
def test_no_label_lies_on_another_or_is_cut_off(module: Any, many: AnalysisFolder) -> None:
    assert faults(drawn(module, many)) == []
