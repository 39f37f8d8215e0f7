"""Reference adapters that a run is compared with during training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.core.files import read_json
from losslens.models.adapters import adapter_fingerprint
from losslens.runs.run import Run, runs_of
from losslens.updates.folder import open_adapter

_LABEL = re.compile(r"[A-Za-z0-9_.-]+")
# Configuration fields in which a reference should agree with the run, the most important first.
_COMPARED = ("init_seed", "seed", "lora_rank", "train_on", "optim", "lr")


def resolve_references(
    configured: Mapping[str, str] | str, run: Run, initial: Path | None, manifest: Mapping[str, Any]
) -> dict[str, Path]:
    """Returns the folders of the adapters to compare `run` with, by label.

    Args:
        configured: `auto` for the finished SFT run of the sweep that differs least from this run, labelled `sft` (a
            resumed run keeps its reference); otherwise, by label, the name of a run of the sweep or a PEFT folder.
        run: The run.
        initial: Its initial adapter; None for full fine-tuning, whose norm alone is tracked.
        manifest: Its manifest; only fields that determine the run are used.

    Raises:
        InputError: A label is invalid, the run has no adapter, or a reference does not exist or adapts other modules.
    """
    if initial is None:
        if configured not in ("auto", {}):
            raise InputError("weight_tracking.references: adapter=none tracks the norm alone; leave it at auto")
        return {}
    shapes = _shapes(initial)
    if configured == "auto":
        sft = _nearest_sft(run, shapes, manifest)
        return {} if sft is None else {"sft": sft.adapter}
    assert not isinstance(configured, str)
    references = {}
    for label, name in configured.items():
        if not _LABEL.fullmatch(label):
            raise InputError(
                f"weight_tracking.references: invalid label {label!r}: only letters, digits, _, . and - are allowed"
            )
        if label == "previous":
            raise InputError(
                "weight_tracking.references.previous: reserved, since cosine_to_previous is the cosine to the previous"
                " logged step; use another label"
            )
        folder = reference_folder(label, name, run.folder.parent)
        if _shapes(folder) != shapes:
            raise InputError(f"weight_tracking.references.{label}: {name} does not adapt the modules of this run")
        references[label] = folder
    return references


def reference_folder(label: str, name: str, sweep: Path) -> Path:
    """Returns the folder of a configured reference.

    Args:
        label: Its label.
        name: The name of a run of the sweep, or a PEFT folder.
        sweep: The sweep's folder.

    Raises:
        InputError: It is neither.
    """
    path = Path(name).expanduser()
    candidates = [sweep / name / "adapter", path, path / "adapter"]
    folder = next((place for place in candidates if (place / "adapter_config.json").is_file()), None)
    if folder is None:
        raise InputError(
            f"weight_tracking.references.{label}: {name} is neither a finished run of the sweep nor a PEFT folder"
        )
    return folder


def describe_references(references: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Returns the references for a manifest: the name of the folder and the SHA-256 of each adapter."""
    return {
        label: {
            "name": folder.parent.name if folder.name == "adapter" else folder.name,
            "adapter_sha256": adapter_fingerprint(folder),
        }
        for label, folder in references.items()
    }


def _nearest_sft(run: Run, shapes: dict[str, tuple[int, int]], manifest: Mapping[str, Any]) -> Run | None:
    """The finished SFT run of the sweep that differs least from `run`, or the reference that `run` had before."""
    file = run.folder / "manifest.json"
    earlier = read_json(file) if file.exists() else {}
    previous = earlier.get("references", {}).get("sft") if isinstance(earlier, dict) else None
    candidates: list[tuple[tuple[bool | str, ...], Run]] = []
    for other in runs_of(run.folder.parent.parent, run.folder.parent.name):
        # Skip runs with a damaged manifest or one of another version.
        with suppress(InputError, KeyError, TypeError):
            if other.name == run.name or other.status.get("state") != "completed":
                continue
            theirs = other.manifest
            if theirs["method"] != "sft" or theirs["base"] != manifest["base"] or _shapes(other.adapter) != shapes:
                continue
            if previous == {"name": other.name, "adapter_sha256": theirs["adapter_sha256"]}:
                return other
            ours = manifest["config"]
            own = manifest["rollouts"] or theirs["rollouts"]  # an on-policy run has none
            differences = [theirs["rollouts"]["sha256"] != own["sha256"]]
            differences += [theirs["config"].get(name) != ours[name] for name in _COMPARED]
            candidates.append(((*differences, other.name), other))
    return min(candidates, default=(None, None))[1]


def _shapes(folder: Path) -> dict[str, tuple[int, int]]:
    with open_adapter(folder) as adapter:
        return adapter.shapes
