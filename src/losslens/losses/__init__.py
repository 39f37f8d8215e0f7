"""Losses under comparison, one file each: the function, its options, and what the rest of the house must know of it.

Shapes in names: N rollouts, T tokens of the padded completions, P pairs of two rollouts each (N = 2P).

Every loss here sees the log-probabilities of the sampled tokens only, so its gradient is that of −Σ_t sg(w_t)·log π_t:
the weights w_t say all there is to say about it (`Loss.weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from losslens.config.identity import identity_options

if TYPE_CHECKING:
    from torch import Tensor

    from losslens.config.training import TrainOn

Unit = Literal["token", "rollout", "pair"]
Normaliser = Literal["tokens", "rollouts", "pairs"]
# What costs a forward pass, and is made for the losses only that ask for it.
Need = Literal["reference", "mismatched_log_ratio"]


@dataclass(frozen=True)
class Batch:
    """Rollouts as the model under training scores them.

    Positions without a completion token have mask 0 and log-probabilities of 0; whatever a loss says of them is left
    out, and so is what it says of rollouts and pairs without any completion token.

    Attributes:
        logps: log π_θ(y_t | y_<t, x), shape (N, T), nats.
        mask: Where there is a completion token, shape (N, T), bool.
        reward: The verifier's reward, 1 correct and 0 incorrect, shape (N,).
        columns: What `Loss.columns` gave for these rollouts, each of shape (N,).
        pairs: Numbers of each pair's chosen and rejected rollout, shape (P, 2); None unless the unit is the pair.
        reference: log π_ref(y_t | y_<t, x) of the base, shape (N, T), nats; None unless it is needed.
        step: Numbers of the whole step, over all its micro-batches and processes, by the name of the need: for
            `mismatched_log_ratio` the mean of log π_θ(y' | x)/π_ref(y' | x) over the prompts of the step, each with the
            completion y' of the last rollout before it in the step that answers another prompt.
    """

    logps: Tensor
    mask: Tensor
    reward: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Tensor | None = None
    reference: Tensor | None = None
    step: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def correct(self) -> Tensor:
        """Whether the verifier accepted it, shape (N,), bool."""
        return self.reward > 0

    @property
    def lengths(self) -> Tensor:
        """|y|, the number of completion tokens, at least 1, shape (N,), in the type of `logps`."""
        return self.mask.sum(dim=1).clamp(min=1).to(self.logps.dtype)

    @property
    def log_ratio(self) -> Tensor:
        """H = log π_θ(y | x) − log π_ref(y | x), summed over the completion, shape (N,), nats."""
        assert self.reference is not None
        return self.logps.sum(dim=1) - self.reference.sum(dim=1)

    def of_pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen rollouts' and the rejected ones' share of `values`, from shape (N,) to twice (P,)."""
        assert self.pairs is not None
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]

    def over_tokens(self, values: Tensor) -> Tensor:
        """One number a rollout at each of its tokens, from shape (N,) to (N, T)."""
        return values[:, None].expand_as(self.logps)

    def over_tokens_of_pairs(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """One number a pair and side at each token of its rollout, from twice (P,) to (N, T)."""
        assert self.pairs is not None
        values = self.logps.new_zeros(len(self.logps))
        values = values.index_put((self.pairs[:, 0],), chosen).index_put((self.pairs[:, 1],), rejected)
        return self.over_tokens(values)


class Loss(BaseModel):
    """A loss and its options; a subclass narrows `name` to its own, and its options are its fields.

    Attributes:
        version: Raised when the same options begin to mean another adapter: runs of before are then others.
        title: What a text calls it; its name if empty.
        summary: What it does, in a sentence that a newcomer reads once.
        paper: Where it comes from.
        colour: In plots, `#rrggbb`; one is chosen by its name if empty.
        place: Where it stands among others in tables and plots, least first; those without one come last.
        unit: What `terms` has one number for.
        normaliser: What their sum is divided by: how many of these the effective batch holds, of tokens those of
            completions.
        uses_reward: Whether a correct rollout teaches it something else than an incorrect one.
        conventional_lr_scale: Peak learning rate over SFT's, as is usual for it: what `lr=conventional` means. SFT, and
            what weighs its tokens, trains at 1.
        diagnostic_titles: What plots call its `diagnostics`, by their names; those without one are in no dashboard.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    version: ClassVar[int] = 1
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    colour: ClassVar[str] = ""
    place: ClassVar[float] = float("inf")
    unit: ClassVar[Unit] = "token"
    normaliser: ClassVar[Normaliser] = "tokens"
    uses_reward: ClassVar[bool] = True
    conventional_lr_scale: ClassVar[float] = 1.0
    diagnostic_titles: ClassVar[Mapping[str, str]] = {}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)

    @property
    def identity(self) -> dict[str, Any]:
        """What of the loss decides an adapter: name, version, and the options that are not at their defaults."""
        return {"version": self.version, **identity_options(self)}

    @property
    def options(self) -> dict[str, Any]:
        """All options, as JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude={"name"})

    @property
    def bounded(self) -> bool:
        """Whether it is bounded below whatever the log-probabilities; it may depend on the options."""
        return True

    @property
    def needs(self) -> frozenset[Need]:
        """What `Batch` is to hold beside the log-probabilities; it may depend on the options."""
        return frozenset()

    def learns_from(self, train_on: TrainOn) -> TrainOn:
        """The widest choice of rollouts from which the loss takes the same rows as from `train_on`."""
        return train_on

    def select(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """The rollouts that are trained on, in their order.

        Raises:
            InputError: There is nothing in them to learn from.
        """
        return rollouts

    def select_pairs(self, rollouts: pd.DataFrame) -> list[tuple[int, int]]:
        """Positions in `rollouts` of the chosen and the rejected one of each pair; for losses whose unit is the pair.

        Raises:
            InputError: There is no pair.
        """
        raise NotImplementedError

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Numbers of each rollout that `terms` needs, each of shape (rollouts,), made once from whole groups.

        Args:
            rollouts: What `select` gave; `group` numbers their prompts, `reward` is 1 or 0.
        """
        return {}

    def terms(self, batch: Batch) -> Tensor:
        """The loss of each token, rollout or pair (`unit`): shape (N, T), (N,) or (P,)."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> Tensor:
        """w_t = −∂(Σ terms)/∂log π_t in closed form, shape (N, T): how hard, and which way, it pulls at each token.

        It documents a loss and is tested against autograd; what is logged is found by autograd, of any loss.
        """
        raise NotImplementedError

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers to be logged beside those of every loss, by name: their means over rollouts (N,) or pairs (P,)."""
        return {}


@cache
def builtin_losses() -> dict[str, type[Loss]]:
    """The losses that come with LossLens, by name."""
    found: dict[str, type[Loss]] = {}
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Loss) and value.__module__.startswith(f"{__name__}."):
                for name in get_args(value.model_fields["name"].annotation):
                    found[name] = value
    return found
