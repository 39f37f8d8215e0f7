"""The configuration of `analyze.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from losslens.config.base import FolderName, Section, SweepName, UserPath, UserPlace, check_address
from losslens.config.identity import Formerly
from losslens.config.slurm import Job
from losslens.config.tracking import Logger


class ProbeSet(Section):
    """The fixed sequences on which connectivity and CKA are measured."""

    problems: int = Field(ge=4)
    completions: UserPath | None
    base_url: Annotated[str | None, AfterValidator(check_address)] = None
    api_key_env: str = "OPENAI_API_KEY"


class Connectivity(Section):
    """Linear mode connectivity."""

    points: int = Field(ge=3)
    loss: Literal["completions", "answer"]
    resamples: int = Field(ge=100)
    midpoint_problems: int = Field(ge=0)


class Cka(Section):
    """CKA of hidden states."""

    pooling: Literal["mean", "last"]
    minibatch: int = Field(ge=4)


class Interventions(Section):
    """Causal checks: runs with changed weights, measured anew. Without any change listed, none is made."""

    scaling: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=list)
    equal: list[Literal["norm", "kl"]] = Field(default_factory=list)
    merging: list[Literal["sum", "mean", "ties", "dare"]] = Field(default_factory=list)
    restoring: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    draws: int = Field(default=2, ge=0)
    problems: int | None = Field(default=None, ge=0)

    @property
    def asked_for(self) -> bool:
        """True if a change is listed."""
        return bool(self.scaling or self.equal or self.merging or self.restoring)


class AnalyzeConfig(Job):
    """The configuration of `analyze.py`: `conf/analyze.yaml`."""

    sweep: SweepName | Annotated[list[SweepName], Field(min_length=1)] | None
    output_dir: UserPath
    adapters: dict[FolderName, UserPath] | None
    published: str | None = None
    model_path: UserPlace | None
    trust_remote_code: bool = False
    sources: list[str] = Field(default_factory=list)
    checkpoint: Annotated[Literal["end", "norm"] | Annotated[int, Field(ge=1)], Formerly("at")]
    target_norm: Annotated[float | None, Formerly("norm")] = Field(gt=0, allow_inf_nan=False)
    allow_different: Annotated[Literal["rollouts"] | None, Formerly("across")]
    primary_benchmark: Annotated[FolderName | None, Formerly("compare_on")]
    select_on: FolderName | None = None
    num_directions: Annotated[int, Formerly("top")] = Field(ge=1)
    spectrum_copies: int = Field(0, ge=0)
    initial_gradients: bool = False
    pairs: Literal["all", "reference", "none"] | list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None
    reference: str | None
    holm_family: Annotated[Literal["all", "reference"], Formerly("family")]
    equivalence_margin: float = Field(gt=0, lt=100)
    probe_set: Annotated[ProbeSet, Formerly("held_out")]
    connectivity: Connectivity
    cka: Cka
    rotated_copies: int = Field(default=4, ge=0)
    answer_copies: int = Field(default=0, ge=0)
    interventions: Interventions = Field(default_factory=Interventions)
    batch_size: int = Field(ge=1)
    logger: Logger

    @property
    def sweeps(self) -> list[str]:
        """Names of the sweeps to analyse, without duplicates; none beside published adapters."""
        if self.sweep is None or self.published is not None:
            return []
        return [self.sweep] if isinstance(self.sweep, str) else list(dict.fromkeys(self.sweep))

    @property
    def folder(self) -> Path:
        """Folder of the analysis: a separate one for the final adapters and for each choice of `checkpoint`."""
        suffix = {"end": "", "norm": "-norm" + (f"-{self.target_norm:g}" if self.target_norm else "")}.get(
            str(self.checkpoint), f"-step-{self.checkpoint}"
        )
        named = [self.sweep] if isinstance(self.sweep, str) else self.sweep
        return self.output_dir / (named[0] if named else "adapters") / f"analysis{suffix}"

    @model_validator(mode="after")
    def _checkpoint_fits(self) -> Self:
        if self.target_norm is not None and self.checkpoint != "norm":
            raise ValueError(f"target_norm={self.target_norm:g} requires checkpoint=norm")
        if self.select_on is not None and self.checkpoint != "end":
            raise ValueError(f"checkpoint={self.checkpoint}: select_on chooses rates at the end of training; use end")
        if self.spectrum_copies == 1:
            raise ValueError("spectrum_copies=1: a spread needs at least 2")
        if self.answer_copies == 1:
            raise ValueError("answer_copies=1: a spread needs at least 2")
        if self.answer_copies > self.rotated_copies:
            raise ValueError(f"answer_copies={self.answer_copies}: there are rotated_copies={self.rotated_copies}")
        if (most := max(self.interventions.restoring, default=0)) > self.num_directions:
            raise ValueError(f"interventions.restoring={most}: at most num_directions={self.num_directions}")
        if (self.adapters or self.published is not None) and self.checkpoint != "end":
            raise ValueError(f"checkpoint={self.checkpoint}: adapters trained elsewhere have no snapshots; use end")
        return self
