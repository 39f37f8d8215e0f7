"""The compared adapters: finished runs, external adapters, and what is known of runs without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from losslens.analysis.manifests import BaseFacts, RunFacts, StartedFacts
from losslens.analysis.scores import Scores
from losslens.core.errors import InputError
from losslens.core.hashing import hash_json
from losslens.runs.run import Run
from losslens.updates.checkpoint import OpenUpdate, open_update
from losslens.updates.weights import is_checkpoint


@dataclass(frozen=True)
class Base:
    """The untrained base, as scored in a sweep."""

    name: str
    run: Run
    facts: BaseFacts


@dataclass(frozen=True)
class BaseFolder:
    """The weights of the base, for updates that depend on them.

    Attributes:
        folder: Their folder.
        identity: What they are (`model_identity`).
    """

    folder: Path
    identity: Mapping[str, str | None]


@dataclass(frozen=True)
class Point:
    """Weights at some point of training.

    Attributes:
        folder: Folder of the adapter, or of the whole model.
        sha256: Hash of the weights and of their configuration.
        base: Folder of the base, if the update depends on its weights: for a whole model or DoRA.
    """

    folder: Path
    sha256: str
    base: Path | None = None

    @property
    def is_whole(self) -> bool:
        """True for a whole model, whose update is its difference to the base."""
        return self.base is not None and is_checkpoint(self.folder)

    def open(self) -> AbstractContextManager[OpenUpdate]:
        """Opens the update."""
        return open_update(self.folder, self.base)

    def key(self, modules: Sequence[str]) -> Any:
        """Returns a cache key of the update on these modules; a LoRA adapter has no others."""
        return self.sha256 if self.base is None else [self.sha256, hash_json(list(modules), 16)]


@dataclass(frozen=True)
class ComparedAdapter:
    """One of the compared adapters.

    Attributes:
        name: Its name in the tables.
        adapter: Its folder.
        sha256: Hash of its weights and its configuration.
        initial: Folder of the adapter it started from; None if unknown or deleted, or for a whole model.
        run: The run that trained it; None for an external adapter.
        facts: The run's manifest; None for an external adapter.
        base: Folder of the base, if its update depends on it (`Point`).
    """

    name: str
    adapter: Path
    sha256: str
    initial: Path | None = None
    run: Run | None = None
    facts: RunFacts | None = None
    base: Path | None = None

    @property
    def point(self) -> Point:
        """Its weights."""
        return Point(self.adapter, self.sha256, self.base)


@dataclass(frozen=True)
class Diverged:
    """A run that diverged and has no final adapter.

    Attributes:
        name: Its name in the tables.
        run: The run.
        facts: Its manifest.
        reason: What became non-finite, and at which step.
        base: As for `ComparedAdapter`.
    """

    name: str
    run: Run
    facts: StartedFacts
    reason: str
    base: Path | None = None


@dataclass(frozen=True)
class Unfinished:
    """A run that was started and has neither finished nor diverged.

    Attributes:
        name: Its name in the tables.
        facts: Its manifest.
        state: Its state: `failed`, `running`, `queued` or `preempted`.
    """

    name: str
    facts: StartedFacts
    state: str


@dataclass(frozen=True)
class Cohort:
    """The adapters that an analysis compares.

    Attributes:
        members: The adapters, in the order of the tables.
        modules: Names of the modules that all of them change.
        shapes: (out, in) of each module.
        ranks: For each member, the ranks of its modules.
        bases: The untrained base, once per sweep.
        scores: The outcomes of members and bases.
        diverged: Runs that diverged; they are listed in the tables but not averaged.
        left_out: What is not compared, with the reasons.
        unfinished: Runs that failed or have not finished, as far as they have a manifest.
    """

    members: list[ComparedAdapter]
    modules: list[str]
    shapes: list[tuple[int, int]]
    ranks: dict[str, list[int]]
    bases: list[Base]
    scores: Scores
    diverged: list[Diverged]
    left_out: dict[str, str]
    unfinished: list[Unfinished] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, ComparedAdapter]:
        """The members by name."""
        return {member.name: member for member in self.members}

    @property
    def names(self) -> list[str]:
        """Names of the members."""
        return [member.name for member in self.members]

    @property
    def first(self) -> RunFacts | None:
        """The manifest of the first run, if possible one on the frozen rollouts; None without runs.

        Its base and problems are those of all runs, and its rollouts those of all runs that trained on frozen ones.
        """
        known = [member.facts for member in self.members if member.facts]
        return next((facts for facts in known if not facts.own_samples), next(iter(known), None))

    @property
    def base_name(self) -> str:
        """The name of the untrained base in the tables."""
        return self.bases[0].name if self.bases else "base"


@dataclass
class SweepContents:
    """The contents of some sweeps.

    Attributes:
        members: The finished runs.
        bases: The untrained base, once per sweep.
        diverged: Runs that diverged.
        taken: Names not available to external adapters.
        nothing: The error message if there are neither members nor external adapters.
        left_out: What is not compared, with the reasons.
        unfinished: Runs that failed or have not finished, as far as they have a manifest.
    """

    members: list[ComparedAdapter]
    bases: list[Base]
    diverged: list[Diverged]
    taken: set[str]
    nothing: str
    left_out: dict[str, str]
    unfinished: list[Unfinished] = field(default_factory=list)


def common_modules(members: Sequence[ComparedAdapter]) -> list[str]:
    """Returns the modules that are compared: those of the adapters, or of the whole models if there is no adapter.

    Raises:
        InputError: Two adapters have different modules, or a whole model lacks one of them.
    """
    adapters = [member for member in members if not member.point.is_whole]
    first = (adapters or members)[0]
    with first.point.open() as update:
        modules = update.modules
    for member in members:
        with member.point.open() as update:
            own = set(update.modules)
        differing = set(modules) - own if member.point.is_whole else set(modules) ^ own
        for module in sorted(differing):
            raise InputError(
                f"{member.name}: adapts different modules than {first.name} (only one of them has {module}); they "
                "cannot be compared"
            )
    return modules
