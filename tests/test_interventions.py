"""Changed weights of finished runs: the arithmetic by hand and next to PEFT's, and what the analysis makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft.utils import merge_utils

from losslens.analysis import greedy_answers, intervention_passes
from losslens.analysis.intervention_table import better, with_interactions, with_repeats
from losslens.analysis.pipeline import Analysis, analyse
from losslens.core.errors import InputError
from losslens.evaluation.outcomes import read_outcomes
from losslens.measures.connectivity import SequenceNll, loss_difference
from losslens.measures.outputs import factor_at_kl
from losslens.report.components import Figure
from losslens.report.sections.interventions import section
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.updates.base import Update
from losslens.updates.dense import DenseUpdate
from losslens.updates.lora import LoraUpdate
from losslens.updates.merging import dare, merged, ties
from losslens.updates.orthonormal import random_frame
from losslens.updates.restoring import leading_directions, only, random_directions, without, without_outputs
from tests.test_analysis import of, settings


def lora(seed: int, out: int = 7, into: int = 5, rank: int = 3) -> LoraUpdate:
    rng = np.random.default_rng(seed)
    return LoraUpdate(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), 0.5)


class TestMerging:
    def test_ties_by_hand(self) -> None:
        """Half of each is kept: (4, 3) at the first two places, and (−1, 6) at the second and −5 at the fourth."""
        first, second = np.array([[4.0, 3.0], [1.0, -2.0]]), np.array([[0.5, 6.0], [1.0, -5.0]])
        # Trimmed: (4, 3; 0, 0) and (0, 6; 0, −5). Only the second place has both: their mean.
        assert ties([first, second], kept=0.5).tolist() == [[4.0, 4.5], [0.0, -5.0]]
        # With the sign of the second exchanged the sum there is −3: the second run alone decides.
        against = np.array([[0.5, -6.0], [1.0, -5.0]])
        assert ties([first, against], kept=0.5).tolist() == [[4.0, -6.0], [0.0, -5.0]]

    def test_dare_by_hand(self) -> None:
        """Of p = ¾ what is left is four times as large."""
        update = np.arange(1.0, 401.0).reshape(20, 20)
        left = dare(update, np.random.default_rng(0), dropped=0.75)
        assert set(np.unique(left / update)) == {0.0, 4.0}
        assert 60 <= np.sum(left != 0) <= 140

    @pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
    def test_ties_is_pefts(self, kept: float) -> None:
        dense = [lora(seed, 20, 30).dense() for seed in (0, 1, 2)]
        theirs = merge_utils.ties([torch.from_numpy(each) for each in dense], torch.ones(3), kept)
        assert np.abs(ties(dense, kept) - theirs.numpy()).max() < 1e-12

    def test_dare_is_pefts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the same masks."""
        one, other = lora(0, 20, 30), lora(1, 20, 30)
        rng = np.random.default_rng(5)
        masks = iter([torch.from_numpy((rng.random((20, 30)) >= 0.9).astype(float)) for _ in range(2)])
        monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
        updates = [torch.from_numpy(each.dense()) for each in (one, other)]
        theirs = merge_utils.dare_linear(updates, torch.tensor([0.5, 0.5]), 1 - 0.9)
        ours = merged("dare", one, other, np.random.default_rng(5)).dense()
        assert np.abs(ours - theirs.numpy()).max() < 1e-12
        assert np.abs(ours).max() > 1

    def test_dare_keeps_the_mean(self) -> None:
        update, rng = np.ones((400, 400)), np.random.default_rng(1)
        assert dare(update, rng).mean() == pytest.approx(1, abs=5 * 3 / 400)  # sd 3 an entry

    @pytest.mark.parametrize("dense", [False, True])
    def test_sum_and_mean_are_of_the_products(self, dense: bool) -> None:
        """Not of A and B: the sum of the factors' products would be another matrix."""
        one, other = lora(0), lora(1)
        second: Update = DenseUpdate(other.dense()) if dense else other
        rng = np.random.default_rng(0)
        for how, factor in (("sum", 1.0), ("mean", 0.5)):
            result = merged(how, one, second, rng)  # type: ignore[arg-type]
            assert np.abs(result.dense() - factor * (one.dense() + other.dense())).max() < 1e-12
        assert rng.random() == np.random.default_rng(0).random()

    def test_the_mean_of_a_run_with_itself_is_the_run(self) -> None:
        one = lora(0)
        assert np.abs(merged("mean", one, one, np.random.default_rng(0)).dense() - one.dense()).max() < 1e-12
        assert np.abs(ties([one.dense(), one.dense()], kept=1.0) - one.dense()).max() < 1e-12

    def test_a_dense_update(self) -> None:
        one, other = DenseUpdate(np.eye(2)), DenseUpdate(np.ones((2, 2)))
        assert (2.0 * one + other).dense().tolist() == [[3.0, 1.0], [1.0, 3.0]]
        assert one.with_arrays(other.arrays()).dense().tolist() == np.ones((2, 2)).tolist()


class TestRestoring:
    def test_by_hand(self) -> None:
        """ΔW = diag(3, 1): its first direction is the first unit vector; W0's, e.g., the diagonal."""
        svd = DenseUpdate(np.diag([3.0, 1.0])).svd()
        first = leading_directions(svd, 1)
        assert np.abs(only(svd, first).dense() - np.diag([3.0, 0.0])).max() < 1e-12
        assert np.abs(without(svd, first).dense() - np.diag([0.0, 1.0])).max() < 1e-12
        # (I − ppᵀ)ΔW with p = (1, 1)/√2.
        diagonal = np.array([[1.0], [1.0]]) / np.sqrt(2)
        assert np.abs(without_outputs(svd, diagonal).dense() - [[1.5, -0.5], [-1.5, 0.5]]).max() < 1e-12

    @pytest.mark.parametrize("k", [1, 2, 3, 9])
    def test_from_the_left_from_the_right_and_from_both_sides(self, k: int) -> None:
        update = lora(2)
        u, _, vt = np.linalg.svd(update.dense())
        k_left, k_right = u[:, : min(k, 3)], vt[: min(k, 3)].T
        top = only(update.svd(), leading_directions(update.svd(), k)).dense()
        for other in (
            k_left @ k_left.T @ update.dense(),
            update.dense() @ k_right @ k_right.T,
            k_left @ k_left.T @ update.dense() @ k_right @ k_right.T,
        ):
            assert np.abs(top - other).max() < 1e-12

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_the_parts_add_up(self, k: int) -> None:
        """Orthogonal parts, whose squared norms add up; a random subspace holds k/r of Σσ² on average."""
        update = lora(3)
        svd = update.svd()
        rng = np.random.default_rng(0)
        shares = []
        for directions in (leading_directions(svd, k), *(random_directions(svd, k, rng) for _ in range(200))):
            kept, rest = only(svd, directions), without(svd, directions)
            assert np.abs(kept.dense() + rest.dense() - update.dense()).max() < 1e-12
            assert abs(kept.inner(rest)) < 1e-12
            assert np.linalg.matrix_rank(kept.dense(), tol=1e-9) == k
            shares.append(kept.inner(kept) / update.inner(update))
        assert max(shares) == pytest.approx(shares[0])
        assert np.mean(shares[1:]) == pytest.approx(k / 3, abs=0.08)

    def test_an_update_of_zero(self) -> None:
        svd = LoraUpdate(np.zeros((4, 2)), np.ones((2, 3)), 1.0).svd()
        rng = np.random.default_rng(0)
        for directions in (leading_directions(svd, 2), random_directions(svd, 2, rng)):
            assert only(svd, directions).dense().tolist() == without(svd, directions).dense().tolist()
        assert not without_outputs(svd, random_frame((4, 1), rng)).dense().any()


class TestTheBetterParent:
    def test_by_hand(self) -> None:
        """Of two items each is the other's half: each has the choice made on the other."""
        assert better(np.array([1.0, 0.0]), np.array([0.0, 1.0])).tolist() == [0.0, 0.0]
        assert better(np.array([1.0, 1.0]), np.array([0.0, 1.0])).tolist() == [0.5, 1.0]

    def test_kinds_of_items_do_not_matter(self) -> None:
        """Two runs of one accuracy that are good at every second item: a reference of about that accuracy."""
        even = np.arange(400) % 2 == 0
        chosen = better(even.astype(float), (~even).astype(float))
        assert chosen.mean() == pytest.approx(0.5, abs=0.06)
        assert better((~even).astype(float), even.astype(float)) == pytest.approx(chosen)

    def test_it_is_not_chosen_by_luck(self) -> None:
        """Two runs of one accuracy: the better of the two looks better than either, this reference does not."""
        rng = np.random.default_rng(0)
        outcomes = rng.random((1000, 2, 20)) < 0.5
        chosen = [better(*pair.astype(float)).mean() for pair in outcomes]
        assert np.mean(chosen) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(20_000))
        assert np.mean(outcomes.mean(axis=2).max(axis=1)) > 0.55

    def test_where_one_is_better_it_is_that_one(self) -> None:
        first, second = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        assert better(first, second).tolist() == first.tolist()


def test_the_difference_of_losses() -> None:
    """(3 − 1 + 2 − 2)/(1 + 3) = ½; where every token is worse by as much, there is no doubt."""
    tokens = np.array([1, 3])
    value, low, high = loss_difference(
        SequenceNll(np.array([3.0, 2.0]), tokens), SequenceNll(np.array([1.0, 2.0]), tokens)
    )
    assert value == 0.5
    assert low <= value <= high
    assert loss_difference(SequenceNll(2.0 * tokens, tokens), SequenceNll(1.0 * tokens, tokens)) == (1.0, 1.0, 1.0)


def test_one_step_where_kl_is_quadratic() -> None:
    """KL = 8λ²: at ½ it is 2, found in one measurement; of 8λ³ several steps come near."""
    seen: list[float] = []

    def measured(factor: float, power: int) -> float:
        seen.append(factor)
        return 8 * factor**power

    assert factor_at_kl(lambda factor: measured(factor, 2), 8.0, 2.0, 0.01, 9) == (0.5, 2.0)
    assert seen == [0.5]
    factor, there = factor_at_kl(lambda factor: measured(factor, 3), 8.0, 1.0, 0.01, 9)
    assert factor == pytest.approx(0.5, rel=0.01)
    assert there == pytest.approx(1.0, rel=0.01)
    assert factor_at_kl(lambda factor: 0.0, 8.0, 1.0, 0.01, 9)[1] == 0


def test_the_repeat_of_a_merge() -> None:
    """Merging x with its repeat costs 2 points, y with its own 4: merging x with y has (2 + 4)/2 beside it."""
    rows = [
        ("x", "x", "same init", -0.02), ("y", "y", "same init", -0.04), ("x", "y", "same init", -0.05),
        ("x", "z", "same init", -0.05), ("x", "x", "other", 0.5), ("x", "x", "same order", 0.5),
        ("x", "y", "same seeds", -0.05), ("x", "y", "other", -0.05),
    ]  # fmt: skip
    table = pd.DataFrame(
        [{"arm": a, "arm_b": b, "pairing": p, "accuracy_diff": d, "loss_diff": d} for a, b, p, d in rows]
    )
    table = table.assign(kind="merging", how="mean")
    repeat = with_repeats(table)["accuracy_diff_repeat"]
    assert repeat[2] == pytest.approx(-0.03)
    # Of z there is no repeat, of y none from another A, and runs of the same seeds have no baseline.
    assert repeat.drop(2).isna().all()


def test_the_interaction_of_a_quadratic_loss() -> None:
    """L(w) = 1 + w₁ + w₁² + ½w₂² with a = (1, 0), b = (1, 2): aᵀHb = 2, aᵀHa = 2, bᵀHb = 6, cosine 2/√12."""

    def loss(w: Any) -> float:
        return float(1 + w[0] + w[0] ** 2 + w[1] ** 2 / 2)

    a, b = np.array([1.0, 0.0]), np.array([1.0, 2.0])
    rows = [
        ("unchanged", "base", "base", "", 1.0, loss(0 * a)), ("unchanged", "run", "a", "", 1.0, loss(a)),
        ("unchanged", "run", "b", "", 1.0, loss(b)), ("scaling", "scaled", "a", "", 2.0, loss(2 * a)),
        ("scaling", "scaled", "b", "", 2.0, loss(2 * b)), ("merging", "sum", "a", "b", np.nan, loss(a + b)),
        ("merging", "mean", "a", "b", np.nan, loss((a + b) / 2)),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["kind", "how", "run", "run_b", "value", "loss"])
    found = with_interactions(table)
    assert found.loc[5, ["interaction", "hessian_cosine"]].tolist() == pytest.approx([2, 2 / np.sqrt(12)])
    assert found.drop(index=5)["interaction"].isna().all()
    unscaled = with_interactions(table.drop(index=[3, 4])).loc[5]
    assert unscaled["interaction"] == pytest.approx(2)
    assert np.isnan(unscaled.get("hessian_cosine", np.nan))


ASKED: dict[str, Any] = {
    "scaling": [-1.0, 0.1, 2.0], "equal": ["norm", "kl"], "merging": ["sum", "mean", "ties", "dare"],
    "restoring": [1, 8], "draws": 1, "problems": 5,
}  # fmt: skip
PAIR: list[list[str]] = [["sft", "dpo"]]


@pytest.fixture(scope="module")
def causal(sweep: Path) -> Analysis:
    """Two of the six runs, with all causal checks; the answers of a model are counted in no other test."""
    for run in ("rft", "dft", "rift", "grpo"):
        shutil.rmtree(of(sweep, run).folder)
    return analyse(settings(sweep, pairs=PAIR, interventions=ASKED))


class TestTable:
    def rows(self, causal: Analysis, kind: str, **values: Any) -> pd.DataFrame:
        table = causal.tables.interventions
        table = table[table["kind"] == kind]
        for name, value in values.items():
            table = table[table[name] == value]
        assert len(table)
        return table

    def test_what_there_is(self, causal: Analysis) -> None:
        assert causal.tables.interventions.groupby("kind").size().to_dict() == {
            "unchanged": 3, "scaling": 2 * 3, "equal_norm": 2, "equal_kl": 2, "merging": 4, "restoring": 2 * (6 + 2),
        }  # fmt: skip
        # All eight directions of an update are no cut of it; eight of W0's are.
        table = self.rows(causal, "restoring", value=8)
        assert set(table["how"]) == {"without_base_top", "without_random_outputs"}
        told = [why for name, why in causal.left_out.items() if name.startswith("some restoring of ")]
        assert told == ["its updates have 8 directions: all of them is no cut"] * 2

    def test_the_runs_are_as_they_were_measured(self, causal: Analysis, sweep: Path) -> None:
        runs = causal.tables.runs.set_index("run")
        for row in self.rows(causal, "unchanged", how="run").itertuples():
            assert row.kl == pytest.approx(runs.loc[row.run, "kl"], rel=1e-9)
            assert row.norm == pytest.approx(runs.loc[row.run, "norm"], rel=1e-9)
            [member] = [m for m in causal.cohort.members if m.name == row.run]
            assert member.run is not None
            [file] = member.run.folder.glob("eval/*.parquet")
            assert row.accuracy == read_outcomes(file)["correct"][:5].mean()
        [base] = self.rows(causal, "unchanged", how="base").itertuples()
        assert (base.kl, base.norm, base.n) == (0, 0, 5)

    def test_kl_grows_with_the_square(self, causal: Analysis) -> None:
        for run, row in self.rows(causal, "unchanged", how="run").set_index("run").iterrows():
            [tenth] = self.rows(causal, "scaling", run=run, value=0.1).itertuples()
            assert row["kl"] / tenth.kl == pytest.approx(100, rel=0.25)
            assert row["norm"] / tenth.norm == pytest.approx(10)

    def test_equal_norms_and_kls(self, causal: Analysis) -> None:
        norms, kls = (self.rows(causal, kind)[name] for kind, name in (("equal_norm", "norm"), ("equal_kl", "kl")))
        runs = self.rows(causal, "unchanged", how="run")
        assert norms.tolist() == pytest.approx([runs["norm"].min()] * 2)
        assert kls.tolist() == pytest.approx([runs["kl"].min()] * 2, rel=0.02)

    def test_the_null_is_not_tested(self, causal: Analysis) -> None:
        table = causal.tables.interventions
        assert table.loc[table["null"], "p"].isna().all()
        tested = table[~table["null"] & (table["kind"] == "restoring")]
        assert tested["p_holm"].notna().all()
        assert (tested["p_holm"] >= tested["p"]).all()
        assert set(tested["how"]) == {"only_top", "without_top", "without_base_top"}

    def test_sum_and_mean_of_two_runs(self, causal: Analysis) -> None:
        """‖½a + ½b‖² = ¼(‖a‖² + ‖b‖² + 2⟨a, b⟩)."""
        runs = self.rows(causal, "unchanged", how="run").set_index("run")["norm"]
        [pair] = causal.tables.pairs.itertuples()
        a, b = runs[pair.run_a], runs[pair.run_b]
        half = np.sqrt(a**2 + b**2 + 2 * pair.cosine * a * b) / 2
        for how, factor in (("mean", 1), ("sum", 2)):
            [row] = self.rows(causal, "merging", how=how).itertuples()
            assert row.norm == pytest.approx(factor * half, rel=1e-6)
            assert row.pairing == "same seeds"
        # The middle of the straight path is the mean.
        [middle] = causal.tables.connectivity.query("alpha == 0.5").itertuples()
        [mean] = self.rows(causal, "merging", how="mean").itertuples()
        assert mean.loss == pytest.approx(middle.loss, rel=1e-6)

    def test_only_what_is_missing_is_measured(self, causal: Analysis, sweep: Path, monkeypatch: Any) -> None:
        seen: list[str] = []

        def counted(name: str, function: Any) -> Any:
            return lambda *arguments, **options: (seen.append(name), function(*arguments, **options))[1]

        monkeypatch.setattr(intervention_passes, "observe", counted("pass", intervention_passes.observe))
        monkeypatch.setattr(greedy_answers, "evaluate", counted("answers", greedy_answers.evaluate))
        again = analyse(settings(sweep, pairs=PAIR, interventions=ASKED)).tables.interventions
        pd.testing.assert_frame_equal(again, causal.tables.interventions)
        assert not seen
        # Another factor is one pass and one set of answers a run; other problems are answers alone, of what is changed.
        analyse(settings(sweep, pairs=PAIR, interventions={"scaling": [2.0, 3.0], "problems": 5}))
        assert sorted(seen) == ["answers"] * 2 + ["pass"] * 2
        seen.clear()
        analyse(settings(sweep, pairs=PAIR, interventions={"scaling": [3.0], "problems": 4}))
        assert seen == ["answers"] * 2
        seen.clear()
        unanswered = analyse(settings(sweep, pairs=PAIR, interventions={"scaling": [4.0], "problems": 0}))
        assert unanswered.tables.interventions["accuracy"].isna().all()
        assert seen == ["pass"] * 2

    def test_what_cannot_be(self, causal: Analysis, sweep: Path) -> None:
        with pytest.raises(InputError, match=r"interventions\.restoring=9: the updates have at most 8 directions"):
            analyse(settings(sweep, pairs=PAIR, interventions={"restoring": [9]}))
        with pytest.raises(ValueError, match=r"interventions\.restoring=11: at most num_directions=10"):
            settings(sweep, interventions={"restoring": [11]})
        found = analyse(settings(sweep, pairs="none", interventions={"merging": ["sum"]}))
        assert found.cohort.left_out["merges"] == "no pairs are chosen (see pairs)"
        assert set(found.tables.interventions["kind"]) == {"unchanged"}


def test_nothing_is_changed_unless_it_is_asked_for(sweep: Path, causal: Analysis) -> None:
    assert analyse(settings(sweep, pairs=PAIR)).tables.interventions.empty


def test_the_report_has_a_section(causal: Analysis, tmp_path: Path) -> None:
    """With the merge of a repeat, which two runs of the fixture are made to be."""
    table = causal.tables.interventions
    arm = table["arm"].iloc[1]
    merges = table[table["kind"] == "merging"].assign(arm_b=arm, arm=arm)
    for name, content in {
        "runs": causal.tables.runs,
        "interventions": pd.concat([table, merges]),
        "arm_pairs": causal.tables.arm_pairs,
    }.items():
        content.to_csv(tmp_path / f"{name}.csv", index=False)
    made = section(AnalysisFolder(tmp_path))
    assert made is not None
    assert [figure.title for figure in made.figures] == [
        "Accuracy of λ·ΔW", "KL of λ·ΔW", "Loss of λ·ΔW", "Merges beside the better of their runs", "Only the top k",
        "Without the top k", "Without W0's top k",
    ]  # fmt: skip
    assert [table.caption for table in made.tables] == [
        "Scaled updates", "Merged updates", "Restored directions", "All at the smallest ‖ΔW‖", "All at the smallest KL",
        "",
    ]  # fmt: skip
    # Each line of KL goes through 0 at λ = 0 and through the run's KL at 1.
    [kl] = [figure.plot for figure in made.figures if isinstance(figure, Figure) and figure.title == "KL of λ·ΔW"]
    runs = table[(table["kind"] == "unchanged") & (table["how"] == "run")]
    lines = [dict(zip(line.x, line.y, strict=True)) for line in kl.data]
    assert [line[0] for line in lines] == [0, 0]
    assert sorted(line[1] for line in lines) == pytest.approx(sorted(runs["kl"]), rel=1e-3)
    assert [table.file for table in made.tables] == [""] * 5 + ["interventions.csv"]
    assert any("Scaled updates: of 6 accuracies, " in finding.text for finding in made.findings)
    assert section(AnalysisFolder(tmp_path / "none")) is None
