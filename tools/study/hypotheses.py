"""Numbers that decide the hypotheses of docs/studies/how_much_is_the_loss_hypotheses.md, from the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.evaluation.statistics import jackknife_interval
from tools.study.crossed import (
    CORRELATION,
    PART,
    PLAIN,
    R2,
    Crossed,
    Estimate,
    Scale,
    Shares,
    Statistic,
    correlation,
    jackknife_over,
    known_mean,
    mantel,
    nanmean,
    p_of_factor,
    pairs_of_losses,
    shares,
)
from tools.study.geometry import MEASURES
from tools.study.results import KINDS, Results

Array = NDArray[np.float64]

# Relative value on one draw from which two losses count as related.
RELATED = 0.5
# Measures of the geometry suite whose logarithm is taken, as they are proportional to the update.
LOGARITHMIC = ("spectral_shift", "rotation")
SUITE = ("unchanged", "spectral_shift", "rotation", "small_overlap")
LIKELIHOODS = ("sft", "rft", "dft", "rift")
POINTWISE = (*LIKELIHOODS, "grpo")
# Losses whose updates are alike (docs/studies/loss_family.md); any other loss is a family of its own.
FAMILIES = (
    ("sft", "awr", "eaft"), ("rft", "rift", "topr"), ("dft", "asft", "p_alpha"), ("kto", "redi"),
    ("dpo", "ipo", "simpo", "cal_dpo", "rpo"),
)  # fmt: skip


def designs(results: Results) -> dict[str, Crossed]:
    """Arranges the similarities of each kind by the factors of the runs."""
    return {kind: Crossed.of(results.runs, results.similarities[kind]) for kind in KINDS}


def families_of(losses: Sequence[str]) -> list[NDArray[np.int_]]:
    """Groups losses, by their places, into the `FAMILIES`."""
    family = {loss: members[0] for members in FAMILIES for loss in members}
    names = np.array([family.get(loss, loss) for loss in losses])
    return [np.flatnonzero(names == name) for name in dict.fromkeys(names)]


def over_losses(statistic: Statistic, losses: Sequence[str], scale: Scale = PLAIN) -> Estimate:
    """Estimates a statistic of losses with the jackknife over their families."""
    return jackknife_over(statistic, families_of(losses), scale)


def share_table(design: Crossed) -> pd.DataFrame:
    """Computes the shares of an update with their intervals over losses, and the difference of H1.

    Returns:
        A row for each share, and for `data_less_loss`, `two_less_one` and `data_less_all_of_loss` (`Shares`): value,
        low, high, p.
    """
    same, other = design.between(same_draw=True), design.between(same_draw=False)
    statistics: dict[str, Callable[[Shares], float]] = {
        "common": lambda found: found.common,
        "loss": lambda found: found.loss,
        "data": lambda found: found.data,
        "loss_and_data": lambda found: found.loss_and_data,
        "order": lambda found: found.order,
        "data_less_loss": lambda found: found.data_less_loss,
        "two_less_one": lambda found: found.two_less_one,
        "data_less_all_of_loss": lambda found: found.data_less_all_of_loss,
    }

    def estimate(of: Callable[[Shares], float]) -> Estimate:
        return over_losses(lambda chosen: of(shares(same, other, chosen)), design.losses)

    return pd.DataFrame([{"share": name, **vars(estimate(of))} for name, of in statistics.items()])


def within_rates(design: Crossed, runs: pd.DataFrame) -> pd.DataFrame:
    """Computes the shares among the losses of each learning rate that at least four have, without intervals."""
    rates = runs.drop_duplicates("loss").set_index("loss")["learning_rate"]
    rows = []
    for rate, losses in rates.groupby(rates).groups.items():
        if len(losses) > 3:
            own = design.only("loss", list(losses))
            found = shares(own.between(same_draw=True), own.between(same_draw=False))
            differences = {"data_less_loss": found.data_less_loss, "two_less_one": found.two_less_one}
            persists = persisting(own).value
            rows.append({"rate": rate, "losses": len(losses), **found.table(), **differences, "persisting": persists})
    return pd.DataFrame(rows)


def pair_table(design: Crossed, gradients: Array | None = None) -> pd.DataFrame:
    """Computes, for each two losses (and one with itself), what persists of their similarity on other data.

    Args:
        design: Similarities of one kind.
        gradients: Cosines of the losses' gradients before step 1 on one draw, shape (L, L).

    Returns:
        `before` (of `gradients`), `same` and `other` (similarity on one draw and on two), `ceiling` (geometric mean of
        what the two show with themselves on one draw), `relative` and `relative_other` (over the geometric means on one
        draw and on two), with the jackknife interval of `relative` over orders, `persists` (`other`/`same`), and
        `two_starts` (similarity on one draw, from two starts; NaN where there is one).
    """
    same, other = design.between(same_draw=True), design.between(same_draw=False)
    two_starts = design.between(same_draw=True, same_start=False)
    orders = design.levels["order"]
    without = [
        design.only("order", [order for order in orders if order != left_out]).between(same_draw=True)
        for left_out in orders
    ]
    rows = []
    for i, a in enumerate(design.losses):
        for j, b in enumerate(design.losses[i:], i):
            value = relative(same, i, j)
            low, high = jackknife(value, [relative(matrix, i, j) for matrix in without])
            rows.append(
                {
                    "loss_a": a, "loss_b": b, "before": np.nan if gradients is None else gradients[i, j],
                    "same": same[i, j], "ceiling": np.sqrt(np.maximum(same[i, i], 0) * np.maximum(same[j, j], 0)),
                    "other": other[i, j], "relative": value, "relative_low": low, "relative_high": high,
                    "relative_other": relative(other, i, j),
                    "persists": other[i, j] / same[i, j], "two_starts": two_starts[i, j],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def relative(matrix: Array, i: int, j: int) -> float:
    """Divides a similarity by the geometric mean of what the two show with themselves; NaN if one is not above 0."""
    ceiling = matrix[i, i] * matrix[j, j]
    return float(matrix[i, j] / np.sqrt(ceiling)) if matrix[i, i] > 0 and matrix[j, j] > 0 else float("nan")


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """Returns the interval of a value from those without each order; NaN for two orders."""
    low, high = jackknife_interval(np.array([value]), np.array(left_out)[:, None], len(left_out))
    return float(low[0]), float(high[0])


def persisting(design: Crossed) -> Estimate:
    """Estimates the share of related pairs of losses of which less than half of the similarity persists (H1b)."""
    same, other = design.between(same_draw=True), design.between(same_draw=False)
    own = np.sqrt(np.clip(np.diag(same), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        related = same / np.outer(own, own) >= RELATED

    related &= np.isfinite(other)

    def of(losses: NDArray[np.int_]) -> float:
        is_related, is_less = pairs_of_losses(related.astype(float), (other < same / 2).astype(float), losses)
        return known_mean(is_less[is_related > 0])

    return over_losses(of, design.losses, PART)


def likelihoods(design: Crossed) -> dict[str, Estimate]:
    """Compares likelihood losses: two of them on one draw, and one of them on two draws (H1c)."""
    chosen = design.only("loss", LIKELIHOODS)
    same, other = chosen.between(same_draw=True), chosen.between(same_draw=False)

    def two(losses: NDArray[np.int_]) -> float:
        return known_mean(pairs_of_losses(same, same, losses)[0])

    def one(losses: NDArray[np.int_]) -> float:
        return known_mean(np.diag(other)[losses])

    return {
        "two_losses_one_draw": over_losses(two, chosen.losses),
        "one_loss_two_draws": over_losses(one, chosen.losses),
        "difference": over_losses(lambda losses: two(losses) - one(losses), chosen.losses),
    }


def gradient_matrices(results: Results, losses: Sequence[str]) -> dict[tuple[str, str, str], Array]:
    """Arranges the cosines of gradients before step 1 by start, draw of the first and draw of the second, (L, L)."""
    found: dict[tuple[str, str, str], Array] = {}
    places = {loss: place for place, loss in enumerate(losses)}
    for row in results.gradients.to_dict("records"):
        i, j = places[row["loss_a"]], places[row["loss_b"]]
        for a, b, x, y in ((row["draw_a"], row["draw_b"], i, j), (row["draw_b"], row["draw_a"], j, i)):
            matrix = found.setdefault((row["start"], a, b), np.full((len(losses), len(losses)), np.nan))
            matrix[x, y] = row["cosine"]
    return found


def decided(results: Results, design: Crossed, permutations: int = 9_999) -> dict[str, Any]:
    """Compares gradients before step 1 with the ends of the runs, over pairs of losses (H2).

    Returns:
        `r`, its interval and Mantel's p for gradients and ends on the same draw, averaged over draws and starts;
        `r_within`, the same of pairs of losses of one learning rate (mean over pairs of rates that at least five
        losses have); `r_of_means`, of the averages over draws and starts; the mean `gap` of these; `r_other`, of
        gradients of one draw and ends of another; the `difference` to it; and `r_across`, of two losses on two draws,
        their gradients and their ends alike (None where there is one draw).
    """
    matrices = gradient_matrices(results, design.losses)
    starts, draws = design.levels["start"], design.levels["draw"]
    ends = {
        (start, draw): design.only("start", [start]).only("draw", [draw]).between(same_draw=True)
        for start in starts
        for draw in draws
    }

    def r(losses: NDArray[np.int_], *, same: bool) -> float:
        found = [
            correlation(*pairs_of_losses(matrices[start, draw, draw], ends[start, end], losses))
            for start in starts
            for draw in draws
            for end in draws
            if (draw == end) is same and (start, draw, draw) in matrices
        ]
        return known_mean(np.array(found))

    count = len(design.losses)
    # Averages over the draws and starts for which there are both.
    both = [
        (start, draw)
        for start in starts
        for draw in draws
        if np.isfinite(ends[start, draw]).any() and (start, draw, draw) in matrices
    ]
    gradients = nanmean(np.stack([matrices[start, draw, draw] for start, draw in both]), 0)
    final = nanmean(np.stack([ends[start, draw] for start, draw in both]), 0)
    upper = np.triu_indices(count, 1)
    _, p = mantel(gradients, final, permutations)
    rate_of = results.runs.drop_duplicates("loss").set_index("loss")["learning_rate"]
    rates = rate_of.reindex(design.losses).to_numpy()
    groups = [group for rate in dict.fromkeys(rates) if len(group := np.flatnonzero(rates == rate)) > 4]
    of_groups = np.array(
        [
            [correlation(*pairs_of_losses(matrices[start, draw, draw], ends[start, draw], group)) for group in groups]
            for start, draw in both
        ]
    )
    # A group's r counts as often as it has pairs.
    pairs = np.where(np.isfinite(of_groups), [len(group) * (len(group) - 1) for group in groups], 0)
    across = [
        (matrices[start, a, b], design.across(start, a, b))
        for start in starts
        for a, b in combinations(draws, 2)
        if (start, a, b) in matrices
    ]

    def r_across(losses: NDArray[np.int_]) -> float:
        chosen, two = np.ix_(losses, losses), ~np.eye(len(losses), dtype=bool)
        return known_mean(np.array([correlation(first[chosen][two], last[chosen][two]) for first, last in across]))

    several = len(draws) > 1
    return {
        "r": over_losses(lambda chosen: r(chosen, same=True), design.losses, CORRELATION),
        "r_within": float(np.nansum(of_groups * pairs) / pairs.sum()) if pairs.any() else float("nan"),
        "r_of_means": correlation(gradients[upper], final[upper]),
        "r_across": over_losses(r_across, design.losses, CORRELATION) if across else None,
        "r_other": over_losses(lambda chosen: r(chosen, same=False), design.losses, CORRELATION) if several else None,
        "difference": over_losses(lambda chosen: r(chosen, same=True) - r(chosen, same=False), design.losses)
        if several
        else None,
        "p": p,
        "gap": known_mean(np.abs(gradients[upper] - final[upper])),
    }


def r_of_kind(results: Results, design: Crossed) -> float:
    """Correlates gradients before step 1 and similarities of another kind, over pairs, mean over draws and starts."""
    found = []
    for (start, a, b), matrix in gradient_matrices(results, design.losses).items():
        if a == b:
            end = design.only("start", [start]).only("draw", [a]).between(same_draw=True)
            upper = np.triu_indices(len(matrix), 1)
            found.append(correlation(matrix[upper], end[upper]))
    return known_mean(np.array(found))


def sampling(gradients: pd.DataFrame) -> dict[str, Any]:
    """Compares the gradients before step 1 of one loss on two draws with those on two halves of one draw.

    Returns:
        Mean cosines over losses and starts: `halves` of each draw, `draws` of each two, and `predicted`, what these
        would be if draws differed only by sampling: √(r_a·r_b) with r = 2h/(1 + h) of halves that agree by h
        (Spearman and Brown, 1910), 0 where h is below 0.
    """
    own = gradients[gradients["loss_a"] == gradients["loss_b"]]
    same = own[own["draw_a"] == own["draw_b"]]
    other = own[own["draw_a"] != own["draw_b"]]
    pairs = ["-".join(sorted(pair)) for pair in zip(other["draw_a"], other["draw_b"], strict=True)]
    halves = other[["halves_a", "halves_b"]].clip(lower=0).to_numpy()
    predicted = np.sqrt((2 * halves / (1 + halves)).prod(axis=1))
    return {
        "halves": same.groupby("draw_a")["halves_a"].mean().to_dict(),
        "draws": other.groupby(pairs)["cosine"].mean().to_dict(),
        "predicted": pd.Series(predicted, other.index).groupby(pairs).mean().to_dict(),
    }


def explained_by_norm(runs: pd.DataFrame) -> pd.DataFrame:
    """Regresses each measure of the geometry suite on log‖ΔW‖ (H3), with intervals over losses.

    Returns:
        A row for each measure: `r2`, its interval, `r2_of_logs` of the measure's logarithm (NaN if it is 0 in a run),
        `r2_within` of deviations from the mean of all runs of the learning rate (rates that several losses have), and
        the least and largest mean ratio of a loss to rotated copies (`least_ratio`, `largest_ratio`), and to Gaussian
        matrices of the same norms (`least_ratio_to_noise`, `largest_ratio_to_noise`).
    """
    names = list(dict.fromkeys(runs["loss"]))
    places = [np.flatnonzero(runs["loss"] == name) for name in names]
    norms = np.log(runs["norm"].to_numpy())
    rows = []
    for measure in (*MEASURES, "principal_left"):
        is_share = measure == "principal_left"
        raw = runs[measure].to_numpy(dtype=float)
        estimate = over_losses(_r2(norms, np.log(raw) if measure in LOGARITHMIC else raw, places), names, R2)
        rows.append(
            {
                "measure": measure, "r2_within": _within(runs, norms, np.log(raw) if measure in LOGARITHMIC else raw),
                "r2": estimate.value, "low": estimate.low, "high": estimate.high,
                "r2_of_logs": correlation(norms, np.log(raw)) ** 2 if (raw > 0).all() else float("nan"),
                **_ratios(runs, measure, "principal_left_chance" if is_share else f"{measure}_copies", ""),
                **_ratios(runs, measure, "principal_left_chance" if is_share else f"{measure}_noise", "_to_noise"),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _ratios(runs: pd.DataFrame, measure: str, null: str, name: str) -> dict[str, Any]:
    """Finds the losses whose mean of a measure is the smallest and the largest multiple of that of its null."""
    mean = runs.groupby("loss")[[measure, null]].mean()
    ratio = (mean[measure] / mean[null].where(mean[null] > 0)).dropna()
    return {
        f"least_ratio{name}": ratio.min(), f"least_loss{name}": ratio.idxmin() if len(ratio) else "",
        f"largest_ratio{name}": ratio.max(), f"largest_loss{name}": ratio.idxmax() if len(ratio) else "",
    }  # fmt: skip


def _within(runs: pd.DataFrame, x: Array, y: Array) -> float:
    """Computes r² of deviations from the means of each learning rate: two groups of losses alone may make r² large."""
    several = (runs.groupby("learning_rate")["loss"].transform("nunique") > 1).to_numpy()
    of_rates = pd.DataFrame({"x": x, "y": y})[several].groupby(runs["learning_rate"].to_numpy()[several])
    deviations = of_rates.transform(lambda own: own - own.mean()).to_numpy()
    return correlation(deviations[:, 0], deviations[:, 1]) ** 2


def _r2(x: Array, y: Array, places: Sequence[NDArray[np.int_]]) -> Statistic:
    """Returns a function of losses that computes r² of x and y over their runs, which are at `places`."""

    def of(losses: NDArray[np.int_]) -> float:
        chosen = np.concatenate([places[loss] for loss in losses])
        return correlation(x[chosen], y[chosen]) ** 2

    return of


def behaviour_per_norm(runs: pd.DataFrame) -> pd.DataFrame:
    """Computes KL ÷ ‖ΔW‖² of each loss over the median of the pointwise losses on the same draw (H4).

    Returns:
        For each loss `ratio`, the geometric mean over draws; `low` and `high`, of the t interval of its logarithms over
        draws if there are several, else those over orders; `order_low` and `order_high`, of the jackknife over orders;
        and `by_draw`, the ratio on each draw.
    """
    values = runs.assign(log=np.log(runs["kl"] / runs["norm"] ** 2))
    draws, orders = (list(dict.fromkeys(values[factor])) for factor in ("draw", "order"))

    def logs(chosen: pd.DataFrame) -> pd.DataFrame:
        """Returns the logarithm of the ratio of each loss (rows) on each draw (columns)."""
        means = chosen.groupby(["loss", "draw"])["log"].mean().unstack()
        return means - means.loc[[name for name in POINTWISE if name in means.index]].median()

    found = logs(values)
    left_out = [logs(values[values["order"] != order]) for order in orders]
    rows = []
    for loss in dict.fromkeys(values["loss"]):
        of_draws = found.loc[loss].dropna()
        ratio = float(of_draws.mean())
        over_orders = jackknife(
            ratio, [float(logs_of.loc[loss].mean()) for logs_of in left_out if loss in logs_of.index]
        )
        interval = t_interval(of_draws.to_numpy()) if len(of_draws) > 1 else over_orders
        rows.append(
            {
                "loss": loss, "ratio": np.exp(ratio), "low": np.exp(interval[0]), "high": np.exp(interval[1]),
                "order_low": np.exp(over_orders[0]), "order_high": np.exp(over_orders[1]),
                "by_draw": {draw: float(np.exp(of_draws[draw])) for draw in draws if draw in of_draws},
            }
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values("ratio", ascending=False, ignore_index=True)


def norm_over_sft(runs: pd.DataFrame) -> dict[str, Any]:
    """Computes DPO's ‖ΔW‖ over SFT's (H6).

    Returns:
        `ratio`, the geometric mean over draws, with Student's interval of its logarithms over draws, and `by_draw`.
    """
    logs = np.log(runs["norm"]).groupby([runs["draw"], runs["loss"]]).mean().unstack()
    of_draws = (logs["dpo"] - logs["sft"]).dropna()
    interval = t_interval(of_draws.to_numpy()) if len(of_draws) > 1 else (float("nan"), float("nan"))
    ratio = np.exp([of_draws.mean(), *interval])
    return {
        "ratio": Estimate(*(float(value) for value in ratio)),
        "by_draw": {str(draw): float(np.exp(value)) for draw, value in of_draws.items()},
    }


def exponents(runs: pd.DataFrame) -> dict[str, float]:
    """Fits, for each loss, x of KL ÷ ‖ΔW‖² ∝ ‖ΔW‖ˣ over its runs at several rates; 0 if the quotient is a constant."""
    logs = pd.DataFrame({"loss": runs["loss"], "norm": np.log(runs["norm"]), "kl": np.log(runs["kl"])})
    return {
        str(loss): float(np.polyfit(own["norm"], own["kl"] - 2 * own["norm"], 1)[0])
        for loss, own in logs.groupby("loss")
    }


def at_norms_of_dpo(runs: pd.DataFrame) -> dict[str, float]:
    """Computes DPO's KL over the median of the pointwise losses where these, too, end at DPO's norm.

    Args:
        runs: Runs at several rates. Between these the KL of a loss is interpolated over its norm, both in logarithms.

    Returns:
        The ratio by the name of DPO's rate; NaN where a pointwise loss has no rates on both sides of the norm.
    """
    values = runs.assign(log_norm=np.log(runs["norm"]), log_kl=np.log(runs["kl"]))
    means = values.groupby(["loss", "rate"])[["log_norm", "log_kl"]].mean().sort_values("log_norm")
    pointwise = [means.loc[loss] for loss in POINTWISE]
    found = {}
    for rate, norm, log_kl in means.loc["dpo"].itertuples():
        others = [np.interp(norm, own["log_norm"], own["log_kl"], np.nan, np.nan) for own in pointwise]
        found[str(rate)] = float(np.exp(log_kl - np.median(others)))
    return found


def t_interval(values: Array) -> tuple[float, float]:
    """Computes Student's 95% interval of a mean."""
    from scipy.stats import t  # slow to import

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def function_less_weights(found: dict[str, Crossed]) -> dict[str, Estimate]:
    """Compares how far function and weights depend on draw and start (H5), with intervals over losses.

    Returns:
        `draw`, `start`: mean similarity of one loss on two draws (from two starts) in function, minus that in weights;
        `start_by_inputs`: minus that of weights as the module's inputs meet them, which a random A does not decide;
        `function_start`, `weights_start`: the similarity from two starts itself.
    """

    def diagonal(kind: str, **which: bool) -> Array:
        own: Array = np.diag(found[kind].between(**which))
        return own

    draw = diagonal("function", same_draw=False) - diagonal("weights", same_draw=False)
    estimates = {"draw": draw}
    if len(found["weights"].levels["start"]) > 1:
        function, weights, inputs = (
            diagonal(kind, same_draw=True, same_start=False) for kind in ("function", "weights", "inputs")
        )
        estimates |= {"start": function - weights, "start_by_inputs": function - inputs}
        estimates |= {"function_start": function, "weights_start": weights}
    return {name: over_losses(_mean_of(values), found["weights"].losses) for name, values in estimates.items()}


def _mean_of(values: Array) -> Statistic:
    return lambda losses: known_mean(values[losses])


def p_of_factors(design: Crossed, permutations: int = 9_999) -> dict[str, float]:
    """Tests whether the loss and the draw matter at all (H1)."""
    return {factor: p_of_factor(design, factor, permutations) for factor in ("loss", "draw")}
