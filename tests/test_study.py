"""The statistics and measures of the study "How much of it is the loss?"."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from losslens.core.errors import InputError
from losslens.measures.base_weights import principal
from losslens.measures.outputs import kl
from losslens.measures.rotated import effects
from losslens.report.figures.canvas import style
from losslens.updates.lora import LoraUpdate
from tools import reference
from tools.study import claims, figures, page, verdicts
from tools.study.__main__ import is_unseen_at_one_rate
from tools.study.crossed import (
    CORRELATION,
    FACTORS,
    PART,
    R2,
    Crossed,
    Estimate,
    Shares,
    correlation,
    jackknife_over,
    mantel,
    p_of_factor,
    pairs_of_losses,
    shares,
)
from tools.study.findings import FINDINGS, TO_SFT, Finding, at_best_rate, findings, matched
from tools.study.geometry import MEASURES, geometry
from tools.study.hypotheses import (
    at_norms_of_dpo,
    behaviour_per_norm,
    decided,
    explained_by_norm,
    exponents,
    families_of,
    function_less_weights,
    gradient_matrices,
    likelihoods,
    norm_over_sft,
    pair_table,
    persisting,
    sampling,
    share_table,
    within_rates,
)
from tools.study.results import KINDS, Results, _config
from tools.study.shared_problems import shared_problems
from tools.study.similarities import flip_products, gram, kl_products, normalised, weight_products

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]


SIZES = ("common", "loss", "data", "loss_and_data", "order")


def simulated(sizes, rng, levels=(1, 8, 3, 3), dimension=20_000):
    """Runs whose updates are sums of independent vectors of these squared lengths, named as in `Shares`."""
    starts, losses, draws, orders = levels
    part = {name: np.sqrt(size / dimension) for name, size in sizes.items()}
    common = part["common"] * rng.standard_normal(dimension)
    loss = part["loss"] * rng.standard_normal((losses, dimension))
    data = part["data"] * rng.standard_normal((draws, dimension))
    both = part["loss_and_data"] * rng.standard_normal((losses, draws, dimension))
    rows, vectors = [], []
    for s, a, d, o in product(range(starts), range(losses), range(draws), range(orders)):
        rows.append(dict(zip(FACTORS, (f"s{s}", f"a{a}", f"d{d}", f"o{o}"), strict=True)))
        vectors.append(common + loss[a] + data[d] + both[a, d] + part["order"] * rng.standard_normal(dimension))
    return pd.DataFrame(rows), normalised(gram(np.array(vectors)))


def test_shares_by_hand():
    # Each of two losses is .9 like itself in another order, .5 on other data; they are .6 alike on one draw, .3 on two.
    found = shares(np.array([[0.9, 0.6], [0.6, 0.9]]), np.array([[0.5, 0.3], [0.3, 0.5]]))
    assert found.table() == pytest.approx({"common": 0.3, "loss": 0.2, "data": 0.3, "loss_and_data": 0.1, "order": 0.1})
    assert sum(found.table().values()) == pytest.approx(1)
    assert found.of_data == pytest.approx(0.4)


def test_shares_of_some_losses():
    same = np.array([[0.9, 0.6, 0.1], [0.6, 0.7, 0.2], [0.1, 0.2, 0.5]])
    other = np.array([[0.5, 0.3, 0.0], [0.3, 0.1, 0.0], [0.0, 0.0, 0.4]])
    found = shares(same, other, [0, 1])
    assert (found.common, found.order) == pytest.approx((0.3, 1 - (0.9 + 0.7) / 2))
    assert (found.loss, found.data) == pytest.approx(((0.5 + 0.1) / 2 - 0.3, 0.6 - 0.3))
    first, second = pairs_of_losses(same, other, np.array([0, 2]))
    assert (first.tolist(), second.tolist()) == ([0.1], [0.0])


def test_shares_are_those_that_the_runs_were_made_of():
    sizes = {"common": 0.15, "loss": 0.25, "data": 0.2, "loss_and_data": 0.3, "order": 0.1}
    design = Crossed.of(*simulated(sizes, np.random.default_rng(0)))
    found = shares(design.between(same_draw=True), design.between(same_draw=False))
    assert found.table() == pytest.approx(sizes, abs=0.02)


def test_pairs_differ_in_order_and_share_their_start():
    levels = list(product(("s0", "s1"), ("a", "b"), ("d0", "d1"), ("o0", "o1")))
    runs = pd.DataFrame(levels, columns=list(FACTORS))
    codes = np.array([[1000 * (x[0] != y[0]) + 100 * (x[1] != y[1]) + 10 * (x[2] != y[2]) + (x[3] != y[3])
                       for y in levels] for x in levels], dtype=float)  # fmt: skip
    design = Crossed.of(runs, codes)
    assert design.between(same_draw=True).tolist() == [[1, 101], [101, 1]]
    assert design.between(same_draw=False).tolist() == [[11, 111], [111, 11]]
    assert design.between(same_draw=True, same_start=False).tolist() == [[1001, 1101], [1101, 1001]]
    assert design.only("loss", ["b"]).between(same_draw=False).tolist() == [[11]]
    # Without its draw d0, start s0 has no pair of two draws, and does not count where one and two are compared.
    kept = np.array([not (x[0] == "s0" and x[2] == "d0") for x in levels])
    turned = codes.copy()
    turned[:8, :8] += 5000
    rest = Crossed.of(runs[kept], turned[np.ix_(kept, kept)])
    assert rest.between(same_draw=True).tolist() == [[1, 101], [101, 1]]
    assert rest.between(same_draw=False).tolist() == [[11, 111], [111, 11]]
    # Without any pair of two draws, every start counts.
    assert rest.only("draw", ["d1"]).between(same_draw=True).tolist() == [[2501, 2601], [2601, 2501]]
    assert np.isnan(rest.only("draw", ["d1"]).between(same_draw=False)).all()
    # Starts count alike, whatever their numbers of pairs.
    assert Crossed.of(runs, turned).between(same_draw=True).tolist() == [[2501, 2601], [2601, 2501]]


def test_the_order_of_the_runs_does_not_matter_and_a_missing_run_is_left_out():
    runs, matrix = simulated(
        {"common": 0.2, "loss": 0.2, "data": 0.2, "loss_and_data": 0.2, "order": 0.2}, np.random.default_rng(1)
    )
    whole = Crossed.of(runs, matrix).between(same_draw=True)
    order = np.random.default_rng(2).permutation(len(runs))
    turned = Crossed.of(runs.iloc[order], matrix[np.ix_(order, order)])
    back = [turned.losses.index(loss) for loss in Crossed.of(runs, matrix).losses]
    np.testing.assert_allclose(turned.between(same_draw=True)[np.ix_(back, back)], whole)
    kept = np.arange(1, len(runs))
    without = Crossed.of(runs.iloc[kept], matrix[np.ix_(kept, kept)]).only(
        "loss", whole_names := list(runs["loss"].unique())
    )
    assert without.losses == whole_names
    np.testing.assert_allclose(without.between(same_draw=True)[1:, 1:], whole[1:, 1:])
    assert np.isfinite(without.between(same_draw=True)).all()
    with pytest.raises(ValueError, match="two runs have the same"):
        Crossed.of(pd.concat([runs, runs.iloc[:1]]), np.eye(len(runs) + 1))


@pytest.mark.parametrize("factor", ["loss", "draw"])
def test_a_factor_is_found_where_it_is_and_not_where_it_is_not(factor):
    without = {"common": 0.2, "loss": 0.0, "data": 0.0, "loss_and_data": 0.3, "order": 0.5}
    name = "loss" if factor == "loss" else "data"
    other = "data" if factor == "loss" else "loss"
    small = (1, 5, 3, 3)
    present = simulated({**without, name: 0.2, "order": 0.3}, np.random.default_rng(0), small, 2000)
    assert p_of_factor(Crossed.of(*present), factor, 199) <= 2 / 200
    # What the other factor adds, and what one loss has on one draw, is no effect of this one.
    absent = [
        p_of_factor(
            Crossed.of(*simulated({**without, other: 0.3, "order": 0.2}, np.random.default_rng(i), small, 300)),
            factor,
            99,
            i,
        )
        for i in range(40)
    ]
    assert 0.3 < np.mean(absent) < 0.7  # uniform, if the test is exact
    assert np.mean(np.array(absent) <= 0.1) < 0.3


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.array([0.3, 0.1, 0.4, 0.15, 0.9, 0.26])
    found = jackknife_over(lambda losses: float(values[losses].mean()), np.arange(6)[:, None])
    low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    # Without one of two groups there is nothing to compare.
    assert np.isnan(jackknife_over(lambda losses: float(values[losses].mean()), np.arange(2)[:, None]).low)
    assert jackknife_over(lambda losses: 0.0, np.arange(3)[:, None]).p == 1


def test_families_are_left_out_together():
    left = []
    jackknife_over(lambda losses: left.append(losses.tolist()) or 0.0, families_of(["dpo", "sft", "ipo", "nft", "awr"]))
    assert left == [[0, 1, 2, 3, 4], [1, 3, 4], [0, 2, 3], [0, 1, 2, 4]]


@pytest.mark.parametrize(("scale", "value"), [(CORRELATION, 0.97), (R2, 0.93), (PART, 0.96)])
def test_intervals_stay_where_their_numbers_can_be(scale, value):
    values = value + np.array([0.02, -0.02, 0.025, -0.025])
    found = jackknife_over(lambda losses: float(values[losses].mean()), np.arange(4)[:, None], scale)
    assert 0 <= found.low < found.value < found.high <= 1
    assert scale.back(scale.to(0.4)) == pytest.approx(0.4)


def test_r_squared_has_the_interval_of_its_correlation():
    r = np.array([0.5, 0.7, 0.8, 0.6])
    plain = jackknife_over(lambda losses: float(r[losses].mean()), np.arange(4)[:, None], CORRELATION)
    squared = jackknife_over(lambda losses: float(r[losses].mean() ** 2), np.arange(4)[:, None], R2)
    assert (squared.low, squared.high) == pytest.approx((plain.low**2, plain.high**2))


def test_the_interval_over_families_covers_what_it_says():
    """A mean over pairs of losses, whose families differ: 95% of the intervals should have its expectation, .3."""
    rng = np.random.default_rng(0)
    sizes = (3, 3, 3, 2, 5, 1, 1, 1, 1)
    groups = np.split(np.arange(20), np.cumsum(sizes)[:-1])
    covered = []
    for _ in range(400):
        one = np.repeat(rng.normal(0, 0.1, 9), sizes) + rng.normal(0, 0.05, 20)
        same = 0.3 + (one[:, None] + one[None, :]) / 2
        found = jackknife_over(lambda losses, same=same: float(pairs_of_losses(same, same, losses)[0].mean()), groups)
        covered.append(found.low < 0.3 < found.high)
    assert 0.91 < np.mean(covered) < 0.98


def test_intervals_of_shares_leave_out_families():
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), np.random.default_rng(0), (1, 6, 2, 2), 2_000)
    names = ["dpo", "ipo", "simpo", "cal_dpo", "sft", "nft"]
    design = Crossed.of(
        runs.assign(loss=runs["loss"].map(dict(zip(sorted(set(runs["loss"])), names, strict=True)))), matrix
    )
    row = share_table(design).set_index("share").loc["data_less_loss"]
    same, other = design.between(same_draw=True), design.between(same_draw=False)
    without = [shares(same, other, kept).data_less_loss for kept in ([4, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4])]
    half = stats.t.ppf(0.975, 2) * np.sqrt(2 / 3 * np.sum((without - np.mean(without)) ** 2))
    assert (row["low"], row["high"]) == pytest.approx((row["value"] - half, row["value"] + half))


def test_mantel_counts_the_orders_that_reach_the_observed_one():
    points = np.random.default_rng(0).standard_normal((9, 2))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    r, p = mantel(distances, distances**2, 499)
    assert r == pytest.approx(np.corrcoef(*[m[np.triu_indices(9, 1)] for m in (distances, distances**2)])[0, 1])
    assert p == 1 / 500
    # Three items have six orders; of these two keep the one distance that differs in its place.
    three = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0.0]])
    assert mantel(three, three, 5999)[1] == pytest.approx(1 / 3, abs=0.02)


def test_correlation_leaves_out_what_is_unknown():
    first, second = np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 4.0, 6.0, 0.0])
    assert correlation(first, second) == pytest.approx(1)
    assert np.isnan(correlation(first[2:], second[2:]))
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))


def test_products_of_weights_and_inputs_by_hand():
    # C doubles the first input: tr(ΔW_a C ΔW_bᵀ) counts it twice.
    changes = np.array([[[1.0, 0.0]], [[1.0, 1.0]]])
    weights, inputs = weight_products(
        iter([("m", changes), ("n", 2 * changes)]), dict.fromkeys("mn", np.diag([2.0, 1.0]))
    )
    assert weights.tolist() == [[5, 5], [5, 10]]
    assert inputs.tolist() == [[10, 10], [10, 15]]
    assert normalised(np.array([[4.0, 2.0], [2.0, 0.0]]))[0].tolist()[0] == 1
    assert np.isnan(normalised(np.array([[4.0, 2.0], [2.0, 0.0]]))[0, 1])


def observed(probabilities):
    """What a model says at two positions, of three tokens."""
    with np.errstate(divide="ignore"):
        return SimpleNamespace(log_probs=np.log(np.array(probabilities)))


def test_products_by_kl_are_those_of_its_squared_distance():
    base, first, second = (
        observed(rows)
        for rows in (
            [[0.5, 0.3, 0.2], [0.8, 0.2, 0]],
            [[0.2, 0.3, 0.5], [0.7, 0.3, 0]],
            [[0.6, 0.3, 0.1], [0.5, 0.5, 0]],
        )
    )
    found = kl_products(base, [first, second])

    def squared(a, b):
        return (kl(a.log_probs, b.log_probs).mean() + kl(b.log_probs, a.log_probs).mean()) / 2

    with np.errstate(invalid="ignore"):
        of_base, apart = [squared(run, base) for run in (first, second)], squared(first, second)
    assert np.diag(found) == pytest.approx(of_base)
    assert found[0, 1] == found[1, 0] == pytest.approx((sum(of_base) - apart) / 2)
    # By hand: at the first position .3·log(.5/.2), half the sum of both directions of (.3·log 2.5 + .3·log 2.5).
    one = kl_products(observed([[0.5, 0.3, 0.2]]), [observed([[0.2, 0.3, 0.5]])])
    assert one[0, 0] == pytest.approx(0.3 * np.log(2.5))


def test_geometry_agrees_with_the_analysis_and_with_numbers_by_hand():
    rng = np.random.default_rng(0)
    weight, factors = rng.standard_normal((24, 16)), (rng.standard_normal((24, 2)), rng.standard_normal((2, 16)))
    changes = np.stack([0.02 * factors[0] @ factors[1], np.zeros((24, 16))])
    found = geometry(iter([("m", changes)]), lambda name, shape: weight, 2)
    own = effects(LoraUpdate(*factors, 0.02).svd(), weight, principal(weight, 10))
    assert found["spectral_shift"][0] == pytest.approx(np.sqrt(own[0]))
    assert found["rotation"][0] == pytest.approx(np.degrees(np.sqrt(own[1])))
    assert found["unchanged"][0] == own[2] / weight.size
    # Nothing changes without an update.
    assert [found[name][1] for name in ("unchanged", "spectral_shift", "rotation", "intruders")] == pytest.approx(
        [1, 0, 0, 0], abs=1e-5
    )
    assert found["principal_left_chance"][0] == pytest.approx(10 / 24)
    u = np.linalg.svd(weight)[0][:, :10]
    assert found["principal_left"][0] == pytest.approx(np.sum((u.T @ changes[0]) ** 2) / np.sum(changes[0] ** 2))
    assert set(found) == {
        *MEASURES,
        *(f"{name}_{null}" for name in MEASURES for null in ("copies", "noise")),
        "principal_left",
        "principal_left_chance",
    }


def test_a_turned_copy_has_the_geometry_of_its_size_alone():
    # An update along W0's own leading direction shifts the spectrum by its size; a turned copy of it hardly does.
    weight = np.diag([5.0, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01])
    change = np.zeros((1, 12, 12))
    change[0, 0, 0] = 0.5
    found = geometry(iter([("m", change)]), lambda name, shape: weight, 8)
    assert found["spectral_shift"][0] == pytest.approx(0.5)
    assert found["spectral_shift_copies"][0] < 0.3


def test_gaussian_updates_are_like_noise_of_their_norm_and_rank_one_is_not():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((40, 30))
    flat = rng.standard_normal((1, 40, 30))
    spike = np.outer(rng.standard_normal(40), rng.standard_normal(30))[None]
    changes = np.concatenate([flat, spike * np.linalg.norm(flat) / np.linalg.norm(spike)])
    found = geometry(iter([("m", changes)]), lambda name, shape: weight, 8)
    for measure in ("spectral_shift", "rotation", "small_overlap"):
        of_noise = found[f"{measure}_noise"]
        assert of_noise[0] == pytest.approx(of_noise[1])  # equal norms
        assert found[measure][0] == pytest.approx(of_noise[0], rel=0.25), measure
    assert found["spectral_shift"][1] > 1.5 * found["spectral_shift_noise"][1]


def test_the_largest_changes_overlap_with_the_smallest_weights():
    weight = np.arange(1.0, 101).reshape(10, 10)
    changes = np.stack([weight**2, 200 - weight, np.full((10, 10), 1.0)])
    found = geometry(iter([("m", changes)]), lambda name, shape: weight, 0)
    assert found["small_overlap"][:2].tolist() == [0, 1]


def test_an_intruder_is_a_direction_that_is_far_from_every_one_of_the_base():
    weight = np.diag(np.linspace(2, 1, 16))
    change = np.zeros((1, 16, 16))
    change[0] = 50 * np.outer(np.ones(16) / 4, np.ones(16) / 4)  # cosine ¼ with every direction of W0
    found = geometry(iter([("m", change)]), lambda name, shape: weight, 0)
    assert found["intruders"][0] >= 1


def test_shares_within_a_rate_are_those_of_its_losses_alone():
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), np.random.default_rng(0), (1, 9, 2, 2), 200)
    runs["learning_rate"] = [{"a8": 3.0}.get(loss, 1.0 if loss < "a4" else 2.0) for loss in runs["loss"]]
    table = within_rates(Crossed.of(runs, matrix), runs).set_index("rate")
    assert table["losses"].to_dict() == {1.0: 4, 2.0: 4}
    first = np.flatnonzero(runs["loss"] < "a4")
    own = Crossed.of(runs.iloc[first].reset_index(drop=True), matrix[np.ix_(first, first)])
    found = shares(own.between(same_draw=True), own.between(same_draw=False))
    assert table.loc[1.0, list(SIZES)].to_dict() == pytest.approx(found.table())
    assert table.loc[1.0, "two_less_one"] == pytest.approx(found.two_less_one)


def test_losses_across_two_draws_by_hand():
    levels = list(product(("s",), ("a", "b"), ("d0", "d1"), ("o0", "o1")))
    runs = pd.DataFrame(levels, columns=list(FACTORS))
    # Of other orders only: a on d0 with b on d1 is .5, b on d0 with a on d1 .1, one loss on two draws .3.
    pairs = {("a", "d0", "b", "d1"): 0.5, ("b", "d0", "a", "d1"): 0.1}
    matrix = np.array([[9.0 if x[3] == y[3] else pairs.get((*x[1:3], *y[1:3]), pairs.get((*y[1:3], *x[1:3]), 0.3))
                        for y in levels] for x in levels])  # fmt: skip
    assert Crossed.of(runs, matrix).across("s", "d0", "d1") == pytest.approx(np.array([[0.3, 0.5], [0.1, 0.3]]))
    assert Crossed.of(runs, matrix).across("s", "d1", "d0") == pytest.approx(np.array([[0.3, 0.1], [0.5, 0.3]]))


def test_shares_name_what_is_lost_on_other_data():
    assert Shares(0.1, 0.2, 0.3, 0.15, 0.25).of_data == pytest.approx(0.45)


def results_of(runs, similarities=None, gradients=None):
    matrix = np.eye(len(runs)) if similarities is None else similarities
    return Results(runs, dict.fromkeys(KINDS, matrix), pd.DataFrame() if gradients is None else gradients)


def test_results_are_read_as_they_were_written(tmp_path):
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), np.random.default_rng(0), (1, 3, 2, 2), 50)
    results_of(runs, matrix, pd.DataFrame({"cosine": [0.5]})).write(tmp_path, "study")
    read = Results.read(tmp_path, "study")
    pd.testing.assert_frame_equal(read.runs, runs)
    for kind in KINDS:
        np.testing.assert_allclose(read.similarities[kind], matrix, atol=1e-7)
    assert read.gradients["cosine"].tolist() == [0.5]
    # Results of fewer runs replace these whole; a file that does not belong to the others, or is cut, is refused.
    file = tmp_path / "study" / "similarities.parquet"
    before = file.read_bytes()
    results_of(runs.iloc[:4].reset_index(drop=True), matrix[:4, :4], pd.DataFrame({"cosine": [0.5]})).write(
        tmp_path, "study"
    )
    assert len(Results.read(tmp_path, "study").runs) == 4
    for damaged in (before, before[:100]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"study"):
            Results.read(tmp_path, "study")


def measured_twice(tmp_path):
    """Results of one design, and a function that measures some of its runs, with changes."""
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), np.random.default_rng(0), (2, 3, 2, 2), 50)
    runs = runs.assign(
        run=[f"run{place}" for place in range(len(runs))], norm=1.0, kl=0.1, accuracy=0.5, base_accuracy=0.6
    )
    gradients = pd.DataFrame(
        [(start, "a0", "d0", "a1", "d1", cosine) for start, cosine in (("s0", 0.1), ("s1", 0.2))],
        columns=["start", "loss_a", "draw_a", "loss_b", "draw_b", "cosine"],
    )

    def measure(chosen, left_out=(), similarities=matrix, **changes):
        kept = matched(results_of(runs.assign(**changes), similarities, gradients), chosen)
        results = Results(kept.runs, kept.similarities, kept.gradients, dict.fromkeys(left_out, "diverged"))
        results.write(tmp_path, "study")
        return Results.read(tmp_path, "study")

    return runs, matrix, measure


def test_runs_that_were_measured_on_another_machine_are_kept(tmp_path):
    runs, matrix, measure = measured_twice(tmp_path)
    first = (runs["start"] == "s0").to_numpy()
    second = ~first | (runs["order"] == "o0").to_numpy()
    now, earlier = measure(second, ["other"], norm=1.0001), measure(first, [runs["run"][second].iloc[-1]])
    # Gradients whose second is now the first are the same two.
    turned = {"loss_a": "loss_b", "draw_a": "draw_b", "loss_b": "loss_a", "draw_b": "draw_a"}
    now.gradients.loc[now.gradients["start"] == "s0", "cosine"] = 0.3
    joined = replace(now, gradients=now.gradients.rename(columns=turned)).with_earlier(earlier)
    assert sorted(joined.gradients["cosine"]) == [0.2, 0.3]
    assert set(joined.runs["run"]) == set(runs["run"])
    assert joined.left_out == {"other": "diverged"}
    # What both have is taken from what was measured last; of runs that were never together nothing is known.
    places = joined.runs["run"].str[3:].astype(int).to_numpy()
    assert joined.runs["norm"].tolist() == pytest.approx(np.where(second[places], 1.0001, 1.0))
    together = (first[places][:, None] & first[places]) | (second[places][:, None] & second[places])
    for found in joined.similarities.values():
        np.testing.assert_allclose(found, np.where(together, matrix[np.ix_(places, places)], np.nan), atol=1e-6)
    # Within starts statistics are those of the whole design; between starts those of the pairs that are known.
    whole, design = Crossed.of(runs, matrix), Crossed.of(joined.runs, joined.similarities["weights"])
    order = [design.losses.index(loss) for loss in whole.losses]
    for same_draw in (True, False):
        own = design.between(same_draw=same_draw)[np.ix_(order, order)]
        np.testing.assert_allclose(own, whole.between(same_draw=same_draw), atol=1e-6)
    known = Crossed.of(runs, np.where((first[:, None] & first) | (second[:, None] & second), matrix, np.nan))
    across = design.between(same_draw=True, same_start=False)[np.ix_(order, order)]
    np.testing.assert_allclose(across, known.between(same_draw=True, same_start=False), atol=1e-6)
    assert np.isfinite(across).all()


def test_results_are_measured_again_when_all_runs_are_there(tmp_path):
    runs, matrix, measure = measured_twice(tmp_path)
    first = (runs["start"] == "s0").to_numpy()
    second = ~first | (runs["order"] == "o0").to_numpy()
    joined = measure(second).with_earlier(measure(first))
    # Pairs that were never compared are known now, without and with gradients (full fine-tuning has none).
    for gradients in (joined.gradients, joined.gradients.iloc[:0]):
        whole = replace(measure(first | second), gradients=gradients)
        again = whole.with_earlier(replace(joined, gradients=gradients))
        places = again.runs["run"].str[3:].astype(int).to_numpy()
        np.testing.assert_allclose(again.similarities["weights"], matrix[np.ix_(places, places)], atol=1e-6)
        assert len(again.gradients) == len(gradients)


def test_results_of_other_runs_are_not_joined(tmp_path):
    runs, _, measure = measured_twice(tmp_path)
    first = (runs["start"] == "s0").to_numpy()
    second = ~first | (runs["order"] == "o0").to_numpy()
    earlier = measure(first)
    for change in ({"norm": 1.1}, {"kl": 0.11}, {"accuracy": 0.4}, {"base_accuracy": 0.7}):
        with pytest.raises(InputError, match=rf"run\d+: its {next(iter(change))} is not that of the earlier results"):
            measure(second, **change).with_earlier(earlier)
    with pytest.raises(InputError, match="similarities in weights are not those of the earlier results"):
        measure(second, similarities=np.eye(len(runs))).with_earlier(earlier)
    for other in (measure(~first), measure(second, more=1)):
        with pytest.raises(InputError, match="no run that was measured again, or other columns"):
            other.with_earlier(earlier)
    # A run that diverged when it was trained again is none.
    lost = runs["run"][first & ~second].iloc[0]
    joined = measure(second, [lost]).with_earlier(earlier)
    assert lost not in set(joined.runs["run"])
    assert joined.left_out == {lost: "diverged"}


def test_a_loss_that_lacks_a_cell_is_compared_within_the_same_starts():
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), np.random.default_rng(0), (2, 3, 2, 2), 2_000)
    lacks = ((runs["start"] == "s1") & (runs["loss"] == "a1") & (runs["draw"] == "d1")).to_numpy()
    design = Crossed.of(runs[~lacks].reset_index(drop=True), matrix[np.ix_(~lacks, ~lacks)])
    # Of a1 there are two draws from the first start alone, so that one draw is taken from there, too.
    whole = Crossed.of(runs, matrix).only("start", ["s0"])
    for same_draw in (True, False):
        found, expected = (one.between(same_draw=same_draw) for one in (design, whole))
        assert found[1, 1] == pytest.approx(expected[1, 1])
    assert design.between(same_draw=True)[0, 0] == pytest.approx(Crossed.of(runs, matrix).between(same_draw=True)[0, 0])


def test_results_that_are_not_there_are_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no results; make study STAGE=results measures the runs"):
        page.make(tmp_path / "none")


def test_what_persists_of_a_pair_by_hand():
    levels = list(product(("s",), ("sft", "dpo"), ("d0", "d1"), ("o0", "o1", "o2")))
    runs = pd.DataFrame(levels, columns=list(FACTORS))
    # One loss: .8 on one draw, .4 on two. Two losses: .6 and .2.
    values = {(True, True): 0.8, (True, False): 0.4, (False, True): 0.6, (False, False): 0.2}
    matrix = np.array([[values[x[1] == y[1], x[2] == y[2]] for y in levels] for x in levels])
    table = pair_table(Crossed.of(runs, matrix)).set_index(["loss_a", "loss_b"])
    pair = table.loc["sft", "dpo"]
    assert pair[["same", "other", "relative", "relative_other", "persists"]].tolist() == pytest.approx(
        [0.6, 0.2, 0.75, 0.5, 1 / 3]
    )
    assert (pair["relative_low"], pair["relative_high"]) == pytest.approx((0.75, 0.75))  # all orders alike
    assert pair["ceiling"] == pytest.approx(0.8)
    assert np.isnan(pair["two_starts"])
    # From another start: .5 for one loss, .1 for two, whatever the draw.
    both = pd.concat([runs, runs.assign(start="t")], ignore_index=True)
    other = np.array([[0.5 if x[1] == y[1] else 0.1 for y in levels] for x in levels])
    again = pair_table(Crossed.of(both, np.block([[matrix, other], [other, matrix]]))).set_index(["loss_a", "loss_b"])
    assert again["two_starts"].tolist() == pytest.approx([0.5, 0.1, 0.5])
    assert again["same"].tolist() == pytest.approx(table["same"].tolist())
    assert np.isnan(pair["before"])
    before = pair_table(Crossed.of(runs, matrix), np.array([[1, 0.7], [0.7, 1]])).set_index(["loss_a", "loss_b"])[
        "before"
    ]
    assert before["sft", "dpo"] == 0.7
    assert persisting(Crossed.of(runs, matrix)).value == 1  # of the one pair, which is related
    shown = share_table(Crossed.of(runs, matrix)).set_index("share")["value"]
    assert shown["data_less_loss"] == pytest.approx((0.4 + 0.0) - 0.2)
    assert shown["two_less_one"] == pytest.approx(0.6 - 0.4)
    assert shown["data_less_all_of_loss"] == pytest.approx(0.4 - 0.2 - 0.0)
    of_rates = within_rates(Crossed.of(runs, matrix), runs.assign(learning_rate=1.0))
    assert of_rates.empty  # two losses are too few
    found = likelihoods(Crossed.of(runs.replace("dpo", "rft"), matrix))
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {"one_loss_two_draws": 0.4, "two_losses_one_draw": 0.6, "difference": 0.2}
    )


def test_gradients_that_are_the_ends_decide_all():
    rng = np.random.default_rng(0)
    sizes = {"common": 0.2, "loss": 0.1, "data": 0.1, "loss_and_data": 0.6, "order": 0.0}
    runs, matrix = simulated(sizes, rng, (1, 6, 2, 3), 500)
    runs["learning_rate"] = 1.0
    first = runs.drop_duplicates(["loss", "draw"])
    cosines = matrix[np.ix_(first.index, first.index)]
    gradients = pd.DataFrame(
        {
            "start": "s0", "loss_a": a.loss, "draw_a": a.draw, "loss_b": b.loss, "draw_b": b.draw,
            "cosine": cosines[i, i + j], "halves_a": 0.25, "halves_b": 0.25,
        }
        for i, a in enumerate(first.itertuples())
        for j, b in enumerate(list(first.itertuples())[i:])
    )  # fmt: skip
    found = decided(results_of(runs, matrix, gradients), Crossed.of(runs, matrix), 99)
    assert found["r"].value == pytest.approx(1)
    assert found["gap"] == pytest.approx(0, abs=1e-12)
    assert found["r_within"] == pytest.approx(1)
    assert found["p"] == 1 / 100
    assert found["r_of_means"] == pytest.approx(1)
    # Two losses on two draws: as the gradients are the ends, these say that, too.
    assert found["r_across"].value == pytest.approx(1)
    told = sampling(gradients)
    assert told["halves"] == {"d0": 0.25, "d1": 0.25}
    own = gradients[(gradients["loss_a"] == gradients["loss_b"]) & (gradients["draw_a"] != gradients["draw_b"])]
    assert told["draws"] == {"d0-d1": pytest.approx(own["cosine"].mean())}
    # Halves that agree by ¼ make wholes that agree by 2·¼/(1 + ¼) = .4; by ⅓ and below 0, √(.4·½) and 0.
    assert told["predicted"] == {"d0-d1": pytest.approx(0.4)}
    assert sampling(gradients.assign(halves_b=1 / 3))["predicted"] == {"d0-d1": pytest.approx(0.2**0.5)}
    assert sampling(gradients.assign(halves_b=-0.2))["predicted"] == {"d0-d1": 0}
    # Runs that are left out take their gradients with them.
    kept = matched(results_of(runs, matrix, gradients), runs["draw"] == "d0")
    assert set(kept.gradients["draw_a"]) | set(kept.gradients["draw_b"]) == {"d0"}
    assert found["r_other"].value < 0.7 < found["difference"].value + found["r_other"].value
    matrices = gradient_matrices(results_of(runs, matrix, gradients), ["a0", "a1", "a2", "a3", "a4", "a5"])
    np.testing.assert_allclose(matrices["s0", "d0", "d1"], matrices["s0", "d1", "d0"].T)


def test_a_measure_that_is_the_norm_is_explained_by_it():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.uniform(-2, 0, 24))
    runs = pd.DataFrame({"loss": [f"a{i // 3}" for i in range(24)], "norm": norms, "learning_rate": 1.0})
    for name in MEASURES:
        runs[name], runs[f"{name}_copies"], runs[f"{name}_noise"] = norms**2, 2 * norms**2, 4 * norms**2
    runs["unchanged"] = np.log(norms) + 5
    runs["intruders"], runs["intruders_copies"], runs["intruders_noise"] = 0.0, 0.0, 0.0
    runs["principal_left"], runs["principal_left_chance"] = rng.uniform(0.1, 0.2, 24), 0.1
    table = explained_by_norm(runs).set_index("measure")
    assert table.loc[["unchanged", "spectral_shift", "rotation"], "r2"].tolist() == pytest.approx([1, 1, 1])
    assert table.loc["spectral_shift", ["least_ratio", "largest_ratio"]].tolist() == pytest.approx([0.5, 0.5])
    assert table.loc["spectral_shift", ["least_ratio_to_noise", "largest_ratio_to_noise"]].tolist() == pytest.approx(
        [0.25, 0.25]
    )
    assert table.loc["small_overlap", "r2"] < 0.99  # its logarithm is not taken
    assert table.loc["small_overlap", "r2_of_logs"] == pytest.approx(1)
    assert table.loc["principal_left", "r2"] < 0.5
    assert np.isnan(table.loc["intruders", "r2"])
    # Of two groups of norms R² is large though within them it is not.
    groups = runs.assign(norm=np.where(np.arange(24) < 12, 1.0, 10.0) * rng.uniform(0.9, 1.1, 24))
    groups["learning_rate"] = np.where(np.arange(24) < 12, 1.0, 10.0)
    groups["rotation"] = np.where(np.arange(24) < 12, 1.0, 10.0) * rng.uniform(0.9, 1.1, 24)
    row = explained_by_norm(groups).set_index("measure").loc["rotation"]
    assert row["r2_within"] < 0.5 < 0.9 < row["r2"]
    # Within rates it is r² of what is left of both when the means of the rates are taken off, as a regression with
    # one line for all rates and a level for each has it.
    of_norm, of_rotation = np.log(groups["norm"].to_numpy()), np.log(groups["rotation"].to_numpy())
    levels = np.stack([np.arange(24) < 12, np.arange(24) >= 12], axis=1).astype(float)
    left = [y - levels @ np.linalg.lstsq(levels, y, rcond=None)[0] for y in (of_norm, of_rotation)]
    assert row["r2_within"] == pytest.approx(np.corrcoef(*left)[0, 1] ** 2)


def test_behaviour_per_norm_by_hand():
    kls = {"sft": 0.01, "rft": 0.02, "grpo": 0.03, "dpo": 0.2}
    rows = [(loss, order, kl, 0.5, "d") for loss, kl in kls.items() for order in ("1", "2", "3")]
    runs = pd.DataFrame(rows, columns=["loss", "order", "kl", "norm", "draw"])
    table = behaviour_per_norm(runs).set_index("loss")
    assert table.loc["dpo", ["ratio", "low", "high"]].tolist() == pytest.approx([10, 10, 10])
    assert table.index[0] == "dpo"
    assert table.loc["rft", "ratio"] == pytest.approx(1)
    # Three draws, on which DPO has 4, 8 and 16 times the median: the interval is Student's over their logarithms,
    # 8 times or divided by exp(4.3027 · ln 2 / √3) = 5.5949, and all orders agree.
    draws = {"d0": 0.08, "d1": 0.16, "d2": 0.32}
    over_draws = pd.concat([runs.assign(draw=draw, kl=runs["kl"].where(runs["loss"] != "dpo", kl))
                            for draw, kl in draws.items()])  # fmt: skip
    row = behaviour_per_norm(over_draws).set_index("loss").loc["dpo"]
    assert row["by_draw"] == pytest.approx({"d0": 4, "d1": 8, "d2": 16})
    assert row[["ratio", "low", "high"]].tolist() == pytest.approx([8, 8 / 5.5949, 8 * 5.5949], rel=1e-4)
    assert row[["order_low", "order_high"]].tolist() == pytest.approx([8, 8])


def test_the_norm_over_sfts_by_hand():
    # DPO has 1, 2 and 4 times SFT's norm on three draws: 2, or 5.5949 times more or less (as above).
    rows = [(loss, draw, norm * size) for draw, norm in (("d0", 1.0), ("d1", 2.0), ("d2", 4.0))
            for loss, sizes in (("sft", (0.5, 0.5)), ("dpo", (0.25, 1.0))) for size in
            (np.array(sizes) / (norm if loss == "sft" else 1))]  # fmt: skip
    found = norm_over_sft(pd.DataFrame(rows, columns=["loss", "draw", "norm"]))
    assert found["by_draw"] == pytest.approx({"d0": 1, "d1": 2, "d2": 4})
    ratio = found["ratio"]
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([2, 2 / 5.5949, 2 * 5.5949], rel=1e-4)
    row = verdicts._of_draws("H6", "ratio", ratio, found["by_draw"], verdicts.Rule(0.5, 0.5, 0.5))
    # Without each draw: √8, 2, √2. The interval reaches below .5.
    assert (row.verdict, row.without_low, row.without_high) == ("not shown", *map(pytest.approx, (2**0.5, 8**0.5)))
    assert verdicts._of_draws("H6", "", ratio, found["by_draw"], verdicts.Rule(0.5, 0.3, 0.3)).verdict == "shown"


def test_exponents_are_those_of_power_laws():
    norms = np.array([0.1, 0.3, 1.0] * 2)
    runs = pd.DataFrame({"loss": ["sft"] * 3 + ["dpo"] * 3, "norm": norms})
    runs["kl"] = 3 * norms ** np.where(runs["loss"] == "sft", 2.0, 1.5)
    assert exponents(runs) == pytest.approx({"sft": 0, "dpo": -0.5}, abs=1e-9)


def test_dpo_at_the_norms_of_others_by_hand():
    # KL is ‖ΔW‖ of the pointwise losses, of DFT 9 times that, and 5‖ΔW‖² of DPO: at .2 and .5 it has 1 and 2.5 times
    # the median; none of them reaches 4.
    norms = {**dict.fromkeys(("sft", "rft", "dft", "rift", "grpo"), (0.1, 1.0, 2.0)), "dpo": (0.2, 0.5, 4.0)}
    rows = [(loss, rate, order, norm) for loss, own in norms.items() for rate, norm in zip("abc", own, strict=True)
            for order in "12"]  # fmt: skip
    runs = pd.DataFrame(rows, columns=["loss", "rate", "order", "norm"])
    runs["kl"] = np.where(runs["loss"] == "dpo", 5 * runs["norm"] ** 2, runs["norm"])
    runs.loc[runs["loss"] == "dft", "kl"] *= 9
    assert at_norms_of_dpo(runs) == pytest.approx({"a": 1, "b": 2.5, "c": np.nan}, nan_ok=True)


def test_function_less_weights_by_hand():
    levels = list(product(("s", "t"), ("sft", "dpo"), ("d0", "d1"), ("o0", "o1")))
    runs = pd.DataFrame(levels, columns=list(FACTORS))
    weights = np.array([[0.1 if x[0] != y[0] else 0.4 if x[2] != y[2] else 0.8 for y in levels] for x in levels])
    function = np.array([[0.7 if x[0] != y[0] else 0.6 if x[2] != y[2] else 0.9 for y in levels] for x in levels])
    inputs = np.array([[0.3 if x[0] != y[0] else 0.9 for y in levels] for x in levels])
    similarities = {"weights": weights, "function": function, "inputs": inputs}
    found = function_less_weights({kind: Crossed.of(runs, matrix) for kind, matrix in similarities.items()})
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {"draw": 0.2, "start": 0.6, "start_by_inputs": 0.4, "function_start": 0.7, "weights_start": 0.1}
    )
    alone = Crossed.of(runs, weights).only("start", ["s"])
    assert list(function_less_weights({"weights": alone, "function": alone})) == ["draw"]


def test_every_figure_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), rng, (1, 3, 2, 3), 50)
    runs["loss"] = runs["loss"].map({"a0": "sft", "a1": "dpo", "a2": "rft"})
    runs["norm"] = rng.uniform(0.1, 1, len(runs))
    runs["kl"] = runs["norm"] ** 2 * rng.uniform(0.5, 2, len(runs))
    runs["learning_rate"] = 1.0
    for name in MEASURES:
        runs[name] = runs[f"{name}_copies"] = runs[f"{name}_noise"] = runs["norm"]
    runs["principal_left"], runs["principal_left_chance"] = 0.3, 0.1
    design = Crossed.of(runs, matrix)
    similar = design.between(same_draw=True)
    with style():
        drawn = {
            "shares": figures.shares({"weights": share_table(design)}),
            "persistence": figures.persistence(pair_table(design), "weights", ["dpo"]),
            "decided": figures.decided(similar, similar, 1.0, "weights"),
            "norm": figures.norm_in_disguise(runs, explained_by_norm(runs)),
            "behaviour": figures.behaviour({"conventional rates": behaviour_per_norm(runs)}),
        }
    bars = [patch.get_width() for patch in drawn["shares"].axes[0].patches]
    assert bars == pytest.approx(share_table(design)["value"][:5].clip(lower=0).tolist())
    points = drawn["decided"].axes[0].lines[1].get_xydata()
    assert points.tolist() == [[similar[i, j]] * 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert "R² = 1.000 (of logarithms)" in drawn["norm"].axes[1].get_title(loc="left")
    assert [label.get_text() for label in drawn["persistence"].axes[0].texts] == ["DPO"]
    figures.save({"decided": drawn["decided"]}, tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".pdf", ".png"}


def six_losses(**changes):
    """Three orders of six losses as in the paper: three alike, GRPO farther, DFT farther still, DPO by itself."""
    cluster = ("sft", "rft", "rift")
    cosines = dict.fromkeys(product(cluster, cluster), 0.95)
    cosines |= dict.fromkeys(product(cluster, ["grpo"]), 0.7) | dict.fromkeys(product(cluster, ["dft"]), 0.5)
    cosines |= changes.pop("cosines", {})
    rng = np.random.default_rng(0)
    base = (rng.random(300) < 0.6).astype(int)
    rows = []
    for order, loss in product("123", ("sft", "rft", "rift", "dft", "grpo", "dpo")):
        correct = base.copy()
        if loss != "dpo":
            correct[np.flatnonzero(base)[:40]] = 0
        rows.append(
            ("s", loss, "d", order, 0.1 if loss == "dpo" else 1.0 + 0.01 * int(order), correct.tolist(), base.tolist())
        )
    runs = pd.DataFrame(rows, columns=[*FACTORS, "norm", "correct", "base_correct"])
    similar = [
        [1.0 if a == b else cosines.get((a, b), cosines.get((b, a), 0.05)) for b in runs["loss"]] for a in runs["loss"]
    ]
    return results_of(runs, np.array(similar))


def test_the_findings_hold_where_they_are_as_in_the_paper():
    found = findings(six_losses())
    assert {name: one.verdict for name, one in found.items()} == dict.fromkeys([*FINDINGS, TO_SFT], "holds")
    assert found["F1"].value == pytest.approx(0.95 - 0.7)
    assert found["F2"].value == pytest.approx(0.2)
    assert found["F3"].value == pytest.approx(0.25)
    assert found["F4"].value == pytest.approx(0.1 / np.exp(np.mean(np.log([1.01, 1.02, 1.03]))))
    assert found["F5"].value == pytest.approx(40 / 300)


def test_the_findings_fail_one_by_one():
    turned = findings(six_losses(cosines={("sft", "dft"): 0.8, ("sft", "dpo"): -0.6}))
    assert {name: one.verdict for name, one in turned.items()} == {
        "F1": "holds", "F2": "fails", "F3": "fails", "F4": "holds", "F5": "holds", TO_SFT: "fails"
    }  # fmt: skip
    assert findings(six_losses(cosines={("rft", "grpo"): 0.97}))["F1"].verdict == "fails"
    # Each loss of the cluster by itself: SFT and RIFT may be farther apart than RFT and DFT are.
    uneven = findings(six_losses(cosines={("sft", "rift"): 0.75, ("rft", "dft"): 0.8}))["F1"]
    assert (uneven.verdict, uneven.value) == ("holds", pytest.approx(0.05))
    # DPO may be like GRPO and orthogonal to SFT.
    turned = findings(six_losses(cosines={("grpo", "dpo"): 0.6}))
    assert (turned["F3"].verdict, turned[TO_SFT].verdict) == ("fails", "holds")
    results = six_losses()
    results.runs.loc[results.runs["loss"] == "dpo", "norm"] = 3.0
    is_dpo = results.runs["loss"] == "dpo"
    results.runs["correct"] = results.runs["correct"].where(~is_dpo, pd.Series([[0] * 300] * len(is_dpo)))
    found = findings(results)
    assert (found["F4"].verdict, found["F5"].verdict, found["F5"].from_base) == ("fails", "fails", True)
    results.runs["correct"] = results.runs["base_correct"]
    results.runs["norm"] = [0.5 + 0.5 * (order == "1") + (loss == "dpo") * (order == "2") for order, loss in
                            zip(results.runs["order"], results.runs["loss"], strict=True)]  # fmt: skip
    found = findings(results)
    assert (found["F4"].verdict, found["F5"].verdict, found["F5"].from_base) == ("cannot tell", "cannot tell", False)


def test_findings_can_be_told_at_the_best_rate_and_norms_that_were_made_equal_are_none():
    results = six_losses()
    runs = pd.concat([results.runs, results.runs[results.runs["order"] == "1"].assign(order="0")], ignore_index=True)
    losses = list(runs["loss"])
    six = results.similarities["weights"][:6, :6]
    place = [list(results.runs["loss"][:6]).index(loss) for loss in losses]
    runs["learning_rate"], runs["accuracy_validation"] = 1.0, 0.5
    best = at_best_rate(results_of(runs, six[np.ix_(place, place)]), "accuracy_validation", "0")
    assert {findings(best)[name].verdict for name in FINDINGS} == {"holds"}
    results.runs["norm"] = 0.239 * (1 + 1e-9 * np.arange(len(results.runs)))
    assert findings(results)["F4"].verdict == "equal by design"


def test_a_cosine_that_is_unknown_is_never_within_bounds():
    results = six_losses()
    of_dpo, of_rft = ((results.runs["loss"] == loss).to_numpy() for loss in ("dpo", "rft"))
    for rows, columns in ((of_dpo, of_rft), (of_rft, of_dpo)):
        results.similarities["weights"][np.ix_(rows, columns)] = np.nan
    assert findings(results)["F3"].verdict == "cannot tell"


@pytest.mark.parametrize(
    ("numbers", "says"),
    [((0.2, 0.05, 0.3), "shown"), ((0.05, 0.01, 0.3), "not shown"), ((0.2, -0.1, 0.3), "not shown"),
     ((-0.2, -0.3, -0.1), "the other way"), ((np.nan, np.nan, np.nan), "not measured")],
)  # fmt: skip
def test_a_verdict_needs_the_size_and_the_interval(numbers, says):
    assert verdicts.Rule(0.1, 0, 0).verdict(*numbers) == says


def test_three_times_at_equal_norm_is_the_other_way():
    # 8 times was said, and 4 must be left out; an interval below 8 says the opposite.
    said = [
        verdicts.DPO_FURTHER.verdict(*numbers) for numbers in ((10, 5, 20), (10, 3, 30), (6, 5, 7), (3.1, 2.4, 4.0))
    ]
    assert said == ["shown", "not shown", "the other way", "the other way"]


def test_what_only_the_seen_runs_show_is_not_shown():
    rule, one = verdicts.Rule(0.1, 0, 0), Estimate(0.2, 0.1, 0.3)
    assert verdicts._judged("H1a", "", one, Estimate(0.2, 0.1, 0.3), rule).verdict == "shown"
    assert verdicts._judged("H1a", "", one, Estimate(0.2, -0.1, 0.3), rule).verdict == "not shown"
    assert verdicts._judged("H1a", "", one, None, rule, holds=False).verdict == "not shown"
    opposite = Estimate(-0.2, -0.3, -0.1)
    assert verdicts._judged("H1a", "", opposite, Estimate(-0.2, -0.3, -0.1), rule).verdict == "the other way"
    assert verdicts._judged("H1a", "", opposite, Estimate(-0.2, -0.3, 0.1), rule).verdict == "not shown"
    # What cannot be computed without the seen runs is not shown; without any one draw the sign must stay.
    assert verdicts._judged("H1a", "", one, Estimate(np.nan, np.nan, np.nan), rule).verdict == "not shown"
    kept = verdicts._judged("H1a", "", one, one, rule, without=[0.3, 0.1])
    assert (kept.verdict, kept.without_low, kept.without_high) == ("shown", 0.1, 0.3)
    assert verdicts._judged("H1a", "", one, one, rule, without=[0.3, -0.1]).verdict == "not shown"
    assert verdicts._judged("H1a", "", opposite, opposite, rule, without=[0.2]).verdict == "not shown"
    # Of two draws none can be left out of what compares them.
    for number in (one, opposite):
        alone = verdicts._judged("H1a", "", number, number, rule, without=[np.nan, np.nan])
        assert (alone.verdict, alone.without_low) == ("not shown", pytest.approx(np.nan, nan_ok=True))
    # There are no others.
    assert verdicts._judged("H1a", "", one, None, rule).verdict == "not shown"
    assert verdicts._judged("H1a", "", opposite, None, rule).verdict == "not shown"


def claimed(verdict, value=0.3, beside=0.1, part="H2", beside_verdict=None, third_verdict="not shown"):
    """The line of the abstract for a verdict."""
    row = {
        "model": "embedded", "says": "what", "low": 0.1, "high": 0.4, "unseen": 0.2, "p": 0.0125, "value": value,
        "without_low": 0.25, "without_high": 0.35,
    }  # fmt: skip
    also = {**row, "part": "H1, beside", "says": "beside", "value": beside, "verdict": beside_verdict or verdict}
    third = {**also, "part": "H1, as the loss's", "says": "third", "p": 0.0002, "verdict": third_verdict}
    (line,) = claims.claims([{**row, "part": part, "verdict": verdict}, also, third], page._number)
    return line


def test_a_claim_is_what_its_verdict_lets_one_say():
    shown, otherwise = claims.CLAIMS["H2"].shown, claims.CLAIMS["H2"].otherwise
    assert claimed("shown") == (
        f"- **H2, embedded model: shown.** {shown} (what: .30, 95% .10 to .40, p = .013). "
        f"*Had it gone the other way:* “{otherwise}.”"
    )
    assert f"** {otherwise} (" in claimed("the other way", -0.3)
    assert f"*Had it gone the other way:* “{shown}.”" in claimed("the other way", -0.3)
    assert "Had it gone" not in claimed("not shown")
    assert f"Neither “{shown}” is shown nor “{otherwise}”" in claimed("not shown")
    assert f"“{shown}” was not measured" in claimed("not measured")
    assert claimed("shown", part="H5, draw").startswith("- **half of H5 (draw), embedded model: shown.**")


def test_that_the_data_decide_is_said_only_as_far_as_both_ways_of_counting_say_so():
    shown = claims.CLAIMS["H1a"].shown
    agrees = claimed("not shown", part="H1a", beside_verdict="shown")
    assert "cannot be told apart" not in agrees
    both = claimed("shown", part="H1a")
    condition = "Counting as the draw's what a loss does on one draw alone, the draw of the data"
    assert shown.startswith("The draw of the data")
    assert f"{condition}{shown.removeprefix('The draw of the data')} (what: .30" in both
    assert (
        "; given to nobody .10, 95% .10 to .40, p = .013; given to the loss .10, 95% .10 to .40, p ≤ .001, *not shown*)"
        in both
    )
    one = claimed("shown", part="H1a", beside_verdict="not shown")
    assert (
        f"{shown.removeprefix('The draw of the data')}; counting it as nobody's, the two cannot be told apart (" in one
    )
    assert "the loss has more" not in one
    assert "; counting it as the loss's, the loss has more (what" in claimed(
        "shown", part="H1a", beside_verdict="not shown", third_verdict="the other way"
    )
    neither = claimed("shown", 0.3, -0.1, part="H1a")
    assert "Loss and data decide together" in neither
    assert shown not in neither


@pytest.mark.parametrize(("at_equal_norm", "says"), [("the other way", True), ("not shown", True), ("shown", False)])
def test_that_dpo_moves_behaviour_further_is_said_with_what_equal_norms_show(at_equal_norm, says):
    row = {"model": "embedded", "says": "ratio", "value": 23.0, "low": 19.0, "high": 28.0, "unseen": 24.0,
           "p": np.nan, "without_low": 15.0, "without_high": 33.0}  # fmt: skip
    equal = {**row, "part": "H4, equal norm", "value": 3.0, "low": 2.4, "high": 4.0, "verdict": at_equal_norm}
    (line,) = claims.claims([{**row, "part": "H4", "verdict": "shown"}, equal], page._number)
    assert ("but not at equal norm" in line) is says
    assert "; at equal norm, the others stopped early 3.00, 95% 2.40 to 4.00" in line


def test_matchings_are_counted_and_show_nothing_of_seen_runs_alone():
    found = dict.fromkeys([*FINDINGS, TO_SFT], Finding("holds", 1.0, 1.0, 1.0))
    found["F5"] = Finding("fails", -0.1, np.nan, np.nan, from_base=True)
    rows = {one.part: one for one in verdicts._matchings({"equal steps, one rate": found})}
    assert {part: one.value for part, one in rows.items()} == {
        "H6b": 1, "H6b, to SFT": 1, "H6c": 1, "H6d": 1, "H6e": 0
    }  # fmt: skip
    assert {one.verdict for one in rows.values()} == {"not shown"}
    assert rows["H6e"].says == "matchings of 1 under which F5 holds (DPO differs from the base under 1)"


def test_a_claim_says_what_another_model_shows():
    row = {"part": "H2", "says": "r", "p": np.nan, "unseen": np.nan, "without_low": np.nan, "without_high": np.nan}
    first = {**row, "model": "embedded", "value": 0.9, "low": 0.8, "high": 0.95, "verdict": "shown"}
    second = {**row, "model": "smollm2", "value": 0.5, "low": 0.2, "high": 0.7, "verdict": "not shown"}
    (line,) = claims.claims([second, first], page._number)
    assert line.startswith("- **H2, embedded model: shown.**")
    assert line.endswith("” On SmolLM2-135M: *not shown* (.50, 95% .20 to .70).")
    (line,) = claims.claims([second], page._number)
    assert line.startswith("- **H2, SmolLM2-135M: not shown.**")


def test_every_primary_hypothesis_has_a_claim():
    text = (ROOT / "docs" / "studies" / "how_much_is_the_loss_hypotheses.md").read_text(encoding="utf-8")
    assert {part[:2] for part in claims.CLAIMS} == set(re.findall(r"\*\*(H\d)\.(?! \*\*)", text)) - {"H7"}


def test_flips_that_are_independent_are_not_alike():
    rng = np.random.default_rng(0)
    base = (rng.random(4000) < 0.6).astype(float)
    flipped = [np.where(rng.random(4000) < share, 1 - base, base) for share in (0.3, 0.3, 0.1)]
    similar = normalised(flip_products(np.array(flipped), base))
    assert np.abs(similar[np.triu_indices(3, 1)]).max() < 0.06  # uncentred, .3 and .2
    assert normalised(flip_products(np.array([flipped[0], flipped[0]]), base))[0, 1] == pytest.approx(1)


def test_the_best_rate_is_chosen_on_one_order_and_reported_on_others():
    rows = [("s", loss, "d", order, rate, accuracy) for loss in ("sft", "dpo") for order in "12"
            for rate, accuracy in ((0.1, 0.5), (1.0, 0.5 if loss == "sft" else 0.6))]  # fmt: skip
    runs = pd.DataFrame(rows, columns=[*FACTORS, "learning_rate", "accuracy_validation"])
    kept = at_best_rate(results_of(runs), "accuracy_validation", "1").runs
    assert kept[["loss", "order", "learning_rate"]].values.tolist() == [["sft", "2", 0.1], ["dpo", "2", 1.0]]


def written(folder):
    """Results of all sweeps: six losses at two rates, two draws, three orders and two starts."""
    losses = ("sft", "rft", "rift", "dft", "grpo", "dpo")
    rng = np.random.default_rng(0)
    runs, matrix = simulated(dict.fromkeys(SIZES, 0.2), rng, (2, 6, 2, 3), 60)
    runs["loss"] = [losses[int(loss[1:])] for loss in runs["loss"]]
    runs = runs.replace({"start": {"s0": "42", "s1": "1"}, "draw": {"d0": "0", "d1": "1"}, "order": {"o0": "42"}})
    runs["norm"], runs["kl"] = rng.uniform(0.1, 1, (2, len(runs)))
    runs["learning_rate"] = 1.0
    for name in MEASURES:
        runs[name] = runs[f"{name}_copies"] = runs[f"{name}_noise"] = runs["norm"]
    runs["principal_left"], runs["principal_left_chance"], runs["gradient_to_end"] = 0.3, 0.1, 0.5
    runs["accuracy"], runs["base_accuracy"], runs["accuracy_validation"] = 0.5, 0.5, 0.5
    answers = pd.Series([rng.integers(0, 2, 20).tolist() for _ in range(len(runs))])
    runs["correct"], runs["base_correct"] = answers, [[1] * 20] * len(runs)
    first = runs.drop_duplicates(["start", "loss", "draw"])
    gradients = pd.DataFrame(
        {
            "start": a.start, "loss_a": a.loss, "draw_a": a.draw, "loss_b": b.loss, "draw_b": b.draw,
            "cosine": matrix[a.Index, b.Index], "halves_a": 0.1, "halves_b": 0.1,
        }
        for i, a in enumerate(first.itertuples())
        for b in list(first.itertuples())[i:]
        if a.start == b.start
    )  # fmt: skip
    results = replace(results_of(runs, matrix, gradients), left_out={"sft-1": "diverged"})
    for sweep in ("study", "study_smollm2", "study_full"):
        results.write(folder, sweep)
    one = matched(results, (runs["start"] == "42") & (runs["draw"] == "0"))
    one.runs["rate"], one.runs["learning_rate"] = "x1.0", 1.0
    one.runs["equal_kl_norm"], one.runs["equal_kl_correct"] = one.runs["norm"], one.runs["correct"]
    for sweep in ("study_rates", "study_rates-conventional", "study_rates-norm"):
        one.write(folder, sweep)
    one.runs["rate"] = "conventional"
    one.write(folder, "study_epochs")
    matched(results, runs["start"] == "1").write(folder, "study_one_rate")


@pytest.mark.slow
def test_the_page_is_made_from_the_results_alone(tmp_path):
    written(tmp_path)
    found = page.numbers(tmp_path, 19)
    assert set(page.draw(tmp_path, found)) == {"shares", "persistence", "decided", "norm", "behaviour", "matchings"}
    tables = page.tables(found)
    assert list(tables) == ["shares", "pairs embedded", "pairs SmolLM2", "matchings", "geometry", "verdicts"]
    heads, rows = tables["matchings"]
    assert [row[0] for row in rows[7:]] == [
        f"equal steps, {rate}, unseen" for rate in ("conventional rates", "one rate")
    ]
    assert {len(row) for row in rows} == {len(heads)}
    assert len(tables["pairs embedded"][1]) == 15
    text = json.dumps(page._plain(found), allow_nan=False)
    assert json.loads(text)["embedded"]["runs"] == 72
    unseen = found["embedded"]["unseen"]
    assert unseen["runs"] == 72 - 18
    assert found["embedded"]["left_out"] == {"sft-1": "diverged"}
    judged = {(row[1], row[0]) for row in tables["verdicts"][1]}
    parts = {
        "H1a",
        "H1, beside",
        "H1, as the loss's",
        "H1b",
        "H1c",
        "H2",
        "H2b",
        "H2, two draws",
        "H3",
        "H3c",
        "H4",
        "H5, draw",
        "H5, start",
        "H5, start, by inputs",
        "H5b",
    }
    assert judged == {
        *(("embedded", part) for part in parts),
        *(("embedded", part) for part in ("H3b", "H4b", "H4, equal norm")),
        *(("embedded", part) for part in ("H6", "H6b", "H6b, to SFT", "H6c", "H6d", "H6e")),
        *(("smollm2", part) for part in parts),
    }


def test_a_page_without_results_says_nothing(tmp_path):
    assert page.numbers(tmp_path) == {"matchings": {}, "matchings_unseen": {}}
    assert page.draw(tmp_path, {"matchings": {}, "matchings_unseen": {}}) == {}


def test_what_two_draws_share_is_counted_in_the_problems_of_their_generator():
    """As counted in the frozen rollouts themselves: 38 of 600 problems, 41 of 160."""
    assert shared_problems("study", ["0", "1"]) == {"0,1": 38 / 600}
    assert shared_problems("study_smollm2", ["0", "1"]) == {"0,1": 41 / 160}


def test_numbers_are_written_as_in_the_other_studies():
    assert [page._number(value) for value in (0.678, -0.12, 1.034, -0.001, 0.999, float("nan"))] == [
        ".68", "−.12", "1.03", ".00", "1.00", "–"
    ]  # fmt: skip
    assert page.latex(("a_b", "R²"), [["−.12", "50%"]]).splitlines()[2:5] == [
        r"a\_b & R$^2$ \\", r"\midrule", r"$-$.12 & 50\% \\"
    ]  # fmt: skip


def test_the_page_has_the_numbers_of_the_results_in_the_repository():
    """Values only: intervals need all resamples."""
    results = ROOT / "docs" / "studies" / "how_much_is_the_loss"
    kept = json.loads((results / "tables.json").read_text(encoding="utf-8"))
    made = page.tables(page.numbers(results, 19))
    assert set(made) == set(kept) - {"claims"}

    def value(cell):
        number = re.match(r"−?\d*\.\d+", cell)
        return float(number[0].replace("−", "-")) if number else cell

    for name, (heads, rows) in made.items():
        assert kept[name]["heads"] == list(heads)
        for row, expected in zip(rows, kept[name]["rows"], strict=True):
            assert [value(cell) for cell in row] == pytest.approx([value(cell) for cell in expected], abs=0.011)


def test_a_table_of_a_sweep_that_was_not_run_says_so(tmp_path, monkeypatch):
    (tmp_path / "tables.json").write_text('{"claims": ["- one"], "shares": {"heads": ["a"], "rows": [["1"]]}}')
    monkeypatch.setattr(reference, "STUDY", tmp_path)
    marked = "<!-- study: {} -->\n<!-- end -->"
    assert reference.written(marked.format("matchings")) == "<!-- study: matchings -->\nNot measured yet.\n<!-- end -->"
    assert reference.written(marked.format("claims")) == "<!-- study: claims -->\n- one\n<!-- end -->"
    assert "| a |\n| --- |\n| 1 |\n" in reference.written(marked.format("shares"))


@pytest.mark.parametrize(
    ("method", "rate", "start", "kept"),
    [("sft", "conventional", 1, True), ("dpo", "matched", 1, True), ("dpo", "conventional", 1, False),
     ("sft", "conventional", 42, False), ("kto", "conventional", 1, False)],
)  # fmt: skip
def test_what_is_measured_at_one_rate_is_the_six_losses_from_the_unseen_start(method, rate, start, kept):
    run = SimpleNamespace(method=method, config=SimpleNamespace(lr=SimpleNamespace(name=rate), init_seed=start))
    assert is_unseen_at_one_rate(run) is kept


def test_the_runs_at_one_rate_are_those_that_suggested_nothing():
    runs = page.available(ROOT / "docs" / "studies" / "how_much_is_the_loss", "study_one_rate").runs
    assert (set(runs["start"]), set(runs["learning_rate"])) == ({"1"}, {1e-3})
    assert runs.groupby(["loss", "draw", "order"]).size().tolist() == [1] * (6 * 3 * 3)


def test_the_sweeps_that_are_measured_are_those_that_were_named(tmp_path):
    config = _config(["study", "study_one_rate"], tmp_path)
    assert (config.sweeps, config.output_dir, config.allow_different) == (
        ["study", "study_one_rate"],
        tmp_path,
        "rollouts",
    )
