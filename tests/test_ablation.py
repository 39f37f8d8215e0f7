"""The arms of the learning-rate-matched comparison: who belongs to which, what is averaged, what is not left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from losslens.analysis.accuracy import RUN_COLUMNS, has_collapsed
from losslens.analysis.arm_accuracy import compare_arms, outcomes_of
from losslens.analysis.arm_summary import COLUMNS, SummaryTables, arm_summary_table
from losslens.analysis.arms import Arm, arm_names, arms_of, repeats, sft_partners
from losslens.analysis.cohort import Base, Cohort, ComparedAdapter, Diverged
from losslens.analysis.gathering import _distinct
from losslens.analysis.manifests import BaseFacts, RunFacts, StartedFacts
from losslens.analysis.pairs import all_pairs, choose
from losslens.analysis.repeats import arm_pairs, pairing
from losslens.analysis.scores import scores_of_runs
from losslens.core.errors import InputError
from losslens.evaluation.statistics import detectable_difference
from losslens.runs.run import Run
from tests.test_analysis_tables import MODEL, scored

pytestmark = pytest.mark.fast

RATES = {
    "conventional": {"peak": 1e-3, "factor": None},
    "matched": {"peak": 1e-3, "factor": 1.0},
    "matched_low": {"peak": 1e-3, "factor": 0.1},
}


def facts(method: str, lr: str, seed: int, init: int | None = None, **options: Any) -> dict[str, Any]:
    scale = 0.1 if method == "dpo" else 1.0
    rate = round(1e-3 * (RATES[lr]["factor"] or scale), 12)
    init = seed if init is None else init
    section = {"name": method, **({"beta": 0.1, "loss_type": "sigmoid"} if method == "dpo" else {}), **options}
    return {
        "method": method,
        "conventional_lr_scale": scale,
        "learning_rate": rate,
        "base": {"sha256": "b"},
        "rollouts": {"folder": "r", "sha256": "r"},
        "trained_on": {"pass_rate": 0.7},
        "initial_adapter": {"folder": str(init), "sha256": str(init)},
        "identity": {"method": section, "learning_rate": rate, "seed": seed, "init_seed": init},
        "config": {
            "data": {"name": "quiz", "eval_size": 9}, "benchmark": {}, "evaluation": {}, "rollouts": {}, "model": MODEL,
            "lr": {"name": lr, **RATES[lr]}, "lora_rank": {"r": 2}, "seed": seed, "init_seed": init,
        },
        "adapter_sha256": "a",
        "adapter_config_sha256": "c",
        "training": {"steps": 10},
    }  # fmt: skip


def member(
    method: str, lr: str, seed: int, run: Run | None = None, init: int | None = None, **options: Any
) -> ComparedAdapter:
    name = "-".join([method, lr, f"s{seed}", *map(str, options.values())])
    return ComparedAdapter(
        name, Path(name), name, None, run, RunFacts.model_validate(facts(method, lr, seed, init, **options))
    )


def cohort(
    members: list[ComparedAdapter], bases: list[Base] | None = None, diverged: list[Diverged] | None = None
) -> Cohort:
    bases = bases or []
    scores = scores_of_runs([*(base.run for base in bases), *(s.run for s in members if s.run)])
    ranks = {s.name: [2] for s in members}
    return Cohort(members, ["m"], [(30, 50)], ranks, bases, scores, diverged or [], {})


def tabled(g: Cohort, arms: list[Arm], cosines: dict[tuple[str, str], float]) -> SummaryTables:
    """Of runs whose measures all have the value of their cosine; those that are not named are 0 to each other."""
    members, names = g.members, arm_names(arms, g)
    runs = pd.DataFrame([{"run": s.name, "norm": n + 1.0} for n, s in enumerate(members)], columns=list(RUN_COLUMNS))
    seeds = {s.name: s.facts.seeds for s in members if s.facts}
    pairs = []
    for a, b in all_pairs([s.name for s in members]):
        value = cosines.get((a, b), cosines.get((b, a), 0.0))
        kind = pairing(seeds[a], seeds[b], seeds[a][1] == seeds[b][1])
        row = {"run_a": a, "run_b": b, "arm_a": names[a], "arm_b": names[b], "pairing": kind}
        row |= dict.fromkeys(("cosine", "angle_min_left", "barrier_chord", "cka_last"), value)
        pairs.append(row | {"cosine_null": 0.02, "angle_min_left_null": 0.02})
    columns = ["run_a", "run_b", "arm_a", "arm_b", "pairing"]
    rows = pd.DataFrame(pairs, columns=None if pairs else columns)
    benchmark = "quiz" if any(s.run for s in members) else None
    outcomes = outcomes_of(g, arms, benchmark)
    of_arms = arm_pairs(rows, {name: seed for name, (seed, _) in seeds.items()}, [arm.name() for arm in arms])
    return SummaryTables(
        runs, of_arms.merge(compare_arms(outcomes, None, 0.05), on=["arm_a", "arm_b"], how="outer"), outcomes, benchmark
    )


def diverged(method: str, lr: str, seed: int) -> Diverged:
    return Diverged(
        f"{method}-{lr}-s{seed}", Run(Path("x")), StartedFacts.model_validate(facts(method, lr, seed)), "diverged"
    )


class TestArms:
    def test_runs_that_differ_in_their_seeds_only(self) -> None:
        members = [member("sft", "conventional", s) for s in (0, 1)] + [member("dpo", "matched", s) for s in (0, 1)]
        arms = arms_of(cohort(members, diverged=[diverged("dpo", "matched", 2)]))
        assert [arm.name() for arm in arms] == ["sft-conventional", "dpo-matched"]
        assert [len(arm.members) for arm in arms] == [2, 2]
        assert [run.name for run in arms[1].diverged] == ["dpo-matched-s2"]

    def test_every_name_of_a_rate(self) -> None:
        """SFT has one rate as conventional and as matched, DPO as conventional and as matched_low."""
        members = [
            member(*which, 0)
            for which in (
                ("sft", "conventional"), ("sft", "matched_low"), ("dpo", "conventional"), ("dpo", "matched"),
            )
        ]  # fmt: skip
        names = {arm.name(): arm.learning_rates for arm in arms_of(cohort(members))}
        assert names == {
            "sft-conventional": ["conventional", "matched"],
            "sft-matched_low": ["matched_low"],
            "dpo-conventional": ["conventional", "matched_low"],
            "dpo-matched": ["matched"],
        }

    def test_a_rate_of_the_same_name_that_was_trained_is_no_second_name(self) -> None:
        members = [member("sft", "conventional", 0), member("dpo", "matched", 0), member("dpo", "conventional", 0)]
        assert [arm.learning_rates for arm in arms_of(cohort(members))][1:] == [["matched"], ["conventional"]]

    def test_the_version_of_a_methods_statistics_makes_no_distance(self) -> None:
        """It is in the identity of a loss with advantages and not in SFT's, though both have the same rows."""
        grpo, sft = member("grpo", "matched", 0), member("sft", "matched", 0)
        assert grpo.facts is not None
        grpo.facts.identity.update(group_statistics=1)
        one, other = arms_of(cohort([grpo, sft]))
        assert one.values.keys() - other.values.keys() == {"group_statistics"}
        assert one.distance(other) == other.distance(one) == 0

    def test_other_settings_are_told(self) -> None:
        members = [member("dpo", "matched", 0, beta=beta) for beta in (0.1, 0.3)] + [member("sft", "matched", 0)]
        assert [arm.name() for arm in arms_of(cohort(members))] == [
            "dpo-matched method.beta=0.1", "dpo-matched method.beta=0.3", "sft-matched",
        ]  # fmt: skip

    def test_each_run_is_held_against_sft_at_the_next_seed(self) -> None:
        """From one initial adapter; where there is none such, at its own seeds."""
        members = [
            *(member("sft", "conventional", seed, init=0) for seed in (0, 1, 2)),
            *(member("dpo", "matched", seed, init=0) for seed in (0, 1, 2)),
            member("sft", "conventional", 5), member("dpo", "matched", 5), member("dpo", "matched", 6),
        ]  # fmt: skip
        partners = sft_partners(arms_of(cohort(members)), members[0])
        assert {name: partner.name for name, partner in partners.items()} == {
            "sft-conventional-s0": "sft-conventional-s1",
            "sft-conventional-s1": "sft-conventional-s2",
            "sft-conventional-s2": "sft-conventional-s0",
            "sft-conventional-s5": "sft-conventional-s5",
            "dpo-matched-s0": "sft-conventional-s1",
            "dpo-matched-s1": "sft-conventional-s2",
            "dpo-matched-s2": "sft-conventional-s0",
            "dpo-matched-s5": "sft-conventional-s5",
        }
        names = [s.name for s in members]
        chosen = choose(names, "reference", names[0], {name: partner.name for name, partner in partners.items()})
        assert ("sft-conventional-s1", "dpo-matched-s0") in chosen.pairs
        assert ("sft-conventional-s0", "dpo-matched-s0") not in chosen.pairs

    def test_rates_of_several_bases(self) -> None:
        """`lr.peak=1e-3,3e-3`: each arm has the names that mean its rate from its own base."""
        members = []
        for base in (1e-3, 3e-3):
            for method, lr in (("sft", "conventional"), ("dpo", "conventional"), ("dpo", "matched")):
                one = facts(method, lr, 0)
                one["config"]["lr"]["peak"] = base
                one["learning_rate"] = one["identity"]["learning_rate"] = float(
                    f"{one['learning_rate'] * base / 1e-3:.12g}"
                )
                name = f"{method}-{lr}-{base:g}"
                members.append(ComparedAdapter(name, Path(name), name, None, None, RunFacts.model_validate(one)))
        arms = arms_of(cohort(members))
        assert [arm.learning_rates for arm in arms if arm.method == "sft"] == [["conventional", "matched"]] * 2
        assert [arm.at_conventional_rate for arm in arms if arm.method == "dpo"] == [True, False, True, False]

    def test_each_loss_is_held_against_itself_where_its_initial_adapter_is_the_same(self) -> None:
        """Of seeds 0, 1, 2 and 3, of which 0 and 3 share their initial adapter, one pair an arm is a repeat."""
        members = [member(m, "conventional", s, init=s % 3) for m in ("sft", "dpo") for s in range(4)]
        own = [pair for arm in arms_of(cohort(members)) for pair in repeats(arm)]
        assert own == [
            ("sft-conventional-s0", "sft-conventional-s3"), ("dpo-conventional-s0", "dpo-conventional-s3"),
        ]  # fmt: skip
        names = [s.name for s in members]
        without, with_own = (choose(names, "reference", names[0], {}, pairs) for pairs in ([], own))
        assert set(with_own.pairs) - set(without.pairs) == {("dpo-conventional-s0", "dpo-conventional-s3")}
        assert without.left_out == "pairs=reference: only the pairs with sft-conventional-s0"
        assert with_own.left_out == f"{without.left_out}, and the repeats of each loss"

    def test_nine_losses_at_one_seed_have_no_repeats_and_no_other_seed(self) -> None:
        names = [f"run{number}" for number in range(9)]
        chosen = choose(names, None, "run0", dict.fromkeys(names, "run0"))
        assert chosen.left_out == (
            "9 runs, so only each run with SFT, at another seed if there is one (pairs=all measures all 36)"
        )

    @pytest.mark.parametrize("name", ["sft-conventional", "sft-matched"])
    def test_an_adapter_made_elsewhere_does_not_join_an_arm(self, name: str) -> None:
        runs = cohort([member("sft", "conventional", 0), member("dpo", "matched", 0)])
        runs.members.append(ComparedAdapter(name, Path(name), "theirs"))
        with pytest.raises(InputError, match=f"^adapters.{name}: the name is already taken by a loss of the runs$"):
            arm_names(arms_of(runs), runs)


def test_equal_adapters_of_two_losses_are_two_runs() -> None:
    """As SFT and RFT where all rollouts are right; one run that two sweeps hold is one."""
    runs = [replace(member(method, "conventional", 0), sha256="same") for method in ("sft", "rft", "sft")]
    again = replace(runs[2], name="seeds/sft")
    left_out: dict[str, str] = {}
    assert _distinct([*runs[:2], again], left_out) == runs[:2]
    assert left_out == {"seeds/sft": "the same run as sft-conventional-s0"}


class TestAblation:
    def rows(self, members: list[ComparedAdapter], cosines: dict[tuple[str, str], float], **more: Any) -> pd.DataFrame:
        g = cohort(members, **more)
        reference = next(s for s in members if s.name.startswith("sft-conventional"))
        arms = arms_of(g)
        table = arm_summary_table(arms, reference, tabled(g, arms, cosines))
        assert list(table.columns) == list(COLUMNS)
        return table.set_index("arm")

    def test_what_compares_two_arms_is_their_row_of_arm_pairs(self) -> None:
        """DPO to SFT from one A: (.2 + .4)/2 = .3 over pairs of other seeds, that of one seed does not count."""
        members = [member(m, "conventional", s, init=0) for m in ("sft", "dpo") for s in (0, 1)]
        sft, dpo = ([f"{m}-conventional-s{s}" for s in (0, 1)] for m in ("sft", "dpo"))
        cosines = {
            (sft[0], dpo[1]): 0.2, (sft[1], dpo[0]): 0.4, (sft[0], dpo[0]): 0.9,
            (sft[0], sft[1]): 0.64, (dpo[0], dpo[1]): 0.36,
        }  # fmt: skip
        row = self.rows(members, cosines).loc["dpo-conventional"]
        assert row["cosine_to_sft"] == pytest.approx(0.3)
        assert (row["cosine_to_sft_min"], row["cosine_to_sft_max"]) == (0.2, 0.4)
        assert row["cosine_to_sft_null"] == pytest.approx(0.02)
        assert row["cosine_to_sft_ceiling"] == pytest.approx(0.48)  # √(.64·.36); of barriers the mean, ½(.64 + .36)
        assert row["barrier_chord_to_sft_repeat"] == pytest.approx(0.5)
        assert row["cosine_to_sft_relative"] == pytest.approx(0.3 / 0.48)
        assert (row["cosine_repeat"], row["pairing"], row["repeats"]) == (pytest.approx(0.36), "same init", 2)
        assert (row["cosine_to_sft_verdict"], row["sft"]) == ("too few seeds", "sft-conventional")
        assert row["cosine_to_dpo_conventional"] == pytest.approx(0.36)
        assert (row["norm"], row["norm_std"], row["seeds"]) == (3.5, pytest.approx(np.sqrt(0.5)), 2)

    def test_without_a_repeat_there_is_no_ceiling(self) -> None:
        members = [member(m, "conventional", 0) for m in ("sft", "dpo")]
        row = self.rows(members, {("sft-conventional-s0", "dpo-conventional-s0"): 0.3}).loc["dpo-conventional"]
        assert (row["cosine_to_sft"], row["pairing"]) == (0.3, "same seeds")
        assert np.isnan(row["cosine_to_sft_ceiling"])

    def test_sft_and_itself_are_its_repeats(self) -> None:
        members = [member("sft", "conventional", s, init=i) for s, i in ((0, 0), (1, 1), (3, 0))]
        cosines = {
            ("sft-conventional-s0", "sft-conventional-s3"): 0.7,
            ("sft-conventional-s0", "sft-conventional-s1"): 0.1,
        }
        row = self.rows(members, cosines).loc["sft-conventional"]
        assert row["cosine_to_sft"] == row["cosine_repeat"] == pytest.approx(0.7)
        assert np.isnan(row["cosine_to_sft_ceiling"])

    def test_sft_at_the_same_rate(self) -> None:
        members = [member(*w, 0) for w in (("sft", "conventional"), ("sft", "matched_low"), ("dpo", "conventional"))]
        low, dpo = members[1].name, members[2].name
        table = self.rows(members, {(low, dpo): 0.6, (members[0].name, dpo): 0.1})
        row = table.loc["dpo-conventional"]
        assert (row["cosine_to_sft"], row["cosine_to_sft_same_rate"]) == (pytest.approx(0.1), pytest.approx(0.6))
        elsewhere = facts("dpo", "conventional", 0)
        elsewhere["identity"]["rollouts"] = {"policy": "base"}  # no SFT was trained on these
        other = ComparedAdapter("other", Path("other"), "other", None, None, RunFacts.model_validate(elsewhere))
        of_other = self.rows([*members, other], {(low, "other"): 0.5}).loc["dpo-conventional rollouts.policy=base"]
        assert np.isnan(of_other["cosine_to_sft_same_rate"])
        again = table.loc["dpo-matched_low"]
        assert (again["alias_of"], again["lr"], again["norm"]) == ("dpo-conventional", "matched_low", row["norm"])

    def test_what_diverged_is_counted_and_not_averaged(self) -> None:
        members = [member("sft", "conventional", 0), member("dpo", "matched", 0)]
        lost = [diverged("dpo", "matched", 1), diverged("rft", "matched", 1)]
        table = self.rows(members, {}, diverged=lost)
        assert tuple(table.loc["dpo-matched", ["seeds", "diverged", "norm"]]) == (1, 1, 2.0)
        assert tuple(table.loc["rft-matched", ["seeds", "diverged"]]) == (0, 1)
        assert np.isnan(table.loc["rft-matched", "norm"])

    def test_accuracies_are_of_problems_and_seeds(self, tmp_path: Path) -> None:
        """Shares right of the four problems over two seeds: SFT 1, 1, ½, ½ and the base 0, 0, 0, 1.

        The differences 1, 1, ½, −½ sum up to 2. Of the 16 ways to flip their signs the sum is 2 or more in (+, +) with
        (½, ½), (½, −½), (−½, ½), and −2 or less in their mirror images: p = 6/16.
        """
        base = Base("base", scored(tmp_path / "b", {p: [p == "d"] for p in "abcd"}), BaseFacts.model_validate(
            {"base": {"sha256": "b"}, "config": {"model": {"name": "t"}}}
        ))  # fmt: skip
        members = [
            member("sft", "conventional", s, scored(tmp_path / f"s{s}", {p: [p in right] for p in "abcd"}))
            for s, right in ((0, "abc"), (1, "abd"))
        ]
        collapsed = member("dpo", "matched", 0, scored(tmp_path / "d0", {p: [False] for p in "abcd"}))
        table = self.rows([*members, collapsed], {}, bases=[base])
        row = table.loc["sft-conventional"]
        assert (row["accuracy"], row["accuracy_std"], row["accuracy_min"], row["n"]) == (0.75, 0.0, 0.75, 4)
        assert row["base_diff"] == pytest.approx(0.5)
        assert row["base_p"] == pytest.approx(6 / 16)
        assert row["base_verdict"] == "cannot say"  # four differences of one sign have p = 1/8
        assert np.isnan(row["sft_diff"])
        lost = table.loc["dpo-matched"]
        # None of four against one of four is no collapse: it may well be chance.
        assert (lost["collapsed"], lost["accuracy"], lost["sft_diff"]) == (0, 0.0, pytest.approx(-0.75))

    def test_one_family_and_one_verdict_a_comparison(self) -> None:
        """Of 20 problems x has all right, y half, the base none: p = 2/2²⁰, 2/2¹⁰ and 2/2¹⁰, times 3, 2 and 2 (Holm).

        The difference of y over two runs, its interval and its p are of their average: a third run that is as good
        changes all three.
        """
        problems = [f"p{n}" for n in range(20)]
        x, base = (pd.DataFrame({name: [value] * 20}, index=problems) for name, value in (("x", 1.0), ("b", 0.0)))
        half = [1.0] * 10 + [0.0] * 10
        table = compare_arms({"x": x, "y": pd.DataFrame({"y": half}, index=problems), "base": base}, None, 0.05)
        found = table.set_index(["arm_a", "arm_b"])
        assert found["accuracy_diff"].tolist() == [0.5, 1.0, 0.5]
        assert found["p"].tolist() == pytest.approx([2 / 2**10, 2 / 2**20, 2 / 2**10])
        assert found["p_holm"].tolist() == pytest.approx([4 / 2**10, 6 / 2**20, 4 / 2**10])
        assert found["accuracy_verdict"].tolist() == ["better"] * 3
        assert found.loc[("x", "y"), "detectable_diff"] == detectable_difference(10, 20, 0.05 / 3)
        two = pd.DataFrame({"y": half, "z": half[::-1]}, index=problems)  # ½ on every problem
        row = compare_arms({"y": two, "base": base}, None, 0.05).iloc[0]
        assert (row["accuracy_diff"], row["diff_low"], row["diff_high"]) == (0.5, 0.5, 0.5)
        assert row["p"] == row["p_holm"] == pytest.approx(2 / 2**20)
        assert np.isnan(row["detectable_diff"])  # of averages no difference is a count of problems

    def test_what_is_not_of_the_family_is_not_tested(self) -> None:
        arms = {name: pd.DataFrame({name: [0.0, 1.0]}, index=["p", "q"]) for name in ("x", "y", "base")}
        table = compare_arms(arms, {frozenset(("x", "base"))}, 0.05)
        assert table["p"].notna().tolist() == [False, True, False]
        assert table["accuracy_verdict"].notna().tolist() == [False, True, False]
        assert table["accuracy_diff"].tolist() == [0.0, 0.0, 0.0]


def test_fallen_to_nothing() -> None:
    """To a tenth of the base's accuracy or less, and not by chance: of n problems lost the exact p is 2/2ⁿ."""
    ones, zeros = pd.Series(np.ones(20)), pd.Series(np.zeros(20))
    tenth, more = (pd.Series([1.0] * right + [0.0] * (20 - right)) for right in (2, 3))
    assert has_collapsed(zeros, ones)
    assert has_collapsed(tenth, ones)
    assert not has_collapsed(more, ones)
    assert has_collapsed(zeros[:6], ones[:6])  # 2/2⁶ = .03
    assert not has_collapsed(zeros[:5], ones[:5])  # 2/2⁵ = .06
    assert not has_collapsed(zeros, zeros)  # where the base has nothing, nothing can be lost
    assert not has_collapsed(zeros, None)
