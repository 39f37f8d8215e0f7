"""The arms of the learning-rate-matched comparison: who belongs to which, what is averaged, what is not left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from losslens.analysis.ablation import COLUMNS, Tabled, ablation_table
from losslens.analysis.accuracy import RUN_COLUMNS, has_collapsed
from losslens.analysis.arms import arms_of, repetitions, sft_partners
from losslens.analysis.manifests import BaseFacts, RunFacts, StartedFacts
from losslens.analysis.pairs import all_pairs, choose
from losslens.analysis.scores import scores_of
from losslens.analysis.subjects import Base, Diverged, Gathered, Subject
from losslens.runs import Run
from tests.test_analysis_tables import MODEL, scored

RATES = {
    "conventional": {"base": 1e-3, "pointwise_factor": 1.0, "pairwise_factor": 0.1},
    "matched": {"base": 1e-3, "pointwise_factor": 1.0, "pairwise_factor": 1.0},
    "matched_low": {"base": 1e-3, "pointwise_factor": 0.1, "pairwise_factor": 0.1},
}


def facts(method: str, lr: str, seed: int, init: int | None = None, **options: Any) -> dict[str, Any]:
    kind = "pairwise_factor" if method == "dpo" else "pointwise_factor"
    rate = round(RATES[lr]["base"] * RATES[lr][kind], 12)
    init = seed if init is None else init
    section = {"name": method, **({"beta": 0.1, "loss_type": "sigmoid"} if method == "dpo" else {}), **options}
    return {
        "method": method,
        "pairwise": method == "dpo",
        "learning_rate": rate,
        "base": {"sha256": "b"},
        "rollouts": {"folder": "r", "sha256": "r"},
        "trained_on": {"share_right": 0.7},
        "initial_adapter": {"folder": str(init), "sha256": str(init)},
        "identity": {"method": section, "learning_rate": rate, "seed": seed, "init_seed": init},
        "config": {
            "data": {"name": "quiz", "eval": 9}, "benchmark": {}, "evaluation": {}, "rollouts": {}, "model": MODEL,
            "lr": {"name": lr, **RATES[lr]}, "lora_rank": {"r": 2}, "seed": seed, "init_seed": init,
        },
        "adapter_sha256": "a",
        "adapter_config_sha256": "c",
        "training": {"steps": 10},
    }  # fmt: skip


def subject(
    method: str, lr: str, seed: int, run: Run | None = None, init: int | None = None, **options: Any
) -> Subject:
    name = "-".join([method, lr, f"s{seed}", *map(str, options.values())])
    return Subject(name, Path(name), name, None, run, RunFacts.model_validate(facts(method, lr, seed, init, **options)))


def gathered(
    subjects: list[Subject], bases: list[Base] | None = None, diverged: list[Diverged] | None = None
) -> Gathered:
    bases = bases or []
    scores = scores_of([*(base.run for base in bases), *(s.run for s in subjects if s.run)])
    ranks = {s.name: [2] for s in subjects}
    return Gathered(subjects, ["m"], [(30, 50)], ranks, bases, scores, diverged or [], {})


def tabled(subjects: list[Subject], cosines: dict[tuple[str, str], float]) -> Tabled:
    runs = pd.DataFrame([{"run": s.name, "norm": n + 1.0} for n, s in enumerate(subjects)], columns=list(RUN_COLUMNS))
    pairs = []
    for a, b in all_pairs([s.name for s in subjects]):
        value = cosines.get((a, b), cosines.get((b, a), 0.0))
        measures = ("cosine", "angle_min_left", "barrier_chord", "cka_last")
        row = {"run_a": a, "run_b": b, **dict.fromkeys(measures, value)}
        pairs.append(row | {f"{m}_null": 0.02 for m in measures})
    return Tabled(runs, pd.DataFrame(pairs))


def diverged(method: str, lr: str, seed: int) -> Diverged:
    return Diverged(
        f"{method}-{lr}-s{seed}", Run(Path("x")), StartedFacts.model_validate(facts(method, lr, seed)), "diverged"
    )


class TestArms:
    def test_runs_that_differ_in_their_seeds_only(self) -> None:
        subjects = [subject("sft", "conventional", s) for s in (0, 1)] + [subject("dpo", "matched", s) for s in (0, 1)]
        arms = arms_of(gathered(subjects, diverged=[diverged("dpo", "matched", 2)]))
        assert [arm.name() for arm in arms] == ["sft-conventional", "dpo-matched"]
        assert [len(arm.subjects) for arm in arms] == [2, 2]
        assert [run.name for run in arms[1].diverged] == ["dpo-matched-s2"]

    def test_every_name_of_a_rate(self) -> None:
        """SFT has one rate as conventional and as matched, DPO as conventional and as matched_low."""
        subjects = [
            subject(*which, 0)
            for which in (
                ("sft", "conventional"), ("sft", "matched_low"), ("dpo", "conventional"), ("dpo", "matched"),
            )
        ]  # fmt: skip
        names = {arm.name(): arm.learning_rates for arm in arms_of(gathered(subjects))}
        assert names == {
            "sft-conventional": ["conventional", "matched"],
            "sft-matched_low": ["matched_low"],
            "dpo-conventional": ["conventional", "matched_low"],
            "dpo-matched": ["matched"],
        }

    def test_a_rate_of_the_same_name_that_was_trained_is_no_second_name(self) -> None:
        subjects = [subject("sft", "conventional", 0), subject("dpo", "matched", 0), subject("dpo", "conventional", 0)]
        assert [arm.learning_rates for arm in arms_of(gathered(subjects))][1:] == [["matched"], ["conventional"]]

    def test_other_settings_are_told(self) -> None:
        subjects = [subject("dpo", "matched", 0, beta=beta) for beta in (0.1, 0.3)] + [subject("sft", "matched", 0)]
        assert [arm.name() for arm in arms_of(gathered(subjects))] == [
            "dpo-matched method.beta=0.1", "dpo-matched method.beta=0.3", "sft-matched",
        ]  # fmt: skip

    def test_each_run_is_held_against_sft_at_its_own_seeds(self) -> None:
        subjects = [
            subject("sft", "matched_low", 0), subject("sft", "conventional", 0), subject("sft", "conventional", 1),
            subject("dpo", "matched", 0), subject("dpo", "matched", 1), subject("dpo", "matched", 2),
        ]  # fmt: skip
        partners = sft_partners(arms_of(gathered(subjects)), subjects[1])
        assert {name: partner.name for name, partner in partners.items()} == {
            "sft-conventional-s0": "sft-conventional-s0",
            "sft-conventional-s1": "sft-conventional-s1",
            "sft-matched_low-s0": "sft-conventional-s0",
            "dpo-matched-s0": "sft-conventional-s0",
            "dpo-matched-s1": "sft-conventional-s1",
        }
        names = [s.name for s in subjects]
        chosen = choose(names, "reference", names[1], {name: partner.name for name, partner in partners.items()})
        assert set(map(frozenset, chosen.pairs)) == {
            frozenset(pair)
            for pair in (
                ("sft-matched_low-s0", "sft-conventional-s0"), ("sft-conventional-s1", "sft-conventional-s0"),
                ("dpo-matched-s0", "sft-conventional-s0"), ("dpo-matched-s1", "sft-conventional-s1"),
                ("dpo-matched-s2", "sft-conventional-s0"),
            )
        }  # fmt: skip

    def test_rates_of_several_bases(self) -> None:
        """`lr.base=1e-3,3e-3`: each arm has the names that mean its rate from its own base."""
        subjects = []
        for base in (1e-3, 3e-3):
            for method, lr in (("sft", "conventional"), ("dpo", "conventional"), ("dpo", "matched")):
                one = facts(method, lr, 0)
                one["config"]["lr"]["base"] = base
                one["learning_rate"] = one["identity"]["learning_rate"] = float(
                    f"{one['learning_rate'] * base / 1e-3:.12g}"
                )
                name = f"{method}-{lr}-{base:g}"
                subjects.append(Subject(name, Path(name), name, None, None, RunFacts.model_validate(one)))
        arms = arms_of(gathered(subjects))
        assert [arm.learning_rates for arm in arms if arm.method == "sft"] == [["conventional", "matched"]] * 2
        assert [arm.at_a_tenth for arm in arms if arm.method == "dpo"] == [True, False, True, False]

    def test_each_loss_is_held_against_itself_where_its_initial_adapter_is_the_same(self) -> None:
        """Of seeds 0, 1, 2 and 3, of which 0 and 3 share their initial adapter, one pair an arm is its floor."""
        subjects = [subject(m, "conventional", s, init=s % 3) for m in ("sft", "dpo") for s in range(4)]
        floors = [pair for arm in arms_of(gathered(subjects)) for pair in repetitions(arm)]
        assert floors == [
            ("sft-conventional-s0", "sft-conventional-s3"), ("dpo-conventional-s0", "dpo-conventional-s3"),
        ]  # fmt: skip
        names = [s.name for s in subjects]
        without, with_floors = (choose(names, "reference", names[0], {}, repeats).pairs for repeats in ([], floors))
        assert set(with_floors) - set(without) == {("dpo-conventional-s0", "dpo-conventional-s3")}


class TestAblation:
    def rows(self, subjects: list[Subject], cosines: dict[tuple[str, str], float], **more: Any) -> pd.DataFrame:
        g = gathered(subjects, **more)
        reference = next(s for s in subjects if s.name.startswith("sft-conventional"))
        benchmark = "quiz" if any(s.run for s in subjects) else None
        table = ablation_table(g, arms_of(g), reference, tabled(subjects, cosines), benchmark)
        assert list(table.columns) == list(COLUMNS)
        return table.set_index("arm")

    def test_means_over_pairs_of_one_seed(self) -> None:
        """DPO to SFT: (.2 + .4)/2 = .3, standard deviation .1·√2; pairs of different seeds do not count."""
        subjects = [subject(m, "conventional", s) for m in ("sft", "dpo") for s in (0, 1)]
        cosines = {
            ("sft-conventional-s0", "dpo-conventional-s0"): 0.2,
            ("sft-conventional-s1", "dpo-conventional-s1"): 0.4,
            ("sft-conventional-s0", "dpo-conventional-s1"): 0.9,
        }
        row = self.rows(subjects, cosines).loc["dpo-conventional"]
        assert row["cosine_to_sft"] == pytest.approx(0.3)
        assert row["cosine_to_sft_std"] == pytest.approx(0.1 * np.sqrt(2))
        assert row["cosine_to_sft_null"] == pytest.approx(0.02)
        assert np.isnan(row["cosine_to_sft_floor"])  # no two runs began with one initial adapter
        assert row["cosine_to_dpo_conventional"] == 1
        assert (row["norm"], row["norm_std"], row["seeds"]) == (3.5, pytest.approx(np.sqrt(0.5)), 2)

    def test_sft_itself_has_its_own_repetition_as_floor(self) -> None:
        subjects = [subject("sft", "conventional", s, init=i) for s, i in ((0, 0), (1, 1), (3, 0))]
        cosines = {
            ("sft-conventional-s0", "sft-conventional-s3"): 0.7,
            ("sft-conventional-s0", "sft-conventional-s1"): 0.1,
        }
        row = self.rows(subjects, cosines).loc["sft-conventional"]
        assert (row["cosine_to_sft"], row["cosine_to_sft_floor"]) == (1, pytest.approx(0.7))
        assert row["cosine_to_itself"] == pytest.approx(0.7)

    def test_the_floor_of_two_losses_of_unequal_noise(self) -> None:
        """Against themselves .64 and .36: two losses that pull one way would have √(.64·.36) = .48; CKA the mean."""
        subjects = [subject(m, "conventional", s, init=0) for m in ("sft", "dpo") for s in (0, 3)]
        names = [s.name for s in subjects]
        row = self.rows(subjects, {(names[0], names[1]): 0.64, (names[2], names[3]): 0.36}).loc["dpo-conventional"]
        assert (row["cosine_to_sft_floor"], row["cosine_to_itself"]) == (pytest.approx(0.48), pytest.approx(0.36))
        assert row["cosine_to_dpo_conventional_floor"] == pytest.approx(0.36)
        assert row["cka_last_to_sft_floor"] == pytest.approx(0.5)

    def test_sft_at_the_same_rate(self) -> None:
        subjects = [subject(*w, 0) for w in (("sft", "conventional"), ("sft", "matched_low"), ("dpo", "conventional"))]
        low, dpo = subjects[1].name, subjects[2].name
        table = self.rows(subjects, {(low, dpo): 0.6, (subjects[0].name, dpo): 0.1})
        row = table.loc["dpo-conventional"]
        assert (row["cosine_to_sft"], row["cosine_to_sft_same_rate"]) == (pytest.approx(0.1), pytest.approx(0.6))
        elsewhere = facts("dpo", "conventional", 0)
        elsewhere["identity"]["rollouts"] = {"policy": "base"}  # no SFT was trained on these
        other = Subject("other", Path("other"), "other", None, None, RunFacts.model_validate(elsewhere))
        of_other = self.rows([*subjects, other], {(low, "other"): 0.5}).loc["dpo-conventional rollouts.policy=base"]
        assert np.isnan(of_other["cosine_to_sft_same_rate"])
        again = table.loc["dpo-matched_low"]
        assert (again["same_as"], again["lr"], again["norm"]) == ("dpo-conventional", "matched_low", row["norm"])

    def test_what_diverged_is_counted_and_not_averaged(self) -> None:
        subjects = [subject("sft", "conventional", 0), subject("dpo", "matched", 0)]
        lost = [diverged("dpo", "matched", 1), diverged("rft", "matched", 1)]
        table = self.rows(subjects, {}, diverged=lost)
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
        subjects = [
            subject("sft", "conventional", s, scored(tmp_path / f"s{s}", {p: [p in right] for p in "abcd"}))
            for s, right in ((0, "abc"), (1, "abd"))
        ]
        collapsed = subject("dpo", "matched", 0, scored(tmp_path / "d0", {p: [False] for p in "abcd"}))
        table = self.rows([*subjects, collapsed], {}, bases=[base])
        row = table.loc["sft-conventional"]
        assert (row["accuracy"], row["accuracy_std"], row["accuracy_min"], row["n"]) == (0.75, 0.0, 0.75, 4)
        assert row["base_diff"] == pytest.approx(0.5)
        assert row["base_p"] == pytest.approx(6 / 16)
        assert row["base_verdict"] == "underpowered"  # four differences of one sign have p = 1/8
        assert np.isnan(row["sft_diff"])
        lost = table.loc["dpo-matched"]
        assert (lost["collapsed"], lost["accuracy"], lost["sft_diff"]) == (1, 0.0, pytest.approx(-0.75))


def test_fallen_to_nothing() -> None:
    base = pd.Series([1.0, 0.0])
    assert has_collapsed(0.0, base)
    assert has_collapsed(0.05, base)
    assert not has_collapsed(0.06, base)
    assert not has_collapsed(0.0, pd.Series([0.0, 0.0]))  # where the base has nothing, nothing can be lost
    assert not has_collapsed(0.0, None)
