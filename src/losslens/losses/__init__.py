"""Losses under comparison, one file each: the function, its options, and its presentation in tables and plots.

Shapes: N rollouts, T tokens of the padded completions, P pairs of two rollouts each (N = 2P).

Every loss here but ASFT depends on the log-probabilities of the sampled tokens only, so its gradient is that of
−Σ_t sg(w_t)·log π_t: the weights w_t (`Loss.weights`) describe it completely.
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
Divisor = Literal["tokens", "rollouts", "pairs"]
Origin = Literal["row", "group", "table"]
# Inputs that cost an extra pass or that not every set of rollouts has, prepared only for the losses that need them.
Need = Literal["reference", "mismatched_log_ratio", "sampler", "sampler_raw", "top_entropy", "divergence"]


@dataclass(frozen=True)
class Factors:
    """The factors of a token's weight: w_t = outcome · gate · saturation · length, or those of a sum of such products.

    Attributes:
        outcome: What the reward decides: nothing (`ignored`); which rollouts count (`correct only`); the size of a
            weight that is always positive (`positive`); its sign (`signed`); or the weight is the reward relative to
            that of the prompt's other rollouts (`relative`).
        gate: What tells the tokens of one rollout apart: `none`, their probability (`probability`), the entropy of the
            distribution they were drawn from (`entropy`), their ratio to another policy (`ratio`), or their place in
            the completion (`position`).
        saturation: How the weight of a rollout changes as it is learned: not at all (`none`); it falls with the
            probability of an incorrect rollout (`taper`); it is 0 outside a range of ratios or margins (`band`);
            it falls to 0 as the margin grows (`logistic`), or on either side of a point (`bump`); or it is the
            distance to a target, and reverses beyond it (`regression`).
        length: Whether each token counts the same (`tokens`), or each rollout, so that its tokens weigh 1/|y|
            (`rollouts`).
        stops: When its weights vanish, in a few words.
        first_step: Name of the class of losses with the same gradient, up to scale, as long as the model is the base;
            empty if there is no other such loss.
    """

    outcome: Literal["ignored", "correct only", "positive", "signed", "relative"]
    gate: Literal["none", "probability", "entropy", "ratio", "position"] = "none"
    saturation: Literal["none", "taper", "band", "logistic", "bump", "regression"] = "none"
    length: Literal["tokens", "rollouts"] = "tokens"
    stops: str = ""
    first_step: str = ""


@dataclass(frozen=True)
class Batch:
    """Rollouts of a micro-batch, scored by the model under training.

    Positions without a completion token have mask 0 and log-probability 0. Loss terms at these positions, and of
    rollouts and pairs without any completion token, are ignored.

    Attributes:
        logps: log π_θ(y_t | y_<t, x), shape (N, T), nats.
        mask: True at completion tokens, shape (N, T), bool.
        reward: The verifier's reward, shape (N,): 1 for correct and 0 for incorrect, or any number for losses that say
            so (`Loss.any_reward`).
        columns: Output of `Loss.columns` for these rollouts, each of shape (N,).
        pairs: Indices of each pair's chosen and rejected rollout, shape (P, 2); None unless the unit is the pair.
        reference: log π_ref(y_t | y_<t, x) of the base, shape (N, T), nats; None unless the loss needs it.
        sampler: log μ(y_t | y_<t, x) of the policy that sampled the rollouts, shape (N, T), nats: of the distribution
            it sampled from (need `sampler`), or at temperature 1 and without truncation (need `sampler_raw`); None
            unless the loss needs it.
        top_entropy: Entropy of π_θ over its 20 most likely tokens, renormalised, without gradient, shape (N, T), nats;
            None unless the loss needs it.
        divergence: KL(π_ref ‖ π_θ) over the whole vocabulary at each position, with gradient, shape (N, T), nats; None
            unless the loss needs it.
        step: Statistics of the whole step, over all its micro-batches and processes, keyed by the name of the need: for
            `mismatched_log_ratio` the mean of log π_θ(y' | x)/π_ref(y' | x) over the prompts of the step, where y' is
            the completion of the last preceding rollout in the step that answers another prompt.
    """

    logps: Tensor
    mask: Tensor
    reward: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Tensor | None = None
    reference: Tensor | None = None
    sampler: Tensor | None = None
    top_entropy: Tensor | None = None
    divergence: Tensor | None = None
    step: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def correct(self) -> Tensor:
        """True where the verifier accepted the rollout, shape (N,), bool."""
        return self.reward > 0

    @property
    def lengths(self) -> Tensor:
        """|y|, the number of completion tokens, at least 1, shape (N,), in the dtype of `logps`."""
        return self.mask.sum(dim=1).clamp(min=1).to(self.logps.dtype)

    @property
    def log_ratio(self) -> Tensor:
        """H = log π_θ(y | x) − log π_ref(y | x), summed over the completion, shape (N,), nats."""
        assert self.reference is not None
        return self.logps.sum(dim=1) - self.reference.sum(dim=1)

    def split_pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Splits `values`, shape (N,), into those of the chosen and of the rejected rollouts, each of shape (P,)."""
        assert self.pairs is not None
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]

    def over_tokens(self, values: Tensor) -> Tensor:
        """Repeats one value per rollout at each of its tokens, from shape (N,) to (N, T)."""
        return values[:, None].expand_as(self.logps)

    def over_tokens_of_pairs(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Repeats the values of the chosen and rejected rollouts at each token, from two of shape (P,) to (N, T)."""
        assert self.pairs is not None
        values = self.logps.new_zeros(len(self.logps))
        values = values.index_put((self.pairs[:, 0],), chosen).index_put((self.pairs[:, 1],), rejected)
        return self.over_tokens(values)


class Method(BaseModel):
    """Base class of what a run can be trained with: a subclass narrows `name` to its own, and its fields are options.

    A `Loss` is minimised on frozen rollouts; an on-policy method (`losslens.losses.on_policy`) samples its own.

    Attributes:
        version: Increased when the same options start to produce a different adapter; earlier runs then no longer count
            as the same run.
        title: Display name; `name` if empty.
        summary: One sentence that explains the method to a newcomer.
        paper: Source.
        colour: Colour in plots, `#rrggbb`; derived from `name` if empty.
        place: Sort key in tables and plots, ascending; methods without one come last.
        conventional_lr_scale: Usual peak learning rate relative to SFT's, used by `lr=conventional`. It is 1 for SFT
            and for losses that reweight its tokens.
        own_samples: True if a run samples what it trains on from its own policy, so that it shares no rows with others.
        removed: Options of earlier versions that changed nothing; they are passed over in what earlier runs recorded.
        diagnostic_titles: Titles of the method's own metrics in plots, by name; metrics without a title are not shown
            in the dashboard.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    version: ClassVar[int] = 1
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    colour: ClassVar[str] = ""
    place: ClassVar[float] = float("inf")
    conventional_lr_scale: ClassVar[float] = 1.0
    own_samples: ClassVar[bool] = False
    removed: ClassVar[frozenset[str]] = frozenset()
    diagnostic_titles: ClassVar[Mapping[str, str]] = {}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a run's identity that describes the method: name, version, and the non-default options."""
        return {"version": self.version, **identity_options(self)}

    @property
    def inert(self) -> dict[str, str]:
        """Options that change nothing beside the other options, and why; a new run that sets one is refused.

        One at its default may be among them.
        """
        return {}

    @property
    def options(self) -> dict[str, Any]:
        """All options, as JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude={"name"})


class Loss(Method):
    """Base class of losses on frozen rollouts.

    Attributes:
        unit: The unit that `terms` has one value for.
        uses_reward: True if the loss treats correct and incorrect rollouts differently.
    """

    unit: ClassVar[Unit] = "token"
    uses_reward: ClassVar[bool] = True

    @property
    def any_reward(self) -> bool:
        """True if rewards may be numbers other than 1 and 0; may depend on the options."""
        return not self.uses_reward

    @property
    def divisor(self) -> Divisor:
        """Divisor of the sum of the terms: the completion tokens, rollouts or pairs of the effective batch."""
        return "tokens"

    @property
    def bounded(self) -> bool:
        """True if the loss is bounded below for all log-probabilities; may depend on the options.

        A run says so if it is not.
        """
        return True

    @property
    def factors(self) -> Factors | None:
        """The factors of the weights, by which losses are told apart; may depend on the options. None if not said."""
        return None

    @property
    def needs(self) -> frozenset[Need]:
        """Inputs that `Batch` must hold besides the log-probabilities; may depend on the options."""
        return frozenset()

    def learns_from(self, train_on: TrainOn) -> TrainOn:
        """Returns the widest value of `train_on` from which the loss selects the same rollouts."""
        return train_on

    def select(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """Returns those of the rollouts that the loss trains on, in their original order; there may be none."""
        return rollouts

    def select_pairs(self, rollouts: pd.DataFrame) -> list[tuple[int, int]]:
        """Returns the positions in `rollouts` of each pair's chosen and rejected rollout, if the unit is the pair."""
        raise NotImplementedError

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Computes per-rollout values that `terms` needs, each of shape (rollouts,), once and from whole groups.

        Args:
            rollouts: All rollouts that were sampled, before `train_on` and `select` leave any out; the column `group`
                numbers the prompts.
        """
        return {}

    @property
    def columns_from(self) -> Origin:
        """Origin of the columns of a rollout: its own `row`, its `group`, or the whole `table`."""
        return "row" if type(self).columns is Loss.columns else "group"

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each token, rollout or pair (`unit`), of shape (N, T), (N,) or (P,)."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> Tensor:
        """Computes w_t = −∂(Σ terms)/∂log π_t in closed form, shape (N, T): the pull on each token.

        Documents the loss and is tested against autograd; the trainer logs weights computed by autograd.
        """
        raise NotImplementedError

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes extra metrics by name: a value for each token, rollout or pair that counts, one-dimensional.

        Their means over all values of the step are logged.
        """
        return {}


@cache
def builtin_methods() -> dict[str, type[Method]]:
    """Returns the methods that come with LossLens, losses and others, by name."""
    methods: dict[str, type[Method]] = {}
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__.startswith(f"{__name__}."):
                for name in get_args(value.model_fields["name"].annotation):
                    methods[name] = value
    return methods


@cache
def builtin_losses() -> dict[str, type[Loss]]:
    """Returns the losses that come with LossLens, by name."""
    return {name: kind for name, kind in builtin_methods().items() if issubclass(kind, Loss)}
