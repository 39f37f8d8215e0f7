"""Statistics of a crossed design: losses × draws of the data × data orders × starts, from similarities of its runs.

Runs are unit vectors, so that the mean similarity of two runs that have some factors in common is the share of an
update that these factors explain (`shares`). Only pairs of runs of different data orders count: they share no batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]

PERMUTATIONS = 9_999
RESAMPLES = 2_000
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

    def without(self, **cell: str) -> Crossed:
        """Forgets the runs of a cell, such as those of `start="42", draw="0"`."""
        place = tuple(self.levels[factor].index(cell[factor]) if factor in cell else slice(None) for factor in FACTORS)
        values = self.values.copy()
        values[place] = np.nan
        values[(slice(None),) * len(FACTORS) + place] = np.nan
        return Crossed(self.levels, values)

    def between(self, *, same_draw: bool, same_start: bool = True) -> Array:
        """Averages similarities of every two losses over pairs of runs of different orders, shape (L, L), symmetric.

        Args:
            same_draw: Pairs of one draw of the data, or of two.
            same_start: Pairs from one start, or from two.
        """
        s, _, d, o = (np.arange(len(self.levels[factor])) for factor in FACTORS)
        starts = _equal(s) if same_start else ~_equal(s)
        draws = _equal(d) if same_draw else ~_equal(d)
        chosen = starts[:, None, None, :, None, None] & draws[None, :, None, None, :, None]
        chosen = chosen & ~_equal(o)[None, None, :, None, None, :]
        # Losses first: (L, L, S, D, O, S, D, O).
        values = np.moveaxis(self.values, (1, 5), (0, 1))
        found: Array = _nanmean(values[:, :, chosen], -1)
        return found


def _equal(levels: NDArray[np.int_]) -> NDArray[np.bool_]:
    equal: NDArray[np.bool_] = levels[:, None] == levels[None, :]
    return equal


def _nanmean(values: Array, axis: int) -> Array:
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

    def table(self) -> dict[str, float]:
        """Returns the shares by name."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


def shares(same: Array, other: Array, losses: Sequence[int] | NDArray[np.int_] | None = None) -> Shares:
    """Computes the shares of the updates of some losses, the analysis of variance of unit vectors.

    Args:
        same: Similarities of losses on one draw, shape (L, L); the diagonal is of one loss.
        other: The same on two draws.
        losses: Which losses, perhaps one several times as in a bootstrap; None: all. Copies of one are no pair.
    """
    index = np.arange(len(same)) if losses is None else np.asarray(losses)
    different = index[:, None] != index[None, :]
    one = known_mean(np.diag(same)[index])
    one_other = known_mean(np.diag(other)[index])
    two = known_mean(same[np.ix_(index, index)][different])
    two_other = known_mean(other[np.ix_(index, index)][different])
    return Shares(two_other, one_other - two_other, two - two_other, one - one_other - two + two_other, 1 - one)


def known_mean(values: Array) -> float:
    """Averages what is known; NaN if nothing is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The estimate.
        low: Lower end of the 95% interval.
        high: Upper end.
        p: Twice the share of resamples on the other side of 0, at most 1; NaN where it was not asked for.
    """

    value: float
    low: float
    high: float
    p: float = float("nan")


def over_losses(
    statistic: Callable[[NDArray[np.int_]], float], count: int, resamples: int | None = None, seed: int = 0
) -> Estimate:
    """Estimates a statistic of losses with a percentile bootstrap that resamples losses (Efron 1979).

    Args:
        statistic: Computes it for losses by their numbers, of which one may occur several times.
        count: Number of losses.
        resamples: Number of resamples; None: `RESAMPLES`.
        seed: Seed of the resamples.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples or RESAMPLES)])
    drawn = drawn[np.isfinite(drawn)]
    value = statistic(np.arange(count))
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (np.nan, np.nan)
    # The observed sample counts as one resample, so that p is never 0.
    beyond = (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn))
    return Estimate(value, float(low), float(high), float(min(1.0, 2 * beyond)))


def mantel(first: Array, second: Array, permutations: int = PERMUTATIONS, seed: int = 0) -> tuple[float, float]:
    """Computes Pearson's r of two symmetric matrices above their diagonals, and p of Mantel's test (1967), one-sided.

    The test permutes rows and columns of one of them together; the observed order counts as one permutation.
    """
    upper = np.triu_indices(len(first), 1)
    rng = np.random.default_rng(seed)
    observed = correlation(first[upper], second[upper])
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
    """Returns the entries of two (L, L) matrices for every two different losses of a resample."""
    a, b = np.triu_indices(len(losses), 1)
    different = losses[a] != losses[b]
    rows, columns = losses[a][different], losses[b][different]
    return first[rows, columns], second[rows, columns]


def p_of_factor(design: Crossed, factor: str, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Tests whether runs of one loss (or draw) are more alike than those of two, by permuting its labels.

    Labels of losses are permuted within draw, order and start; those of draws within loss, order and start. Statistic:
    for losses S(loss, ·) − S(·, ·), for draws S(·, data) − S(·, ·), both over pairs of different orders from one start.

    Args:
        design: The runs.
        factor: "loss" or "draw".
        permutations: Number of permutations; the observed labels count as one more.
        seed: Seed of the permutations.
    """
    axis = FACTORS.index(factor)
    shape = tuple(len(design.levels[name]) for name in FACTORS)
    matrix = design.values.reshape(int(np.prod(shape)), -1)
    labels = np.indices(shape).reshape(len(shape), -1)
    start, loss, draw, order = labels
    eligible = (start[:, None] == start[None, :]) & (order[:, None] != order[None, :]) & np.isfinite(matrix)
    # The pairs whose factor is tested differ in the other one.
    held = draw if factor == "loss" else loss
    rows, columns = np.nonzero(np.triu(eligible & (held[:, None] != held[None, :])))
    values = matrix[rows, columns]

    def statistic(of: NDArray[np.int_]) -> float:
        same = of[rows] == of[columns]
        return float(values[same].mean() - values[~same].mean())

    rng = np.random.default_rng(seed)
    observed = statistic(labels[axis])
    cells = np.moveaxis(np.arange(matrix.shape[0]).reshape(shape), axis, -1).reshape(-1, shape[axis])
    reached = 0
    shuffled = np.empty_like(labels[axis])
    for _ in range(permutations):
        shuffled[cells] = rng.permuted(np.broadcast_to(np.arange(shape[axis]), cells.shape), axis=1)
        reached += statistic(shuffled) >= observed - 1e-12
    return (reached + 1) / (permutations + 1)
