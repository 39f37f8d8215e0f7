"""Losses under comparison, one file each: the pure function, its options, and the rows it learns from.

Shapes in names: N rollouts, T tokens of the padded completions. A position that holds no completion token has mask 0,
and a log-probability of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from losslens.identity import options_of

if TYPE_CHECKING:
    from torch import Tensor

    from losslens.config import TrainOn


@dataclass(frozen=True)
class Scored:
    """A batch of rollouts as the model under training scores them.

    Attributes:
        logps: log π_θ(y_t | y_<t, x), shape (N, T), nats.
        mask: 1 where there is a completion token, shape (N, T).
        reward: The verifier's reward, 1 right and 0 wrong, shape (N,).
        advantage: What `Pointwise.advantages` gave, shape (N,).
        group: Number of the prompt that the rollout answers, shape (N,).
        reference_logps: log π_ref(y_t | y_<t, x) of the base, shape (N, T); None unless the method needs it.
    """

    logps: Tensor
    mask: Tensor
    reward: Tensor
    advantage: Tensor
    group: Tensor
    reference_logps: Tensor | None = None


class Method(BaseModel):
    """A loss and its options; a subclass narrows `name` to its own.

    Attributes:
        version: Raised when the same options begin to mean another adapter: runs of before are then others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    version: ClassVar[int] = 1

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)

    @property
    def identity(self) -> dict[str, Any]:
        """What of the loss decides an adapter: name, version, and the options that are not at their defaults."""
        return {"version": self.version, **options_of(self)}

    @property
    def options(self) -> dict[str, Any]:
        """All options, as JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude={"name"})

    def learns_from(self, train_on: TrainOn) -> TrainOn:
        """The widest choice of rollouts from which the loss takes the same rows as from `train_on`."""
        return train_on

    @property
    def uses_reward(self) -> bool:
        """Whether a correct rollout teaches it something else than an incorrect one."""
        return True


class Pointwise(Method):
    """A loss that is a sum over the tokens of single rollouts, divided by the completion tokens of the batch."""

    @property
    def needs_reference(self) -> bool:
        """Whether `Scored.reference_logps` is to be filled, at the price of one more forward pass."""
        return False

    def rows(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """The rows of `rollouts` that are trained on, in their order.

        Raises:
            InputError: There is nothing in them to learn from.
        """
        return rollouts

    def advantages(self, reward: np.ndarray, group: np.ndarray) -> np.ndarray:
        """The advantage of each rollout, from all rollouts of its group; shape (rollouts,)."""
        return np.zeros_like(reward)

    def loss(self, scored: Scored) -> Tensor:
        """Each token's term of the loss, shape (N, T), 0 where the mask is 0."""
        raise NotImplementedError


class Pairwise(Method):
    """A loss on pairs of a right and a wrong rollout of one prompt, averaged over the pairs."""

    def pair_rows(self, rollouts: pd.DataFrame) -> list[tuple[int, int]]:
        """Positions in `rollouts` of the chosen and the rejected one of each pair.

        Raises:
            InputError: No prompt has both a right and a wrong rollout.
        """
        raise NotImplementedError

    def trainer_options(self) -> dict[str, Any]:
        """What TRL's `DPOConfig` is to be given."""
        raise NotImplementedError

    def loss(self, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        """Each pair's loss from the summed log-probabilities of its two completions; all of shape (pairs,)."""
        raise NotImplementedError


@cache
def own_methods() -> dict[str, type[Method]]:
    """The losses that come with LossLens, by name."""
    found: dict[str, type[Method]] = {}
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__.startswith(f"{__name__}."):
                for name in get_args(value.model_fields["name"].annotation):
                    found[name] = value
    return found
