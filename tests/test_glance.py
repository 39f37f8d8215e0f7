"""What the page says in sentences: from made-up tables the exact words, and nothing that the numbers do not carry."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from losslens.report.arm_comparison import arm_rows
from losslens.report.arm_figures import arm_figures
from losslens.report.caveats import caveats
from losslens.report.findings import findings
from losslens.report.loss_comparison import LossComparison
from losslens.report.sections import glance, statistics
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import AGAINST, ALONG
from tests.arm_tables import arm_tables
from tests.test_report import MANIFEST, arm, base_run
from tests.test_report import run as row_of_run

NAN = math.nan


def run(method: str, seed: int = 0, init_seed: int = 0, **columns: Any) -> dict[str, Any]:
    lr = columns.get("lr", "conventional")
    seeds = {"seed": seed, "init_seed": init_seed, "arm": f"{method}-{lr}", "rank": 8}
    return row_of_run(f"{method}-{lr}-s{seed}-{init_seed}", method, **{**seeds, **columns})


def pair(a: dict[str, Any], b: dict[str, Any], cosine: float, **columns: Any) -> dict[str, Any]:
    return {"run_a": a["run"], "run_b": b["run"], "cosine": cosine, "cosine_null": 0.02, **columns}


def seeds(between: float, own: float, other: float, a: str = "sft", b: str = "rft", n: int = 3) -> dict[str, Any]:
    """Runs of two losses at `n` seeds and their pairs: between them, of the one with itself, of the other."""
    runs = [run(method, seed=seed) for method in (a, b) for seed in range(n)]
    pairs = []
    for one, two in combinations(runs, 2):
        same = one["method"] == two["method"]
        cosine = (own if one["method"] == a else other) if same else between
        pairs.append(pair(one, two, cosine + 0.01 * (one["seed"] + two["seed"] - 2)))
    return {"runs": runs, "pairs": pairs}


@pytest.fixture
def folder(tmp_path: Path):
    """Writes tables and a manifest, and gives their folder."""

    def make(manifest: dict[str, Any] | None = None, **tables: list[dict[str, Any]]) -> AnalysisFolder:
        (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **(manifest or {})}), encoding="utf-8")
        made = {name: pd.DataFrame(rows) for name, rows in tables.items() if name != "accuracies"}
        made |= arm_tables(tables["runs"], tables.get("pairs", []), tables.get("accuracies", []))
        for name, rows in made.items():
            rows.to_csv(tmp_path / f"{name}.csv", index=False)
        return AnalysisFolder(tmp_path)

    return make


def said(analysis: AnalysisFolder, begin: str) -> str:
    """Returns the finding that begins with `begin`; empty if there is none."""
    texts = [finding.text for finding in findings(analysis, LossComparison(analysis)) if finding.text.startswith(begin)]
    assert len(texts) < 2
    return texts[0] if texts else ""


SFT, AGAIN, APART = run("sft"), run("sft", seed=1), run("sft", init_seed=1)
RFT, DFT, DPO = run("rft"), run("dft"), run("dpo", learning_rate=1e-4)


class TestDirection:
    """Cosines over pairs of different seeds move by .01 with the seeds, so that jackknife intervals have a width."""

    def test_one_loss(self, folder) -> None:
        """.82 of √(.82·.82), at every seed: the interval is narrow, and holds 1."""
        assert said(folder(**seeds(0.82, 0.82, 0.82)), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.820 (ceiling 0.820, ratio 1.00, 95% [1.00, 1.00]) is indistinguishable "
            "from SFT: one loss, as far as the repeats can tell."
        )

    def test_related(self, folder) -> None:
        """.6 of √(.8·.8) = .8 is .75."""
        told = said(folder(**seeds(0.6, 0.8, 0.8)), "Direction")
        assert told.startswith("Direction (cosine of ΔW): RFT 0.600 (ceiling 0.800, ratio 0.75, 95% [0.7")
        assert told.endswith("]) is related to SFT but not the same loss.")

    def test_perhaps_one_loss(self, folder) -> None:
        """Of unequal pairs the interval holds 1, but is wider than .2."""
        made = seeds(0.8, 0.8, 0.8)
        for row in made["pairs"]:
            if {row["run_a"][:3], row["run_b"][:3]} == {"sft", "rft"} and "s0" in row["run_a"] + row["run_b"]:
                row["cosine"] = 0.7
        told = said(folder(**made), "Direction")
        assert "is related to SFT and may be the same loss." in told

    def test_opposed(self, folder) -> None:
        told = said(folder(**seeds(-0.2, 0.8, 0.8)), "Direction")
        assert "RFT −0.200 (ceiling 0.800, ratio −0.25, 95% [" in told
        assert told.endswith("is opposed to SFT.")

    def test_nothing_in_common(self, folder) -> None:
        told = said(folder(**seeds(0.015, 0.8, 0.8)), "Direction")
        assert told.startswith("Direction (cosine of ΔW): RFT 0.015 (null 0.020, ceiling 0.800, ratio 0.02, 95% [")
        assert told.endswith("]) has nothing in common with SFT.")

    def test_a_loss_that_is_not_like_itself(self, folder) -> None:
        """Once a positive cosine "could not be told from SFT" where the repeat of one of the two was negative."""
        assert said(folder(**seeds(0.382, 0.5, -0.04)), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.382 (null 0.020, repeat of RFT −0.040, repeat of SFT 0.500): too noisy to "
            "say."
        )

    def test_what_each_shows_with_itself_is_what_the_ceiling_is_made_of(self, folder) -> None:
        """SFT and RFT share no A: SFT's .82 in another order is no reason for no ceiling, its .1 over A is."""
        sft = [SFT, AGAIN, run("sft", seed=2, init_seed=2)]
        rft = [run("rft", seed=seed, init_seed=seed) for seed in (3, 4)]
        pairs = [pair(SFT, AGAIN, 0.82), pair(SFT, sft[2], 0.1), pair(AGAIN, sft[2], 0.1), pair(*rft, 0.6)]
        pairs += [pair(one, two, 0.05) for one in sft for two in rft]
        analysis = folder(runs=[*sft, *rft], pairs=pairs)
        assert said(analysis, "Direction") == (
            "Direction (cosine of ΔW): RFT 0.050 (null 0.020, repeat of RFT 0.600, repeat of SFT 0.100): too noisy to "
            "say."
        )
        [figure] = glance.section(analysis).figures
        assert figure.squares[0][1].hover.split("\n")[2] == "repeat of SFT 0.100, repeat of RFT 0.600"
        assert figure.squares[0][0].hover.startswith("SFT, trained again (different order)\ncosine 0.820 ")

    def test_two_seeds(self, folder) -> None:
        told = said(folder(**seeds(0.6, 0.8, 0.8, n=2)), "Direction")
        assert told.endswith(
            "RFT 0.590 (ceiling 0.790, ratio 0.75, cosines 0.590 to 0.590): two seeds give no interval and so no "
            "verdict."
        )

    def test_runs_of_one_seed(self, folder) -> None:
        """Nothing is called more or less than chance from one run a loss."""
        pairs = [pair(SFT, RFT, 0.7), pair(SFT, DPO, -0.1), pair(RFT, DPO, 0)]
        assert said(folder(runs=[SFT, RFT, DPO], pairs=pairs), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.700 (null 0.020) and DPO −0.100 (null 0.020): compared on runs of the "
            "same seed, which share their batches, so there is no ceiling and no verdict."
        )

    def test_a_loss_without_a_repeat(self, folder) -> None:
        """SFT's own repeat alone is no ceiling for RFT; the pair of one seed does not count."""
        pairs = [pair(SFT, AGAIN, 0.8), pair(SFT, RFT, 0.9), pair(AGAIN, RFT, 0.5)]
        analysis = folder(runs=[SFT, AGAIN, RFT], pairs=pairs)
        assert said(analysis, "Direction") == (
            "Direction (cosine of ΔW): RFT 0.500 (null 0.020): no ceiling, since the repeat of RFT is not known."
        )

    def test_without_any(self, folder) -> None:
        analysis = folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, 0.7)])
        assert caveats(analysis, LossComparison(analysis))[1] == (
            "There is no ceiling for SFT and RFT: they were not trained with a second data order (`python train.py "
            "-m method=sft,rft seed=…`), so their repeats are not known."
        )

    def test_an_update_of_0_and_one_run(self, folder) -> None:
        assert said(folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, NAN, cosine_null=NAN)]), "Direction") == ""
        assert findings(*[(f := folder(runs=[base_run(), SFT], pairs=[])), LossComparison(f)]) == []

    def test_adapters_of_which_nothing_is_known(self, folder) -> None:
        theirs, ours = (
            {"run": name, "arm": name, "method": "adapter", "norm": n} for name, n in (("a", 2.0), ("b", 1))
        )
        pairs = [{"run_a": "a", "run_b": "b", "cosine": 0.5, "cosine_null": 0.02}]
        analysis = folder(runs=[theirs, ours], pairs=pairs, manifest={"reference": "a"})
        assert said(analysis, "Direction") == (
            "Direction (cosine of ΔW): b 0.500 (null 0.020): no ceiling, since the repeats of b and a are not known."
        )
        assert said(analysis, "Size") == "Size (‖ΔW‖): from b's 1.000 to a's 2.000, a factor of 2.0."
        assert "train.py" not in "".join(caveats(analysis, LossComparison(analysis)))

    def test_of_a_method_at_several_rates_that_of_the_reference_s_name(self, folder) -> None:
        low = run("rft", lr="low", learning_rate=1e-5)
        pairs = [pair(SFT, RFT, 0.7), pair(SFT, low, 0.2), pair(RFT, low, 0.3)]
        assert said(folder(runs=[SFT, RFT, low], pairs=pairs), "Direction").startswith(
            "Direction (cosine of ΔW): RFT 1e-3 0.700 (null 0.020): compared on runs"
        )


def test_the_most_alike(folder) -> None:
    pairs = [pair(SFT, RFT, 0.7), pair(SFT, DFT, 0.6), pair(RFT, DFT, 0.996)]
    runs = [SFT, RFT, DFT]
    assert said(folder(runs=runs, pairs=pairs), "The two") == (
        "The two most similar losses are RFT and DFT: cosine 0.996 (null 0.020); compared on runs of the same seed, "
        "which share their batches."
    )
    made = seeds(0.82, 0.82, 0.82, "rft", "rift")
    made["pairs"] += [pair(SFT, row, 0.3) for row in made["runs"]]
    assert said(folder(runs=[SFT, *made["runs"]], pairs=made["pairs"]), "The two") == (
        "The two most similar losses are RFT and RIFT: cosine 0.820 (ceiling 0.820, ratio 1.00, 95% [1.00, 1.00]); "
        "one loss, as far as the repeats can tell."
    )
    pairs[2] = pair(RFT, DFT, 0.65)  # SFT is one of the two
    assert said(folder(runs=runs, pairs=pairs), "The two") == ""


def test_the_most_alike_are_of_one_kind_of_pairs_and_not_noisy(folder) -> None:
    """RFT and RIFT at different seeds, .7 of .8; DFT has runs of seed 0 only, and reads higher; GRPO is noise."""
    made = seeds(0.7, 0.8, 0.8, "rft", "rift")
    grpo = [run("grpo", seed=seed) for seed in range(3)]
    noisy = [pair(row, other, 0.75) for row in made["runs"] for other in grpo if row["seed"] != other["seed"]]
    noisy += [pair(one, two, 0.1) for one, two in combinations(grpo, 2)]
    zero = [row for row in made["runs"] if row["seed"] == 0]
    dft = run("dft", init_seed=9)
    pairs = [*made["pairs"], *noisy, *(pair(dft, row, 0.99) for row in zero)]
    assert said(folder(runs=[*made["runs"], *grpo, dft], pairs=pairs), "The two").startswith(
        "The two most similar losses, among those compared at different seeds, are RFT and RIFT: cosine 0.700 "
        "(ceiling 0.800"
    )


def test_sizes(folder) -> None:
    runs = [{**SFT, "norm": 1.0}, {**AGAIN, "norm": 1.1}, {**DPO, "norm": 0.2}, {**DFT, "norm": 1.5}]
    assert said(folder(runs=runs, pairs=[]), "Size") == (
        "Size (‖ΔW‖): from DPO's 0.200 to DFT's 1.500, a factor of 7.5, trained at learning rates 1e-4 and 1e-3; "
        "between runs of one loss the factor is at most 1.10."
    )
    assert said(folder(runs=[{**SFT, "norm": 0.0}, DFT], pairs=[]), "Size") == ""


class TestAccuracy:
    SFT_ARM = arm("sft", "conventional", 1e-3, accuracy=0.6, base_diff=0.024, base_diff_low=-0.01,
                  base_diff_high=0.05, base_p_holm=0.4)  # fmt: skip

    def said(self, folder, *arms: dict[str, Any], runs: list[dict[str, Any]] | None = None) -> str:
        runs = runs if runs is not None else [base_run(), SFT, AGAIN, DPO, run("dpo", seed=1, learning_rate=1e-4)]
        return said(folder(runs=runs, pairs=[], arms=[self.SFT_ARM, *arms]), "Accuracy")

    def test_no_difference(self, folder) -> None:
        assert self.said(folder, arm("dpo", "conventional", 1e-4)) == (
            "Accuracy (500 problems of arithmetic, p after Holm's correction): whether all losses differ from the base "
            "(57.6%), the data cannot say (the largest difference is that of DPO: −3.6 points, 95% −7.0 … +0.4, "
            "p = 0.310)."
        )

    def test_differences_equivalence_and_neither(self, folder) -> None:
        worse = {"base_diff": -0.2, "base_diff_low": -0.25, "base_diff_high": -0.15, "base_p_holm": 1e-5}
        dpo = arm("dpo", "conventional", 1e-4, **worse, base_verdict="worse", sft_diff=-0.22, sft_diff_low=-0.27,
                  sft_diff_high=-0.17, sft_p_holm=0.04, sft_verdict="worse")  # fmt: skip
        rft = arm("rft", "conventional", 1e-3, base_verdict="equivalent")
        assert self.said(folder, dpo, rft) == (
            "Accuracy (500 problems of arithmetic, p after Holm's correction): DPO (−20.0 points, 95% −25.0 … −15.0, "
            "p < 0.001) is worse than the base (57.6%); RFT 1e-3 is equivalent to the base (57.6%) within ±5 points; "
            "whether SFT differs from the base (57.6%), the data cannot say (+2.4 points, 95% −1.0 … +5.0, p = 0.400); "
            "DPO (−22.0 points, 95% −27.0 … −17.0, p = 0.040) is worse than SFT (60.0%)."
        )

    def test_each_arm_is_held_against_its_own_sft(self, folder) -> None:
        """Of a sweep over ranks: DPO at rank 16 against SFT at rank 16, whatever SFT has at rank 8."""
        arms = []
        for rank, accuracy in ((8, 0.4), (16, 0.7)):
            settings = f"lora.r={rank}"
            named = {"settings": settings, "sft": f"sft-conventional {settings}"}
            arms.append(arm("sft", "conventional", 1e-3, **named, accuracy=accuracy) | {"arm": named["sft"]})
            dpo = arm("dpo", "conventional", 1e-4, **named, accuracy=0.6, sft_diff=0.6 - accuracy, sft_diff_low=-0.15,
                      sft_diff_high=0.25, sft_p_holm=0.01, sft_verdict="worse" if rank == 16 else "better")  # fmt: skip
            arms.append(dpo | {"arm": f"dpo-conventional {settings}"})
        told = said(folder(runs=[base_run(), SFT, DPO], pairs=[], arms=arms), "Accuracy")
        assert "; DPO 1e-4 r=8 (+20.0 points, 95% −15.0 … +25.0, p = 0.010) is better than SFT 1e-3 r=8 (40.0%)" in told
        assert "; DPO 1e-4 r=16 (−10.0 points, 95% −15.0 … +25.0, p = 0.010) is worse than SFT 1e-3 r=16 (70." in told

    def test_all_ties(self, folder) -> None:
        same = {
            "base_diff": 0.0,
            "base_diff_low": 0.0,
            "base_diff_high": 0.0,
            "base_p_holm": 1.0,
            "base_verdict": "equivalent",
        }
        analysis = folder(
            runs=[base_run(), SFT, DPO], pairs=[],
            arms=[{**self.SFT_ARM, **same}, arm("dpo", "conventional", 1e-4, **same)],
        )  # fmt: skip
        assert said(analysis, "Accuracy") == (
            "Accuracy (500 problems of arithmetic, p after Holm's correction): all losses are equivalent to the base "
            "(57.6%) within ±5 points."
        )

        analysis = folder(
            runs=[base_run(), SFT, DPO], pairs=[],
            arms=[
                self.SFT_ARM,
                arm("dpo", "conventional", 1e-4, sft_diff=0.0, sft_p_holm=1.0, sft_equivalence_margin=0.05,
                    sft_verdict="equivalent"),
            ],
        )  # fmt: skip
        assert "; DPO is equivalent to SFT (" in said(analysis, "Accuracy")

    def test_without_a_base(self, folder) -> None:
        lost = dict.fromkeys(("base_diff", "base_diff_low", "base_diff_high", "base_p", "base_p_holm"), NAN)
        analysis = folder(runs=[SFT, AGAIN], pairs=[], arms=[{**self.SFT_ARM, **lost, "base_verdict": ""}])
        assert said(analysis, "Accuracy") == ""
        assert caveats(analysis, LossComparison(analysis))[-1] == (
            "The untrained base was not scored, so whether training helped or hurt is not known."
        )

    def test_what_could_have_been_found(self, folder) -> None:
        """Against the base, on the benchmark that is compared; what another benchmark could show says nothing here."""
        found = [
            {"arm_a": f"{m}-conventional", "arm_b": "base", "detectable_diff": d}
            for m, d in (("sft", 0.054), ("dpo", 0.06))
        ]
        found += [{"arm_a": "sft-conventional", "arm_b": "dpo-conventional", "detectable_diff": 0.2}]
        arms = [self.SFT_ARM, arm("dpo", "conventional", 1e-4)]
        analysis = folder(runs=[base_run(), SFT, DPO], pairs=[], arms=arms, accuracies=found)
        assert said(analysis, "Accuracy").endswith(
            " With this many problems of arithmetic, a difference of 5.4 to 6.0 points between a loss and the base "
            "would be detected in four of five samples."
        )


def test_the_learning_rate_matched_comparison_in_short(folder) -> None:
    sft = arm("sft", "conventional", 1e-3, norm=0.7, accuracy=0.6)
    usual = arm("dpo", "conventional", 1e-4, cosine_to_sft=-0.11)
    matched = arm("dpo", "matched", 1e-3, cosine_to_sft=-0.09, norm=1.1, accuracy=0.29)
    runs = [base_run(), SFT, DPO]
    assert said(folder(runs=runs, pairs=[], arms=[sft, usual, matched]), "At SFT's") == (
        "At SFT's learning rate (1e-3), DPO has a cosine to SFT of −0.090 (ceiling 0.904; at 1e-4: −0.110, ceiling "
        "0.904), a norm of 1.100 (at 1e-4: 0.250; SFT: 0.700) and an accuracy of 29.0% (at 1e-4: 54.0%; SFT: 60.0%)."
    )
    assert said(folder(runs=runs, pairs=[], arms=[sft, usual]), "At SFT's") == ""
    assert said(folder(runs=runs, pairs=[], arms=[usual, matched]), "At SFT's") == ""


def test_the_learning_rate_matched_comparison_at_two_ranks(folder) -> None:
    """Each method is compared at the rate of the SFT arm of its own rank."""
    arms = []
    for rank, norm in ((8, 0.7), (16, 0.9)):
        named = {"settings": f"lora.r={rank}", "sft": f"sft-conventional lora.r={rank}"}
        for method, lr, learning_rate in (
            ("sft", "conventional", 1e-3),
            ("dpo", "conventional", 1e-4),
            ("dpo", "matched", 1e-3),
        ):
            row = arm(method, lr, learning_rate, **named, norm=norm, cosine_to_sft=norm - 0.5)
            arms.append(row | {"arm": f"{method}-{lr} lora.r={rank}"})
    analysis = folder(runs=[base_run(), SFT, DPO], pairs=[], arms=arms)
    told = [each.text for each in findings(analysis, LossComparison(analysis)) if each.text.startswith("At SFT's")]
    assert [text.partition(" (ceiling 0.904")[0].partition("has ")[2] for text in told] == [
        "a cosine to SFT 1e-3 r=8 of 0.200",
        "a cosine to SFT 1e-3 r=16 of 0.400",
    ]
    assert "; SFT 1e-3 r=16: 0.900)" in told[1]


def test_the_repeat_of_each_sft_arm_is_drawn(folder) -> None:
    arms = []
    for rank, repeat in ((8, 0.9), (16, 0.5)):
        name = f"sft-conventional lora.r={rank}"
        row = arm("sft", "conventional", 1e-3, settings=f"lora.r={rank}", sft=name, cosine_repeat=repeat)
        arms.append(row | {"arm": name})
    analysis = folder(runs=[SFT], pairs=[], arms=arms)
    first, *_ = arm_figures(arm_rows(analysis), LossComparison(analysis).looks, None)
    assert sorted(line.y0 for line in first.plot.layout.shapes if line.line.dash == "dash") == [0.5, 0.9]
    assert "Dashed: the repeat of each SFT arm." in first.caption


class TestFunction:
    def test_no_barrier(self, folder) -> None:
        flat = {"barrier_chord": 0.0, "barrier_chord_low": 0.0, "barrier_chord_high": 0.0}
        pairs = [pair(SFT, RFT, 0.7, **flat, cka_last=0.9991), pair(SFT, AGAIN, 0.8, **flat, cka_last=0.9996)]
        rft = run("rft", seed=1)
        pairs += [pair(AGAIN, rft, 0.7), pair(RFT, rft, 0.8, **flat, cka_last=0.9996)]
        pairs += [pair(SFT, rft, 0.7, **flat, cka_last=0.9991)]
        assert said(folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs), "Function") == (
            "Function: no loss barrier on the straight path between any two runs of different losses (largest of 2 "
            "measured pairs: 0.000 nats per token; repeat level 0.000); the last-layer hidden states that differ most "
            "from SFT's are those of RFT (CKA 0.9991, ceiling 0.9996)."
        )

    def test_a_barrier(self, folder) -> None:
        high = {"barrier_chord": 0.25, "barrier_chord_low": 0.2, "barrier_chord_high": 0.31}
        pairs = [pair(SFT, RFT, 0.7, barrier_chord=0.01), pair(RFT, DPO, 0.1, **high)]
        assert said(folder(runs=[SFT, RFT, DPO], pairs=pairs), "Function") == (
            "Function: the largest loss barrier on the straight path between any two runs of different losses is 0.250 "
            "nats per token (RFT and DPO, 95% 0.200 … 0.310, of 2 measured pairs)."
        )

    def test_the_least_cka_at_whatever_rate(self, folder) -> None:
        dpo = run("dpo", lr="matched")
        pairs = [pair(SFT, DPO, 0.7, cka_last=0.99), pair(SFT, dpo, 0.7, cka_last=0.5)]
        assert "most from SFT's are those of DPO 1e-3 (CKA 0.5000)" in said(
            folder(runs=[SFT, DPO, dpo], pairs=pairs), "Function"
        )

    def test_nothing_was_measured(self, folder) -> None:
        assert said(folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, 0.7)]), "Function") == ""


class TestCaveats:
    def said(self, folder, runs: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> list[str]:
        analysis = folder(runs=runs, pairs=pairs)
        return caveats(analysis, LossComparison(analysis))

    def test_one_run_each(self, folder) -> None:
        once = (
            "so how much of this would change with another seed is unknown. Intervals and tests are over problems, not "
            "over seeds."
        )
        assert self.said(folder, [base_run(), SFT, DPO], [])[0] == f"Each loss was trained once, {once}"
        assert self.said(folder, [base_run(), SFT], []) == [f"SFT was trained once, {once}"]
        assert self.said(folder, [base_run(), SFT, AGAIN, DPO, RFT], [])[0] == f"RFT and DPO were trained once, {once}"

    def test_several_seeds(self, folder) -> None:
        notes = self.said(folder, [base_run(), SFT, AGAIN], [pair(SFT, AGAIN, 0.8)])
        assert notes == [
            "Every loss was trained at least 2 times. Tests are over problems, not over seeds; ± is the standard "
            "deviation over runs."
        ]
        notes = self.said(folder, [base_run(), SFT, AGAIN, RFT], [pair(SFT, AGAIN, 0.8)])
        assert notes[1:] == [
            "There is no ceiling for RFT: it was not trained with a second data order (`python train.py method=rft "
            "seed=…`), so its repeat is not known.",
            "SFT was trained with only two seeds; three would give an interval and a verdict.",
        ]

    def test_a_run_that_diverged(self, folder) -> None:
        lost = run("dpo", seed=1, learning_rate=1e-4, diverged="diverged: loss is nan at step 5", norm=NAN)
        analysis = folder(runs=[base_run(), SFT, DPO, lost], pairs=[pair(SFT, DPO, -0.1)])
        assert caveats(analysis, LossComparison(analysis))[-1] == "DPO: 1 of 2 runs diverged or collapsed."
        assert "DPO −0.100 (null 0.020): compared on runs of the same seed" in said(analysis, "Direction")


class TestComparison:
    def test_runs_of_different_seeds_are_compared(self, folder) -> None:
        rft = run("rft", seed=1)
        pairs = [pair(SFT, rft, 0.7), pair(AGAIN, RFT, 0.5), pair(SFT, RFT, 1), pair(AGAIN, rft, 1)]
        comparison = LossComparison(folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs))
        sft, other = comparison.losses
        cosine = comparison.of("cosine", other, sft)
        assert (cosine.value, cosine.pairs, cosine.null) == (pytest.approx(0.6), 2, pytest.approx(0.02))
        assert (cosine.lowest, cosine.highest, cosine.pairing) == (0.5, 0.7, "same init")
        assert comparison.between(sft, other)["cosine"].tolist() == [0.7, 0.5]

    def test_what_the_page_says_is_what_the_table_says(self, folder) -> None:
        analysis = folder(**seeds(0.6, 0.8, 0.8))
        row = pd.read_csv(analysis.path / "arm_pairs.csv").set_index(["arm_a", "arm_b"]).iloc[1]
        comparison = LossComparison(analysis)
        cosine = comparison.of("cosine", *comparison.losses)
        assert cosine.verdict == row["cosine_verdict"] == "related"
        assert (cosine.level, cosine.relative, cosine.low) == tuple(
            row[f"cosine_{end}"] for end in ("ceiling", "relative", "low")
        )

    def test_names(self, folder) -> None:
        betas = [
            run("dpo", lr="matched", arm=f"dpo-matched method.beta={beta}", run=f"dpo-{beta}") for beta in (0.1, 0.3)
        ]
        losses = LossComparison(folder(runs=[SFT, *betas, RFT], pairs=[])).losses
        assert [loss.name for loss in losses] == ["SFT", "RFT", "DPO 1e-3 beta=0.1", "DPO 1e-3 beta=0.3"]


class TestSection:
    ORIGINS: ClassVar = {
        "rollouts": [{"rollouts": 2400, "prompts": 600, "pass_rate": 0.728, "share_mixed_groups": 0.518}],
        "base": [{"sha256": "b"}], "data": ["arithmetic"], "runs": {"a": {"initial_adapter": "i"}},
    }  # fmt: skip

    def test_what_was_compared(self, folder) -> None:
        section = glance.section(
            folder(runs=[base_run(), SFT, AGAIN, RFT], pairs=[], manifest={"origins": self.ORIGINS})
        )
        assert section.text == [
            "What did each loss do to the weights? Two losses, 3 runs, trained on the same 2400 rollouts of 600 "
            "prompts (72.8% of the rollouts are correct; 51.8% of the prompts have both correct and incorrect ones) "
            "from the same base and initial adapter."
        ]
        section = glance.section(folder(runs=[base_run(), SFT], pairs=[]))
        assert section.text == ["What did each loss do to the weights? One loss, 1 run."]
        assert section.figures == []

    def test_nothing_was_trained(self, folder) -> None:
        assert glance.section(folder(runs=[base_run()])) is None

    def test_the_matrix(self, folder) -> None:
        made = seeds(0.6, 0.8, 0.8)
        made["pairs"] += [pair(row, DPO, -0.1) for row in made["runs"]]
        analysis = folder(runs=[*made["runs"], DPO], pairs=made["pairs"])
        [figure] = glance.section(analysis).figures
        assert figure.names == ["SFT", "RFT", "DPO"]
        assert [[square.text for square in row] for row in figure.squares] == [
            [".800", ".600", "−.100"], [".600", ".800", "−.100"], ["−.100", "−.100", "–"],
        ]  # fmt: skip
        sft = figure.squares[0]
        assert [square.below for square in sft] == ["", "of .80 → .75", ""]
        assert [square.ink for square in sft] == [ALONG, ALONG, AGAINST]
        assert [square.share for square in sft] == pytest.approx([0.8, 0.6, 0.1])
        lines = sft[1].hover.split("\n")
        assert lines[:2] == ["SFT and RFT", "cosine 0.600 (6 pairs of runs, same init)"]
        assert lines[2] == "repeat of SFT 0.800, repeat of RFT 0.800"
        assert lines[3].startswith("ceiling 0.800, ratio 0.75, 95% [0.7")
        assert lines[4:] == ["related", "null 0.020"]
        assert "stays below 0.020 in 95 of 100" in figure.caption
        [table] = glance.section(analysis).tables
        assert [column.heading for column in table.columns] == ["loss", "SFT", "RFT", "DPO"]
        cells = table.rows[0].cells
        assert [cell.text for cell in cells] == ["SFT", "0.800", "0.600", "−0.100"]
        assert cells[2].below == "\n".join(lines[3:])
        assert cells[3].below == "null 0.020"

    def test_a_matrix_of_many_losses_has_the_width_of_the_page_and_no_ceilings(self, folder) -> None:
        runs = [run("sft", lr=str(rate), learning_rate=rate) for rate in range(1, 13)]
        section = glance.section(folder(runs=runs, pairs=[pair(runs[0], runs[1], 0.5)]))
        assert section.figures[0].wide
        assert not any(square.below for row in section.figures[0].squares for square in row)

    def test_adapters_made_elsewhere_are_no_losses(self, folder) -> None:
        theirs = [{"run": name, "arm": name, "method": "adapter", "norm": 1.0} for name in ("a", "b")]
        section = glance.section(folder(runs=theirs, pairs=[]))
        assert section.text == ["What did each loss do to the weights? Two external adapters."]
        section = glance.section(folder(runs=[SFT, AGAIN, theirs[0]], pairs=[]))
        assert section.text == ["What did each loss do to the weights? One loss, 2 runs; one external adapter."]

    def test_the_accuracies(self, folder) -> None:
        arms = [arm("sft", "conventional", 1e-3), arm("rft", "conventional", 1e-3, accuracy=NAN)]
        figures = glance.section(folder(runs=[base_run(), SFT, AGAIN], pairs=[], arms=arms)).figures
        plot = figures[-1].plot
        assert list(plot.layout.yaxis.ticktext) == ["SFT"]
        assert [trace.x[0] for trace in plot.data] == [0.52, 0.54]
        assert plot.layout.shapes[0].x0 == 0.576


class TestStatistics:
    TESTED: ClassVar = {
        "n": 500, "accuracy_diff": 0.016, "diff_low": 0.004, "diff_high": 0.028, "p": 0.0215, "p_holm": 0.043,
        "equivalence_margin": 0.05, "equivalent_within": 0.026, "accuracy_verdict": "better", "detectable_diff": 0.021,
    }  # fmt: skip

    def test_the_table(self, folder) -> None:
        rest = {**self.TESTED, "p": 1.0, "p_holm": 1.0, "accuracy_verdict": "cannot say", "detectable_diff": NAN}
        sft, rft, dpo = (f"{method}-conventional" for method in ("sft", "rft", "dpo"))
        accuracies = [{"arm_a": sft, "arm_b": dpo, **rest}, {"arm_a": sft, "arm_b": rft, **self.TESTED}]
        accuracies += [{"arm_a": rft, "arm_b": "base", **rest}]
        section = statistics.section(folder(runs=[base_run(), SFT, RFT, DPO], pairs=[], accuracies=accuracies))
        assert section.text == [
            "3 comparisons of losses with each other and with the base on arithmetic, each on the same problems. "
            "Holm's correction covers the family, 3 tests: 1 differs, about 2 the data cannot say.",
            "To be detected in four of five samples of this size, a difference would have to be 2.1% in the median "
            "comparison (2.1% where two disagree least, 2.1% where they disagree most).",
        ]
        first, *others = section.tables[0].rows
        assert [cell.text for cell in first.cells] == [
            "SFT", "RFT", "+1.6%", "+0.4% … +2.8%", "0.021", "0.043", "±2.6%", "first better", "2.1%",
        ]  # fmt: skip
        assert [[cell.text for cell in row.cells][-2:] for row in others] == [["cannot say", "–"]] * 2
        assert {row.cells[1].text for row in others} == {"DPO", "base"}

    def test_nothing_was_scored(self, folder) -> None:
        assert statistics.section(folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, 0.7)])) is None

    def test_of_very_many_losses_those_with_the_reference_and_the_base(self, folder) -> None:
        runs = [run("sft", lr=f"{rate}", learning_rate=1e-3) for rate in range(20)]
        arms = [*(row["arm"] for row in runs), "base"]
        accuracies = [{"arm_a": a, "arm_b": b, **self.TESTED} for a, b in combinations(arms, 2)]
        section = statistics.section(
            folder(runs=runs, pairs=[], accuracies=accuracies, manifest={"reference": runs[3]["run"]})
        )
        assert len(section.tables[0].rows) == 19 + 20
        assert "all 210 are in arm_pairs.csv" in section.tables[0].caption
