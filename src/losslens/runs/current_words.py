"""Manifests and identities in the words of today: options and facts under the names that they have now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from losslens.config.data import Data, Rollouts
from losslens.config.evaluation import Evaluation
from losslens.config.identity import current_value, in_current_words
from losslens.config.model import Model
from losslens.config.training import TRAIN_ON, LearningRate, Optim
from losslens.losses import builtin_losses

_SECTIONS: dict[str, type[BaseModel]] = {
    "data": Data, "rollouts": Rollouts, "optim": Optim, "evaluation": Evaluation, "lr": LearningRate, "model": Model,
}  # fmt: skip


def current_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run, its configuration and facts under today's names; its identity stays as it was written."""
    found = _with_one_factor(manifest)
    config = found.get("config")
    if isinstance(config, dict):
        config = {name: in_current_words(_SECTIONS[name], v) if name in _SECTIONS else v for name, v in config.items()}
        if isinstance(config.get("benchmark"), dict):
            config["benchmark"] = {name: in_current_words(Data, v) for name, v in config["benchmark"].items()}
        if isinstance(config.get("method"), dict):
            config["method"] = _options(config["method"].get("name"), config["method"])
        if "train_on" in config:
            config["train_on"] = current_value(TRAIN_ON, config["train_on"])
        logger = config.get("logger")
        if isinstance(logger, dict) and "references" in logger:
            config["logger"] = {name: value for name, value in logger.items() if name != "references"}
            config["weight_tracking"] = {"references": logger["references"]}
        found = {**found, "config": config}
    if isinstance(found.get("options"), dict):
        found = {**found, "options": _options(found.get("method"), found["options"])}
    for name in ("rollouts", "trained_on"):
        counts = found.get(name)
        if isinstance(counts, dict) and "share_right" in counts:
            rest = {key: value for key, value in counts.items() if key != "share_right"}
            found = {**found, name: {**rest, "pass_rate": counts["share_right"]}}
    return found


def settings_of(identity: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader is shown of an identity: today's names, and all options of the loss, those at their defaults too.

    Args:
        identity: Of the run.
        options: Of its loss, as its manifest has them.
    """
    method = identity["method"]
    found = {**identity, "method": {**_options(method.get("name"), method), **options}}
    if "optim" in found:
        found["optim"] = in_current_words(Optim, found["optim"])
    if "train_on" in found:
        found["train_on"] = current_value(TRAIN_ON, found["train_on"])
    rollouts = found.get("rollouts")
    if isinstance(rollouts, Mapping):
        found["rollouts"] = {
            name: in_current_words(Rollouts, value) if name == "sampling" else value
            for name, value in in_current_words(Rollouts, rollouts).items()
        }
    return found


def _options(name: Any, recorded: Mapping[str, Any]) -> Any:
    loss = builtin_losses().get(str(name))
    return in_current_words(loss, recorded) if loss else recorded


def _with_one_factor(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest from before losses had conventional rates: those on pairs had one factor, all others another."""
    match manifest:
        case {
            "pairwise": bool(pairwise),
            "config": {"lr": {"pointwise_factor": pointwise, "pairwise_factor": pair, **lr}, **others},
        }:
            factor = None if (pointwise, pair) == (1.0, 0.1) else pair if pairwise else pointwise
            config = {**others, "lr": {**lr, "factor": factor}}
            return {**manifest, "config": config, "conventional_lr_scale": 0.1 if pairwise else 1.0}
    return manifest
