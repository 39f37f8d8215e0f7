"""Agreement of answers: flips against the base and κ, by hand, against libraries, and their limits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa

from losslens.analysis.accuracy import pair_answers_of, run_table
from losslens.analysis.cohort import Base, ComparedAdapter
from losslens.analysis.manifests import BaseFacts
from losslens.core.completions import Completion
from losslens.evaluation.outcomes import outcomes_of, read_outcomes, write_outcomes
from losslens.measures import get_measure
from losslens.measures.answers import PairAnswers, flip_cosine, kappa, pair_answers
from losslens.measures.views import Functions
from losslens.problems import Problem
from losslens.problems.mathematics import MathVerify
from losslens.runs.run import Run
from tests.test_analysis_tables import cohort, scored

pytestmark = pytest.mark.fast
outcomes = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 3), min_size=2, max_size=40)


class TestByHand:
    def test_flips(self) -> None:
        """Of six problems a breaks 1 and mends 3 and 4, b breaks 2 and mends 3: 1/√(3·2)."""
        base = np.array([1.0, 1, 0, 0, 1, 0])
        a = np.array([0.0, 1, 1, 1, 1, 0])
        b = np.array([1.0, 0, 1, 0, 1, 0])
        assert flip_cosine(a, b, base) == pytest.approx(1 / math.sqrt(6))
        # Uncentred: both mend all that the base misses, and nothing else is left to agree on.
        assert flip_cosine(np.ones(6), np.ones(6), base) == pytest.approx(1)

    def test_flips_of_shares(self) -> None:
        """Flips of +.5, −.5 and of +1, 0: .5/√(.5·1)."""
        assert flip_cosine(np.array([0.5, 0.5]), np.array([1.0, 1.0]), np.array([0.0, 1.0])) == pytest.approx(0.5**0.5)

    def test_kappa(self) -> None:
        """Both right on 3, both wrong on 1 of 6; p = 4/6 and 4/6: p_o = 4/6, p_e = 20/36, κ = (24 − 20)/(36 − 20)."""
        assert kappa(np.array([1.0, 1, 1, 1, 0, 0]), np.array([1.0, 1, 1, 0, 1, 0])) == pytest.approx(0.25)

    def test_nulls(self) -> None:
        """Draw 1 of a with draw 2 of b, and 2 with 1; bounds of a further draw, as for outputs: t is 12.7062."""
        base = np.zeros(4)
        a = [np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 0, 0])]
        b = [np.array([1.0, 0, 0, 0]), np.array([0.0, 1, 1, 0])]
        drawn = [0.5, 1.0]  # a1 with b2: 1/√(2·2); a2 with b1
        found = pair_answers(a[0], b[0], base, a, b)
        assert found.flips_null == pytest.approx(min(1, 0.75 + 12.7062 * np.std(drawn, ddof=1) * 1.5**0.5))
        wide = pair_answers(a[0], b[0], base, [a[0]] * 3, [b[1]] * 3)
        assert wide.flips_null == pytest.approx(0.5)  # no spread
        assert found.kappa_null == pytest.approx((kappa(a[0], b[1]) + kappa(a[1], b[0])) / 2)
        assert math.isnan(pair_answers(a[0], b[0], base).flips_null)
        assert math.isnan(pair_answers(a[0], b[0], None, a, b).flips)


class TestProperties:
    @given(outcomes)
    def test_symmetric_and_bounded(self, rows: list[tuple[float, float, float]]) -> None:
        a, b, base = np.array(rows).T
        found, turned = pair_answers(a, b, base), pair_answers(b, a, base)
        assert (found.flips, found.kappa) == pytest.approx((turned.flips, turned.kappa), nan_ok=True)
        assert math.isnan(found.flips) or abs(found.flips) <= 1 + 1e-12
        own = pair_answers(a, a, base)
        assert math.isnan(own.flips) == bool((a == base).all())
        assert math.isnan(own.flips) or own.flips == pytest.approx(get_measure("flips").identical)  # type: ignore[attr-defined]
        assert math.isnan(own.kappa) or own.kappa == pytest.approx(get_measure("kappa").identical)  # type: ignore[attr-defined]

    @given(outcomes)
    def test_kappa_is_that_of_statsmodels(self, rows: list[tuple[float, float, float]]) -> None:
        a, b, _ = np.array(rows).T
        if len({*a, *b}) == 2:
            table = [[np.sum((a == x) & (b == y)) for y in (0, 1)] for x in (0, 1)]
            assert kappa(a, b) == pytest.approx(cohens_kappa(table, return_results=False), nan_ok=True)

    def test_undefined(self) -> None:
        x = np.array([1.0, 0.0])
        assert math.isnan(flip_cosine(x, x, x))
        assert math.isnan(kappa(np.ones(3), np.ones(3)))
        assert math.isnan(kappa(np.array([0.5, 1.0]), x))

    def test_without_answers_there_is_no_value(self) -> None:
        view = Functions([None] * 2, [None] * 2, [None] * 2, [PairAnswers(0.5, 0.2, 0.4, 0.1), None])
        for name, value, null in (("flips", 0.5, 0.2), ("kappa", 0.4, 0.1)):
            measure = get_measure(name)
            assert measure.value(view).tolist() == pytest.approx([value, math.nan], nan_ok=True)  # type: ignore[attr-defined]
            assert measure.null(view).tolist() == pytest.approx([null, math.nan], nan_ok=True)  # type: ignore[attr-defined]


def base_of(folder: Path, correct: dict[str, list[bool]]) -> Base:
    facts = BaseFacts.model_validate({"base": {}, "config": {"model": {"name": "tiny"}}})
    return Base("base", scored(folder, correct), facts)


class TestOfACohort:
    def test_pairs_whatever_the_order_of_their_problems(self, tmp_path: Path) -> None:
        base = base_of(tmp_path / "base", {"p": [True], "q": [False], "r": [False]})
        x = scored(tmp_path / "x", {"p": [False], "q": [True], "r": [False]})
        y = scored(tmp_path / "y", {"r": [True], "q": [True], "p": [True]})
        members = [ComparedAdapter(run.folder.name, run.folder, run.folder.name, run=run) for run in (x, y)]
        these = cohort(members, bases=[base])
        copies = {
            "x": [pd.Series([True, True, False], index=["q", "p", "r"])] * 2,
            "y": [pd.Series([True, True, True], index=["r", "p", "q"])] * 2,
        }
        [(pair, found)] = pair_answers_of(these, "quiz", copies).items()
        assert pair == ("x", "y")
        assert found.flips == pytest.approx(0.5)  # −1, 1, 0 with 0, 1, 1
        assert found.flips_null == pytest.approx(1 / 2**0.5)  # 0, 1, 0 with 0, 1, 1
        other = {name: [pd.Series([True], index=["s"])] * 2 for name in "xy"}
        assert math.isnan(pair_answers_of(these, "quiz", other)[pair].flips_null)
        assert these.left_out == {"null of flips": "the rotated copies did not answer the problems of quiz"}
        assert pair_answers_of(these, None, {}) == {}

    def test_a_base_that_was_not_scored(self, tmp_path: Path) -> None:
        runs = [scored(tmp_path / name, {"p": [True], "q": [False]}) for name in "xy"]
        members = [ComparedAdapter(run.folder.name, run.folder, run.folder.name, run=run) for run in runs]
        [found] = pair_answers_of(cohort(members), "quiz", {}).values()
        assert math.isnan(found.flips)
        assert found.kappa == 1

    def test_sampled_answers_flip_by_themselves(self, tmp_path: Path) -> None:
        """Of two runs that change nothing the flips would share the noise of the base's samples: a cosine of ½."""
        members = []
        for name in ("base", "x", "y"):
            folder = scored(tmp_path / name, {"p": [True, False], "q": [False, False]}).folder
            (folder / "eval" / "quiz.parquet").rename(folder / "eval" / "quiz-avg2.parquet")
            members.append(ComparedAdapter(name, folder, name, run=Run(folder)))
        facts = BaseFacts.model_validate({"base": {}, "config": {"model": {"name": "tiny"}}})
        these = cohort(members[1:], bases=[Base("base", Run(tmp_path / "base"), facts)])
        copies = {name: [pd.Series([True, False], index=["p", "q"])] * 2 for name in "xy"}
        [found] = pair_answers_of(these, "quiz-avg2", copies).values()
        assert math.isnan(found.flips)
        assert math.isnan(found.flips_null)
        assert math.isnan(found.kappa_null)
        assert these.left_out["flips"].startswith("quiz-avg2 has sampled answers")


class TestLengths:
    def test_are_those_of_the_completions(self, tmp_path: Path) -> None:
        problems = [Problem("p", "1 + 1", "2"), Problem("q", "1 + 2", "3")]
        completions = [[Completion("2", 7, True)], [Completion("4", None, False)]]
        file = tmp_path / "quiz.parquet"
        write_outcomes(outcomes_of(MathVerify(), problems, completions, 5), file, "asked", "scored")
        found = read_outcomes(file)
        assert found["correct"].tolist() == [True, False]
        assert found["tokens"].tolist() == [7, pd.NA]
        assert found["finished"].tolist() == [True, False]

    def test_of_a_run_against_the_base(self, tmp_path: Path) -> None:
        """Both are right on p (4 tokens, and 4.5 in the mean of 4 and 5) and q (5 and 5): .25 tokens shorter."""
        base = base_of(tmp_path / "base", {"p": [True, True], "q": [False, True], "r": [True, False]})
        run = scored(tmp_path / "x", {"p": [True, False], "q": [False, True], "r": [False, False]})
        members = [ComparedAdapter("x", run.folder, "x", run=run)]
        table = run_table(cohort(members, bases=[base]), pd.DataFrame({"run": ["x"]})).set_index("run")
        assert table.loc["x", ["tokens_correct", "finished"]].tolist() == [4.5, 2 / 6]
        assert table.loc["x", "base_tokens_diff"] == -0.25
        assert table.loc["x", "base_tokens_low"] == -0.5
        assert pd.isna(table.loc["base", "base_tokens_diff"])

    def test_files_of_earlier_versions_have_none(self, tmp_path: Path) -> None:
        run = scored(tmp_path / "x", {"p": [True], "q": [True]})
        file = tmp_path / "x" / "eval" / "quiz.parquet"
        old = pd.read_parquet(file).drop(columns=["tokens", "finished"])
        old.to_parquet(file, index=False)
        table = run_table(cohort([ComparedAdapter("x", run.folder, "x", run=run)]), pd.DataFrame({"run": ["x"]}))
        assert table["accuracy"].tolist() == [1]
        assert table[["tokens_correct", "finished", "base_tokens_diff"]].isna().all(axis=None)
