"""Every run against every other, module by module: what `analysis` makes its tables of.

One module's factors of all runs are in memory at a time, so memory grows with the number of runs and not with the
model. All inner products come from two Gram matrices of the stacked factors, all angles from one Gram matrix of the
stacked singular vectors a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from losslens.geometry.deltas import Adapter, Delta
from losslens.geometry.subspaces import Array, angles_from_overlap, thin_svd, with_small_angles


@dataclass(frozen=True)
class ModuleComparison:
    """One module of all runs. N runs, P pairs (i < j, in the order of `itertools.combinations`), k angles.

    Attributes:
        module: Its name.
        inner: ⟨ΔW_i, ΔW_j⟩, shape (N, N).
        singular_values: Of each run, descending, null directions left out.
        angles_left: Principal angles (radians, ascending) between the top-k left singular subspaces, shape (P, k); NaN
            where a run has fewer directions.
        angles_right: The same on the right.
        u1: |⟨u_1, u_1'⟩| of the top left singular vectors, shape (P,); NaN where a run has none.
        v1: The same on the right.
    """

    module: str
    inner: Array
    singular_values: list[Array]
    angles_left: Array
    angles_right: Array
    u1: Array
    v1: Array


def compare_modules(adapters: Sequence[Adapter], modules: Sequence[str], top: int = 10) -> Iterator[ModuleComparison]:
    """Compares the adapters in one module after another.

    Args:
        adapters: The runs; ranks may differ, shapes of ΔW may not.
        modules: Names of the modules.
        top: k, the number of leading singular directions whose subspaces are compared.
    """
    for module in modules:
        deltas = [adapter[module] for adapter in adapters]
        svds = [thin_svd(delta) for delta in deltas]
        angles_left, u1 = _side([svd.left for svd in svds], top)
        angles_right, v1 = _side([svd.right for svd in svds], top)
        yield ModuleComparison(
            module, inner_products(deltas), [svd.values for svd in svds], angles_left, angles_right, u1, v1
        )


def inner_products(deltas: Sequence[Delta]) -> Array:
    """⟨ΔW_i, ΔW_j⟩ = s_i·s_j·Σ[(B_iᵀB_j) ∘ (A_iA_jᵀ)] of all pairs, shape (N, N)."""
    b = np.concatenate([delta.scale * delta.b for delta in deltas], axis=1)
    a = np.concatenate([delta.a for delta in deltas], axis=0)
    starts = np.cumsum([0, *(delta.a.shape[0] for delta in deltas[:-1])])
    products = (b.T @ b) * (a @ a.T)
    return np.add.reduceat(np.add.reduceat(products, starts, axis=0), starts, axis=1)


def _side(vectors: Sequence[Array], top: int) -> tuple[Array, Array]:
    """Principal angles and first-vector agreement of all pairs, from orthonormal columns of each run."""
    count, pairs = len(vectors), list(combinations(range(len(vectors)), 2))
    angles = np.full((len(pairs), top), np.nan)
    first = np.full(len(pairs), np.nan)
    widths = [min(top, v.shape[1]) for v in vectors]
    d = vectors[0].shape[0]
    stacked = np.zeros((d, count * top))
    for i, v in enumerate(vectors):
        stacked[:, i * top : i * top + widths[i]] = v[:, : widths[i]]
    overlaps = (stacked.T @ stacked).reshape(count, top, count, top).transpose(0, 2, 1, 3)
    full = [n for n, (i, j) in enumerate(pairs) if widths[i] == widths[j] == top]
    if full:
        rows, columns = np.array([pairs[n] for n in full]).T
        angles[full] = angles_from_overlap(overlaps[rows, columns])
    for n, (i, j) in enumerate(pairs):
        k = min(widths[i], widths[j])
        if k == 0:
            continue
        overlap = overlaps[i, j][: widths[i], : widths[j]]
        first[n] = abs(overlap[0, 0])
        from_cosines = angles[n] if widths[i] == widths[j] == top else angles_from_overlap(overlap)
        angles[n, :k] = with_small_angles(from_cosines, vectors[i][:, : widths[i]], vectors[j][:, : widths[j]], overlap)
    return angles, first
