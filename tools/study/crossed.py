"""Statistics of a crossed design: losses × draws of the data × data orders × starts, from similarities of its runs.

Runs are unit vectors, so that the mean similarity of two runs that have some factors in common is the share of an
update that these factors explain (`shares`). Only pairs of runs of different data orders count: they share no batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.evaluation.statistics import jackknife_interval

Array = NDArray[np.float64]

PERMUTATIONS = 9_999
FACTORS = ("start", "loss", "draw", "order")


@dataclass(frozen=True)
class Crossed:
    """Similarities of the runs of a crossed design.

    Attributes:
        levels: The levels of each of the `FACTORS`.
        values: Similarities, shape (S, L, D, O, S, L, D, O); NaN where a run is missing.
    """

    levels: dict[str, list[str]]
    values: Array

    @classmethod
    def of(cls, runs: pd.DataFrame, similarities: Array) -> Crossed:
        """Arranges a matrix of similarities by the factors of its runs.

        Args:
            runs: A row for each run, with the `FACTORS` as columns.
            similarities: Shape (N, N), in the order of `runs`.

        Raises:
            ValueError: Two runs have the same levels.
        """
        if runs.duplicated(list(FACTORS)).any():
            raise ValueError("two runs have the same loss, draw, order and start")
        levels = {factor: list(dict.fromkeys(runs[factor])) for factor in FACTORS}
        places = [[levels[factor].index(value) for factor, value in zip(FACTORS, row, strict=True)] for row in
                  runs[list(FACTORS)].itertuples(index=False)]  # fmt: skip
        shape = tuple(len(levels[factor]) for factor in FACTORS)
        flat = np.ravel_multi_index(np.array(places).T, shape)
        values = np.full((int(np.prod(shape)),) * 2, np.nan)
        values[np.ix_(flat, flat)] = similarities
        return cls(levels, values.reshape(*shape, *shape))

    @property
    def losses(self) -> list[str]:
        """The losses."""
        return self.levels["loss"]

    def only(self, factor: str, chosen: Sequence[str]) -> Crossed:
        """Keeps some levels of one factor, in their order here."""
        kept = [level for level in self.levels[factor] if level in set(chosen)]
        index = [self.levels[factor].index(level) for level in kept]
        axis = FACTORS.index(factor)
        values = self.values.take(index, axis).take(index, axis + len(FACTORS))
        return Crossed({**self.levels, factor: kept}, values)

    def between(self, *, same_draw: bool, same_start: bool = True) -> Array:
        """Averages similarities of every two losses over pairs of runs of different orders, shape (L, L), symmetric.

        Pairs of one start are averaged start by start. For each two losses only starts count that have their pairs of
        one draw and of two (if any do), so that what is compared is of the same starts.

        Args:
            same_draw: Pairs of one draw of the data, or of two.
            same_start: Pairs from one start, or from two.
        """
        if not same_start:
            return self._mean(same_draw, ~np.eye(len(self.levels["start"]), dtype=bool))
        of_starts = {
            pairs: np.stack([self._mean(pairs, one) for one in _single(len(self.levels["start"]))])
            for pairs in (True, False)
        }
        both = np.isfinite(of_starts[True]) & np.isfinite(of_starts[False])
        return nanmean(np.where(both | ~both.any(axis=0), of_starts[same_draw], np.nan), 0)

    def across(self, start: str, first: str, second: str) -> Array:
        """Averages similarities of every loss on one draw with every loss on another, from one start, shape (L, L).

        Args:
            start: The start.
            first: The draw of the losses in rows.
            second: That of the losses in columns.
        """
        place = self.levels["start"].index(start)
        a, b = (self.levels["draw"].index(draw) for draw in (first, second))
        values = np.moveaxis(self.values[place, :, a, :, place, :, b, :], 2, 1)  # (L, L, O, O)
        return nanmean(values[:, :, ~np.eye(values.shape[-1], dtype=bool)], -1)

    def _mean(self, same_draw: bool, starts: NDArray[np.bool_]) -> Array:
        """Averages over the pairs of starts that are chosen, shape (S, S)."""
        draws, orders = (np.eye(len(self.levels[factor]), dtype=bool) for factor in ("draw", "order"))
        draws = draws if same_draw else ~draws
        chosen = starts[:, None, None, :, None, None] & draws[None, :, None, None, :, None]
        chosen = chosen & ~orders[None, None, :, None, None, :]
        # Losses first: (L, L, S, D, O, S, D, O).
        values = np.moveaxis(self.values, (1, 5), (0, 1))
        return nanmean(values[:, :, chosen], -1)


def _single(count: int) -> Iterator[NDArray[np.bool_]]:
    """Yields the choice of each start with itself, shape (S, S)."""
    for place in range(count):
        chosen = np.zeros((count, count), dtype=bool)
        chosen[place, place] = True
        yield chosen


def nanmean(values: Array, axis: int) -> Array:
    """Averages what is known along an axis; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    mean: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


@dataclass(frozen=True)
class Shares:
    """Shares of an update, which add up to 1; one that is not of the mean may be negative.

    Attributes:
        common: What runs of other losses on other data have in common.
        loss: What runs of one loss have in common beyond that, whatever the data.
        data: What runs on one draw have in common beyond that, whatever the loss.
        loss_and_data: What only one loss on one draw has in common.
        order: The rest, which another data order changes.
    """

    common: float
    loss: float
    data: float
    loss_and_data: float
    order: float

    @property
    def of_data(self) -> float:
        """What is lost on other data: `data` + `loss_and_data`."""
        return self.data + self.loss_and_data

    @property
    def data_less_loss(self) -> float:
        """What is lost on other data, less what one loss keeps on any: `of_data` − `loss`."""
        return self.of_data - self.loss

    @property
    def two_less_one(self) -> float:
        """Two losses on one draw, less one loss on two: S(·, data) − S(loss, ·), which is `data` − `loss`."""
        return self.data - self.loss

    @property
    def data_less_all_of_loss(self) -> float:
        """`data_less_loss` the other way round, with what only both have in common as the loss's."""
        return self.data - self.loss - self.loss_and_data

    def table(self) -> dict[str, float]:
        """Returns the shares by name."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


def shares(same: Array, other: Array, losses: Sequence[int] | NDArray[np.int_] | None = None) -> Shares:
    """Computes the shares of the updates of some losses, the analysis of variance of unit vectors.

    Args:
        same: Similarities of losses on one draw, shape (L, L); the diagonal is of one loss.
        other: The same on two draws.
        losses: Which losses; None: all.
    """
    index = np.arange(len(same)) if losses is None else np.asarray(losses)
    one = known_mean(np.diag(same)[index])
    one_other = known_mean(np.diag(other)[index])
    two, two_other = (known_mean(values) for values in pairs_of_losses(same, other, index))
    return Shares(two_other, one_other - two_other, two - two_other, one - one_other - two + two_other, 1 - one)


def known_mean(values: Array) -> float:
    """Averages what is known; NaN if nothing is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The estimate.
        low: Lower end of the 95% interval; NaN where there is none.
        high: Upper end.
        p: p of a two-sided test against 0; NaN where there is none.
    """

    value: float
    low: float
    high: float
    p: float = float("nan")


@dataclass(frozen=True)
class Scale:
    """The scale on which a number has a symmetric interval.

    Attributes:
        to: Takes a number to the scale.
        back: Takes it back.
    """

    to: Callable[[float], float]
    back: Callable[[float], float]


def _artanh(r: float) -> float:
    # Short of ±1, where the scale ends.
    return float(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)))


PLAIN = Scale(lambda value: value, lambda value: value)
# Fisher's z (1915), of a correlation and of its square; a part of a whole stays between 0 and 1.
CORRELATION = Scale(_artanh, lambda z: float(np.tanh(z)))
R2 = Scale(lambda r2: _artanh(np.sqrt(r2)), lambda z: float(np.tanh(max(z, 0.0)) ** 2))
PART = Scale(PLAIN.to, lambda value: float(np.clip(value, 0, 1)))

# Computes a number of losses, which are given by their numbers.
Statistic = Callable[[NDArray[np.int_]], float]


def jackknife_over(statistic: Statistic, groups: Sequence[NDArray[np.int_]], scale: Scale = PLAIN) -> Estimate:
    """Estimates a statistic of losses with the jackknife that leaves out one group of them at a time (Tukey 1958).

    A percentile bootstrap of so few groups covers less than it says, 50% with three and 82 to 94% with nine, where this
    covers 94 to 96%.

    Args:
        statistic: The statistic.
        groups: Numbers of the losses that are left out together.
        scale: The scale on which the interval is symmetric.
    """
    from scipy.stats import t  # slow to import

    every = np.concatenate(groups)
    value = statistic(np.sort(every))
    without = [scale.to(statistic(np.sort(np.setdiff1d(every, group)))) for group in groups if len(every) > len(group)]
    center = scale.to(value)
    low, high = (
        float(end[0]) for end in jackknife_interval(np.array([center]), np.array(without)[:, None], len(without))
    )
    if not np.isfinite([low, high]).all():
        return Estimate(value, float("nan"), float("nan"))
    degrees = len(without) - 1
    error = (high - center) / t.ppf(0.975, degrees)
    p = float(2 * t.sf(abs(center) / error, degrees)) if error > 0 else float(center == 0)
    return Estimate(value, scale.back(low), scale.back(high), p)


def mantel(first: Array, second: Array, permutations: int = PERMUTATIONS, seed: int = 0) -> tuple[float, float]:
    """Computes Pearson's r of two symmetric matrices above their diagonals, and p of Mantel's test (1967), one-sided.

    The test permutes rows and columns of one of them together; the observed order counts as one permutation.
    """
    upper = np.triu_indices(len(first), 1)
    rng = np.random.default_rng(seed)
    observed = correlation(first[upper], second[upper])
    if np.isnan(observed):
        return observed, observed
    reached = 0
    for _ in range(permutations):
        order = rng.permutation(len(first))
        reached += correlation(first[np.ix_(order, order)][upper], second[upper]) >= observed - 1e-12
    return observed, (reached + 1) / (permutations + 1)


def correlation(first: Array, second: Array) -> float:
    """Computes Pearson's r of what is known of both; NaN for fewer than three, or if one of them is constant."""
    known = np.isfinite(first) & np.isfinite(second)
    a, b = first[known], second[known]
    varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
    return float(np.corrcoef(a, b)[0, 1]) if varied else float("nan")


def pairs_of_losses(first: Array, second: Array, losses: NDArray[np.int_]) -> tuple[Array, Array]:
    """Returns the entries of two symmetric (L, L) matrices for every two of some losses."""
    a, b = np.triu_indices(len(losses), 1)
    rows, columns = losses[a], losses[b]
    return first[rows, columns], second[rows, columns]


def p_of_factor(design: Crossed, factor: str, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Tests whether runs of one loss (or draw) are more alike than those of two, by permuting its labels.

    Labels of losses are permuted within each draw, those of draws within each loss; all orders and starts of a cell
    move together, since they share what only this loss on this draw has. Statistic: for losses S(loss, ·) − S(·, ·),
    for draws S(·, data) − S(·, ·), both over pairs of different orders from one start.

    Args:
        design: The runs.
        factor: "loss" or "draw".
        permutations: Number of permutations; the observed labels count as one more.
        seed: Seed of the permutations.

    Returns:
        NaN if there are no two levels of the other factor.
    """
    shape = tuple(len(design.levels[name]) for name in FACTORS)
    matrix = design.values.reshape(int(np.prod(shape)), -1)
    start, loss, draw, order = np.indices(shape).reshape(len(shape), -1)
    own, held = (loss, draw) if factor == "loss" else (draw, loss)
    eligible = (start[:, None] == start[None, :]) & (order[:, None] != order[None, :]) & np.isfinite(matrix)
    # The pairs whose factor is tested differ in the other one.
    rows, columns = np.nonzero(np.triu(eligible & (held[:, None] != held[None, :])))
    values = matrix[rows, columns]

    def statistic(labels: NDArray[np.int_]) -> float:
        same = labels[rows] == labels[columns]
        return float(values[same].mean() - values[~same].mean()) if same.any() and not same.all() else float("nan")

    rng = np.random.default_rng(seed)
    observed = statistic(own)
    if np.isnan(observed):
        return float("nan")
    identity = np.broadcast_to(np.arange(own.max() + 1), (held.max() + 1, own.max() + 1))
    reached = sum(statistic(rng.permuted(identity, axis=1)[held, own]) >= observed - 1e-12 for _ in range(permutations))
    return (reached + 1) / (permutations + 1)
