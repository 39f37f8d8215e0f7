"""Clusters of adapters, and a test of whether things of one kind lie closer together than things of different kinds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losslens.updates.base import Array

_PERMUTATIONS, _SEED = 9999, 0
# Degrees between two clusters from which on they remain apart: a cosine of one half.
CLUSTER_ANGLE = 60.0


@dataclass(frozen=True)
class Clusters:
    """Clusters of N things.

    Attributes:
        labels: The cluster of each thing, from 1 in the order of `places`, shape (N,).
        places: The place of each thing in an order in which clusters, and things alike in them, are neighbours; shape
            (N,).
    """

    labels: NDArray[np.intp]
    places: NDArray[np.intp]


def cluster(distances: Array, apart: float = CLUSTER_ANGLE) -> Clusters:
    """Clusters by average linkage (UPGMA; Sokal and Michener 1958) of angles, up to a mean angle of `apart`.

    The order is the optimal leaf order of Bar-Joseph, Gifford and Jaakkola 2001.

    Args:
        distances: Angles in degrees, shape (N, N), symmetric.
        apart: Two clusters are joined if the mean angle between their members is at most this.
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage  # slow to import
    from scipy.spatial.distance import squareform

    n = len(distances)
    if n < 2:
        return Clusters(np.ones(n, dtype=np.intp), np.zeros(n, dtype=np.intp))
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    order = leaves_list(tree)
    found = fcluster(tree, apart, "distance")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(found[order]), 1)}
    return Clusters(np.array([numbers[label] for label in found], dtype=np.intp), np.argsort(order).astype(np.intp))


@dataclass(frozen=True)
class Permanova:
    """The result of a permutational analysis of variance.

    Attributes:
        pseudo_f: The variance between the groups over that within them, per degree of freedom; NaN if it is undefined.
        explained: R², the share of the variance that lies between the groups; NaN if all things coincide.
        expected: The mean of R² over the permutations: what groups of these sizes explain by chance.
        p: The share of permutations of the labels with a pseudo-F at least as large, the observed one included.
        p_min: The smallest p that groups of these sizes can reach, whatever the distances.
    """

    pseudo_f: float
    explained: float
    expected: float
    p: float
    p_min: float


def smallest_p(groups: Sequence[str], permutations: int = _PERMUTATIONS) -> float:
    """Returns the smallest p that a permutation test of these groups can reach.

    Labels that are exchanged within a group, or between two groups of one size as a whole, leave the groups as they
    are: of N! permutations, Π n_i! · Π m_k! do, with m_k groups of size k. With random permutations p is at least one
    of them, too.
    """
    sizes = list(Counter(groups).values())
    alike = math.prod(map(math.factorial, [*sizes, *Counter(sizes).values()]))
    return max(alike / math.factorial(sum(sizes)), 1 / (permutations + 1))


def permanova(distances: Array, groups: Sequence[str], permutations: int = _PERMUTATIONS) -> Permanova:
    """Tests whether groups differ in location, from the distances alone (PERMANOVA; Anderson 2001, equations 2 to 4).

    With N things and g groups, SS_total = Σ_{i<j} d_ij²/N, SS_within = Σ over groups of Σ_{i<j} d_ij²/n_group, and
    F = ((SS_total − SS_within)/(g − 1)) / (SS_within/(N − g)). Under the null the labels are exchangeable. A small p
    may also come from groups of different spread.

    Args:
        distances: Shape (N, N), symmetric, 0 on the diagonal.
        groups: The group of each thing; at least two groups, fewer than N.
        permutations: Number of random permutations of the labels.

    Raises:
        ValueError: There are fewer than two groups, or as many as things.
    """
    squared = np.asarray(distances, dtype=np.float64) ** 2
    _, labels = np.unique(np.asarray(groups), return_inverse=True)
    n, count = len(labels), int(labels.max(initial=-1)) + 1
    if not 2 <= count < n:
        raise ValueError(f"{count} groups of {n} things: there must be at least two, and fewer than things")
    total = squared.sum() / (2 * n)
    rng = np.random.default_rng(_SEED)
    drawn = np.stack([labels, *(rng.permutation(labels) for _ in range(permutations))])
    within = np.zeros(len(drawn))
    for group in range(count):
        member = (drawn == group).astype(np.float64)
        within += np.einsum("pi,ij,pj->p", member, squared, member, optimize=True) / (2 * member.sum(axis=1))
    # Permutations change only SS_within, so that F falls as it grows; rounding must not tell equal ones apart.
    as_large = within <= within[0] * (1 + 1e-9) + 1e-12 * total
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = 1 - within / total
        pseudo_f = float((total - within[0]) / (count - 1) / (within[0] / (n - count)))
    return Permanova(
        pseudo_f,
        float(explained[0]),
        float(explained[1:].mean()),
        float(as_large.mean()),
        smallest_p(groups, permutations),
    )
