"""Provenance of the runs: what a reader needs to reproduce them, or to see why they may not be comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losslens.analysis.cohort import Cohort, ComparedAdapter, Diverged
from losslens.core import provenance
from losslens.core.mappings import flatten

# Parts of the configuration that other columns show or that do not affect the result (paths, logging).
_NOT_SHOWN = (
    "output_dir", "sweep", "logger", "evaluation.server", "rollouts.server", "seed", "init_seed", "method.name",
    "method._target_",
)  # fmt: skip


def lineage(cohort: Cohort) -> dict[str, Any]:
    """Returns the manifest entries on data, rollouts, base, shared configuration, and what is specific to each run."""
    runs: list[ComparedAdapter | Diverged] = [*cohort.members, *cohort.diverged]
    manifests = {run.name: run.run.manifest for run in runs if run.run}
    configurations = {name: _configuration(manifest) for name, manifest in manifests.items()}
    common = _common(list(configurations.values()))
    return {
        "data": sorted({str(((m.get("config") or {}).get("data") or {}).get("name")) for m in manifests.values()}),
        "rollouts": _distinct([manifest.get("rollouts") or {} for manifest in manifests.values()]),
        "base": _distinct([manifest.get("base") or {} for manifest in manifests.values()]),
        "commands": list(dict.fromkeys(m["command"] for m in manifests.values() if m.get("command"))),
        "configuration": common,
        "runs": {name: _of_run(manifest, configurations[name], common) for name, manifest in manifests.items()},
    }


def _of_run(manifest: Mapping[str, Any], configuration: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    here = provenance.versions()
    code, training = manifest.get("code") or {}, manifest.get("training") or {}
    return {
        "commit": code.get("commit"), "changed": bool(code.get("dirty_diff")),
        "versions": {k: v for k, v in (manifest.get("versions") or {}).items() if here.get(k) != v},
        "precision": manifest.get("precision") or {},
        "initial_adapter": (manifest.get("initial_adapter") or {}).get("sha256"), "started": manifest.get("started"),
        "seconds": training.get("seconds"),
        "own": {name: value for name, value in configuration.items() if name not in common},
    }  # fmt: skip


def _configuration(manifest: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(manifest.get("config") or {})
    return {k: v for k, v in flat.items() if not any(k == name or k.startswith(f"{name}.") for name in _NOT_SHOWN)}


def _common(configurations: list[dict[str, Any]]) -> dict[str, Any]:
    if not configurations:
        return {}
    first, *others = configurations
    return {
        name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)
    }


def _distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for number, value in enumerate(values) if value and value not in values[:number]]
