"""Every loss at its own best rate: the choice by hand, held-out problems that the report does not hold, and a sweep."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from losslens.analysis.arms import arms_of
from losslens.analysis.cohort import ComparedAdapter, Unfinished
from losslens.analysis.gathering import find_runs
from losslens.analysis.manifests import RunFacts, StartedFacts
from losslens.analysis.rate_choice import (
    ALL_RUNS,
    NORM,
    OTHER_SEEDS,
    SAME_RUNS,
    STEPS,
    TunedLoss,
    best_rate,
    common_norm,
    losses_of,
    rate_rows,
    with_unfinished,
)
from losslens.analysis.tuning import (
    CONVENTIONAL,
    MATCHED,
    NO_VERDICT,
    TUNED,
    TUNED_NORM,
    Benchmarks,
    Tuning,
    repeat_command,
    require_other_problems,
    tune,
)
from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import Data
from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.errors import InputError
from losslens.losses import builtin_losses
from losslens.problems import Problem
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.report.page import write_report
from losslens.rollouts.sample import held_out_problems, problem_source
from losslens.runs.run import Run, runs_of
from losslens.runs.spec import RunSpec
from tests.conftest import ROOT, command, script
from tests.test_ablation import cohort, diverged, facts
from tests.test_analysis_tables import scored

fast = pytest.mark.fast


def member(method: str, factor: float, seed: int = 0, init: int | None = None, **options: Any) -> ComparedAdapter:
    one = facts(method, "matched", seed, init, **options)
    one["config"]["lr"] = {"name": f"x{factor:g}", "peak": 1e-3, "factor": factor}
    one["learning_rate"] = one["identity"]["learning_rate"] = round(1e-3 * factor, 12)
    name = "-".join([method, f"x{factor:g}", f"s{seed}", *map(str, options.values())])
    return ComparedAdapter(name, Path(name), name, None, None, RunFacts.model_validate(one))


def loss_of(*members: ComparedAdapter) -> TunedLoss:
    [loss] = losses_of(arms_of(cohort(list(members))))
    return loss


def outcomes(loss: TunedLoss, *right: list[int] | list[list[int]], of: int = 20) -> dict[str, pd.DataFrame]:
    """By arm in the order of the rates, how many of the first problems each of its runs solves (a list: which runs)."""
    return {
        arm.name(): pd.DataFrame(
            {run.name: [float(n < count) for n in range(of)] for run, count in zip(arm.members, counts, strict=True)},
            index=[f"p{n}" for n in range(of)],
        )
        for arm, counts in zip(loss.arms, right, strict=True)
    }


def unfinished(method: str, factor: float, seed: int, state: str) -> Unfinished:
    run = member(method, factor, seed)
    assert run.facts is not None
    return Unfinished(run.name, StartedFacts.model_validate(run.facts.model_dump()), state)


def two_rates() -> list[pd.DataFrame]:
    """Of two problems, the first rate solves none and the second one."""
    return [
        pd.DataFrame({f"dpo-x{factor}-s0": right}, index=["p", "q"])
        for factor, right in (("0.1", [0.0, 0.0]), ("1", [1.0, 0.0]))
    ]


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).set_index("learning_rate")


@fast
class TestChoice:
    def test_by_hand(self) -> None:
        """Of 20 problems 8, 10, 16 are solved, each set within the next: the best differs from the others on 8 and 6.

        The exact p of 8 : 0 is 2/2⁸ = .0078, of 6 : 0 it is 2/2⁶ = .031; twice as much for two comparisons: .0156 and
        .0625. Of the two only the first is worse than the best by more than chance. Wilson of 16/20: .584 to .919.
        """
        loss = loss_of(*(member("dpo", factor) for factor in (3.0, 0.1, 1.0)))
        assert [arm.learning_rate for arm in loss.arms] == [1e-4, 1e-3, 3e-3]
        rows = table(rate_rows(loss, outcomes(loss, [8], [16], [10]), outcomes(loss, [1], [2], [3], of=4)))
        assert rows["validation"].tolist() == [0.4, 0.8, 0.5]
        assert rows["chosen"].tolist() == [False, True, False]
        assert rows["p"].tolist() == pytest.approx([2 / 2**8, np.nan, 2 / 2**6], nan_ok=True)
        assert rows["p_bonferroni"].tolist() == pytest.approx([4 / 2**8, np.nan, 4 / 2**6], nan_ok=True)
        assert rows["may_be_best"].tolist() == [False, True, True]
        assert rows["diff_to_chosen"].tolist() == pytest.approx([-0.4, np.nan, -0.3], nan_ok=True)
        assert rows.loc[1e-3, ["validation_low", "validation_high"]].tolist() == pytest.approx([0.584, 0.919], abs=1e-3)
        # Reported on four other problems, on which another rate is better: nothing of the choice changes.
        assert rows["accuracy"].tolist() == [0.25, 0.5, 0.75]
        assert not rows["at_edge"].any()
        assert set(rows["rule"]) == {STEPS}

    def test_of_equal_scores_the_smaller_rate(self) -> None:
        loss = loss_of(*(member("dpo", factor) for factor in (0.1, 1.0, 3.0)))
        rows = table(rate_rows(loss, outcomes(loss, [9], [12], [12]), {}))
        assert rows["chosen"].tolist() == [False, True, False]
        assert rows["p_bonferroni"].tolist()[2] == 1.0

    @pytest.mark.parametrize(("right", "at"), [((9, 5, 5), 0), ((5, 5, 9), 2), ((5, 9, 5), None)])
    def test_the_end_of_the_grid(self, right: tuple[int, ...], at: int | None) -> None:
        loss = loss_of(*(member("dpo", factor) for factor in (0.1, 1.0, 3.0)))
        rows = rate_rows(loss, outcomes(loss, *([count] for count in right)), {})
        assert [place for place, row in enumerate(rows) if row["at_edge"]] == ([] if at is None else [at])

    def test_a_rate_of_which_a_run_of_the_choice_diverged_is_no_candidate(self) -> None:
        """Its other run is the best of all. Its neighbour is not at the end: the grid went on, and failed."""
        members = [member("dpo", factor, seed) for factor in (0.1, 1.0) for seed in (0, 1)] + [member("dpo", 3.0, 1)]
        loss = loss_of(*members)
        loss.arms[2].diverged.append(diverged("dpo", "matched", 0))
        rows = table(rate_rows(loss, outcomes(loss, [5, 5], [6, 6], [20]), {}))
        assert rows["chosen"].tolist() == [False, True, False]
        assert rows["diverged"].tolist() == [0, 0, 1]
        assert rows["status"].tolist() == ["compared", "compared", "diverged"]
        assert np.isnan(rows.loc[3e-3, "validation"])
        assert not rows["at_edge"].any()
        assert rows.loc[1e-4, "p"] == rows.loc[1e-4, "p_bonferroni"] == 1.0  # of two candidates one comparison

    def test_a_repeat_that_diverged_does_not_change_the_choice(self) -> None:
        loss = loss_of(member("dpo", 0.1), member("dpo", 1.0), member("dpo", 1.0, 1), member("dpo", 3.0))
        loss.arms[1].diverged.append(diverged("dpo", "matched", 2))
        rows = table(rate_rows(loss, outcomes(loss, [5], [6, 6], [4]), {}))
        assert rows["chosen"].tolist() == [False, True, False]
        assert rows["diverged"].tolist() == [0, 1, 0]

    def test_repeats_of_a_chosen_rate_do_not_change_the_choice_and_are_what_is_reported(self) -> None:
        """Seed 1 of the best rate solves nothing. The choice is made on seed 0, the accuracy is of seed 1."""
        loss = loss_of(member("dpo", 0.1), member("dpo", 1.0), member("dpo", 1.0, 1))
        validation = outcomes(loss, [10], [12, 0])
        rows = table(rate_rows(loss, validation, validation))
        assert rows["chosen"].tolist() == [False, True]
        assert rows.loc[1e-3, ["validation", "selection_runs", "runs", "accuracy"]].tolist() == [0.6, 1, 2, 0.0]
        assert rows["reported_on"].tolist() == [SAME_RUNS, OTHER_SEEDS]
        assert rows["reported_runs"].tolist() == [1, 1]

    def test_a_repeat_from_the_initial_adapter_of_the_choice_is_reported_only_if_there_is_no_other(self) -> None:
        """Seed 3 starts where seed 0 did, and shares the luck of that start."""
        of_3 = member("dpo", 1.0, 3, init=0)
        loss = loss_of(member("dpo", 0.1), member("dpo", 1.0), of_3)
        names = ["dpo-x1-s0", "dpo-x1-s1", of_3.name]
        assert loss.reported(loss.arms[1], names) == ([of_3.name], OTHER_SEEDS)
        loss = loss_of(member("dpo", 0.1), *(member("dpo", 1.0, seed) for seed in (0, 1)), of_3)
        assert loss.reported(loss.arms[1], names) == (["dpo-x1-s1"], OTHER_SEEDS)
        # One that was not scored is passed over; without any the runs of the choice are reported, and marked.
        assert loss.reported(loss.arms[1], ["dpo-x1-s0", of_3.name]) == ([of_3.name], OTHER_SEEDS)
        assert loss.reported(loss.arms[1], ["dpo-x1-s0"]) == (["dpo-x1-s0"], SAME_RUNS)

    def test_of_a_single_rate_all_runs_are_reported(self) -> None:
        loss = loss_of(member("dpo", 1.0), member("dpo", 1.0, 1))
        [row] = rate_rows(loss, outcomes(loss, [8, 12]), outcomes(loss, [8, 12]))
        assert (row["accuracy"], row["reported_runs"], row["reported_on"]) == (0.5, 2, ALL_RUNS)

    def test_failed_and_unfinished_rates_are_listed(self) -> None:
        """They are no end of the grid that was tried, and take no seed from the choice."""
        arms = arms_of(cohort([member("dpo", 0.1), member("dpo", 1.0)]))
        started = [(3.0, 0, "failed"), (10.0, 0, "running"), (1.0, 1, "failed")]
        [loss] = losses_of(with_unfinished(arms, [unfinished("dpo", *run) for run in started]))
        some = {arm.name(): loss_outcomes for arm, loss_outcomes in zip(loss.arms, two_rates(), strict=False)}
        rows = table(rate_rows(loss, some, {}))
        assert rows.index.tolist() == [1e-4, 1e-3, 3e-3, 1e-2]
        assert rows["status"].tolist() == ["compared", "compared", "failed", "not finished"]
        assert rows["failed"].tolist() == [0, 1, 1, 0]
        assert rows["unfinished"].tolist() == [0, 0, 0, 1]
        assert rows["diverged"].sum() == 0
        assert rows["chosen"].tolist() == rows["at_edge"].tolist() == [False, True, False, False]

    def test_the_mean_over_seeds(self) -> None:
        """(9 + 11)/40 is more than (8 + 11)/40; one seed each would be a tie at 11."""
        loss = loss_of(*(member("dpo", factor, seed) for factor in (0.1, 1.0) for seed in (0, 1)))
        rows = rate_rows(loss, outcomes(loss, [8, 11], [9, 11]), {})
        assert [row["validation"] for row in rows] == pytest.approx([19 / 40, 20 / 40])
        assert [row["chosen"] for row in rows] == [False, True]

    def test_without_a_common_seed_nothing_is_chosen(self) -> None:
        loss = loss_of(member("dpo", 0.1, 0), member("dpo", 1.0, 1))
        rows = table(rate_rows(loss, outcomes(loss, [9], [8]), outcomes(loss, [9], [8])))
        assert rows["status"].tolist() == ["no common seed"] * 2
        assert not rows[["chosen", "may_be_best"]].any(axis=None)
        assert "p" not in rows

    def test_where_nothing_is_known_nothing_is_chosen(self) -> None:
        loss = loss_of(member("dpo", 0.1), member("dpo", 1.0))
        assert not any(row["chosen"] or row["may_be_best"] for row in rate_rows(loss, {}, {}))

    def test_other_problems_are_not_compared(self) -> None:
        loss = loss_of(member("dpo", 0.1), member("dpo", 1.0))
        scores = outcomes(loss, [9], [8])
        name = loss.arms[1].name()
        scores[name] = scores[name].rename(index={"p0": "q0"})
        with pytest.raises(InputError, match=r"^dpo-x1 and dpo-x0.1: not scored on the same problems; no rate can be"):
            rate_rows(loss, scores, {})


@fast
def test_accuracies_on_other_seeds_are_unbiased_and_those_of_the_choice_are_not() -> None:
    """Five equal rates of accuracy .5; runs are lucky by s = .02 on all problems: the best of five has 1.163·s.

    That is E max of five standard normals, here .0233: the choice is of the luck alone, and other problems do not
    remove it. Over 300 sweeps the standard error of the mean of the maxima is .67·.02/√300 = .0008, that of the mean of
    two repeats .02/√600 = .0008: ±.004 is about five of them.
    """
    rng = np.random.default_rng(0)
    factors = (0.03, 0.1, 0.3, 1.0, 3.0)
    once = [member("dpo", factor) for factor in factors]
    alone = loss_of(*once)
    # As the commands go: all rates once, then repeats of the one that was chosen.
    repeated = {arm.name(): loss_of(*once, *(member("dpo", factor, seed) for seed in (1, 2)))
                for arm, factor in zip(alone.arms, factors, strict=True)}  # fmt: skip
    accuracies: dict[str, list[float]] = {SAME_RUNS: [], OTHER_SEEDS: []}
    for _ in range(300):
        luck = {run.name: 0.5 + rng.normal(0, 0.02) for arm in alone.arms for run in arm.members}
        seen = {arm.name(): pd.DataFrame({run.name: [luck[run.name]] for run in arm.members}) for arm in alone.arms}
        name, _ = best_rate(alone, seen)
        assert name is not None
        for loss in (alone, repeated[name]):
            [arm] = [arm for arm in loss.arms if arm.name() == name]
            runs, which = loss.reported(arm, [run.name for run in arm.members])
            # On the problems that are reported a run is as lucky as on those that it was chosen on.
            accuracies[which].append(float(np.mean([luck.get(run) or 0.5 + rng.normal(0, 0.02) for run in runs])))
    assert np.mean(accuracies[SAME_RUNS]) == pytest.approx(0.5 + 1.163 * 0.02, abs=0.004)
    assert np.mean(accuracies[OTHER_SEEDS]) == pytest.approx(0.5, abs=0.004)


def answers(folder: Path, right: dict[str, int]) -> Run:
    """A run that solves the first problems of each benchmark, of 12 each."""
    for benchmark, number in right.items():
        scored(folder, {f"{benchmark}{n}": [n < number] for n in range(12)})
        if benchmark != "quiz":
            (folder / "eval" / "quiz.parquet").rename(folder / "eval" / f"{benchmark}.parquet")
    (folder / "manifest.json").write_text("{}")
    return Run(folder)


@fast
class TestComparison:
    def tables(self, tmp_path: Path, *repeats: int) -> Tuning:
        """SFT and DPO at two rates, the better one 1e-3 by 9 to 3 of 12; repeats of this rate solve 6."""
        runs = [(method, factor, 0) for method in ("sft", "dpo") for factor in (0.1, 1.0)]
        runs += [(method, 1.0, seed) for method in ("sft", "dpo") for seed in repeats]
        members = []
        for method, factor, seed in runs:
            one = member(method, factor, seed)
            right = 6 if seed else 9 if factor == 1.0 else 3
            members.append(replace(one, run=answers(tmp_path / one.name, {"validation": right, "quiz": right})))
        made = cohort(members)
        norms = pd.DataFrame(columns=["run", "step", "norm"])
        return tune(made, arms_of(made), Benchmarks("validation", "quiz"), pd.DataFrame(), norms, 0.05, lambda *_: None)

    def test_the_run_that_was_chosen_on_gets_no_verdict(self, tmp_path: Path) -> None:
        tuning = self.tables(tmp_path)
        row = tuning.pairs.set_index("rates").loc[TUNED]
        assert (row["accuracy_verdict"], row["accuracy_a"], row["accuracy_b"]) == (NO_VERDICT, 0.75, 0.75)
        assert row[["p", "p_holm", "diff_low", "diff_high"]].isna().all()
        # A rate that was named beforehand is tested on the same run.
        assert tuning.pairs.set_index("rates").loc[MATCHED, "p_holm"] == 1.0
        assert [line.partition(";")[0] for line in tuning.missing] == [
            f"{loss} at 0.001: {NO_VERDICT}" for loss in ("sft", "dpo")
        ]

    def test_its_repeats_do(self, tmp_path: Path) -> None:
        tuning = self.tables(tmp_path, 1, 2)
        row = tuning.pairs.set_index("rates").loc[TUNED]
        assert (row["accuracy_verdict"], row["accuracy_a"], row["accuracy_b"]) == ("cannot say", 0.5, 0.5)
        assert tuning.pairs.set_index("rates").loc[MATCHED, "accuracy_a"] == 0.75
        assert tuning.missing == []


@fast
class TestRepeatCommand:
    def command(self, tmp_path: Path, line: str | None, **options: Any) -> str:
        one = replace(member("dpo", 0.3, **options), run=Run(tmp_path))
        (tmp_path / "manifest.json").write_text(json.dumps({"command": line}))
        loss = loss_of(one)
        return repeat_command(loss, loss.arms[0])

    def test_of_the_experiment(self, tmp_path: Path) -> None:
        """Seeds 1, 2 and 4 start from initial adapters 1, 2 and 1, and the choice was made on seed and adapter 0."""
        found = self.command(tmp_path, "python train.py experiment=tuned data.eval_size=9 method=dpo,sft lr.factor=0.3")
        assert found == (
            "python train.py experiment=tuned data.eval_size=9 method=dpo method.beta=0.1 method.loss_type=sigmoid "
            "lr=grid lr.factor=0.3 seed=1,2,4"
        )

    def test_of_a_sweep_over_options(self, tmp_path: Path) -> None:
        found = self.command(tmp_path, "python train.py method.beta=0.1,0.3 lr=grid lr.factor=1,2 sweep=x", beta=0.3)
        assert found == (
            "python train.py sweep=x -m method=dpo method.beta=0.3 method.loss_type=sigmoid lr=grid lr.factor=0.3 "
            "seed=1,2,4"
        )

    def test_in_the_words_of_today(self, tmp_path: Path) -> None:
        """Identities keep the names and values that options had before."""
        one = replace(member("topr", 0.3), run=Run(tmp_path))
        assert one.facts is not None
        one.facts.identity["method"] = {"name": "topr", "version": 1, "ratio": "geometric"}
        (tmp_path / "manifest.json").write_text(json.dumps({"command": "python train.py method=topr"}))
        loss = loss_of(one)
        assert "method=topr method.level=geometric lr=grid" in repeat_command(loss, loss.arms[0])

    def test_of_a_sweep_over_anything(self, tmp_path: Path) -> None:
        """A single rate, and of the rest what this run had."""
        one = replace(member("dpo", 0.3), run=Run(tmp_path))
        line = "python train.py -m lr=matched lr.peak=1e-5,1e-3 init_seed=0,1 data.seed=7 pairs=[a,b]"
        (tmp_path / "manifest.json").write_text(json.dumps({"command": line, "config": {"init_seed": 1}}))
        loss = loss_of(one)
        found = repeat_command(loss, loss.arms[0])
        assert found.startswith("python train.py -m init_seed=1 data.seed=7 'pairs=[a,b]' method=dpo")
        assert " lr.peak=0.001 " in found

    def test_where_none_is_recorded(self, tmp_path: Path) -> None:
        assert self.command(tmp_path, None).startswith("python train.py experiment=tuned method=dpo ")


@fast
def test_losses_differ_in_more_than_their_rate() -> None:
    """Two β at different factors have no rate in common, so their arms' names do not tell their β."""
    members = [member("dpo", 0.1, beta=0.1), member("dpo", 1.0, beta=0.3), member("dpo", 3.0, beta=0.3)]
    members += [member("sft", 1.0)]
    found = [(loss.name, [arm.learning_rate for arm in loss.arms]) for loss in losses_of(arms_of(cohort(members)))]
    assert found == [("dpo method.beta=0.1", [1e-4]), ("dpo method.beta=0.3", [1e-3, 3e-3]), ("sft", [1e-3])]


@fast
def test_two_rates_never_share_the_name_of_an_arm() -> None:
    """Not even where `lr` has one name for both, as in a sweep over lr.peak or over factors of an unnamed rate."""
    members = [member("sft", 1.0), member("sft", 3.0)]
    for one in members:
        assert one.facts is not None
        object.__setattr__(one.facts.config.lr, "name", "same")
    assert [arm.name() for arm in arms_of(cohort(members))] == [
        "sft-same learning_rate=0.001", "sft-same learning_rate=0.003",
    ]  # fmt: skip


@fast
def test_the_norm_that_every_loss_reaches() -> None:
    """Two of SFT's three rates reach 3 (one by two runs, 3 and 4), and DPO's only candidate 3.5: the norm is 3.

    DPO's larger rate diverged at the seed of the choice; its other run, which reaches 9, does not count.
    """
    members = [member("sft", 0.1), member("sft", 1.0), *(member("sft", 3.0, seed) for seed in (0, 1))]
    members += [member("dpo", 0.1), member("dpo", 1.0, 1)]
    arms = arms_of(cohort(members))
    arms[-1].diverged.append(diverged("dpo", "matched", 0))
    losses = losses_of(arms)
    norms = {"sft-x0.1-s0": 1.0, "sft-x1-s0": 5.0, "sft-x3-s0": 3.0, "sft-x3-s1": 4.0}
    norms |= {"dpo-x0.1-s0": 3.5, "dpo-x1-s1": 9.0}
    way = pd.DataFrame([{"run": run, "step": s, "norm": norm / s} for run, norm in norms.items() for s in (1, 2)])
    assert losses[0].seeds == {(0, 0)}  # those of all its rates
    assert common_norm(losses, way) == 3.0
    assert common_norm(losses, way[way["run"] != "sft-x1-s0"]) == 1.0  # without snapshots it reaches no norm
    assert common_norm(losses, way[way["run"] != "dpo-x0.1-s0"]) is None
    assert common_norm(losses, way.iloc[:0]) is None
    assert common_norm([], way) is None


@fast
class TestRefusals:
    def tuned(self, members: list[ComparedAdapter], select_on: str, reported: str) -> None:
        require_other_problems(cohort(members), Benchmarks(select_on, reported))

    def test_the_benchmark_that_is_reported(self) -> None:
        with pytest.raises(
            InputError, match=r"^select_on=quiz: accuracies are reported on it; rates must be chosen on"
        ):
            self.tuned([member("sft", 1.0)], "quiz", "quiz")

    def test_a_benchmark_without_scores(self, tmp_path: Path) -> None:
        one = replace(member("sft", 1.0), run=scored(tmp_path / "r", {"p": [True]}))
        with pytest.raises(InputError, match=r"^select_on=validation: no run was scored on it, only on quiz$"):
            self.tuned([one], "validation", "quiz")

    def test_no_run_with_both(self, tmp_path: Path) -> None:
        one = replace(member("sft", 1.0), run=scored(tmp_path / "r", {"p": [True]}))
        with pytest.raises(InputError, match=r"^select_on=quiz: no run was scored on both it and other$"):
            self.tuned([one], "quiz", "other")

    def test_the_same_problems_by_another_name(self, tmp_path: Path) -> None:
        run = scored(tmp_path / "r", {p: [True] for p in "abc"})
        (run.folder / "eval" / "quiz.parquet").rename(run.folder / "eval" / "other.parquet")
        scored(tmp_path / "r", {p: [True] for p in "cd"})
        with pytest.raises(InputError, match=r"^select_on=other: 1 of its 3 problems are also in quiz, on which"):
            self.tuned([replace(member("sft", 1.0), run=run)], "other", "quiz")

    def test_at_a_snapshot(self) -> None:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("analyze", ["select_on=validation", "checkpoint=8"])
        with pytest.raises(
            InputError, match=r"^checkpoint=8: select_on chooses rates at the end of training; use end$"
        ):
            parse(AnalyzeConfig, config)


# Held-out problems beyond those that are reported


def composed(*overrides: str) -> TrainConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(TrainConfig, compose("train", list(overrides)))


def _file(folder: Path) -> list[str]:
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(50)]
    return ["data=file", f"data.path={_written(folder, rows)}", f"data.eval_path={folder / 'rows.jsonl'}"]


def _multiple_choice(folder: Path) -> list[str]:
    rows = [{"question": f"What is {n}?", "choices": ["this", "that"], "answer": "A"} for n in range(50)]
    return ["data=multiple_choice", "data.path=null", f"data.eval_path={_written(folder, rows)}"]


def _hub(folder: Path) -> list[str]:
    _written(folder, [{"question": f"{n} apples?", "answer": f"#### {n}"} for n in range(50)])
    return ["data=gsm8k", f"data.source.repo={folder}", "data.source.config=null", "+data.source.files.test=rows.jsonl"]


def _written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.slow
@fast
@pytest.mark.parametrize("lines", [lambda folder: ["data=arithmetic"], _file, _multiple_choice, _hub])
def test_validation_problems_follow_the_reported_ones(lines: Any, tmp_path: Path) -> None:
    """Of each source: the first 12 of a seed are the same whatever comes after, and 12 to 31 are others."""
    line = lines(tmp_path)
    if line[0] == "data=file":
        line[1] = "data.path=null"  # all problems of eval_path are held out
    line += ["data.eval_size=12", "benchmark=[own,validation]", "benchmark.validation.eval_size=20"]
    own, validation = composed(*line).benchmark.values()
    assert (validation.name, validation.eval_offset, validation.seed) == ("validation", 12, own.seed)
    source = problem_source(own)
    first, further = held_out_problems(own), held_out_problems(validation)
    assert first == source.problems("eval", 12, own.seed)
    assert [*first, *further] == source.problems("eval", 32, own.seed)
    assert len({problem.id for problem in (*first, *further)}) == 32


@pytest.mark.slow
@fast
def test_too_few_problems_are_told_in_one_line(tmp_path: Path) -> None:
    line = [*_multiple_choice(tmp_path), "benchmark=[own,validation]"]
    with pytest.raises(InputError, match=r"^benchmark.validation.eval_offset: no held-out problems .* set data.eval_s"):
        composed(*line)  # eval_size=null reports all of them
    validation = composed(*line, "data.eval_size=45", "benchmark.validation.eval_size=6").benchmark["validation"]
    with pytest.raises(InputError, match=r"^benchmark.validation.eval_offset=45: the problems after .*has 50 held-out"):
        held_out_problems(validation)
    rest = composed(*line, "data.eval_size=45", "benchmark.validation.eval_size=null").benchmark["validation"]
    assert len(held_out_problems(rest)) == 5
    none = rest.model_copy(update={"eval_offset": 50})
    with pytest.raises(InputError, match=r"eval_offset=50: no held-out problems are left after these$"):
        held_out_problems(none)


class Shuffled(ReasoningGym):
    """A source of one's own whose first problems depend on how many there are."""

    def problems(self, split: Any, size: int | None, seed: int) -> list[Problem]:
        return super().problems(split, size, seed)[::-1]


@fast
def test_a_source_that_cannot_be_divided_is_refused() -> None:
    line = ["data.source._target_=tests.test_tuning.Shuffled", "data.eval_size=4", "benchmark=[own,validation]"]
    config = composed(*line, "benchmark.validation.eval_size=4")
    with pytest.raises(InputError, match=r"^benchmark.validation.eval_offset=4: the source selects other problems"):
        held_out_problems(config.benchmark["validation"])


@pytest.mark.slow
@fast
def test_what_was_scored_and_trained_before_keeps_its_name() -> None:
    """The same digits as in docs/reference/identity.md, with or without further benchmarks."""
    for more in ([], ["benchmark=[own,validation]"], ["lr=grid"]):
        spec = RunSpec.of(composed("method=grpo", "method.bias=0.2", *more))
        assert spec.run.name.endswith("-4b6a24ea")
    data = composed().data
    assert data.eval_offset == 0
    recorded = {name: value for name, value in data.model_dump().items() if name != "eval_offset"}
    assert Data.model_validate(recorded) == data  # a manifest of before


@pytest.mark.slow
@fast
def test_every_rate_of_the_grid_is_a_run_of_its_own(tmp_path: Path) -> None:
    empty = f"output_dir={tmp_path}"  # where no run has another name
    names = [
        RunSpec.of(composed(empty, "lr=grid", f"lr.factor={factor}")).run.name for factor in (0.03, 0.1, 0.3, 1.0, 3.0)
    ]
    assert [name.split("-")[1] for name in names] == ["x0.03", "x0.1", "x0.3", "x1.0", "x3.0"]
    assert len({name[-8:] for name in names}) == 5
    # The conventional rates of the built-in losses and the matched one are in it.
    conventional = {RunSpec.of(composed(empty, f"method={method}")).run.name[-8:] for method in ("sft", "dpo")}
    of_dpo = {RunSpec.of(composed(empty, "method=dpo", "lr=grid", f"lr.factor={f}")).run.name[-8:] for f in (0.1, 1.0)}
    assert conventional <= {name[-8:] for name in names} | of_dpo


@fast
def test_the_experiment_has_every_loss_at_its_conventional_rate() -> None:
    """In its grid, or by the command in its header."""
    file = ROOT / "conf" / "experiment" / "tuned.yaml"
    swept = OmegaConf.load(file).hydra.sweeper.params
    assert set(swept.method.split(",")) == set(builtin_losses())
    grid = {float(factor) for factor in swept["lr.factor"].split(",")}
    others = {name for name, loss in builtin_losses().items() if loss.conventional_lr_scale not in grid}
    [(named, factor)] = re.findall(
        r"^# .* method=(\S+) lr.factor=(\S+)    the conventional rate", file.read_text(), re.M
    )
    assert others == set(named.split(","))
    assert {builtin_losses()[name].conventional_lr_scale for name in others} == {float(factor)}


# A sweep


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and DPO at three rates, the conventional ones among them, analysed with rates chosen on ten problems."""
    outputs = tmp_path_factory.mktemp("tuned")
    line = ["-m", "method=sft,dpo", "lr=grid", "lr.factor=0.1,1.0,3.0", "benchmark=[own,validation]", "sweep=tuned"]
    sizes = ["data.eval_size=12", "benchmark.validation.eval_size=10", "optim.snapshot_steps=4", "logger=none"]
    script(*command(outputs, *line, *sizes))
    script("analyze.py", "experiment=tuned", f"output_dir={outputs}", "pairs=none", "logger=none", "num_directions=2")
    return outputs


def test_a_sweep(tuned: Path) -> None:
    folder = tuned / "tuned" / "analysis"
    rates = pd.read_csv(folder / "tuning.csv")
    assert rates.groupby(["rule", "loss"]).size().to_dict() == {
        (rule, loss): 3 for rule in (STEPS, NORM) for loss in ("sft", "dpo")
    }
    assert set(rates["select_on"]) == {"validation"}
    assert set(rates["benchmark"]) == {"arithmetic"}
    runs = pd.read_csv(folder / "runs.csv")
    at_ends = rates[rates["rule"] == STEPS]
    for row in at_ends.itertuples():
        scores = runs[runs["arm"] == row.arm].set_index("benchmark")["accuracy"]
        assert (row.validation, row.accuracy) == (scores["validation"], scores["arithmetic"])
        assert (row.validation_n, row.n, row.runs, row.diverged) == (10, 12, 1, 0)
    for _, of in at_ends.groupby("loss"):
        best = of[of["validation"] == of["validation"].max()]
        assert of.loc[of["chosen"], "learning_rate"].tolist() == [best["learning_rate"].min()]
    # At one norm: each run where it first reaches it; those that never do are no candidates.
    at_norm = rates[rates["rule"] == NORM]
    assert at_norm["norm"].nunique() == 1
    norm = at_norm["norm"].iloc[0]
    largest = pd.read_csv(folder / "trajectories.csv").groupby("run")["norm"].max()
    arm_of = runs.drop_duplicates("run").set_index("run")["arm"]
    by_loss = {loss: sorted(v for run, v in largest.items() if run.startswith(loss)) for loss in ("sft", "dpo")}
    assert norm == pytest.approx(min(values[1] for values in by_loss.values()))  # two of three rates
    reached = {arm_of[run] for run, value in largest.items() if value >= norm}
    assert set(at_norm.loc[at_norm["validation"].notna(), "arm"]) == reached
    assert at_norm.groupby("loss")["chosen"].sum().eq(1).all()
    points = list((tuned / "tuned").glob("*/snapshots/norm-*/eval/validation.parquet"))
    assert len(points) + sum(math.isclose(value, norm) for value in largest) >= len(reached) > 1


def test_the_comparison_beside_the_conventional_and_the_matched_one(tuned: Path) -> None:
    folder = tuned / "tuned" / "analysis"
    pairs, arms = pd.read_csv(folder / "tuning_pairs.csv"), pd.read_csv(folder / "arm_pairs.csv")
    assert pairs.groupby("rates").size().to_dict() == {TUNED: 3, TUNED_NORM: 3, CONVENTIONAL: 3, MATCHED: 3}
    between = pairs[pairs["loss_b"] != "base"].set_index("rates")
    assert between.loc[CONVENTIONAL, ["learning_rate_a", "learning_rate_b"]].tolist() == [1e-4, 1e-3]
    assert between.loc[MATCHED, ["learning_rate_a", "learning_rate_b"]].tolist() == [1e-3, 1e-3]
    for rates in (TUNED, CONVENTIONAL, MATCHED):
        row = between.loc[rates]
        same = arms[(arms["arm_a"] == row["arm_a"]) & (arms["arm_b"] == row["arm_b"])]
        both = same if len(same) else arms[(arms["arm_a"] == row["arm_b"]) & (arms["arm_b"] == row["arm_a"])]
        assert row["cosine"] == pytest.approx(both["cosine"].item())
    chosen = pd.read_csv(folder / "tuning.csv").query("chosen").set_index(["rule", "loss"])
    for rule, rates in ((STEPS, TUNED), (NORM, TUNED_NORM)):
        row, accuracy = between.loc[rates], chosen.loc[rule, "accuracy"]
        assert row["accuracy_diff"] == pytest.approx(accuracy[row["loss_a"]] - accuracy[row["loss_b"]])
        # One seed: the runs are those of the choice.
        assert (pairs.loc[pairs["rates"] == rates, "accuracy_verdict"] == NO_VERDICT).all()
    for rates in (CONVENTIONAL, MATCHED):
        # Holm's correction is of the three comparisons of the set, not of all arms of the sweep.
        of_set = pairs[pairs["rates"] == rates]
        assert (of_set["p_holm"] <= 3 * of_set["p"] + 1e-12).all()


def test_the_page(tuned: Path) -> None:
    page = write_report(tuned / "tuned" / "analysis").read_text(encoding="utf-8")
    assert 'id="tuning"' in page
    assert "Every loss at its own best rate" in page
    assert "tuning.csv" in page
    assert "chosen and reported on the same run" in page


@pytest.mark.parametrize("state", ["failed", "preempted"])
def test_a_run_that_did_not_finish_is_found(tuned: Path, tmp_path: Path, state: str) -> None:
    """With the manifest of a real run; one that was never started has none, and is only left out."""
    run = next(run for run in runs_of(tuned, "tuned") if run.name.startswith("dpo"))
    for name in (run.name, "sft-never"):
        (tmp_path / "tuned" / name).mkdir(parents=True)
        (tmp_path / "tuned" / name / "status.json").write_text(json.dumps({"state": state}))
    shutil.copy(run.folder / "manifest.json", tmp_path / "tuned" / run.name)
    found = find_runs(tmp_path, ["tuned"], None)
    assert [(one.name, one.state, one.facts.method) for one in found.unfinished] == [(run.name, state, "dpo")]
    assert set(found.left_out) == {run.name, "sft-never"}


def test_a_wrong_benchmark_is_refused_in_one_line(tuned: Path) -> None:
    line = ["analyze.py", "sweep=tuned", f"output_dir={tuned}", "pairs=none", "logger=none"]
    wrong = script(*line, "select_on=arithmetic", check=2)
    assert wrong.stderr.splitlines()[-1].startswith("analyze.py: select_on=arithmetic: accuracies are reported on it;")
    assert "geometry" not in wrong.stderr  # before anything is measured


def test_without_select_on_no_rate_is_chosen(tuned: Path) -> None:
    script("analyze.py", "sweep=tuned", f"output_dir={tuned}", "pairs=none", "logger=none", "num_directions=2")
    assert pd.read_csv(tuned / "tuned" / "analysis" / "tuning.csv").empty


def test_arms_are_not_shared(tuned: Path) -> None:
    runs = pd.read_csv(tuned / "tuned" / "analysis" / "runs.csv").query("method != 'base'").drop_duplicates("run")
    assert runs.groupby("arm")["learning_rate"].nunique().eq(1).all()
    assert runs["arm"].nunique() == 6
