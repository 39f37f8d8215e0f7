"""LoRA updates ΔW = s·B·A in factor space: no matrix as large as ΔW is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from losslens.updates.base import Array, ThinSvd, Update, leading
from losslens.updates.orthonormal import column_space, orthonormalise, random_frame

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraUpdate(Update):
    """LoRA update ΔW = `scale`·B·A.

    Attributes:
        b: B, shape (out, r), float64.
        a: A, shape (r, in), float64.
        scale: alpha / r, or alpha / √r with rsLoRA.
    """

    b: Array
    a: Array
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def dense(self) -> Array:
        return self.scale * self.b @ self.a

    def arrays(self) -> dict[str, Array]:
        return {"B": self.b, "A": self.a}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        return replace(self, b=arrays["B"], a=arrays["A"])

    def __rmul__(self, factor: float) -> Self:
        return replace(self, scale=factor * self.scale)

    def __add__(self, other: Self) -> Self:
        """Returns the sum, whose rank is the sum of ranks: [s·B, s'·B'] with [A; A'] and a scale of 1."""
        b = np.concatenate([self.scale * self.b, other.scale * other.b], axis=1)
        return replace(self, b=b, a=np.concatenate([self.a, other.a]), scale=1.0)

    def svd(self, top: int | None = None) -> ThinSvd:
        """Computes the exact SVD from that of the r×r core s·R_b·R_aᵀ, with B = Q_b·R_b and Aᵀ = Q_a·R_a."""
        b, a = orthonormalise(self.b), orthonormalise(self.a.T)
        core = leading(*np.linalg.svd(self.scale * b.r @ a.r.T), top)
        return ThinSvd(b.combine(core.left), core.values, a.combine(core.right))

    def orthonormal_factors(self) -> tuple[Array, Array]:
        """Computes Q = B·V·D⁻½ and R = s·D½·Vᵀ·A from BᵀB = V·D·Vᵀ, a third of the time of a QR decomposition.

        Columns that B hardly has are not quite orthonormal: D is at least 1e-15 of its largest, which leaves Q·R as it
        is.
        """
        squares, turn = np.linalg.eigh(self.b.T @ self.b)
        if not squares[-1] > 0:
            return np.zeros_like(self.b), np.zeros_like(self.a)
        lengths = np.sqrt(np.maximum(squares, 1e-15 * squares[-1]))
        return self.b @ (turn / lengths), self.scale * (turn * lengths).T @ self.a

    def on_inputs(self, inputs: Array) -> Array:
        return self.scale * self.b @ (self.a @ inputs)

    def on_outputs(self, outputs: Array) -> Array:
        return self.scale * self.a.T @ (self.b.T @ outputs)

    def inner(self, other: Update) -> float:
        """Computes s·s'·Σ[(BᵀB') ∘ (AA'ᵀ)], or s·Σ[(BᵀΔW') ∘ A] with another kind of update."""
        if not isinstance(other, LoraUpdate):
            return self.scale * float(np.vdot(self.b.T @ other.dense(), self.a))
        return self.scale * other.scale * float(np.vdot(self.b.T @ other.b, self.a @ other.a.T))

    def right_overlap(self, other: Update) -> float:
        """Computes s²·Σ[(BᵀB) ∘ (CᵀC)] with C = ΔW'·Aᵀ."""
        image = other.dense() @ self.a.T
        return self.scale**2 * float(np.vdot(self.b.T @ self.b, image.T @ image))

    def input_space(self) -> Array | None:
        """Returns the row space of A."""
        return column_space(self.a.T)

    def sign_step(self) -> Self:
        """Returns s·sign(B)·A: as long as B is 0, A has no gradient and stays as it is."""
        return replace(self, b=np.sign(self.b))

    def left_rotated(self, rng: np.random.Generator) -> Self:
        """Draws Q'·R·A for B = Q·R, with Q' a uniformly random orthonormal frame of the size of Q."""
        q, r = np.linalg.qr(self.b)
        return replace(self, b=random_frame(q.shape, rng) @ r)

    @classmethod
    def of_pairs(cls, updates: Sequence[Self], fresh: int) -> list[tuple[float, float]]:
        """Computes all pairs at once: one product per fresh update with the factors of all that follow it.

        s_i·s_j·Σ[(B_iᵀB_j) ∘ C] and (s_i·s_j)²·Σ[(B_iᵀB_i·C) ∘ (C·B_jᵀB_j)] with C = A_iA_jᵀ.
        """
        b = np.concatenate([update.b for update in updates], axis=1)
        a = np.concatenate([update.a for update in updates], axis=0)
        grams = [update.b.T @ update.b for update in updates]
        starts = np.cumsum([0, *(update.rank for update in updates)])
        products = []
        for i in range(min(fresh, len(updates) - 1)):
            after = starts[i + 1]
            b_products, a_products = updates[i].b.T @ b[:, after:], updates[i].a @ a[after:].T
            turned = grams[i] @ a_products
            for j in range(i + 1, len(updates)):
                block = slice(starts[j] - after, starts[j + 1] - after)
                scale = updates[i].scale * updates[j].scale
                inner = scale * np.vdot(b_products[:, block], a_products[:, block])
                overlap = scale**2 * np.vdot(turned[:, block], a_products[:, block] @ grams[j])
                products.append((float(inner), float(overlap)))
        return products

    @classmethod
    def matrices(cls, updates: Sequence[Self], weights: Sequence[float]) -> list[Array]:
        """Stacks √(w_i·s_i)·A_i and √(w_i·s_i)·B_i; interpolating A and B separately would add B_i·A_j."""
        roots = [np.sqrt(weight * abs(update.scale)) for weight, update in zip(weights, updates, strict=True)]
        pairs = list(zip(roots, updates, strict=True))
        b = np.concatenate([root * np.sign(update.scale) * update.b for root, update in pairs], axis=1)
        return [np.concatenate([root * update.a for root, update in pairs]), b]


def updates_of(model: Any) -> dict[str, LoraUpdate]:
    """Returns ΔW of each LoRA module of a PEFT model, by the names used in the adapter folder."""
    return {
        name: LoraUpdate(
            _copied(module.lora_B["default"].weight),
            _copied(module.lora_A["default"].weight),
            module.scaling["default"],
        )
        for name, module in _lora_modules(model)
    }


def gradient_steps_of(model: Any) -> dict[str, LoraUpdate]:
    """Returns the step of gradient descent from B = 0 in each LoRA module of a PEFT model, named as by `updates_of`.

    From the gradients of the parameters, ΔW = −s·(∂L/∂B)·A. A stays as it is: its gradient is 0 as long as B is.
    """
    return {
        name: LoraUpdate(
            -_copied(module.lora_B["default"].weight.grad),
            _copied(module.lora_A["default"].weight),
            module.scaling["default"],
        )
        for name, module in _lora_modules(model)
    }


def _lora_modules(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield re.sub(r"^base_model\.model\.", "", name), module


def _copied(weight: torch.Tensor) -> Array:
    import torch

    return weight.detach().cpu().to(torch.float64, copy=True).numpy()
