"""Measures of adapters against the weights of their base, module by module; all results are cached."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields

import numpy as np
from threadpoolctl import threadpool_limits

from losslens.analysis.cohort import Cohort
from losslens.analysis.forward_passes import ForwardPasses, bar
from losslens.analysis.weight_space import initial_key
from losslens.core.errors import InputError
from losslens.measures.base_weights import Principal, PrincipalParts, principal, principal_parts
from losslens.measures.rotated import against_copies
from losslens.measures.tables import BaseComparison
from losslens.updates.base import Array
from losslens.updates.folder import open_adapter


class BaseWeights:
    """Compares the adapters of a cohort with W0.

    Args:
        passes: The base, which is only loaded for results missing from the cache.
        cohort: The adapters.
        top: Number of leading singular directions of W0.
    """

    def __init__(self, passes: ForwardPasses, cohort: Cohort, top: int) -> None:
        self._passes, self._cache, self._cohort, self._top = passes, passes.cache, cohort, top

    def compared(self) -> dict[str, BaseComparison]:
        """Compares every run with W0."""
        members, modules = self._cohort.by_name, self._cohort.modules
        keys = {name: [self._passes.identity, *initial_key(one, modules), self._top] for name, one in members.items()}
        names = [field.name for field in fields(BaseComparison)]
        known = {name: self._cache.load("against_base", key, names) for name, key in keys.items()}
        found = {name: BaseComparison(**arrays) for name, arrays in known.items() if arrays is not None}
        missing = [name for name in keys if name not in found]
        if missing:
            norms = np.empty(len(self._cohort.modules))
            parts: dict[str, list[PrincipalParts]] = {name: [] for name in missing}
            with ExitStack() as stack:
                adapters = {name: stack.enter_context(members[name].point.open()) for name in missing}
                folders = {folder for name in missing if (folder := members[name].initial)}
                starts = {folder: stack.enter_context(open_adapter(folder)) for folder in folders}
                for m, module in enumerate(bar(self._cohort.modules, "base weights", "module")):
                    weight = self.principal(module, self._cohort.shapes[m])
                    norms[m] = weight.norm
                    spaces = {folder: start[module].input_space() for folder, start in starts.items()}
                    with threadpool_limits(1, "blas"):  # the factors are too thin for one product to use several cores
                        for name, adapter in adapters.items():
                            initial = members[name].initial
                            start = spaces[initial] if initial else None
                            parts[name].append(principal_parts(adapter[module], start, weight))
            for name in missing:
                fresh = BaseComparison.of(norms, parts[name])
                found[name] = BaseComparison(**self._cache.save("against_base", keys[name], vars(fresh)))
        return found

    def effects(self, copies: int) -> dict[str, Array]:
        """Computes the effects of every run on W0 and those of left-rotated copies of it, shape (M, 3, 4) each."""
        members, modules = self._cohort.by_name, self._cohort.modules
        about = [self._top, copies]
        keys = {name: [self._passes.identity, one.point.key(modules), *about] for name, one in members.items()}
        known = {name: self._cache.load("effects", key, ["effects"]) for name, key in keys.items()}
        found = {name: arrays["effects"] for name, arrays in known.items() if arrays is not None}
        missing = [name for name in keys if name not in found]
        if missing:
            found_effects: dict[str, list[Array]] = {name: [] for name in missing}
            with ExitStack() as stack:
                adapters = {name: stack.enter_context(members[name].point.open()) for name in missing}
                shapes: Sequence[tuple[int, int]] = self._cohort.shapes
                for m, module in enumerate(bar(modules, "rotated copies", "module")):
                    directions = self.principal(module, shapes[m])
                    weight = self._passes.base_weight(module, shapes[m])
                    for name, adapter in adapters.items():
                        # The same rotations for all runs.
                        rng = np.random.default_rng(m)
                        found_effects[name].append(against_copies(adapter[module], weight, directions, copies, rng))
            for name in missing:
                found[name] = self._cache.save("effects", keys[name], {"effects": found_effects[name]})["effects"]
        return found

    def principal(self, module: str, shape: tuple[int, int]) -> Principal:
        """Returns the leading singular directions of W0 in a module."""
        key = [self._passes.identity, module, self._top]
        known = self._cache.load("principal", key, ["norm", "values", "left", "right"])
        if known is None:
            fresh = principal(self._passes.base_weight(module, shape), self._top)
            known = self._cache.save("principal", key, vars(fresh))
        if (len(known["left"]), len(known["right"])) != shape:
            raise InputError(f"the adapters do not fit the base: {module} has a different shape there")
        return Principal(float(known["norm"]), known["values"], known["left"], known["right"])
