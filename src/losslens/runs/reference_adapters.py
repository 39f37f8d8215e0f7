"""Which adapters a run is compared with while it trains."""

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
# Of the configuration, what makes another SFT run less of a reference, the worst first.
_COMPARED = ("init_seed", "seed", "lora_rank", "train_on", "optim", "lr")


def references_of(
    asked: Mapping[str, str] | str, run: Run, initial: Path, manifest: Mapping[str, Any]
) -> dict[str, Path]:
    """Folders of the adapters to compare `run` with, by label.

    Args:
        asked: `auto`: the finished SFT run of the sweep that differs least from this run, as `sft`; the same as before
            for a run that goes on. Else by label the name of a run of the sweep, or a PEFT folder.
        run: The run.
        initial: The adapter it starts from.
        manifest: What the run is; nothing else of it counts than what decides the run.

    Raises:
        InputError: One that was named is not there, or on other modules.
    """
    shapes = _shapes(initial)
    if asked == "auto":
        sft = _nearest_sft(run, shapes, manifest)
        return {} if sft is None else {"sft": sft.adapter}
    assert not isinstance(asked, str)
    found = {}
    for label, named in asked.items():
        if not _LABEL.fullmatch(label):
            raise InputError(f"weight_tracking.references: {label!r}: a label is made of letters, digits, _, . and -")
        if label == "previous":
            raise InputError("weight_tracking.references.previous: cosine_to_previous is the cosine to the line before")
        places = [run.folder.parent / named / "adapter", Path(named).expanduser(), Path(named).expanduser() / "adapter"]
        folder = next((place for place in places if (place / "adapter_config.json").is_file()), None)
        if folder is None:
            raise InputError(
                f"weight_tracking.references.{label}: no adapter of a finished run and no PEFT folder: {named}"
            )
        if _shapes(folder) != shapes:
            raise InputError(f"weight_tracking.references.{label}: {named} is not on the modules of this run")
        found[label] = folder
    return found


def describe_references(references: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """The same for a manifest: the folder that an adapter lies in, and the adapter's SHA-256."""
    return {
        label: {
            "name": folder.parent.name if folder.name == "adapter" else folder.name,
            "adapter_sha256": adapter_fingerprint(folder),
        }
        for label, folder in references.items()
    }


def _nearest_sft(run: Run, shapes: dict[str, tuple[int, int]], manifest: Mapping[str, Any]) -> Run | None:
    file = run.folder / "manifest.json"
    earlier = read_json(file) if file.exists() else {}
    before = earlier.get("references", {}).get("sft") if isinstance(earlier, dict) else None
    found: list[tuple[tuple[bool | str, ...], Run]] = []
    for other in runs_of(run.folder.parent.parent, run.folder.parent.name):
        # One that is damaged, or of a version that wrote another manifest, is no reason for this run to stop.
        with suppress(InputError, KeyError, TypeError):
            if other.name == run.name or other.status.get("state") != "completed":
                continue
            theirs = other.manifest
            if theirs["method"] != "sft" or theirs["base"] != manifest["base"] or _shapes(other.adapter) != shapes:
                continue
            if before == {"name": other.name, "adapter_sha256": theirs["adapter_sha256"]}:
                return other
            mine, its = manifest["config"], theirs["config"]
            unlike = [theirs["rollouts"]["sha256"] != manifest["rollouts"]["sha256"]]
            unlike += [its.get(name) != mine[name] for name in _COMPARED]
            found.append(((*unlike, other.name), other))
    return min(found, default=(None, None))[1]


def _shapes(folder: Path) -> dict[str, tuple[int, int]]:
    with open_adapter(folder) as adapter:
        return adapter.shapes
