"""Inner products of many rows from 8-bit integers, four times as fast as float32 where the processor has VNNI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from losslens.core.errors import InputError

if TYPE_CHECKING:
    import torch

# Longest rows whose products fit into int32 for certain: 2¹⁷·127² < 2³¹.
_LONGEST = 2**17
# Codes of the largest entry: the uniform number that is added before rounding down cannot take it past 127.
_LEVELS = 126
# A row whose largest entry is below this counts as zero: its steps would overflow in float32. Rows have norms up to 1.
_SMALLEST = 1e-36


@dataclass(frozen=True)
class Int8Rows:
    """Rows as integers with a scale each: row ≈ scale·codes.

    Attributes:
        codes: int8, shape (n, K).
        scales: float32, shape (n,); 0 for a row of zeros.
    """

    codes: torch.Tensor
    scales: NDArray[np.float32]

    @classmethod
    def rounded(cls, rows: NDArray[Any], rng: np.random.Generator) -> Int8Rows:
        """Rounds rows at random, up or down with the probabilities that make the code right in the mean.

        So the errors of two rows are independent, and their product is right in the mean, even where the rows are
        alike; rounded to the nearest, their errors would be alike, too, and the product too large.

        Args:
            rows: Shape (n, K).
            rng: Source of the random numbers.
        """
        import torch

        largest, steps = _largest_and_steps(rows)
        codes = rng.random(rows.shape, dtype=np.float32)
        codes += rows * steps[:, np.newaxis]
        return cls(torch.from_numpy(np.floor(codes, out=codes).astype(np.int8)), largest / np.float32(_LEVELS))

    def products(self, other: Int8Rows) -> NDArray[np.float32]:
        """Computes the inner products of all rows with those of another, shape (n, n'); sums of codes are exact."""
        parts = [slice(start, start + _LONGEST) for start in range(0, self.codes.shape[1], _LONGEST)]
        sums = [_sums(self.codes[:, part], other.codes[:, part]).numpy() for part in parts]
        found: NDArray[np.float32] = np.multiply(sums[0], self.scales[:, np.newaxis], dtype=np.float32)
        for more in sums[1:]:
            found += more * self.scales[:, np.newaxis]
        found *= other.scales
        return found


@dataclass(frozen=True)
class RoundingNoise:
    """Excess that rounding adds to the sums of squared products of groups of rows, such as those of one adapter.

    A rounded row is R + ε with E ε = 0 and Var ε_k = s²·f·(1 − f), where s is its scale and f how far R_k/s is above
    the integer below. So Σ_rs ⟨R_r, R'_s⟩² of n·n' rounded rows is too large by Σ_k (m_k·v'_k + v_k·m'_k + v_k·v'_k) in
    the mean, with m_k = Σ_r R_rk² and v_k = Σ_r Var ε_rk.

    Attributes:
        squares: m of each group, float32, shape (groups, K).
        variances: v of each group, float32, shape (groups, K).
    """

    squares: NDArray[np.float32]
    variances: NDArray[np.float32]

    @classmethod
    def of(cls, rows: NDArray[Any]) -> RoundingNoise:
        """Computes the noise of `Int8Rows.rounded` for groups of rows, shape (groups, n, K)."""
        flat = rows.reshape(-1, rows.shape[-1])
        largest, steps = _largest_and_steps(flat)
        above = flat * steps[:, np.newaxis]
        above -= np.floor(above)
        above *= 1 - above
        above *= ((largest / np.float32(_LEVELS)) ** 2)[:, np.newaxis]
        return cls(np.einsum("grk,grk->gk", rows, rows), above.reshape(rows.shape).sum(axis=1))

    def excess(self, other: RoundingNoise) -> NDArray[np.float32]:
        """Computes the expected excess of sums of squared products with each group of another, (groups, groups')."""
        excess: NDArray[np.float32] = self.squares @ other.variances.T
        excess += self.variances @ (other.squares + other.variances).T
        return excess


def _largest_and_steps(rows: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the largest entry of each row, and the number of codes per unit; both are 0 for a row of zeros."""
    largest = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32)
    largest[largest < _SMALLEST] = 0
    return largest, np.divide(_LEVELS, largest, out=np.zeros_like(largest), where=largest > 0)


def _sums(codes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Computes the inner products of codes in int32."""
    import torch

    if codes.shape[1] == 1:  # for which `_int_mm` of PyTorch 2.13 returns arbitrary numbers
        return codes.int() * others.int().T
    return torch._int_mm(codes, others.T)


def require_vnni() -> None:
    """Checks that the processor multiplies 8-bit integers without saturation and fast.

    Raises:
        InputError: It does not.
    """
    import torch

    if not torch.cpu._is_vnni_supported():
        raise InputError("--precision int8: this processor has no VNNI (fast 8-bit products); leave the option out")


def use_one_core() -> None:
    """Keeps the products that the calling thread makes from using several cores."""
    import torch

    torch.get_num_threads()  # torch chooses a new thread's number of cores when it is first asked for anything
    threadpool_limits(1, "openmp")
