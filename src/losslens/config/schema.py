"""Everything a user can set, typed and checked. Nothing here imports torch.

The values and their meaning stand in `conf/`; these models say which values are allowed. A value that is not ends in
one line that names its field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from losslens.config import interpolations
from losslens.core.errors import InputError, first_line
from losslens.core.redaction import remember_address, remember_name

interpolations.register()

_TYPE = re.compile(r"\[|^(constrained-)?(str|int)$|^function-")
T = TypeVar("T")
Schema = TypeVar("Schema", bound=BaseModel)
_NAME_LENGTH = 100  # of 255 that a file's name may have: names of runs and files hold several


def _of_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"a name of letters, digits, ., _ and -, which begins with a letter or digit, not {name!r}")
    if len(name) > _NAME_LENGTH:
        raise ValueError(f"{len(name)} characters; a name has at most {_NAME_LENGTH}")
    return name


FolderName = Annotated[str, AfterValidator(_of_a_folder)]


def _at_home(path: Any) -> Any:
    """A path with `~` replaced by the home folder."""
    if not isinstance(path, (str, Path)):
        return path
    if not str(path).strip():
        raise ValueError("empty; the folder here is .")
    if "\0" in str(path):
        raise ValueError("a path has no null character")
    if not str(path).startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path}: no such home folder") from error


# A file or folder that the user names; and one that may be an id of the hub instead.
UserPath = Annotated[Path, BeforeValidator(_at_home)]
UserPlace = Annotated[str, BeforeValidator(_at_home)]


def _not_reserved(name: str) -> str:
    if name in ("rollouts", "references", "init", "adapters", "cache"):
        raise ValueError(f"{name} is the name of another folder of output_dir")
    return name


SweepName = Annotated[FolderName, AfterValidator(_not_reserved)]


# Options of an earlier LossLens, and what they are called now.
RENAMED = {"lr.pointwise_factor": "lr.factor", "lr.pairwise_factor": "lr.factor"}

# Which of the rollouts a method may learn from: losslens.training.batches.
TrainOn = Literal["all", "mixed_groups", "dpo_rows"]


class Section(BaseModel):
    """A part of the configuration: no field that is not declared, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LearningRate(Section):
    """The peak learning rate: `base` times `factor`, or times what is conventional for the loss where that is None."""

    name: FolderName
    base: float = Field(gt=0, allow_inf_nan=False)
    factor: float | None = Field(gt=0, allow_inf_nan=False)

    def of(self, conventional_scale: float) -> float:
        """Peak learning rate of a loss whose `conventional_lr_scale` is given."""
        rate = self.base * (conventional_scale if self.factor is None else self.factor)
        return float(f"{rate:.12g}")  # a tenth of 1e-3 and 1e-4 are one rate


class LoraRank(Section):
    """Size of the adapter."""

    r: int = Field(ge=1)
    alpha: float | None = Field(gt=0, allow_inf_nan=False)
    dropout: float = Field(ge=0, lt=1)

    @property
    def scale_numerator(self) -> float:
        """LoRA's alpha: twice the rank unless it is set."""
        return 2.0 * self.r if self.alpha is None else self.alpha


class Package(Section):
    """An installed Python package that ships a model of the hub."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    of: str


class Model(Section):
    """The base that is trained, and the teacher that may write the rollouts."""

    name: FolderName
    path: UserPlace
    revision: str | None
    package: Package | None
    teacher: UserPlace | None
    teacher_revision: str | None
    target_modules: Literal["attention", "all_linear"] | Annotated[list[str], Field(min_length=1)]
    lr: float = Field(gt=0, allow_inf_nan=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    chat_options: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str] | None
    trust_remote_code: bool

    @model_validator(mode="after")
    def _a_name_is_no_secret(self) -> Self:
        remember_name(self.path)
        remember_name(self.teacher)
        return self


# What of a source of problems is a path.
SOURCE_PATHS = ("path", "eval_path", "repo")


class Data(Section):
    """The problems: where they come from, and how many."""

    name: FolderName
    path: UserPlace | None = None  # of data=file; other sources say themselves where they are
    eval_path: UserPlace | None = None
    source: dict[str, Any]
    train: int | None = Field(ge=1)
    eval: int | None = Field(ge=0)
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
        return {name: _at_home(value) if name in SOURCE_PATHS else value for name, value in source.items()}


def _plain_address(url: str | None) -> str | None:
    parts = urlsplit(url or "http://unset")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("an address without user, password and query; a key comes from the environment")
    remember_address(url)
    return url


class Server(Section):
    """An OpenAI-compatible server. Keys come from the environment alone, so that none can stand in a manifest."""

    base_url: Annotated[str | None, AfterValidator(_plain_address)]
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
    k: int = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=1)
    seed: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    path: UserPath | None
    accept: Annotated[list[Literal["all_incorrect", "mostly_cut"]], BeforeValidator(_one_or_several)] = []
    server: Server

    @model_validator(mode="after")
    def _the_server_is_told_the_model(self) -> Self:
        if self.engine == "openai" and not self.server.model:
            raise ValueError("engine=openai: what does the server call its model? rollouts.server.model=NAME")
        return self


class Optim(Section):
    """The optimiser and its schedule.

    An option that is added here gets its default here too: then runs from before it keep their identity.
    """

    max_steps: int = Field(ge=1)
    epochs: float | None = Field(gt=0, allow_inf_nan=False)
    batch_size: int = Field(ge=1)
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)]
    scheduler: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ]
    warmup: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(gt=0, allow_inf_nan=False)
    gradient_checkpointing: Literal["auto"] | bool
    log_steps: int = Field(ge=1)
    save_steps: int = Field(ge=1)
    snapshot_steps: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _steps_and_batches_fit(self) -> Self:
        if self.micro_batch != "auto" and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}")
        if self.save_steps % self.log_steps:
            raise ValueError(f"log_steps={self.log_steps} does not divide save_steps={self.save_steps}")
        return self

    def steps(self, rows: int) -> int:
        """Optimiser steps of a method whose epoch has `rows` rows."""
        return self.max_steps if self.epochs is None else math.ceil(round(self.epochs * rows / self.batch_size, 9))

    def per_process_batch(self, processes: int) -> int:
        """Rollouts (or pairs) of one optimiser step that each of so many processes computes.

        Raises:
            InputError: The batch, or a process's share of it, cannot be divided so.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise InputError(f"optim.batch_size={self.batch_size} cannot be shared by {processes} processes")
        if self.micro_batch != "auto" and share % self.micro_batch:
            raise InputError(
                f"optim.micro_batch={self.micro_batch} does not divide {share}, "
                f"the share of each of {processes} processes in optim.batch_size={self.batch_size}"
            )
        return share

    def microbatch_plans(self, processes: int = 1, dropout: bool = False) -> list[tuple[int, bool]]:
        """Examples in one forward pass, and whether with gradient checkpointing: what to try, the quickest first.

        With `dropout` the number decides what is dropped, and so the adapter: `auto` is then all that a process
        computes, and nothing smaller. Checkpointing draws the same again, and changes nothing.
        """
        sizes = [self.micro_batch] if self.micro_batch != "auto" else _divisors(self.per_process_batch(processes))
        sizes = sizes[:1] if dropout else sizes
        switches = [self.gradient_checkpointing] if self.gradient_checkpointing != "auto" else [False, True]
        return [(size, switch) for switch in switches for size in sizes]


def _divisors(number: int) -> list[int]:
    """The divisors, from the largest to 1."""
    return [d for d in range(number, 0, -1) if number % d == 0]


class Evaluation(Section):
    """How the held-out problems are answered: greedily once, and by `samples` samples besides."""

    engine: Literal["transformers", "openai"]
    max_tokens: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    samples: int = Field(ge=0)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=0)
    server: Server


class Logger(Section):
    """What is logged, and where it goes besides `metrics.jsonl`."""

    name: Literal["wandb", "none"]
    mode: Literal["offline", "online"]
    project: str = Field(pattern=r"^[^/\\#?%:]{1,128}$")  # W&B's own rule
    entity: str | None
    artifacts: bool
    references: Literal["auto"] | dict[str, UserPlace]


# Flags of sbatch that resources have a name for, or that the launcher depends on.
_SET_BY_LOSSLENS = (
    *("account", "constraint", "cpus-per-task", "gpus-per-node", "mem", "partition", "qos", "signal", "time"),
    *("array", "chdir", "clusters", "dependency", "error", "export", "input", "job-name", "kill-on-invalid-dep"),
    *(
        "nodes",
        "ntasks",
        "open-mode",
        "output",
        "parsable",
        "quiet",
        "requeue",
        "no-requeue",
        "test-only",
        "wait",
        "wrap",
    ),
)
_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d{1,2}){0,2})")


class Resources(Section):
    """What Slurm gives to one job."""

    gpus: int = Field(ge=0)
    cpus: int = Field(ge=1)
    memory_gb: float = Field(gt=0, allow_inf_nan=False)
    time: int | str
    requeues: int = Field(ge=0)
    signal_seconds: int = Field(ge=1, lt=65536)
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    max_running: int = Field(ge=1)
    sbatch: dict[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]*$")], str | int | float | bool] | None
    setup: list[str]

    @field_validator("sbatch")
    @classmethod
    def _nothing_that_is_set_otherwise(cls, flags: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in flags or {}:
            if name in _SET_BY_LOSSLENS:
                raise ValueError(f"{name} is set by LossLens itself; see the other resources")
        return flags

    @model_validator(mode="after")
    def _a_time_of_slurm(self) -> Self:
        if self.minutes < 1:
            raise ValueError(f"time={self.time}: at least a minute")
        if self.signal_seconds >= 60 * self.minutes:
            raise ValueError(f"signal_seconds={self.signal_seconds} is not before the limit, time={self.time}")
        # submitit takes an earlier signal for preemption, which is not counted.
        if self.signal_seconds > max(600, 12 * self.minutes):
            raise ValueError(f"signal_seconds={self.signal_seconds}: at most 600, or a fifth of the time")
        if isinstance(self.time, int) and self.time > 1440:
            # YAML reads 8:00:00 as a number, 28800, and Slurm would take that for minutes.
            raise ValueError(
                f'time={self.time}: for more than a day of minutes write D-HH:MM:SS, and "H:MM:SS" in quotes'
            )
        return self

    @property
    def minutes(self) -> int:
        """`time` in minutes, rounded up.

        Raises:
            ValueError: It is not a time as Slurm writes it.
        """
        match = _SLURM_TIME.fullmatch(str(self.time))
        if match is None:
            raise ValueError(f"time={self.time}: minutes, M:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
        parts = [int(part) for part in match["parts"].split(":")]
        if match["days"] is not None:  # D-H, D-H:M, D-H:M:S
            hours, minutes, seconds = [*parts, 0, 0][:3]
            hours += 24 * int(match["days"])
        else:  # M, M:S, H:M:S
            hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        return math.ceil(hours * 60 + minutes + seconds / 60)


class Job(Section):
    """What all entry scripts can be told."""

    # Read by hydra/launcher=slurm before the job; no part of what the job does, nor of its manifest.
    resources: Resources | None = Field(default=None, exclude=True)


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
        if data.eval == 0:
            raise ValueError(f"{name}.eval=0 leaves no problem to score on")
        data._field = f"benchmark.{name}"
    return benchmarks


Benchmarks = Annotated[dict[FolderName, Data], AfterValidator(_distinct_and_asked)]


class TrainConfig(RolloutConfig):
    """The configuration of `train.py`: `conf/train.yaml`. `method` is checked by the method's own class."""

    sweep: SweepName
    seed: int = Field(ge=0, lt=2**32)
    init_seed: int = Field(ge=0, lt=2**32)
    method: dict[str, Any]
    train_on: TrainOn
    lr: LearningRate
    lora_rank: LoraRank
    optim: Optim
    evaluation: Evaluation
    benchmark: Benchmarks = Field(default_factory=dict)
    logger: Logger

    @property
    def benchmarks(self) -> list[Data]:
        """What a run is scored on: the benchmarks that are named, else the held-out problems of its own data."""
        return list(self.benchmark.values()) or ([self.data] if self.data.eval != 0 else [])


class LaterEvaluation(Evaluation):
    """The same of runs that were scored before."""

    max_tokens: int | None = Field(ge=1)  # type: ignore[assignment]  # None: as long as then


class EvaluateConfig(Job):
    """The configuration of `evaluate.py`: `conf/evaluate.yaml`."""

    sweep: SweepName
    output_dir: UserPath
    trust_remote_code: bool = False
    benchmark: Benchmarks = Field(default_factory=dict, validate_default=True)
    evaluation: LaterEvaluation

    @field_validator("benchmark")
    @classmethod
    def _something_to_score_on(cls, benchmarks: dict[str, Data]) -> dict[str, Data]:
        if not benchmarks:
            raise ValueError("name what to score on, for example benchmark=gsm8k (all of them: --help)")
        return benchmarks


class HeldOut(Section):
    """The fixed sequences on which connectivity and CKA are measured."""

    problems: int = Field(ge=4)
    completions: UserPath | None
    base_url: Annotated[str | None, AfterValidator(_plain_address)] = None
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


class AnalyzeConfig(Job):
    """The configuration of `analyze.py`: `conf/analyze.yaml`."""

    sweep: SweepName | Annotated[list[SweepName], Field(min_length=1)] | None
    output_dir: UserPath
    adapters: dict[FolderName, UserPath] | None
    model_path: UserPlace | None
    trust_remote_code: bool = False
    sources: list[str] = Field(default_factory=list)
    at: Literal["end", "norm"] | Annotated[int, Field(ge=1)]
    norm: float | None = Field(gt=0, allow_inf_nan=False)
    across: Literal["rollouts"] | None
    compare_on: FolderName | None
    top: int = Field(ge=1)
    pairs: Literal["all", "reference", "none"] | list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None
    reference: str | None
    family: Literal["all", "reference"]
    held_out: HeldOut
    connectivity: Connectivity
    cka: Cka
    batch_size: int = Field(ge=1)
    logger: Logger

    @property
    def sweeps(self) -> list[str]:
        """The sweeps to gather."""
        if self.sweep is None:
            return []
        return [self.sweep] if isinstance(self.sweep, str) else list(dict.fromkeys(self.sweep))

    @property
    def folder(self) -> Path:
        """Where the analysis is written: one folder for the ends of the runs, another for each point on their way."""
        where = {"end": "", "norm": "-norm" + (f"-{self.norm:g}" if self.norm else "")}.get(
            str(self.at), f"-step-{self.at}"
        )
        return self.output_dir / (self.sweeps[0] if self.sweeps else "adapters") / f"analysis{where}"

    @model_validator(mode="after")
    def _a_norm_for_at_norm(self) -> Self:
        if self.norm is not None and self.at != "norm":
            raise ValueError(f"norm={self.norm:g} is for at=norm")
        if self.adapters and self.at != "end":
            raise ValueError(f"at={self.at}: adapters made elsewhere have only their ends")
        return self


def parse(schema: type[Schema], config: DictConfig | dict[str, Any], field: str = "") -> Schema:
    """`config`, resolved and checked against `schema`; `field` is where it stands in the whole configuration.

    Raises:
        InputError: A value is missing, unknown, of another type or out of its range.
    """
    content = resolved(schema, config) if isinstance(config, DictConfig) else config
    return _checked(field, partial(schema.model_validate, content))


def resolved(schema: type[BaseModel], config: DictConfig) -> dict[str, Any]:
    """The values of `config` that `schema` asks for, resolved, and any that no script knows.

    An experiment sets for `train.py` what other scripts do not have.

    Raises:
        InputError: A value that has to be given is not.
    """
    others = set(TrainConfig.model_fields) | {"hydra"} if issubclass(schema, Job) else set()
    names = [name for name in map(str, config) if name in schema.model_fields or name not in others]
    try:
        values = {name: config[name] for name in names}
        return {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in values.items()
        }
    except OmegaConfBaseException as error:
        if missing := re.search(r"Missing mandatory value: (\S+)", str(error)):
            value = "FILE" if missing[1].endswith("path") else "…"
            raise InputError(f"{missing[1]}: not given, and needed ({missing[1]}={value})") from None
        raise


def build(field: str, section: dict[str, Any]) -> Any:
    """The object that a section of the configuration describes: its `_target_`, called with its other values.

    Raises:
        InputError: There is no such class, or it does not take these values.
    """
    values = dict(section)
    try:
        target = get_class(values.pop("_target_"))
    except (KeyError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"{field}._target_: {first_line(error)}") from error
    return _checked(field, partial(target, **values))


def _checked(field: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValidationError as error:
        errors = error.errors()
        where = _where(field, errors[0]["loc"])
        if where in RENAMED:
            raise InputError(f"{where}: there is none; did you mean {RENAMED[where]}?") from error
        # Of a choice between types each has its own error, and any of them would do.
        said = [each["msg"].removeprefix("Value error, ") for each in errors if _where(field, each["loc"]) == where]
        given = "" if errors[0]["type"] in ("missing", "value_error") else f", got {errors[0]['input']!r}"
        raise InputError(f"{where}: {', or '.join(dict.fromkeys(said))}{given}") from error
    except TypeError as error:
        raise InputError(f"{field}: {error}") from error


def _where(field: str, loc: tuple[int | str, ...]) -> str:
    # Of a choice between types pydantic names the one it tried, for example `list[str]`.
    return ".".join(str(part) for part in (field, *loc) if part != "" and not _TYPE.search(str(part)))
