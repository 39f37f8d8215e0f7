"""Checks that external adapters name the base on which they are compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from losslens.core import hub
from losslens.core.errors import InputError
from losslens.core.files import read_json
from losslens.models.loading import ModelSource, model_identity
from losslens.updates.weights import is_checkpoint

Identity = Mapping[str, str | None]
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def require_one_base(
    adapters: Mapping[str, Path], runs: Identity | None, model_path: str | None, left_out: dict[str, str]
) -> None:
    """Rejects an adapter whose `base_model_name_or_path` is a different model than that of the others.

    Local folders are identified by content, hub models by id and commit. A different name without a commit proves
    nothing: it may be a relative path.

    Args:
        adapters: The external adapters, by label.
        runs: The base of the runs; None without runs.
        model_path: The base given for the analysis.
        left_out: Receives a line for each adapter whose base cannot be verified.

    Raises:
        InputError: An adapter names a different base.
    """
    bases: dict[str, tuple[str, Identity | None]] = {}
    if runs is not None:
        bases["the runs"] = ("the base they were trained on", runs)
    elif model_path is not None:
        bases["model_path"] = (model_path, _identity(model_path, None))
    for label, folder in adapters.items():
        if is_checkpoint(folder):
            left_out[f"the base of {label}"] = (
                "a whole model names none; its difference to the given base is its update"
            )
            continue
        config = read_json(folder / "adapter_config.json")
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not named or not isinstance(named, str):
            left_out[f"the base of {label}"] = "its adapter_config.json names no base, so it cannot be verified"
            continue
        bases[label] = (named, _identity(named, revision if isinstance(revision, str) else None))
    for label in adapters.keys() & bases.keys():
        first, (expected, identity) = next(iter(bases.items()))
        named, own = bases[label]
        known = _are_same(identity, own)
        same = named == expected if known is None else known
        if known is False:
            raise InputError(
                f"adapters.{label}: trained on a different base ({_named(named)}) than {first} ({_named(expected)}); "
                "they cannot be compared"
            )
        if not same:
            left_out[f"the base of {label}"] = (
                f"its adapter_config.json names {_named(named)}; whether this is the base of {first} "
                f"({_named(expected)}) cannot be verified from the name"
            )


def require_model_path(model_path: str | None) -> None:
    """Checks that `model_path` may name a model, before anything is measured; the hub is not asked.

    Raises:
        InputError: It is neither a folder nor of the form of a hub id.
    """
    if model_path is not None and not Path(model_path).is_dir() and not hub.is_hub_id(model_path):
        raise InputError(f"model_path={model_path}: no such folder, and not a hub id")


def _identity(name: str, revision: str | None) -> Identity | None:
    """Returns the content hash of a local folder, or id and revision of a hub model; None for a missing path."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return model_identity(ModelSource("base_model_name_or_path", name, None, "auto", "auto", False))
    return {"hub_id": name, "revision": revision} if hub.is_hub_id(name) else None


def _are_same(first: Identity | None, second: Identity | None) -> bool | None:
    """True if two identities are the same model; None if unknown."""
    if first is None or second is None or first.keys() != second.keys():
        return None
    if "hub_id" not in first:
        return dict(first) == dict(second)
    commits = [revision for base in (first, second) if (revision := base["revision"]) and _COMMIT.match(revision)]
    if str(first["hub_id"]).lower() != str(second["hub_id"]).lower():
        # Without a commit, a name may be a relative folder on another machine, such as `models/llama`.
        return False if len(commits) == 2 else None
    return len(set(commits)) < 2


def _named(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:117]}…"
