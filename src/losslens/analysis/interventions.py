"""Causal checks: which changed weights of finished runs are measured, and what these weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from losslens.analysis.pairs import Pair
from losslens.config.analysis import Interventions

Kind = Literal["unchanged", "scaling", "equal_norm", "equal_kl", "merging", "restoring"]

# What restoring does, with the random subspaces that are its null.
RESTORING = {
    "only_top": "only_random",
    "without_top": "without_random",
    "without_base_top": "without_random_outputs",
}


@dataclass(frozen=True)
class Change:
    """Weights made from those of some runs; the same change is measured once, whatever it is made for.

    Attributes:
        runs: The runs whose updates it is made of; none: the base.
        how: `scaled`, a merge (`updates.merging`), or one of `RESTORING` or its nulls.
        value: The factor λ, or the number of directions k; 0 for a merge.
        draw: The number of the random draw.
    """

    runs: tuple[str, ...]
    how: str = "scaled"
    value: float = 1.0
    draw: int = 0

    @property
    def is_a_model(self) -> bool:
        """True for the base and for runs as they are."""
        return not self.runs or (self.how == "scaled" and self.value == 1)

    def __str__(self) -> str:
        value = f" {self.value:g}" * bool(self.value)
        return f"{' + '.join(self.runs) or 'base'}, {self.how.replace('_', ' ')}{value}"


@dataclass(frozen=True)
class Intervention:
    """A change and what it is made for.

    Attributes:
        kind: The causal check that it belongs to.
        change: The change.
        null: True for a random subspace.
    """

    kind: Kind
    change: Change
    null: bool = False


def unchanged(names: Sequence[str]) -> list[Intervention]:
    """Returns the base and each run as they are."""
    return [Intervention("unchanged", Change(runs)) for runs in [(), *((name,) for name in names)]]


def planned(settings: Interventions, names: Sequence[str], pairs: Sequence[Pair]) -> list[Intervention]:
    """Lists the interventions whose weights do not depend on what the runs do, in the order of the table.

    Args:
        settings: The interventions that were asked for.
        names: Names of the runs.
        pairs: The pairs of runs to merge.
    """
    factors = [factor for factor in dict.fromkeys(settings.scaling) if factor not in (0, 1)]
    scaling = [Intervention("scaling", Change((name,), "scaled", factor)) for name in names for factor in factors]
    merging = [Intervention("merging", Change(pair, how, 0.0)) for pair in pairs for how in settings.merging]
    return (
        scaling
        + merging
        + [
            Intervention("restoring", Change((name,), change, float(k), draw), null)
            for name in names
            for how, random in RESTORING.items()
            for k in settings.restoring
            for change, null, draws in ((how, False, 1), (random, True, settings.draws))
            for draw in range(draws)
        ]
    )


def scaled(kind: Kind, factors: Mapping[str, float]) -> list[Intervention]:
    """Scales each run by its factor."""
    return [Intervention(kind, Change((name,), "scaled", factor)) for name, factor in factors.items()]


def equal_norm_factors(norms: Mapping[str, float]) -> dict[str, float]:
    """Returns the factor at which each run with a non-zero update has the smallest ‖ΔW‖_F among them."""
    target = min((norm for norm in norms.values() if norm > 0), default=0.0)
    return {name: target / norm for name, norm in norms.items() if norm > 0}
