"""The report: one page from the tables of an analysis, whatever they hold."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import losslens
from losslens.core.errors import InputError
from losslens.report.citation import ARXIV, AUTHORS, STUDY, TITLE
from losslens.report.page import write_report
from losslens.tables.format import difference, number, p_value, percent, rate, whole
from losslens.tables.style import METHODS, colour
from tests.conftest import ROOT

MANIFEST: dict[str, Any] = {
    "sweeps": ["a"], "bases": ["base-tiny-1"], "benchmark": "arithmetic",
    "settings": {"num_directions": 10, "checkpoint": "end"},
    "adapters": {"sft-conventional-s0": "c0ffee"}, "left_out": {}, "versions": {"losslens": "0.1.0"},
    "code": {"commit": "0123456789abcdef", "dirty_diff": "secret"}, "machine": {"host": "mine", "cpus": 2},
}  # fmt: skip


class Page(HTMLParser):
    """What a browser finds in a page: tags with attributes, the rows of every table, scripts, notes, section ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside = ""
        self._section: str | None = None
        self._rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style", "caption") else self._inside
        if tag == "section":
            self._section = dict(attrs)["id"]
        if tag == "script":
            self.scripts.append(({**dict(attrs), "section": self._section}, ""))
        elif tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside
        if tag == "table":
            self._rows[:] = [[" ".join(cell.split()) for cell in row] for row in self._rows]
            self._rows = []

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside == "caption":
            self.tables[data] = self._rows
        elif self._inside != "style":
            self.text += data
            if self._rows and self._rows[-1]:
                self._rows[-1][-1] += data

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Those of the sections; what is at a glance is in tests/test_glance.py."""
        return [plot for section, plot in self._plots if section != "glance"]

    @property
    def glance(self) -> list[dict[str, Any]]:
        return [plot for section, plot in self._plots if section == "glance"]

    @property
    def _plots(self) -> list[tuple[str | None, dict[str, Any]]]:
        return [(a["section"], json.loads(script)) for a, script in self.scripts if a.get("type")]


def run(name: str, method: str, **columns: Any) -> dict[str, Any]:
    row = {
        "run": name, "arm": f"{method}-{columns.get('lr', 'conventional')}", "method": method, "lr": "conventional",
        "learning_rate": 1e-3, "seed": 0, "init_seed": 0,
        "diverged": "", "norm": 0.95123, "effective_rank": 6.26, "benchmark": "arithmetic", "accuracy": 0.6, "n": 500,
        "ci_low": 0.5564, "ci_high": 0.642, "base_diff": 0.024, "base_diff_low": -0.01, "base_diff_high": 0.05,
    }  # fmt: skip
    return {**row, **columns}


def base_run() -> dict[str, Any]:
    unknown = dict.fromkeys(("learning_rate", "seed", "init_seed", "norm", "effective_rank", "base_diff"))
    return run("base-tiny-1", "base", lr="", arm="", accuracy=0.576, **unknown)


def arm(method: str, lr: str, learning_rate: float, **columns: Any) -> dict[str, Any]:
    row = {
        "arm": f"{method}-{lr}", "method": method, "lr": lr, "learning_rate": learning_rate, "settings": "",
        "alias_of": "", "seeds": 4, "diverged": 0, "collapsed": 0, "norm": 0.25, "norm_std": 0.0125,
        "effective_rank": 6.5, "effective_rank_std": 0.25, "stable_rank": 2.0, "cosine_to_sft": -0.1154,
        "cosine_to_sft_min": -0.1365, "cosine_to_sft_max": -0.0943, "cosine_to_sft_ceiling": 0.9041,
        "cosine_to_sft_relative": -0.1276, "cosine_to_sft_low": -0.16, "cosine_to_sft_high": -0.07,
        "cosine_to_sft_verdict": "opposed", "cosine_to_sft_null": 0.0231, "cosine_repeat": 0.9921,
        "sft": "sft-conventional", "angle_min_left_to_sft": 40.81, "angle_min_left_to_sft_min": 40.29,
        "angle_min_left_to_sft_max": 41.33, "angle_min_left_to_sft_repeat": 14.62,
        "angle_min_left_to_sft_null": 59.51, "barrier_chord_to_sft": 0.0, "barrier_chord_to_sft_min": 0.0,
        "barrier_chord_to_sft_max": 0.0, "barrier_chord_to_sft_repeat": 0.0, "cka_last_to_sft": 0.99761,
        "cka_last_to_sft_ceiling": 0.99962, "benchmark": "arithmetic", "accuracy": 0.54, "accuracy_std": 0.015,
        "accuracy_min": 0.52, "accuracy_max": 0.56, "n": 500, "ci_low": 0.496, "ci_high": 0.583, "base_diff": -0.036,
        "base_diff_low": -0.07, "base_diff_high": 0.004, "base_p": 0.06, "base_p_holm": 0.31,
        "base_verdict": "cannot say", "base_equivalence_margin": 0.05, "base_equivalent_within": 0.066,
    }  # fmt: skip
    return {**row, **columns}


RUNS = [base_run(), run("sft-conventional-s0", "sft"), run("dpo-matched-s0", "dpo", lr="matched", accuracy=0.45)]
ARMS = [
    arm("sft", "conventional", 1e-3, cosine_to_sft=0.8141, cosine_repeat=0.8141, cosine_to_sft_ceiling=np.nan),
    arm("dpo", "conventional", 1e-4),
    arm("dpo", "matched", 1e-3, diverged=1, seeds=3, collapsed=2),
    arm("sft", "matched", 1e-3, cosine_to_sft=0.8141, alias_of="sft-conventional"),
]
STEPS = [
    {
        "run": f"sft-conventional-s{seed}", "method": "sft", "lr": "conventional", "learning_rate": 1e-3,
        "settings": "", "seed": seed, "init_seed": seed, "diverged": False, "step": step, "norm": (step + seed) / 100,
        "cosine_to_end": step / 60, "cosine_to_sft": np.nan,
    }
    for seed in (0, 1)
    for step in (30, 60)
]  # fmt: skip
STEPPED = [run(f"sft-conventional-s{seed}", "sft", seed=seed) for seed in (0, 1)]


@pytest.fixture
def report(tmp_path: Path):
    """Writes tables and a manifest, and reads the page that comes of them."""

    def make(manifest: dict[str, Any] | None = None, **tables: list[dict[str, Any]]) -> Page:
        (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **(manifest or {})}), encoding="utf-8")
        for name, rows in tables.items():
            pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
        written = write_report(tmp_path)
        assert written == tmp_path / "report.html"
        return Page(written.read_text(encoding="utf-8"))

    return make


def test_a_whole_analysis(report) -> None:
    page = report(runs=RUNS, arms=ARMS, trajectories=STEPS, manifest={"left_out": {"x": "it was not completed"}})
    assert page.sections == ["glance", "learning-rate", "runs", "trajectories", "words", "left-out", "provenance"]
    assert page.tables["What was not compared, and why"][1] == ["x", "it was not completed"]
    assert "0123456789ab, with uncommitted changes" in page.text
    assert "secret" not in page.text
    assert "mine" not in page.text
    assert ["settings.num_directions", "10"] in page.tables["Settings and versions"]


def test_a_section_needs_its_table(report, tmp_path: Path) -> None:
    assert report().sections == ["provenance"]
    assert report(runs=RUNS).sections == ["glance", "runs", "words", "provenance"]
    for name in ("arms", "trajectories"):
        (tmp_path / f"{name}.csv").write_text("arm,method,run\n")
    assert report(runs=RUNS).sections == ["glance", "runs", "words", "provenance"]
    (tmp_path / "arms.csv").write_text("")
    assert report(runs=RUNS).sections == ["glance", "runs", "words", "provenance"]


def test_what_is_no_table_is_named(report, tmp_path: Path) -> None:
    for content in (b"a,b\n1\n1,2,3\n", b"\xff\xfe\xfa", b"run,seed\nx,many\n"):
        (tmp_path / "runs.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"runs\.csv: not a table"):
            report()


def test_an_analysis_that_was_cut_off_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_that_were_not_scored_and_adapters_of_which_little_is_known(report) -> None:
    known = ("run", "arm", "method", "norm", "effective_rank")
    page = report(runs=[{name: run("theirs", "adapter", arm="theirs")[name] for name in known}])
    assert page.tables["Every run and the base"][1][:2] == ["0 theirs", "adapter"]
    assert page.figures == []


def test_arms_of_which_only_the_weights_were_measured(report) -> None:
    known = ("arm", "method", "lr", "learning_rate", "settings", "alias_of", "seeds", "norm", "cosine_to_sft")
    page = report(arms=[{name: row[name] for name in known} for row in ARMS])
    heading, *_ = page.tables["One row per arm: mean ± standard deviation over seeds"]
    assert heading == ["arm", "learning rate", "runs", "‖ΔW‖", "cosine to SFT"]
    assert len(page.figures) == 1
    assert "There are no ceilings" in page.text


EVIL = "<img src=x onerror=alert(1)>"


def test_what_is_on_the_disk_is_text(report) -> None:
    page = report(
        runs=[
            base_run(),
            run(EVIL, EVIL, lr=EVIL, arm=EVIL, benchmark=EVIL, diverged=EVIL),
            run("lost", "sft", diverged=EVIL, benchmark="", accuracy=None),
        ],
        arms=[arm(EVIL, EVIL, 1e-3, settings=f"{EVIL}</script>", base_verdict=EVIL, arm=EVIL)],
        trajectories=[{**STEPS[0], "run": EVIL, "method": EVIL, "lr": EVIL, "settings": EVIL}],
        manifest={"sweeps": [EVIL], "bases": [EVIL], "left_out": {EVIL: EVIL}, "settings": {EVIL: EVIL}},
    )  # fmt: skip
    assert page.text.count(EVIL) > 10
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.tags)
    # Nor does plotly, which knows some tags, get any.
    shown = [text for plot in page.figures for text in _texts(plot) if "img" in text and text != EVIL]
    assert shown
    assert all("<img" not in text and "&lt;img" in text for text in shown)


def _texts(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [text for name, inner in value.items() for text in _texts(inner, name)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner, key)]
    # `meta` is compared with a button's name, and never shown.
    return [value] if isinstance(value, str) and key != "meta" else []


def test_nothing_is_loaded_from_anywhere(report) -> None:
    page = report(runs=RUNS, arms=ARMS, trajectories=STEPS)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed", "form")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:text/csv;"))
        assert "url(" not in (attributes.get("style") or "")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    scripts = [script for attributes, script in page.scripts if not attributes.get("type")]
    assert len(scripts) == 2
    assert [len(script) > 1_000_000 for script in scripts] == [True, False]
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "http" not in scripts[1]


def test_the_style_loads_nothing(report, tmp_path: Path) -> None:
    report()
    style = re.search("<style>(.*?)</style>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style
    assert not re.search(r"@import|url\(|http", style[1])


def test_names_of_one_learning_rate_are_one_arm(report) -> None:
    page = report(runs=RUNS, arms=ARMS)
    _, *rows = page.tables["One row per arm: mean ± standard deviation over seeds"]
    assert [row[:2] for row in rows] == [
        ["SFT conventional = matched", "1e-3"],
        ["DPO matched", "1e-3"],
        ["DPO conventional", "1e-4"],
    ]
    accuracy = next(plot for plot in page.figures if plot["layout"]["xaxis"]["title"]["text"] == "accuracy")
    assert accuracy["layout"]["yaxis"]["ticktext"] == ["SFT 1e-3", "DPO 1e-3 ✕", "DPO 1e-4"]


def test_a_row_whose_twin_is_missing_stays(report) -> None:
    page = report(arms=ARMS[1:])
    _, *rows = page.tables["One row per arm: mean ± standard deviation over seeds"]
    assert [row[0] for row in rows] == ["SFT matched", "DPO matched", "DPO conventional"]


def test_an_arm_says_which_of_its_runs_were_lost(report) -> None:
    page = report(arms=[*ARMS, arm("dft", "matched", 1e-3, collapsed=1, settings="method.beta=0.3")])
    assert "DPO, matched: 1 of 4 runs diverged and is not included in the averages." in page.text
    assert "DPO, matched: 2 of 4 runs collapsed and are included in the averages." in page.text
    assert "DFT, matched, method.beta=0.3: 1 of 4 runs collapsed and is included in the averages." in page.text
    assert page.text.count("of 4 runs") == 3
    assert "average of 3 to 4 runs" in page.text


def test_an_arm_without_a_run_is_a_row_without_numbers(report) -> None:
    lost = {name: np.nan for name, value in ARMS[1].items() if isinstance(value, float) and name != "learning_rate"}
    page = report(arms=[ARMS[0], {**ARMS[1], **lost, "seeds": 0, "diverged": 4, "benchmark": "", "base_verdict": ""}])
    _, _, row = page.tables["One row per arm: mean ± standard deviation over seeds"]
    assert row[2:5] == ["0 ✕ 4 diverged", "–", "–"]
    assert "4 of 4 runs diverged and are not included in the averages." in page.text


def test_a_run_that_diverged_is_shown_as_such(report) -> None:
    scores = dict.fromkeys(("norm", "effective_rank", "accuracy", "n", "ci_low", "ci_high", "base_diff"))
    lost = run("dpo-matched-s1", "dpo", seed=1, diverged="diverged: loss is nan at step 5", benchmark="", **scores)
    collapsed = run("dpo-matched-s2", "dpo", seed=2, diverged="accuracy fell to 1.0%", accuracy=0.01)
    page = report(runs=[*RUNS, lost, collapsed])
    _, *rows = page.tables["Every run and the base"]
    assert [row[0] for row in rows][3:] == [
        "3 dpo-matched-s1 ✕ diverged: loss is nan at step 5",
        "4 dpo-matched-s2 ✕ accuracy fell to 1.0%",
    ]
    assert "4, of which 2 diverged or collapsed" in page.text
    assert "Run 3 (dpo-matched-s1): diverged: loss is nan at step 5." in page.text
    (plot,) = page.figures
    assert plot["layout"]["yaxis"]["ticktext"][2:] == ["✕ 3 DPO 1e-3 s1", "✕ 4 DPO 1e-3 s2"]
    assert [note["text"] for note in plot["layout"]["annotations"]] == ["✕ diverged: loss is nan at step 5"]


def test_the_numbers_are_those_of_the_tables(report) -> None:
    page = report(runs=RUNS, arms=ARMS, trajectories=STEPS)
    assert page.tables["Every run and the base"][2] == [
        "1 sft-conventional-s0", "SFT conventional", "1e-3", "0", "0", "0.951", "6.3", "60.0%", "55.6% … 64.2%",
        "+2.4% −1.0% … +5.0%",
    ]  # fmt: skip
    assert page.tables["One row per arm: mean ± standard deviation over seeds"][3] == [
        "DPO conventional", "1e-4", "4", "0.250 ± 0.013", "6.5 ± 0.2", "2.0",
        "−0.115 ceiling 0.904, ratio −0.13 [−0.16, −0.07] opposed null 0.023", "40.8° repeat 14.6° null 59.5°",
        "0.0000 repeat 0.0000", "0.9976 ceiling 0.9996", "54.0% ± 1.5% 95% 49.6% … 58.3% runs 52.0% … 56.0%",
        "−3.6% cannot say −7.0% … +0.4% p (Holm) 0.310 within ±6.6%",
    ]  # fmt: skip
    direction, accuracy, angle, *_ = page.figures
    at = {trace["hovertext"][0].split("<")[1]: trace for trace in direction["data"] if "hovertext" in trace}
    dpo = at["b>DPO 1e-4"]
    assert (dpo["x"], dpo["y"], dpo["error_y"]["array"]) == ([0.25], [-0.1154], pytest.approx([0.0211], abs=1e-4))
    assert direction["layout"]["xaxis"]["type"] == "log"
    lines = [shape["y0"] for shape in direction["layout"]["shapes"]]
    assert lines == [0, 0.8141]
    assert accuracy["layout"]["shapes"][0]["x0"] == 0.576
    assert [trace["x"] for trace in angle["data"]][-2:] == [[14.62] * 3, [59.51] * 3]


def test_accuracy_and_forgetting_are_drawn_against_kl(report) -> None:
    """Only for arms that have both numbers; the base stands at a KL of 0."""
    measured = arm("dpo", "conventional", 1e-4, kl=0.004, kl_std=0.001, off_task_kl=0.02)
    page = report(runs=RUNS, arms=[measured, arm("sft", "conventional", 1e-3, kl=0.003)])
    plots = [p for p in page.figures if p["layout"]["xaxis"]["title"]["text"].startswith("KL to the base (nats")]
    gained, forgotten = (p for p in plots if "text" in p["layout"]["yaxis"].get("title", {}))
    assert [(t["x"], t["y"]) for t in gained["data"]] == [([0], [0.576]), ([0.003], [0.54]), ([0.004], [0.54])]
    assert [(t["x"], t["y"]) for t in forgotten["data"]] == [([0], [0.0]), ([0.004], [0.02])]
    assert gained["data"][2]["error_x"]["array"] == [pytest.approx(0.001)]


def test_barriers_of_0_are_shown_at_the_left_of_a_range_that_has_some(report) -> None:
    def shown(*heights: float) -> dict:
        table = [arm("sft", "conventional", 1e-3), arm("dpo", "conventional", 1e-4)]
        rows = [{**row, "barrier_chord_to_sft": height} for row, height in zip(table, heights, strict=True)]
        figures = report(runs=RUNS, arms=rows).figures
        return next(
            plot["layout"]["xaxis"] for plot in figures if "barrier" in plot["layout"]["xaxis"]["title"]["text"]
        )

    assert shown(0.0, 0.0)["range"] == [-0.0005, 0.0105]
    assert "range" not in shown(0.0, 0.2)


def test_trajectories_are_averaged_over_seeds(report) -> None:
    page = report(runs=STEPPED, trajectories=STEPS)
    *_, norm, to_end = page.figures  # cosine_to_sft is defined nowhere
    band, line = norm["data"]
    assert (line["x"], line["y"]) == ([30, 60], pytest.approx([0.305, 0.605]))
    assert band["y"] == pytest.approx([0.31, 0.61, 0.6, 0.3])
    assert norm["layout"]["yaxis"]["type"] == "log"
    assert to_end["data"][1]["y"] == [0.5, 1.0]


def test_a_trajectory_that_diverges_is_a_line_of_its_own(report) -> None:
    lost = [{**step, "run": "sft-conventional-s2", "seed": 2, "norm": 5.0, "diverged": True} for step in STEPS[:1]]
    page = report(runs=[*STEPPED, run("sft-conventional-s2", "sft")], trajectories=[*STEPS, *lost])
    *_, norm, _ = page.figures
    lines = [trace for trace in norm["data"] if trace["mode"] == "lines+markers"]
    assert [line["y"] for line in lines] == [pytest.approx([0.305, 0.605]), [5.0]]
    [cross] = [trace for trace in norm["data"] if trace["mode"] == "markers"]
    assert (cross["x"], cross["y"], cross["marker"]["symbol"]) == ([30], [5.0], "x")
    assert "1 run diverged and has its own line, marked ✕." in page.text


def test_the_tables_that_no_section_shows_can_be_had_too(report, tmp_path: Path) -> None:
    (tmp_path / "layers.csv").write_text("run_a,layer\n" + "sft,1\n" * 100_000)
    pd.DataFrame({"run_a": ["sft"], "run_b": ["dpo"], "module": ["q"]}).to_parquet(tmp_path / "modules.parquet")
    page = report(runs=RUNS, mds=[{"run": "sft", "x": 1, "y": 2}], repeats=[{"method": "sft"}][:0])
    links = {a["download"]: a["href"] or "" for tag, a in page.tags if tag == "a" and "download" in a}
    assert list(links) == ["runs.csv", "layers.csv.gz", "mds.csv"]
    packed = base64.b64decode(links["layers.csv.gz"].partition("base64,")[2])
    assert gzip.decompress(packed).count(b"sft,1") == 100_000
    assert "modules.parquet" in page.text


def test_a_large_table_that_is_shown_is_packed_too(report) -> None:
    page = report(runs=[{**row, "note": "x" * 300_000} for row in RUNS])
    [link] = [a for tag, a in page.tags if tag == "a" and "download" in a]
    assert link["download"] == "runs.csv.gz"
    assert gzip.decompress(base64.b64decode(link["href"].partition("base64,")[2])).count(b"x" * 300_000) == len(RUNS)


def test_where_the_runs_come_from(report) -> None:
    runs = {
        "sft": {"commit": "a" * 40, "changed": False, "versions": {}, "precision": {"dtype": "float32"},
                "started": "2026-11-22", "seconds": 15.5, "own": {"lr.of_run": 0.001}},
        "dpo": {"commit": "b" * 40, "changed": True, "versions": {"torch": "2.0"}, "precision": {"dtype": "bfloat16"},
                "started": "2026-11-22", "seconds": None, "own": {}},
    }  # fmt: skip
    counts = {"folder": "r-1", "rollouts": 2400, "prompts": 600, "pass_rate": 0.728, "share_mixed_groups": 0.518}
    origins = {
        "data": ["arithmetic"], "rollouts": [counts], "base": [{"sha256": "ba5e"}], "runs": runs,
        "commands": ["python train.py -m method=sft,dpo"], "configuration": {"optim.max_steps": 100},
    }  # fmt: skip
    page = report(
        runs=RUNS, manifest={"origins": origins, "command": "python analyze.py", "adapters": {"sft": "c0ffee"}}
    )
    assert [row[0] for row in page.tables["Commands"]] == ["python train.py -m method=sft,dpo", "python analyze.py"]
    assert ["rollouts.folder", "r-1"] in page.tables["Settings and versions"]
    assert ["base.sha256", "ba5e"] in page.tables["Settings and versions"]
    assert page.tables["Configuration shared by all runs"][1] == ["optim.max_steps", "100"]
    assert page.tables["Provenance of each run"][1:] == [
        ["sft", "lr.of_run=0.001", "aaaaaaaaaaaa", "2026-11-22", "16", "c0ffee"],
        ["dpo", "torch=2.0", "bbbbbbbbbbbb, with uncommitted changes", "2026-11-22", "–", "–"],
    ]
    for warning in (
        "The runs were trained with 2 different commits of the code.",
        "1 of 2 runs was trained with uncommitted changes of the code.",
        "1 of 2 runs was trained with other package versions than the analysis used.",
        "The runs were trained in different precisions or on different devices.",
        "The code of the analysis had uncommitted changes; they are in manifest.json.",
    ):
        assert warning in page.text
    assert "2400, 72.8% correct; 51.8% of prompts with both correct and incorrect ones" in page.text


def test_how_to_cite(report) -> None:
    """As CITATION.cff has it, which is not in the package."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (reference,) = cff["references"]
    assert (cff["title"], reference["title"]) == (TITLE, STUDY)
    assert [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]] == [*AUTHORS]
    assert reference["identifiers"][0]["value"] == f"arXiv:{ARXIV}"
    assert cff["version"] == losslens.__version__
    software, study = report().tables["How to cite"][1:]
    assert f"The LossLens authors. {TITLE} Software, version 0.1.0, 2026. @software{{losslens," in software[1]
    named = "Aleksandr Nikolich, Igor Kiselev, Vladimir Platonov and Karina Romanova"
    assert f"{named}. {STUDY}. arXiv:2606.23740, 2026. @article{{arxiv260623740," in study[1]
    assert "author = {Nikolich, Aleksandr and Kiselev, Igor and Platonov, Vladimir and Romanova, Karina}," in study[1]


def test_a_finding_leads_to_its_section(report) -> None:
    """Only where the page has it."""
    page = report(runs=[base_run(), run("a", "sft", norm=1.0), run("b", "dpo", norm=0.1)])
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links.count("#runs") == 2  # the contents, and the sizes
    assert "from DPO's 0.100 to SFT's 1.000" in page.text


def test_a_table_can_be_had(report) -> None:
    page = report(runs=RUNS, arms=ARMS, trajectories=STEPS)
    links = {a["download"]: a["href"] for tag, a in page.tags if tag == "a" and "download" in a}
    assert list(links) == ["arms.csv", "runs.csv", "trajectories.csv"]
    link = links["arms.csv"]
    assert link is not None
    table = pd.read_csv(io.BytesIO(base64.b64decode(link.partition("base64,")[2])), keep_default_na=False)
    assert table["alias_of"].tolist() == ["", "", "", "sft-conventional"]


def test_a_method_has_one_colour_everywhere(report) -> None:
    page = report(runs=[*RUNS, STEPPED[1]], arms=ARMS, trajectories=STEPS)
    used = {
        (trace["meta"].partition("-")[0], trace["marker"]["color"])
        for plot in page.figures
        for trace in plot["data"]
        if "meta" in trace and trace.get("marker", {}).get("size", 0) > 1
    }
    assert used == {("sft", colour("sft")), ("dpo", colour("dpo"))}
    assert len({colour(method) for method in (*METHODS, "another")}) == len(METHODS) + 1


def test_numbers_read_as_on_the_terminal() -> None:
    nothing = float("nan")
    assert [f(nothing) for f in (number, percent, difference, p_value, whole, rate)] == ["–"] * 6
    assert (number(-0.1154), number(6.26, 1), percent(0.5764), difference(0.0249)) == (
        "−0.115",
        "6.3",
        "57.6%",
        "+2.5%",
    )
    assert (p_value(0.0471), p_value(0.00047), whole(42.0)) == ("0.047", "<0.001", "42")
    assert [rate(value) for value in (1e-3, 2.5e-5, 5e-4, 0.1)] == ["1e-3", "2.5e-5", "5e-4", "1e-1"]


def test_a_comparison_on_the_way_says_where(report) -> None:
    points = {"sft": {"norm": 0.1412, "weight": 0.5}, "dpo": {"norm": 0.1412, "weight": 0.7}}
    settings = {"settings": {"checkpoint": "norm", "target_norm": None}}
    assert "at ‖ΔW‖ = 0.1412" in report(runs=RUNS, manifest={**settings, "points": points}).text
    assert "at step 1000" in report(runs=RUNS, manifest={"settings": {"checkpoint": 1000, "target_norm": None}}).text
