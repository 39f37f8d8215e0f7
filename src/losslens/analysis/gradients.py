"""Gradients before step 1 of the runs of a cohort, compared with each other and with the ends of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from losslens.analysis.cohort import Cohort
from losslens.analysis.pairs import Pair, all_pairs
from losslens.config.analysis import AnalyzeConfig
from losslens.measures.gradients import Gradient, PairGradients, gradient_products, products_with_end
from losslens.updates.base import Array
from losslens.updates.folder import open_adapter

# Returns the folder of each run's gradient: PEFT folders `whole` and `half`. The trainer computes them, which an
# analysis does not know.
FindGradients = Callable[[AnalyzeConfig, Cohort], Mapping[str, Path]]


@dataclass(frozen=True)
class Gradients:
    """Gradients before step 1; empty if they were not asked for.

    Attributes:
        runs: `products_with_end` of each run, shape (M, 4, 4).
        pairs: Gradients of each pair.
    """

    runs: Mapping[str, Array] = field(default_factory=dict)
    pairs: Mapping[Pair, PairGradients] = field(default_factory=dict)


def measure_gradients(cohort: Cohort, folders: Mapping[str, Path]) -> Gradients:
    """Compares the gradients with each other, and each with the end of its run.

    Args:
        cohort: The compared adapters.
        folders: Folder of each run's gradient, the same for runs that have one gradient.
    """
    names = [name for name in cohort.names if name in folders]
    if not names:
        return Gradients()
    distinct = list(dict.fromkeys(folders[name] for name in names))
    number = {name: distinct.index(folders[name]) for name in names}
    with ExitStack() as stack:
        gradients = [
            Gradient(*(stack.enter_context(open_adapter(folder / part)) for part in ("whole", "half")))
            for folder in distinct
        ]
        runs = {}
        for name in names:
            with open_adapter(cohort.by_name[name].adapter) as end:
                runs[name] = products_with_end(gradients[number[name]], end, cohort.modules)
        products = gradient_products(gradients, cohort.modules)
    return Gradients(runs, {(a, b): products.of(number[a], number[b]) for a, b in all_pairs(names)})
