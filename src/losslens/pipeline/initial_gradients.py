"""Gradients of the runs of a cohort before their first steps, each computed once and kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losslens.analysis.cohort import Cohort, ComparedAdapter
from losslens.analysis.function_space import base_of, trust_of
from losslens.analysis.loss_family import loss_of
from losslens.analysis.manifests import RunFacts
from losslens.config.analysis import AnalyzeConfig
from losslens.core.errors import InputError, UnavailableError
from losslens.core.files import atomic_folder, read_object, write_json
from losslens.core.hashing import hash_json
from losslens.losses import Loss
from losslens.models.adapters import LoraSettings, adapter_fingerprint, adapter_hashes
from losslens.models.loading import ModelSource, load_model
from losslens.rollouts.frozen import FrozenRollouts, load_rollouts
from losslens.updates.folder import write_adapter

# Increased when the same inputs begin to give other gradients.
_VERSION = 1
# Folders of a gradient: all problems, and the first half of them.
PARTS = ("whole", "half")


def initial_gradients(config: AnalyzeConfig, cohort: Cohort) -> dict[str, Path]:
    """Returns the folder of each run's gradient before step 1; computes those that the cache lacks.

    The folder holds two PEFT folders, `whole` and `half` (`training.initial_gradient.InitialGradient`). Runs that
    differ only in their optimiser, learning rate or data order have one gradient. What has none is added to
    `cohort.left_out` with the reason.

    Args:
        config: The configuration of the analysis.
        cohort: The compared adapters.
    """
    try:
        source, base = base_of(config.model_path, cohort.first, trust_of(config))
    except UnavailableError as error:
        cohort.left_out["gradients before step 1"] = str(error)
        return {}
    found = {}
    for member in cohort.members:
        try:
            found[member.name] = _Gradient(member, source, base, config).folder
        except InputError as error:
            cohort.left_out[f"gradient before step 1 of {member.name}"] = str(error)
    return found


class _Gradient:
    """Gradient of one run.

    Args:
        member: The run.
        source: The source of the base.
        base: The identity of the base.
        config: The configuration of the analysis.

    Raises:
        UnavailableError: The run has no frozen rows, or not enough is known of it.
    """

    def __init__(
        self, member: ComparedAdapter, source: ModelSource, base: dict[str, str | None], config: AnalyzeConfig
    ) -> None:
        if member.facts is None:
            raise UnavailableError("trained elsewhere: its rows are unknown")
        if member.facts.own_samples:
            raise UnavailableError(
                f"method={member.facts.method} samples its own rollouts: it has no rows before step 1"
            )
        if member.point.base is not None:
            raise UnavailableError("full fine-tuning: its gradient is of all weights, and is not computed")
        initial = member.initial or _initial(config.output_dir, member.facts)
        if initial is None:
            raise UnavailableError("its initial adapter is missing")
        loss = loss_of(member.facts)
        if loss is None:
            raise UnavailableError(f"method={member.facts.method} is not a loss of this version of LossLens")
        self._facts: RunFacts = member.facts
        self._initial: Path = initial
        self._loss: Loss = loss
        self._source, self._base, self._config = source, base, config

    @property
    def folder(self) -> Path:
        """Its folder in the cache, computed if it is missing or damaged."""
        folder = self._config.output_dir / "cache" / "gradients" / hash_json(self._key, 24)
        if not _is_intact(folder):
            with atomic_folder(folder) as temporary:
                self._write(temporary)
        return folder

    @property
    def _key(self) -> list[Any]:
        import torch

        source = self._source
        precision = [source.dtype, source.device, torch.cuda.is_available(), source.attention, source.chat_options]
        assert self._facts.rollouts is not None
        assert self._facts.initial_adapter is not None
        rows = [self._facts.rollouts.sha256, self._loss.learns_from(self._facts.config.train_on)]
        loss = [self._loss.name, self._loss.identity]
        start = [self._facts.initial_adapter.sha256, {**self._facts.identity["lora"], "dropout": 0}]
        return [_VERSION, self._base, precision, rows, loss, start, self._config.batch_size]

    def _write(self, folder: Path) -> None:
        from losslens.training.batches import Examples, require_sampler, require_weights, tokenise_frozen
        from losslens.training.initial_gradient import initial_gradient

        base, rollouts, train_on = load_model(self._source), self._rollouts(), self._facts.config.train_on
        tokenised = tokenise_frozen(rollouts, base.tokenizer)
        examples = Examples(tokenised, self._loss, train_on)
        require_weights(examples, tokenised, self._loss, train_on)
        require_sampler(examples, self._loss, rollouts)
        lora = LoraSettings(**self._facts.identity["lora"])
        found = initial_gradient(self._loss, examples, lora, self._initial, base, self._config.batch_size)
        config = read_object(self._initial / "adapter_config.json")
        for part in PARTS:
            write_adapter(folder / part, getattr(found, part), config)
        hashes = {part: adapter_hashes(folder / part) for part in PARTS}
        about = {"loss": self._loss.name, "examples": len(examples), "sha256": hashes}
        write_json(folder / "manifest.json", about, sealed=True)

    def _rollouts(self) -> FrozenRollouts:
        recorded = self._facts.rollouts
        assert recorded is not None
        folders = [self._config.output_dir / "rollouts" / recorded.folder]
        folders += [Path(path)] if (path := self._facts.config.rollouts.get("path")) else []
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise UnavailableError(f"its rollouts, {folders[0]}, are missing")
        rollouts = load_rollouts(folder)
        if rollouts.sha256 != recorded.sha256:
            raise UnavailableError(f"{folder}: not the rollouts that it was trained on")
        return rollouts


def _initial(output_dir: Path, facts: RunFacts) -> Path | None:
    """Returns the adapter that a run started from, whichever point of it is compared; None if it is missing."""
    if facts.initial_adapter is None:
        return None
    folder = output_dir / "init" / facts.initial_adapter.folder
    try:
        return folder if adapter_fingerprint(folder) == facts.initial_adapter.sha256 else None
    except InputError:
        return None


def _is_intact(folder: Path) -> bool:
    try:
        recorded = read_object(folder / "manifest.json")["sha256"]
        return all(adapter_hashes(folder / part) == recorded[part] for part in PARTS)
    except (InputError, KeyError, TypeError):
        return False
