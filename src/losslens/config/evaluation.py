"""Configuration of evaluation on held-out problems, and of `evaluate.py`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from losslens.config.base import Section, SweepName, UserPath
from losslens.config.data import Benchmarks, Data, Server, require_token_ids
from losslens.config.identity import Formerly
from losslens.config.slurm import Job


class Evaluation(Section):
    """Decoding on held-out problems: one greedy answer each, and `samples_per_prompt` sampled ones."""

    engine: Literal["transformers", "openai", "vllm"]
    max_tokens: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    samples_per_prompt: Annotated[int, Formerly("samples")] = Field(ge=0)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=0)
    server: Server

    @model_validator(mode="after")
    def _require_token_ids(self) -> Self:
        require_token_ids(self.engine, self.server)
        return self


class LaterEvaluation(Evaluation):
    """Evaluation of runs that were scored before, after training."""

    max_tokens: int | None = Field(ge=1)  # type: ignore[assignment]  # None: as after training


class EvaluateConfig(Job):
    """The configuration of `evaluate.py`: `conf/evaluate.yaml`."""

    sweep: SweepName
    output_dir: UserPath
    trust_remote_code: bool = False
    benchmark: Benchmarks = Field(default_factory=dict, validate_default=True)
    evaluation: LaterEvaluation

    @field_validator("benchmark")
    @classmethod
    def _require_benchmark(cls, benchmarks: dict[str, Data]) -> dict[str, Data]:
        if not benchmarks:
            raise ValueError("choose what to score on, for example benchmark=gsm8k (--help lists all benchmarks)")
        return benchmarks
