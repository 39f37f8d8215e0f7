"""Specification of a run, built once from its configuration: determines its identity, folder and training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from hydra.utils import get_class

from losslens.config.identity import FORMAT, identity_options
from losslens.config.parse import build
from losslens.config.training import TRAIN_ON, TrainConfig, TrainOn
from losslens.core import distributed
from losslens.core.errors import InputError
from losslens.core.hashing import hash_json
from losslens.losses import Loss, Method, Need, builtin_methods
from losslens.losses.on_policy import OnPolicy
from losslens.losses.online_grpo import OnlineGrpo
from losslens.losses.presentation import presentation_of
from losslens.losses.sft import Sft
from losslens.models.adapters import LoraSettings
from losslens.models.loading import ModelSource, model_identity, source_of
from losslens.rollouts.sample import rollouts_identity, training_problems
from losslens.runs.run import Run, base_identity, find_run

# Increased when the same `optim` starts to produce a different adapter.
OPTIMISER = 1
# Increased when the same settings start to give an on-policy method other samples.
OWN_SAMPLES = 3
# Increased when columns that losses compute from whole groups change where rollouts are left out; 1: of all rollouts.
GROUP_STATISTICS = 1
# Fields of `optim` that do not change the adapter: memory use, logging, saving and waiting.
_NOT_IN_IDENTITY = (
    "micro_batch", "gradient_checkpointing", "log_steps", "save_steps", "snapshot_steps", "max_step_minutes",
)  # fmt: skip


def own_options(method: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section `method` without options that a loss outside the package has only from `method=sft`.

    `train.py method._target_=mine.Loss method.name=mine` is composed from the default method, SFT.
    """
    with suppress(ImportError, ValueError, TypeError, KeyError):  # told by `build`
        kind = get_class(str(method["_target_"]))
        if issubclass(kind, Loss) and not issubclass(kind, Sft):
            rest = Sft(name="sft").options
            return {
                option: value
                for option, value in method.items()
                if option in kind.model_fields or option not in rest or value != rest[option]
            }
    return dict(method)


def _require_effect(method: Method) -> None:
    """Refuses options that are set although they change nothing: they would give one result two folders.

    Runs that were recorded with such options are still read.

    Raises:
        InputError: There is one; the message names it and says why.
    """
    for name, why in method.inert.items():
        value = getattr(method, name)
        if value != type(method).model_fields[name].default:
            raise InputError(f"method.{name}={value}: has no effect: {why}")


def _statistics_identity(method: Method, train_on: TrainOn) -> dict[str, int]:
    """Version of the columns of whole groups, where rollouts are left out that once were left out of these, too."""
    if not isinstance(method, Loss) or method.columns_from == "row":
        return {}
    of_table = method.columns_from == "table"
    left_out = train_on == "paired_rollouts" or (train_on == "mixed_groups" and of_table)
    selects = type(method).select is not Loss.select
    return {"group_statistics": GROUP_STATISTICS} if left_out or selects else {}


@dataclass(frozen=True)
class RunSpec:
    """Specification of a run.

    Attributes:
        config: The complete configuration, including options that do not affect the adapter.
        method: The loss or on-policy method, with its options.
    """

    config: TrainConfig
    method: Method

    @classmethod
    def of(cls, config: TrainConfig) -> RunSpec:
        """Builds the specification, including the method that `config` names.

        Raises:
            InputError: The method does not exist, rejects its options, has the name of a built-in one, or samples its
                own rollouts although `train_on` selects among frozen ones; or an option has no effect.
        """
        loss: Method = build("method", own_options(config.method))
        if not isinstance(loss, (Loss, OnPolicy)):
            raise InputError(f"method._target_: {type(loss).__qualname__} is not a subclass of losslens.losses.Loss")
        builtin = builtin_methods().get(loss.name)
        if builtin is not None and type(loss) is not builtin:
            # A run is identified by the name of its loss, not by its class.
            raise InputError(
                f"method.name={loss.name}: the name of a built-in loss; {type(loss).__qualname__} needs another name"
            )
        presentation_of(loss)
        _require_effect(loss)
        if config.adapter == "none" and isinstance(loss, OnlineGrpo) and loss.kl_coef:
            # TRL would load another copy of the base, without its revision, precision and attention.
            raise InputError(f"method.kl_coef={loss.kl_coef}: method={loss.name} has no reference with adapter=none")
        if isinstance(loss, OnPolicy):
            if config.train_on != "all":
                raise InputError(f"train_on={config.train_on}: method={loss.name} samples its own rollouts; use all")
            if loss.max_tokens == config.rollouts.max_tokens:
                # The identity would hold it twice.
                raise InputError(f"method.max_tokens={loss.max_tokens}: has no effect: it is rollouts.max_tokens")
            return cls(config, loss)
        if unknown := loss.needs - set(get_args(Need)):
            raise InputError(
                f"method.name={loss.name}: needs {', '.join(sorted(unknown))}; a loss may need only "
                f"{', '.join(sorted(get_args(Need)))}"
            )
        return cls(config, loss)

    @property
    def loss(self) -> Loss:
        """The method of a run on frozen rollouts."""
        assert isinstance(self.method, Loss)
        return self.method

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.config.lr.of(self.method.conventional_lr_scale)

    @property
    def max_tokens(self) -> int:
        """Maximum length of a sample of an on-policy method, tokens."""
        own = self.method.max_tokens if isinstance(self.method, OnPolicy) else None
        return self.config.rollouts.max_tokens if own is None else own

    @property
    def lora(self) -> LoraSettings | None:
        """Settings of the adapter; None for full fine-tuning."""
        rank, names = self.config.lora_rank, self.config.model.target_modules
        if rank is None:
            return None
        targets = names if isinstance(names, str) else tuple(sorted(set(names)))
        return LoraSettings(rank.r, rank.scale_numerator, rank.dropout, targets)

    @cached_property
    def base(self) -> dict[str, str | None]:
        """Fingerprint of the base.

        Raises:
            InputError: The model does not exist.
        """
        return base_identity(self.config.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the adapter, and nothing else: no paths, classes, launcher or logger.

        The format is described in docs/reference/identity.md.

        Raises:
            InputError: The model or the rollouts do not exist.
        """
        config = self.config
        train_on = self.method.learns_from(config.train_on) if isinstance(self.method, Loss) else config.train_on
        steps = ("max_steps",) if config.optim.epochs else ()
        return {
            "format": FORMAT,
            "method": self.method.identity,
            "train_on": TRAIN_ON.values.get(train_on, train_on),
            **_statistics_identity(self.method, train_on),
            "learning_rate": self.learning_rate,
            **({"adapter": "none"} if self.lora is None else {"lora": asdict(self.lora)}),
            "base": self.base,
            "dtype": config.model.dtype,
            "chat_options": config.model.chat_options,
            **self._rollouts_identity(),
            "optim": {"version": OPTIMISER, **identity_options(config.optim, (*_NOT_IN_IDENTITY, *steps))},
            "seed": config.seed,
            **({} if self.lora is None else {"init_seed": config.init_seed}),
            **self._execution_identity(),
        }

    def _rollouts_identity(self) -> dict[str, Any]:
        """Identity of the frozen rollouts, or of the problems and of the samples that an on-policy method takes."""
        if not isinstance(self.method, OnPolicy):
            return {"rollouts": rollouts_identity(self.config)}
        problems, _ = training_problems(self.config, self.method.name)
        samples: dict[str, Any] = {"version": OWN_SAMPLES, "max_tokens": self.max_tokens}
        samples |= self.config.data.verification
        if self.method.needs_teacher:
            samples["teacher"] = model_identity(self.teacher)
        return {"rollouts": problems, "own_samples": samples}

    @property
    def teacher(self) -> ModelSource:
        """The teacher of an on-policy method.

        Raises:
            InputError: None is set.
        """
        if self.config.model.teacher is None:
            raise InputError(
                f"method={self.method.name}: no model.teacher is set; name a model with the base's vocabulary"
            )
        return source_of(self.config.model, teacher=True)

    def _execution_identity(self) -> dict[str, Any]:
        """Number of processes and micro-batch, where they change the result: with LoRA dropout or own samples."""
        config = self.config
        dropout = 0 if config.lora_rank is None else config.lora_rank.dropout
        if not dropout and not self.method.own_samples:
            return {}
        # Outside the run's processes, as in the launcher, the resources say how many there will be.
        gpus = config.resources.gpus if config.resources is not None else 1
        count = distributed.world_size() if distributed.world_size() > 1 else max(gpus, 1)
        if not dropout:
            return {"processes": count}
        return {"micro_batch": config.optim.microbatch_plans(count, dropout=True)[0][0], "processes": count}

    @property
    def sweep(self) -> Path:
        """Folder of the sweep."""
        return self.config.output_dir / self.config.sweep

    @property
    def run(self) -> Run:
        """The run; the same configuration always gives the same one.

        Two names of the same learning rate give one run, with the folder of whichever was started first.
        """
        identity, config = hash_json(self.identity, 8), self.config
        parts = (self.method.name, config.lr.name, config.size, config.model.name, f"s{config.seed}")
        return find_run(self.sweep, identity) or Run(self.sweep / "-".join([*parts, identity]))
