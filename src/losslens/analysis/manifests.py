"""The parts of a run's manifest that an analysis needs, validated on reading."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from losslens.config.base import FolderName
from losslens.config.training import LearningRate, TrainOn
from losslens.core.errors import InputError
from losslens.runs.current_words import readable_settings
from losslens.runs.integrity import require_own_manifest
from losslens.runs.run import Run, arm_of

Facts = TypeVar("Facts", bound="_Facts")


class _Facts(BaseModel):
    """A part of a run's manifest; other fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Named(_Facts):
    """A configuration group with a name, which becomes part of file names."""

    name: FolderName


class TrainingFacts(_Facts):
    """The result of training."""

    steps: int


class Rank(_Facts):
    """The rank of the adapter."""

    r: int


class Frozen(_Facts):
    """A folder identified by its hash; its name may not contain a path, nor begin with a dot as `..` does."""

    folder: Annotated[str, StringConstraints(pattern=r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$")]
    sha256: str


class TrainedOn(_Facts):
    """The rollouts that the method may learn from; of an on-policy run nothing is known before training."""

    pass_rate: float | None = None


class RecordedData(Named):
    """The problems; further fields are kept for `Data`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    eval_size: int | None


class RecordedModel(Named):
    """The base; further fields are kept for `Model`."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class RunConfig(_Facts):
    """The configuration of a run."""

    data: RecordedData
    benchmark: dict[str, RecordedData]
    evaluation: dict[str, Any]
    rollouts: dict[str, Any]
    model: RecordedModel
    train_on: TrainOn = "all"
    lr: LearningRate
    lora_rank: Rank | None
    seed: int
    init_seed: int | None


class StartedFacts(_Facts):
    """The manifest of a run, finished or not."""

    method: FolderName
    options: dict[str, Any] = Field(default_factory=dict)
    loss: dict[str, Any] = Field(default_factory=dict)
    conventional_lr_scale: float = Field(gt=0, allow_inf_nan=False)
    learning_rate: FiniteFloat
    base: dict[str, str | None]
    rollouts: Frozen | None
    trained_on: TrainedOn
    prompts_sha256: str | None = None
    metrics_sha256: str | None = None
    initial_adapter: Frozen | None
    identity: dict[str, Any]
    config: RunConfig

    @property
    def own_samples(self) -> bool:
        """True if the run sampled what it trained on from its own policy."""
        return self.rollouts is None

    @property
    def start(self) -> str | None:
        """Hash of the initial adapter; None for full fine-tuning, which starts from the base itself."""
        return self.initial_adapter.sha256 if self.initial_adapter else None

    @property
    def rank(self) -> int | None:
        """Rank of the adapter; None for full fine-tuning."""
        return self.config.lora_rank.r if self.config.lora_rank else None

    @property
    def scored_on(self) -> list[RecordedData]:
        """The benchmarks on which the run was scored after training."""
        return list(self.config.benchmark.values()) or [self.config.data] * (self.config.data.eval_size != 0)

    @property
    def benchmark_data(self) -> RecordedData | None:
        """The first of these benchmarks; None if the run was not scored."""
        return next(iter(self.scored_on), None)

    @property
    def benchmark(self) -> str | None:
        """The name of the first benchmark; None if the run was not scored."""
        return self.benchmark_data.name if self.benchmark_data else None

    @property
    def model(self) -> str:
        """The name of the base."""
        return self.config.model.name

    @property
    def seeds(self) -> tuple[int, int | None]:
        """`seed` and `init_seed`, which full fine-tuning has not."""
        return self.config.seed, self.config.init_seed

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that determine the run, including options of its loss at their defaults."""
        return readable_settings(self.identity, self.options)

    @property
    def configuration(self) -> str:
        """Hash of the configuration without seeds, which identifies the arm."""
        return arm_of(self.identity)


class RunFacts(StartedFacts):
    """The manifest of a trained run."""

    adapter_sha256: str
    adapter_config_sha256: str
    training: TrainingFacts


class BaseConfig(_Facts):
    """The configuration under which the base was scored."""

    model: Named


class BaseFacts(_Facts):
    """The manifest of the untrained base."""

    base: dict[str, str | None]
    config: BaseConfig


def read_facts(run: Run, kind: type[Facts]) -> Facts:
    """Reads the manifest of `run`.

    Raises:
        InputError: It is missing or incomplete, or belongs to another run.
    """
    try:
        manifest = run.manifest
        facts = kind.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise InputError(
            f"{run.folder / 'manifest.json'}: {where}: {first['msg']} (written by another version of LossLens?)"
        ) from error
    require_own_manifest(run.folder, manifest)
    return facts
