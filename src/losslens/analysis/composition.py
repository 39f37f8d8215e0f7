"""Parts of whole models that a comparison on some modules leaves out, and the share of rounding in them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort, Point
from losslens.updates.checkpoint import Checkpoint, Composition

# Rounding below this share of the squared norm is not worth a line.
_ROUNDING = 0.01


def tell_composition(cohort: Cohort, cache: Cache | None = None) -> None:
    """Adds to what is left out the share of each whole model's update that is not compared, and that of rounding.

    Reads each whole model and its base once.

    Args:
        cohort: The compared adapters and models.
        cache: Known results.
    """
    for member in cohort.members:
        if not member.point.is_whole:
            continue
        found = _composition(member.point, cohort.modules, cache)
        total = found.inside + found.outside
        if found.outside:
            cohort.left_out[f"further weights of {member.name}"] = (
                f"{_percent(found.outside / total)} of the squared norm of its update lies in weights that are not "
                "compared (embeddings, norms and modules that not all have)"
            )
        if found.rounding > _ROUNDING * found.inside > 0:
            cohort.left_out[f"an exact update of {member.name}"] = (
                "its weights are stored in 16 bits, and rounding to these would by itself make an update with "
                f"{_percent(found.rounding / found.inside)} of the squared norm that is compared"
                + "; most of the exact one is lost"
                * (found.rounding > found.inside)
            )


def _composition(point: Point, modules: list[str], cache: Cache | None) -> Composition:
    names = [field.name for field in fields(Composition)]
    known = cache.load("composition", [2, point.key(modules)], names) if cache else None
    if known is not None:
        return Composition(*(float(known[name]) for name in names))
    with point.open() as update:
        assert isinstance(update, Checkpoint)
        found = update.composition(modules)
    if cache:
        cache.save("composition", [2, point.key(modules)], {name: np.array(getattr(found, name)) for name in names})
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"
