"""Configuration of problems, rollouts and servers: `data`, `rollouts` and `server`; the schema of `rollout.py`."""

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

# Options of a problem source that are paths.
SOURCE_PATHS = ("path", "eval_path", "repo")


def _require_offset(value: Any) -> Any:
    if value is None:  # benchmark=validation with all held-out problems in the data's own benchmark
        raise ValueError("no held-out problems are left to validate on; set data.eval_size")
    return value


class Data(Section):
    """The problems: where they come from, and how many."""

    name: FolderName
    path: UserPlace | None = None  # for data=file; other sources know their location
    eval_path: UserPlace | None = None
    source: dict[str, Any]
    train_size: Annotated[int | None, Formerly("train")] = Field(ge=1)
    eval_size: Annotated[int | None, Formerly("eval")] = Field(ge=0)
    # Held-out problems before those that are scored.
    eval_offset: Annotated[int, BeforeValidator(_require_offset)] = Field(default=0, ge=0)
    seed: int = Field(ge=0)
    verify_seconds: float = Field(default=10, gt=0, allow_inf_nan=False)
    _field: str = PrivateAttr("data")

    @property
    def field(self) -> str:
        """Its key in the configuration, for messages: `data`, `benchmark.gsm8k`."""
        return self._field

    @property
    def verification(self) -> dict[str, float]:
        """Part of an identity: the time limit for verifying, which can change a reward; empty at its default."""
        default = type(self).model_fields["verify_seconds"].default
        return {} if self.verify_seconds == default else {"verify_seconds": self.verify_seconds}

    @field_validator("source")
    @classmethod
    def _expand_source_paths(cls, source: dict[str, Any]) -> dict[str, Any]:
        return {name: expand_home(value) if name in SOURCE_PATHS else value for name, value in source.items()}


class Server(Section):
    """An OpenAI-compatible server; the last three options are those of a vLLM that LossLens starts.

    The key is read only from the environment, so that it cannot enter a manifest.
    """

    base_url: Annotated[str | None, AfterValidator(check_address)]
    model: str | None
    api_key_env: str
    concurrency: int = Field(ge=1)
    attempts: int = Field(ge=1)
    timeout: float = Field(gt=0, allow_inf_nan=False)
    requests_per_minute: float | None = Field(gt=0, allow_inf_nan=False)
    token_ids: Literal["auto", "off"]
    logprobs: Literal["auto", "off"] = "auto"
    price_prompt: float | None = Field(ge=0, allow_inf_nan=False)
    price_completion: float | None = Field(ge=0, allow_inf_nan=False)
    extra_body: dict[str, Any] | None
    command: str = "vllm serve"
    args: dict[str, Any] | None = None
    start_timeout: float = Field(default=600, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _remember_names(self) -> Self:
        remember_name(self.model)
        return self

    @model_validator(mode="after")
    def _require_both_prices(self) -> Self:
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("price_prompt and price_completion: set both or neither")
        return self


def require_token_ids(engine: str, server: Server) -> None:
    """Refuses `engine=vllm` without token ids, which show that prompts and answers are those of the local model."""
    if engine == "vllm" and server.token_ids == "off":
        raise ValueError("server.token_ids=off: engine=vllm needs token ids")


def _as_list(value: Any) -> Any:
    if not isinstance(value, (str, list)):
        raise ValueError(f"must be all_incorrect, mostly_cut or [all_incorrect,mostly_cut], not {value!r}")
    return [value] if isinstance(value, str) else value


class Rollouts(Section):
    """Sampling of the frozen rollouts."""

    engine: Literal["transformers", "openai", "vllm"]
    policy: Literal["teacher", "base"]
    samples_per_prompt: Annotated[int, Formerly("k")] = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1)
    seed: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    path: UserPath | None
    accept: Annotated[list[Literal["all_incorrect", "mostly_cut"]], BeforeValidator(_as_list)] = Field(
        default_factory=list
    )
    server: Server

    @model_validator(mode="after")
    def _require_token_ids(self) -> Self:
        require_token_ids(self.engine, self.server)
        return self

    @model_validator(mode="after")
    def _require_server_model(self) -> Self:
        if self.engine == "openai" and not self.server.model:
            raise ValueError("engine=openai needs the server's name for the model: rollouts.server.model=NAME")
        return self


class RolloutConfig(Job):
    """The configuration of `rollout.py`: `conf/rollout.yaml`."""

    output_dir: UserPath
    model: Model
    data: Data
    rollouts: Rollouts


def _require_distinct(benchmarks: dict[str, Data]) -> dict[str, Data]:
    names = [data.name for data in benchmarks.values()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two benchmarks have the name {name}, and would be written to the same file")
    for name, data in benchmarks.items():
        if data.eval_size == 0:
            raise ValueError(f"{name}.eval_size=0 leaves no problems to score on")
        data._field = f"benchmark.{name}"
    return benchmarks


Benchmarks = Annotated[dict[FolderName, Data], AfterValidator(_require_distinct)]
