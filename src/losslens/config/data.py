"""Problems, rollouts and servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from losslens.config.base import FolderName, Section, UserPath, UserPlace, check_address, expand_home
from losslens.config.identity import Formerly
from losslens.config.model import Model
from losslens.config.slurm import Job
from losslens.core.redaction import remember_name

# What of a source of problems is a path.
SOURCE_PATHS = ("path", "eval_path", "repo")


class Data(Section):
    """The problems: where they come from, and how many."""

    name: FolderName
    path: UserPlace | None = None  # of data=file; other sources say themselves where they are
    eval_path: UserPlace | None = None
    source: dict[str, Any]
    train_size: Annotated[int | None, Formerly("train")] = Field(ge=1)
    eval_size: Annotated[int | None, Formerly("eval")] = Field(ge=0)
    seed: int = Field(ge=0)
    verify_seconds: float = Field(gt=0, allow_inf_nan=False)
    _field: str = PrivateAttr("data")

    @property
    def field(self) -> str:
        """Where it stands in the configuration, for messages: `data`, `benchmark.gsm8k`."""
        return self._field

    @field_validator("source")
    @classmethod
    def _paths_of_the_source(cls, source: dict[str, Any]) -> dict[str, Any]:
        return {name: expand_home(value) if name in SOURCE_PATHS else value for name, value in source.items()}


class Server(Section):
    """An OpenAI-compatible server. Keys come from the environment alone, so that none can stand in a manifest."""

    base_url: Annotated[str | None, AfterValidator(check_address)]
    model: str | None
    api_key_env: str
    concurrency: int = Field(ge=1)
    attempts: int = Field(ge=1)
    timeout: float = Field(gt=0, allow_inf_nan=False)
    requests_per_minute: float | None = Field(gt=0, allow_inf_nan=False)
    token_ids: Literal["auto", "off"]
    price_prompt: float | None = Field(ge=0, allow_inf_nan=False)
    price_completion: float | None = Field(ge=0, allow_inf_nan=False)
    extra_body: dict[str, Any] | None

    @model_validator(mode="after")
    def _a_name_is_no_secret(self) -> Self:
        remember_name(self.model)
        return self

    @model_validator(mode="after")
    def _both_prices_or_none(self) -> Self:
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("price_prompt and price_completion: give both or none")
        return self


def _one_or_several(value: Any) -> Any:
    if not isinstance(value, (str, list)):
        raise ValueError(f"all_incorrect, mostly_cut or [all_incorrect,mostly_cut], not {value!r}")
    return [value] if isinstance(value, str) else value


class Rollouts(Section):
    """How the rollouts are sampled."""

    engine: Literal["transformers", "openai"]
    policy: Literal["teacher", "base"]
    samples_per_prompt: Annotated[int, Formerly("k")] = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1)
    seed: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    path: UserPath | None
    accept: Annotated[list[Literal["all_incorrect", "mostly_cut"]], BeforeValidator(_one_or_several)] = Field(
        default_factory=list
    )
    server: Server

    @model_validator(mode="after")
    def _the_server_is_told_the_model(self) -> Self:
        if self.engine == "openai" and not self.server.model:
            raise ValueError("engine=openai: what does the server call its model? rollouts.server.model=NAME")
        return self


class RolloutConfig(Job):
    """The configuration of `rollout.py`: `conf/rollout.yaml`."""

    output_dir: UserPath
    model: Model
    data: Data
    rollouts: Rollouts


def _distinct_and_asked(benchmarks: dict[str, Data]) -> dict[str, Data]:
    names = [data.name for data in benchmarks.values()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two benchmarks are called {name}, and would have one file")
    for name, data in benchmarks.items():
        if data.eval_size == 0:
            raise ValueError(f"{name}.eval_size=0 leaves no problem to score on")
        data._field = f"benchmark.{name}"
    return benchmarks


Benchmarks = Annotated[dict[FolderName, Data], AfterValidator(_distinct_and_asked)]
