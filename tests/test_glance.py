"""What the page says in sentences: from made-up tables the exact words, and nothing that the numbers do not carry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from losslens.report import glance, statistics
from losslens.report.caveats import caveats
from losslens.report.comparison import Comparison
from losslens.report.findings import findings
from losslens.report.folder import AnalysisFolder
from losslens.report.style import AGAINST, ALONG
from tests.test_report import MANIFEST, arm, base_run
from tests.test_report import run as row_of_run

NAN = math.nan


def run(method: str, seed: int = 0, init_seed: int = 0, **columns: Any) -> dict[str, Any]:
    lr = columns.get("lr", "conventional")
    seeds = {"seed": seed, "init_seed": init_seed, "arm": f"{method}-{lr}", "rank": 8}
    return row_of_run(f"{method}-{lr}-s{seed}-{init_seed}", method, **{**seeds, **columns})


def pair(a: dict[str, Any], b: dict[str, Any], cosine: float, **columns: Any) -> dict[str, Any]:
    measures = {"cosine": cosine, "cosine_null": 0.02, "shared_initial": a["init_seed"] == b["init_seed"]}
    return {"run_a": a["run"], "run_b": b["run"], **measures, **columns}


@pytest.fixture
def folder(tmp_path: Path):
    """Writes tables and a manifest, and gives their folder."""

    def make(manifest: dict[str, Any] | None = None, **tables: list[dict[str, Any]]) -> AnalysisFolder:
        (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **(manifest or {})}), encoding="utf-8")
        for name, rows in tables.items():
            pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
        return AnalysisFolder(tmp_path)

    return make


def said(analysis: AnalysisFolder, begin: str) -> str:
    """The finding that begins so; empty where there is none."""
    found = [each.text for each in findings(analysis, Comparison(analysis)) if each.text.startswith(begin)]
    assert len(found) < 2
    return found[0] if found else ""


SFT, AGAIN, APART = run("sft"), run("sft", seed=1), run("sft", init_seed=1)
RFT, DFT, DPO = run("rft"), run("dft"), run("dpo", learning_rate=1e-4)


class TestDirection:
    def test_farther_than_the_floor_and_against(self, folder) -> None:
        pairs = [
            pair(SFT, AGAIN, 0.8),
            pair(SFT, RFT, 0.7),
            pair(DPO, SFT, -0.1),
            pair(RFT, AGAIN, 0.9),
            pair(RFT, DPO, 0),
        ]
        assert said(folder(runs=[SFT, AGAIN, RFT, DPO], pairs=pairs), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.700 (floor 0.800) is farther from SFT than SFT is from itself in another "
            "order of the data, but how near it is to itself is not known; DPO −0.100 points away from SFT, by more "
            "than chance (null 0.020)."
        )

    def test_within_the_floor_and_chance(self, folder) -> None:
        pairs = [pair(SFT, AGAIN, 0.8), pair(SFT, RFT, 0.85), pair(SFT, DFT, 0.8), pair(SFT, DPO, -0.019)]
        assert said(folder(runs=[SFT, AGAIN, RFT, DFT, DPO], pairs=pairs), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.850 and DFT 0.800 (floor 0.800) cannot be told from SFT in another order "
            "of the data; DPO −0.019 has no more to do with SFT than chance (null 0.020)."
        )

    def test_without_a_floor(self, folder) -> None:
        """A run from another initial adapter is no floor of runs that share theirs."""
        pairs = [pair(SFT, RFT, 0.7), pair(SFT, DFT, 0.6), pair(SFT, APART, 0.1), pair(RFT, APART, 0.1)]
        analysis = folder(runs=[SFT, RFT, DFT, APART], pairs=pairs)
        assert said(analysis, "Direction") == (
            "Direction (cosine of ΔW): RFT 0.700 and DFT 0.600 point along SFT, but how near SFT is to itself is not "
            "known."
        )
        assert caveats(analysis, Comparison(analysis))[1] == (
            "There is no floor: SFT was not trained in another order of the data from the same initial adapter "
            "(`python train.py method=sft seed=…`), so nothing says how near a loss is to itself."
        )

    def test_the_floor_of_two_losses_is_their_geometric_mean(self, folder) -> None:
        """√(.9·.4) = .6; DFT has no floor of its own, so SFT's .9 stands."""
        rft = run("rft", seed=1)
        pairs = [
            pair(SFT, AGAIN, 0.9),
            pair(RFT, rft, 0.4),
            pair(SFT, RFT, 0.5),
            pair(AGAIN, rft, 0.5),
            pair(SFT, DFT, 0.3),
        ]
        assert said(folder(runs=[SFT, AGAIN, RFT, rft, DFT], pairs=pairs), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.500 ± 0.000 (floor 0.600) is farther from SFT than another order of "
            "the data explains; DFT 0.300 (floor 0.900) is farther from SFT than SFT is from itself in another order "
            "of the data, but how near it is to itself is not known."
        )

    def test_one_pair_each_and_no_floor_of_the_reference(self, folder) -> None:
        rft = run("rft", seed=1)
        pairs = [pair(RFT, rft, 0.9), pair(SFT, RFT, 0.5), pair(SFT, rft, 0.1)]
        told = said(folder(runs=[SFT, RFT, rft], pairs=pairs), "Direction")
        assert told.endswith("RFT 0.500 points along SFT, but how near SFT is to itself is not known.")
        pairs += [pair(SFT, AGAIN, 0.9)]
        told = said(folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs), "Direction")
        assert told.endswith("than another order of the data explains, as far as one pair of runs tells.")

    def test_what_seeds_do_not_tell_apart(self, folder) -> None:
        """.7 and .8 have a mean of .75 and a standard deviation of .071: twice that reaches .85."""
        rft = run("rft", seed=1)
        pairs = [pair(SFT, AGAIN, 0.85), pair(SFT, RFT, 0.7), pair(AGAIN, rft, 0.8), pair(SFT, rft, 0.1)]
        assert said(folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs), "Direction") == (
            "Direction (cosine of ΔW): RFT 0.750 ± 0.071 (floor 0.850) cannot be told from SFT in another order of the "
            "data."
        )

    def test_what_seeds_do_tell_apart(self, folder) -> None:
        """.70 and .72: .71 + 2·.014 = .738 stays below .8."""
        rft = run("rft", seed=1)
        pairs = [pair(SFT, AGAIN, 0.8), pair(SFT, RFT, 0.7), pair(AGAIN, rft, 0.72)]
        assert "RFT 0.710 ± 0.014 (floor 0.800) is farther" in said(
            folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs), "Direction"
        )

    def test_nearer_than_the_reference_to_itself_and_yet_below_the_floor(self, folder) -> None:
        """RFT is nearer to SFT, .65, than SFT is to itself, .6, and yet below √(.6·.9) = .73: it has less noise."""
        rft = run("rft", seed=1)
        pairs = [pair(SFT, AGAIN, 0.6), pair(RFT, rft, 0.9), pair(SFT, RFT, 0.64), pair(AGAIN, rft, 0.66)]
        told = said(folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs), "Direction")
        assert "RFT 0.650 ± 0.014 (floor 0.735) is farther from SFT than another order of the data explains" in told
        assert "itself" not in told

    def test_the_floor_moves_with_the_seed_too(self, folder) -> None:
        """SFT's own .7, .8 and .9 are .8 ± .1: .65 is no more than two of these away, .55 is."""
        third = run("sft", seed=2)
        own = [pair(SFT, AGAIN, 0.7), pair(SFT, third, 0.8), pair(AGAIN, third, 0.9)]
        runs = [SFT, AGAIN, third, RFT]
        assert "cannot be told" in said(folder(runs=runs, pairs=[*own, pair(SFT, RFT, 0.65)]), "Direction")
        told = said(folder(runs=runs, pairs=[*own, pair(SFT, RFT, 0.55)]), "Direction")
        assert "is farther from SFT than SFT is" in told

    def test_a_sign_that_does_not_hold_over_seeds(self, folder) -> None:
        """−.10 and .02 lie on both sides of 0, which no null of single pairs says."""
        dpo = run("dpo", seed=1)
        pairs = [pair(SFT, AGAIN, 0.8), pair(SFT, DPO, -0.1), pair(AGAIN, dpo, 0.02)]
        assert said(folder(runs=[SFT, AGAIN, DPO, dpo], pairs=pairs), "Direction") == (
            "Direction (cosine of ΔW): DPO −0.040 ± 0.085 changes too much with the seed to say (null 0.020)."
        )

    def test_an_update_of_0_and_one_run(self, folder) -> None:
        assert said(folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, NAN, cosine_null=NAN)]), "Direction") == ""
        assert findings(*[(f := folder(runs=[base_run(), SFT], pairs=[])), Comparison(f)]) == []

    def test_adapters_of_which_nothing_is_known(self, folder) -> None:
        known = ("run", "method", "norm")
        theirs, ours = (
            {k: row_of_run(name, "adapter", norm=n)[k] for k in known} for name, n in (("a", 2.0), ("b", 1.0))
        )
        pairs = [{"run_a": "a", "run_b": "b", "cosine": 0.5, "cosine_null": 0.02, "shared_initial": None}]
        analysis = folder(runs=[theirs, ours], pairs=pairs, manifest={"reference": "a"})
        assert said(analysis, "Direction") == (
            "Direction (cosine of ΔW): b 0.500 points along a, but how near a is to itself is not known."
        )
        assert said(analysis, "Size") == "Size (‖ΔW‖): from b's 1.000 to a's 2.000, a factor of 2.0."
        assert "train.py" not in "".join(caveats(analysis, Comparison(analysis)))

    def test_of_a_method_at_several_rates_that_of_the_reference_s_name(self, folder) -> None:
        low = run("rft", lr="low", learning_rate=1e-5)
        pairs = [pair(SFT, AGAIN, 0.8), pair(SFT, RFT, 0.7), pair(SFT, low, 0.2), pair(RFT, low, 0.3)]
        assert said(folder(runs=[SFT, AGAIN, RFT, low], pairs=pairs), "Direction").startswith(
            "Direction (cosine of ΔW): RFT 1e-3 0.700 (floor 0.800) is farther"
        )


def test_the_most_alike(folder) -> None:
    pairs = [pair(SFT, RFT, 0.7), pair(SFT, DFT, 0.6), pair(RFT, DFT, 0.996)]
    runs = [SFT, RFT, DFT]
    assert said(folder(runs=runs, pairs=pairs), "The two") == (
        "The two methods most alike are RFT and DFT: 0.996 (neither was trained in another order of the data, "
        "so there is no floor)."
    )
    rft = run("rft", seed=1)
    known = [*pairs, pair(RFT, rft, 0.9)]
    assert said(folder(runs=[*runs, rft], pairs=known), "The two") == (
        "The two methods most alike are RFT and DFT: 0.996 (floor 0.900: they cannot be told apart by their direction)."
    )
    known[-1] = pair(RFT, rft, 0.999)
    assert (
        said(folder(runs=[*runs, rft], pairs=known), "The two")
        == "The two methods most alike are RFT and DFT: 0.996 (floor 0.999)."
    )
    pairs[2] = pair(RFT, DFT, 0.65)  # SFT is one of the two
    assert said(folder(runs=runs, pairs=pairs), "The two") == ""


def test_the_most_alike_at_whatever_rates(folder) -> None:
    rft, low = run("rft", lr="low", learning_rate=1e-5), run("dft", lr="low", learning_rate=1e-5)
    pairs = [pair(SFT, RFT, 0.7), pair(RFT, DFT, 0.8), pair(rft, low, 0.9), pair(RFT, rft, 0.99)]
    assert said(folder(runs=[SFT, RFT, DFT, rft, low], pairs=pairs), "The two").startswith(
        "The two methods most alike are RFT 1e-5 and DFT 1e-5: 0.900"
    )


def test_sizes(folder) -> None:
    runs = [{**SFT, "norm": 1.0}, {**AGAIN, "norm": 1.1}, {**DPO, "norm": 0.2}, {**DFT, "norm": 1.5}]
    assert said(folder(runs=runs, pairs=[]), "Size") == (
        "Size (‖ΔW‖): from DPO's 0.200 to DFT's 1.500, a factor of 7.5, trained at 1e-4 and 1e-3; between runs of one "
        "loss it is 1.10 at most."
    )
    assert said(folder(runs=[{**SFT, "norm": 0.0}, DFT], pairs=[]), "Size") == ""


class TestAccuracy:
    SFT_ARM = arm("sft", "conventional", 1e-3, cosine_to_sft=1.0, accuracy=0.6, base_diff=0.024, base_diff_low=-0.01,
                  base_diff_high=0.05, base_p_holm=0.4)  # fmt: skip

    def said(self, folder, *arms: dict[str, Any], runs: list[dict[str, Any]] | None = None) -> str:
        runs = runs if runs is not None else [base_run(), SFT, AGAIN, DPO, run("dpo", seed=1, learning_rate=1e-4)]
        return said(folder(runs=runs, pairs=[], ablation=[self.SFT_ARM, *arms]), "Accuracy")

    def test_no_difference(self, folder) -> None:
        assert self.said(folder, arm("dpo", "conventional", 1e-4)) == (
            "Accuracy (500 problems of arithmetic, p after Holm): no difference from the base (57.6%) was shown, the "
            "largest is that of DPO (−3.6 points, 95% −7.0 … +0.4, p = 0.310)."
        )

    def test_differences_and_what_is_underpowered(self, folder) -> None:
        worse = {"base_diff": -0.2, "base_diff_low": -0.25, "base_diff_high": -0.15, "base_p_holm": 1e-5}
        dpo = arm("dpo", "conventional", 1e-4, **worse, base_verdict="worse", sft_diff=-0.22, sft_diff_low=-0.27,
                  sft_diff_high=-0.17, sft_p_holm=0.04, sft_verdict="worse")  # fmt: skip
        rft = arm("rft", "conventional", 1e-3, base_verdict="underpowered")
        assert self.said(folder, dpo, rft) == (
            "Accuracy (500 problems of arithmetic, p after Holm): DPO (−20.0 points, 95% −25.0 … −15.0, p < 0.001) is "
            "worse than the base (57.6%); of the others no difference was shown; of RFT 1e-3 too few answers differ to "
            "show any (underpowered); DPO (−22.0 points, 95% −27.0 … −17.0, p = 0.040) is worse than SFT (60.0%)."
        )

    def test_a_single_run_must_pass_as_a_run_too(self, folder) -> None:
        """As one of two arms p = .03, as one of three runs .06: no difference."""
        dpo = arm("dpo", "conventional", 1e-4, seeds=1, base_p_holm=0.03, base_verdict="worse")
        runs = [base_run(), SFT, AGAIN, {**DPO, "base_p_holm": 0.06}]
        assert self.said(folder, dpo, runs=runs).endswith(
            "no difference from the base (57.6%) was shown, the largest is that of DPO (−3.6 points, 95% −7.0 … +0.4, "
            "p = 0.060)."
        )
        runs[-1]["base_p_holm"] = 0.02
        assert "DPO (−3.6 points, 95% −7.0 … +0.4, p = 0.030) is worse than the base" in self.said(
            folder, dpo, runs=runs
        )

    def test_all_ties(self, folder) -> None:
        same = {
            "base_diff": 0.0,
            "base_diff_low": 0.0,
            "base_diff_high": 0.0,
            "base_p_holm": 1.0,
            "base_verdict": "same answers",
        }
        analysis = folder(
            runs=[base_run(), SFT, DPO], pairs=[],
            ablation=[{**self.SFT_ARM, **same}, arm("dpo", "conventional", 1e-4, **same)],
        )  # fmt: skip
        assert said(analysis, "Accuracy") == (
            "Accuracy (500 problems of arithmetic, p after Holm): all are that of the base (57.6%)."
        )

        analysis = folder(
            runs=[base_run(), SFT, DPO], pairs=[],
            ablation=[
                self.SFT_ARM,
                arm("dpo", "conventional", 1e-4, sft_diff=0.0, sft_p_holm=1.0, sft_verdict="same answers"),
            ],
        )  # fmt: skip
        assert "; that of DPO is that of SFT (" in said(analysis, "Accuracy")

    def test_without_a_base(self, folder) -> None:
        lost = dict.fromkeys(("base_diff", "base_diff_low", "base_diff_high", "base_p", "base_p_holm"), NAN)
        analysis = folder(runs=[SFT, AGAIN], pairs=[], ablation=[{**self.SFT_ARM, **lost, "base_verdict": ""}])
        assert said(analysis, "Accuracy") == ""
        assert caveats(analysis, Comparison(analysis))[-1] == (
            "The untrained base was not scored: whether training helped or hurt is not known."
        )

    def test_what_could_have_been_found(self, folder) -> None:
        runs = [base_run(), {**SFT, "base_detectable": 0.054}, {**DPO, "base_detectable": 0.06}]
        assert self.said(folder, arm("dpo", "conventional", 1e-4), runs=runs).endswith(
            " A difference of 5.4 to 6.0 points between a run and the base would be found in four of five such samples."
        )


def test_the_learning_rate_matched_comparison_in_short(folder) -> None:
    sft = arm("sft", "conventional", 1e-3, cosine_to_sft=1.0, norm=0.7, accuracy=0.6)
    usual = arm("dpo", "conventional", 1e-4, cosine_to_sft=-0.11)
    matched = arm("dpo", "matched", 1e-3, cosine_to_sft=-0.09, norm=1.1, accuracy=0.29)
    runs = [base_run(), SFT, DPO]
    assert said(folder(runs=runs, pairs=[], ablation=[sft, usual, matched]), "At SFT's") == (
        "At SFT's learning rate (1e-3) DPO has a cosine to SFT of −0.090 (at 1e-4 −0.110; floor 0.814), a norm of "
        "1.100 (0.250; SFT 0.700) and an accuracy of 29.0% (54.0%; SFT 60.0%)."
    )
    assert said(folder(runs=runs, pairs=[], ablation=[sft, usual]), "At SFT's") == ""
    assert said(folder(runs=runs, pairs=[], ablation=[usual, matched]), "At SFT's") == ""


class TestFunction:
    def test_no_barrier(self, folder) -> None:
        flat = {"barrier_chord": 0.0, "barrier_chord_low": 0.0, "barrier_chord_high": 0.0}
        pairs = [pair(SFT, RFT, 0.7, **flat, cka_last=0.9991), pair(SFT, AGAIN, 0.8, **flat, cka_last=0.9996)]
        assert said(folder(runs=[SFT, AGAIN, RFT], pairs=pairs), "Function") == (
            "Function: no loss barrier to the chord between two updates (largest of 1 pair of runs: 0.000 nats a "
            "token; same loss at other seeds 0.000); the last layer's hidden states differ most from SFT's in RFT (CKA "
            "0.9991, floor 0.9996)."
        )

    def test_a_barrier(self, folder) -> None:
        high = {"barrier_chord": 0.25, "barrier_chord_low": 0.2, "barrier_chord_high": 0.31}
        pairs = [pair(SFT, RFT, 0.7, barrier_chord=0.01), pair(RFT, DPO, 0.1, **high)]
        assert said(folder(runs=[SFT, RFT, DPO], pairs=pairs), "Function") == (
            "Function: the largest loss barrier to the chord between two updates, of 2 pairs of runs, is 0.250 "
            "nats a token (RFT and DPO, 95% 0.200 … 0.310)."
        )

    def test_the_least_cka_at_whatever_rate(self, folder) -> None:
        dpo = run("dpo", lr="matched")
        pairs = [pair(SFT, DPO, 0.7, cka_last=0.99), pair(SFT, dpo, 0.7, cka_last=0.5)]
        assert "most from SFT's in DPO 1e-3 (CKA 0.5000)" in said(folder(runs=[SFT, DPO, dpo], pairs=pairs), "Function")

    def test_nothing_was_measured(self, folder) -> None:
        assert said(folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, 0.7)]), "Function") == ""


class TestCaveats:
    def said(self, folder, runs: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> list[str]:
        analysis = folder(runs=runs, pairs=pairs)
        return caveats(analysis, Comparison(analysis))

    def test_one_run_each(self, folder) -> None:
        once = (
            "how much of this would be otherwise at another seed is not known. Intervals and tests are about problems, "
            "not about seeds."
        )
        assert self.said(folder, [base_run(), SFT, DPO], [])[0] == f"Each loss was trained once: {once}"
        assert self.said(folder, [base_run(), SFT], []) == [f"SFT was trained once: {once}"]
        assert self.said(folder, [base_run(), SFT, AGAIN, DPO, RFT], [])[0] == f"RFT and DPO were trained once: {once}"

    def test_several_seeds(self, folder) -> None:
        notes = self.said(folder, [base_run(), SFT, AGAIN], [pair(SFT, AGAIN, 0.8)])
        assert notes == ["Every loss was trained at least 2 times. Tests are about problems, ± is over seeds."]
        notes = self.said(folder, [base_run(), SFT, AGAIN, RFT], [pair(SFT, AGAIN, 0.8)])
        assert notes[1] == "The floor of SFT is that of one pair of runs, so its own spread is not known."

    def test_a_run_that_diverged(self, folder) -> None:
        lost = run("dpo", seed=1, learning_rate=1e-4, diverged="diverged: loss is nan at step 5", norm=NAN)
        analysis = folder(runs=[base_run(), SFT, DPO, lost], pairs=[pair(SFT, DPO, -0.1)])
        assert caveats(analysis, Comparison(analysis))[-1] == "DPO: 1 of 2 runs diverged or collapsed."
        assert "DPO −0.100 points away" in said(analysis, "Direction")


class TestComparison:
    def test_runs_of_the_same_seeds_are_compared(self, folder) -> None:
        rft = run("rft", seed=1)
        pairs = [pair(SFT, RFT, 0.7), pair(AGAIN, rft, 0.5), pair(SFT, rft, -1), pair(AGAIN, RFT, -1)]
        comparison = Comparison(folder(runs=[SFT, AGAIN, RFT, rft], pairs=pairs))
        sft, other = comparison.losses
        average = comparison.average("cosine", other, sft)
        assert (average.value, average.pairs, average.null) == (pytest.approx(0.6), 2, pytest.approx(0.02))
        assert average.std == pytest.approx(math.sqrt(0.02))

    def test_else_those_of_one_initial_adapter_else_all(self, folder) -> None:
        rft = run("rft", seed=7)
        apart = run("rft", seed=8, init_seed=8)
        comparison = Comparison(folder(runs=[SFT, rft, apart], pairs=[pair(SFT, rft, 0.6), pair(SFT, apart, 0.0)]))
        assert comparison.average("cosine", *comparison.losses).value == 0.6
        comparison = Comparison(
            folder(runs=[SFT, APART, apart], pairs=[pair(SFT, apart, 0.1), pair(APART, apart, 0.3)])
        )
        assert comparison.average("cosine", *comparison.losses).value == pytest.approx(0.2)

    def test_the_floor_of_pairs_that_share_no_initial_adapter(self, folder) -> None:
        apart = run("rft", seed=8, init_seed=8)
        pairs = [pair(SFT, apart, 0.05), pair(SFT, AGAIN, 0.8), pair(SFT, APART, 0.1)]
        comparison = Comparison(folder(runs=[SFT, AGAIN, APART, apart], pairs=pairs))
        assert comparison.floor("cosine", *comparison.losses).value == pytest.approx(0.1)

    def test_tables_without_the_arms(self, folder) -> None:
        """Runs of one method and rate that have the same seeds differ in something else: each is a loss of its own."""
        without = [{k: v for k, v in row.items() if k != "arm"} for row in (SFT, AGAIN, DPO, {**DPO, "run": "dpo-b"})]
        losses = Comparison(folder(runs=without, pairs=[])).losses
        assert [(loss.name, len(loss.runs)) for loss in losses] == [
            ("SFT", 2),
            ("dpo-b", 1),
            ("dpo-conventional-s0-0", 1),
        ]

    def test_names(self, folder) -> None:
        betas = [
            run("dpo", lr="matched", arm=f"dpo-matched method.beta={beta}", run=f"dpo-{beta}") for beta in (0.1, 0.3)
        ]
        losses = Comparison(folder(runs=[SFT, *betas, RFT], pairs=[])).losses
        assert [loss.name for loss in losses] == ["SFT", "RFT", "DPO 1e-3 beta=0.1", "DPO 1e-3 beta=0.3"]


class TestSection:
    ORIGINS: ClassVar = {
        "rollouts": [{"rollouts": 2400, "prompts": 600, "share_right": 0.728, "share_mixed_groups": 0.518}],
        "base": [{"sha256": "b"}], "data": ["arithmetic"], "runs": {"a": {"initial_adapter": "i"}},
    }  # fmt: skip

    def test_what_was_compared(self, folder) -> None:
        section = glance.section(
            folder(runs=[base_run(), SFT, AGAIN, RFT], pairs=[], manifest={"origins": self.ORIGINS})
        )
        assert section.text == [
            "What did each loss do to the weights? Two losses, 3 runs, trained on the same 2400 rollouts of 600 "
            "prompts (72.8% right, 51.8% of the groups mixed) from the same base and initial adapter."
        ]
        section = glance.section(folder(runs=[base_run(), SFT], pairs=[]))
        assert section.text == ["What did each loss do to the weights? One loss, 1 run."]
        assert section.figures == []

    def test_nothing_was_trained(self, folder) -> None:
        assert glance.section(folder(runs=[base_run()])) is None

    def test_the_matrix(self, folder) -> None:
        pairs = [pair(SFT, AGAIN, 0.814), pair(SFT, RFT, 0.723), pair(AGAIN, RFT, 0.5), pair(SFT, DPO, -0.1)]
        [figure] = glance.section(folder(runs=[SFT, AGAIN, RFT, DPO], pairs=pairs)).figures
        assert figure.names == ["SFT", "RFT", "DPO"]
        assert [[square.text for square in row] for row in figure.squares] == [
            [".814", ".723", "−.100"], [".723", "–", "–"], ["−.100", "–", "–"],
        ]  # fmt: skip
        sft = figure.squares[0]
        assert [square.below for square in sft] == ["", "floor .81", "floor .81"]
        assert [(square.ink, square.share) for square in sft] == [(ALONG, 0.814), (ALONG, 0.723), (AGAINST, 0.1)]
        assert sft[1].hover == "SFT and RFT\ncosine 0.723 (1 pair of runs)\nfloor 0.814\nnull 0.020"
        assert "stay below 0.020 in 95 of 100" in figure.caption

    def test_the_matrix_in_numbers(self, folder) -> None:
        pairs = [pair(SFT, AGAIN, 0.814), pair(SFT, RFT, 0.723), pair(SFT, DPO, -0.1)]
        [table] = glance.section(folder(runs=[SFT, AGAIN, RFT, DPO], pairs=pairs)).tables
        assert [column.heading for column in table.columns] == ["loss", "SFT", "RFT", "DPO"]
        assert [(cell.text, cell.below) for cell in table.rows[0].cells] == [
            ("SFT", ""), ("0.814", "null 0.020"), ("0.723", "floor 0.814\nnull 0.020"),
            ("−0.100", "floor 0.814\nnull 0.020"),
        ]  # fmt: skip
        assert [cell.text for cell in table.rows[1].cells] == ["RFT", "0.723", "–", "–"]

    def test_a_matrix_of_many_losses_has_the_width_of_the_page_and_no_floors(self, folder) -> None:
        runs = [run("sft", lr=str(rate), learning_rate=rate) for rate in range(1, 13)]
        section = glance.section(folder(runs=runs, pairs=[pair(runs[0], runs[1], 0.5)]))
        assert section.figures[0].wide
        assert not any(square.below for row in section.figures[0].squares for square in row)

    def test_adapters_made_elsewhere_are_no_losses(self, folder) -> None:
        theirs = [{"run": name, "method": "adapter", "norm": 1.0} for name in ("a", "b")]
        section = glance.section(folder(runs=theirs, pairs=[]))
        assert section.text == ["What did each loss do to the weights? Two adapters made elsewhere."]
        section = glance.section(folder(runs=[SFT, AGAIN, theirs[0]], pairs=[]))
        assert section.text == ["What did each loss do to the weights? One loss, 2 runs; one adapter made elsewhere."]

    def test_the_accuracies(self, folder) -> None:
        arms = [arm("sft", "conventional", 1e-3, cosine_to_sft=1.0), arm("rft", "conventional", 1e-3, accuracy=NAN)]
        figures = glance.section(folder(runs=[base_run(), SFT, AGAIN], pairs=[], ablation=arms)).figures
        plot = figures[-1].plot
        assert list(plot.layout.yaxis.ticktext) == ["SFT"]
        assert [trace.x[0] for trace in plot.data] == [0.52, 0.54]
        assert plot.layout.shapes[0].x0 == 0.576


class TestStatistics:
    TESTED: ClassVar = {
        "mcnemar_b": 9, "mcnemar_c": 1, "mcnemar_p": 0.0215, "mcnemar_midp": 0.0117, "p_holm": 0.043,
        "accuracy_diff": 0.016, "diff_low": 0.004, "diff_high": 0.028, "verdict": "a better", "detectable_diff": 0.021,
    }  # fmt: skip

    def test_the_table(self, folder) -> None:
        rest = {**self.TESTED, "mcnemar_p": 1.0, "p_holm": 1.0, "verdict": "underpowered", "detectable_diff": NAN}
        section = statistics.section(
            folder(
                runs=[base_run(), SFT, RFT, DPO], pairs=[pair(SFT, DPO, 0, **rest), pair(SFT, RFT, 0, **self.TESTED)]
            )
        )
        assert section.text == [
            "2 pairs of runs on arithmetic, each on the same problems. Holm's correction counts the family, 2 tests: 1 "
            "differs, 1 underpowered.",
            "To be found in four of five such samples, a difference would have to be 2.1% in the median pair (2.1% "
            "where two runs disagree least, 2.1% where they disagree most).",
        ]
        first, second = section.tables[0].rows
        assert [cell.text for cell in first.cells] == [
            "1 SFT", "2 RFT", "+1.6%", "+0.4% … +2.8%", "9", "1", "0.021", "0.012", "0.043", "first better", "2.1%",
        ]  # fmt: skip
        assert [cell.text for cell in second.cells][-2:] == ["underpowered", "–"]
        assert first.cells[0].spread == "1e-3 s0 A0"

    def test_no_pair_was_scored(self, folder) -> None:
        assert statistics.section(folder(runs=[SFT, RFT], pairs=[pair(SFT, RFT, 0.7)])) is None

    def test_of_very_many_pairs_those_with_the_reference(self, folder) -> None:
        runs = [run("sft", seed=seed) for seed in range(20)]
        pairs = [pair(a, b, 0.5, **self.TESTED) for n, a in enumerate(runs) for b in runs[n + 1 :]]
        section = statistics.section(folder(runs=runs, pairs=pairs, manifest={"reference": runs[3]["run"]}))
        assert len(section.tables[0].rows) == 19
        assert "all 190 are in pairs.csv" in section.tables[0].caption
