"""Conversion of recorded manifests and identities to the current names of options and fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from losslens.config.data import Data, Rollouts
from losslens.config.evaluation import Evaluation
from losslens.config.identity import current_value, in_current_words
from losslens.config.model import Model
from losslens.config.training import TRAIN_ON, LearningRate, Optim
from losslens.losses import builtin_methods

_SECTIONS: dict[str, type[BaseModel]] = {
    "data": Data, "rollouts": Rollouts, "optim": Optim, "evaluation": Evaluation, "lr": LearningRate, "model": Model,
}  # fmt: skip


def current_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's manifest with configuration and facts under their current names; its identity is unchanged."""
    current = _with_one_factor(manifest)
    config = current.get("config")
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
        current = {**current, "config": config}
    if isinstance(current.get("options"), dict):
        current = {**current, "options": _options(current.get("method"), current["options"])}
    for name in ("rollouts", "trained_on"):
        counts = current.get(name)
        if isinstance(counts, dict) and "share_right" in counts:
            rest = {key: value for key, value in counts.items() if key != "share_right"}
            current = {**current, name: {**rest, "pass_rate": counts["share_right"]}}
    return current


def readable_settings(identity: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity for display: current names, and all options of the loss, including those at their defaults.

    Args:
        identity: Identity of the run.
        options: Options of its loss, from its manifest.
    """
    method = identity["method"]
    settings = {**identity, "method": {**_options(method.get("name"), method), **options}}
    if "optim" in settings:
        settings["optim"] = in_current_words(Optim, settings["optim"])
    if "train_on" in settings:
        settings["train_on"] = current_value(TRAIN_ON, settings["train_on"])
    rollouts = settings.get("rollouts")
    if isinstance(rollouts, Mapping):
        settings["rollouts"] = {
            name: in_current_words(Rollouts, value) if name == "sampling" else value
            for name, value in in_current_words(Rollouts, rollouts).items()
        }
    return settings


def _options(name: Any, recorded: Mapping[str, Any]) -> Any:
    loss = builtin_methods().get(str(name))
    if loss is None:
        return recorded
    return in_current_words(loss, {option: value for option, value in recorded.items() if option not in loss.removed})


def _with_one_factor(manifest: dict[str, Any]) -> dict[str, Any]:
    """Converts manifests of versions with one learning-rate factor for pairwise and one for all other losses."""
    match manifest:
        case {
            "pairwise": bool(pairwise),
            "config": {"lr": {"pointwise_factor": pointwise, "pairwise_factor": pair, **lr}, **others},
        }:
            factor = None if (pointwise, pair) == (1.0, 0.1) else pair if pairwise else pointwise
            config = {**others, "lr": {**lr, "factor": factor}}
            return {**manifest, "config": config, "conventional_lr_scale": 0.1 if pairwise else 1.0}
    return manifest
