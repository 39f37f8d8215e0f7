"""What decides a run, built once from a configuration: from it come its identity, its folder and its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from losslens.config.identity import FORMAT, identity_options
from losslens.config.parse import build
from losslens.config.training import TRAIN_ON, TrainConfig
from losslens.core import distributed
from losslens.core.errors import InputError
from losslens.core.hashing import hash_json
from losslens.losses import Loss, Need, builtin_losses
from losslens.losses.presentation import presentation_of
from losslens.models.adapters import LoraSettings
from losslens.rollouts.sample import rollouts_identity
from losslens.runs.run import Run, base_identity, find_run

# Raised when the same `optim` begins to mean another adapter.
OPTIMISER = 1
# Of `optim`: what is computed at once, and what is kept and told while it trains.
_NOT_SCIENCE = ("micro_batch", "gradient_checkpointing", "log_steps", "save_steps", "snapshot_steps")


@dataclass(frozen=True)
class RunSpec:
    """A run as it was asked for.

    Attributes:
        config: The whole configuration, with what decides nothing.
        loss: The loss, with its options.
    """

    config: TrainConfig
    loss: Loss

    @classmethod
    def of(cls, config: TrainConfig) -> RunSpec:
        """Builds the loss that `config` names.

        Raises:
            InputError: There is no such loss, it does not take these options, or it has the name of another one.
        """
        loss: Loss = build("method", config.method)
        if not isinstance(loss, Loss):
            raise InputError(f"method._target_: {type(loss).__qualname__} is no losslens.losses.Loss")
        own = builtin_losses().get(loss.name)
        if own is not None and type(loss) is not own:
            # Runs are known by the name of their loss, wherever its class is.
            raise InputError(
                f"method.name={loss.name}: LossLens's own loss; {type(loss).__qualname__} needs a name of its own"
            )
        presentation_of(loss)
        if unknown := loss.needs - set(get_args(Need)):
            raise InputError(f"method.name={loss.name}: needs {', '.join(sorted(unknown))}, which no batch has")
        return cls(config, loss)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.config.lr.of(self.loss.conventional_lr_scale)

    @property
    def lora(self) -> LoraSettings:
        """The adapter."""
        rank, names = self.config.lora_rank, self.config.model.target_modules
        targets = names if isinstance(names, str) else tuple(sorted(set(names)))
        return LoraSettings(rank.r, rank.scale_numerator, rank.dropout, targets)

    @cached_property
    def base(self) -> dict[str, str | None]:
        """Fingerprint of the base.

        Raises:
            InputError: The model is not there.
        """
        return base_identity(self.config.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides what the adapter will be, and nothing else: no path, no class, no launcher, no logger.

        The form is described in docs/reference/identity.md.

        Raises:
            InputError: The model or the rollouts that are named are not there.
        """
        config = self.config
        train_on = self.loss.learns_from(config.train_on)
        steps = ("max_steps",) if config.optim.epochs else ()
        return {
            "format": FORMAT,
            "method": self.loss.identity,
            "train_on": TRAIN_ON.values.get(train_on, train_on),
            "learning_rate": self.learning_rate,
            "lora": asdict(self.lora),
            "base": self.base,
            "dtype": config.model.dtype,
            "chat_options": config.model.chat_options,
            "rollouts": rollouts_identity(config),
            "optim": {"version": OPTIMISER, **identity_options(config.optim, (*_NOT_SCIENCE, *steps))},
            "seed": config.seed,
            "init_seed": config.init_seed,
            **self._what_dropout_meets(),
        }

    def _what_dropout_meets(self) -> dict[str, Any]:
        """What decides which activations LoRA dropout leaves out: the rows computed at once, and who draws."""
        config = self.config
        if not config.lora_rank.dropout:
            return {}
        # Whoever asks before the run has its processes, as the launcher does, knows how many there will be.
        gpus = config.resources.gpus if config.resources is not None else 1
        count = distributed.world_size() if distributed.world_size() > 1 else max(gpus, 1)
        return {"micro_batch": config.optim.microbatch_plans(count, dropout=True)[0][0], "processes": count}

    @property
    def sweep(self) -> Path:
        """Folder of the sweep."""
        return self.config.output_dir / self.config.sweep

    @property
    def run(self) -> Run:
        """The run's folder: the same configuration always has the same one.

        Two names of one learning rate are one run: whichever was started first has the folder.
        """
        identity, config = hash_json(self.identity, 8), self.config
        parts = (self.loss.name, config.lr.name, f"r{config.lora_rank.r}", config.model.name, f"s{config.seed}")
        return find_run(self.sweep, identity) or Run(self.sweep / "-".join([*parts, identity]))
