"""The head of the page: what was compared."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import percent, whole


def title(analysis: AnalysisFolder) -> str:
    """The sweeps, or that there are none."""
    return ", ".join(map(str, analysis.manifest.get("sweeps") or [])) or "adapters"


def header_facts(analysis: AnalysisFolder) -> list[tuple[str, str]]:
    """Name and value of what is known."""
    manifest = analysis.manifest
    runs = analysis.table("runs", ("run", "method", "diverged"), ("seed",))
    origins = manifest.get("origins") or {}
    found: list[tuple[str, Any]] = [("base", ", ".join(map(str, manifest.get("bases") or [])))]
    if len(runs):
        trained = runs[runs["method"] != "base"].drop_duplicates("run")
        diverged = int((trained["diverged"] != "").sum())
        seeds = sorted(trained["seed"].dropna().unique())
        found += [
            ("runs", f"{len(trained)}, of which {diverged} diverged or collapsed" if diverged else str(len(trained))),
            ("seeds", f"{len(seeds)} ({', '.join(map(whole, seeds))})" if len(seeds) else ""),
        ]
    found += [("data", ", ".join(map(str, origins.get("data") or []))), ("rollouts", _rollouts(origins))]
    written = datetime.fromtimestamp((analysis.path / "manifest.json").stat().st_mtime, UTC)
    found += [
        ("benchmark", manifest.get("benchmark")),
        ("compared", _where(manifest.get("settings") or {}, manifest.get("points") or {})),
        ("LossLens", (manifest.get("versions") or {}).get("losslens")),
        ("commit", _commit(manifest)),
        ("analysed", f"{written:%Y-%m-%d %H:%M} UTC"),
    ]
    return [(name, str(value)) for name, value in found if value]


def _rollouts(origins: dict[str, Any]) -> str:
    """How many, and how many of them are right; which ones where there are several sets."""
    sets = [each for each in origins.get("rollouts") or [] if each.get("rollouts")]
    if len(sets) != 1:
        return ", ".join(str(each.get("folder")) for each in sets)
    right, mixed = percent(sets[0]["pass_rate"]), percent(sets[0]["share_mixed_groups"])
    return f"{sets[0]['rollouts']}, {right} right, {mixed} of the groups mixed"


def _where(settings: dict[str, Any], points: dict[str, Any]) -> str:
    """At which point of the runs' ways, where it is not their end."""
    at = settings.get("checkpoint", "end")
    if at == "end":
        return ""
    if at != "norm":
        return f"at step {at}"
    norms = {point["norm"] for point in points.values() if "norm" in point}
    return f"at ‖ΔW‖ = {norms.pop():.4g}" if len(norms) == 1 else "at one norm"


def _commit(manifest: dict[str, Any]) -> str:
    code = manifest.get("code") or {}
    commit = str(code.get("commit") or "")[:12]
    return f"{commit}, with changes" if commit and code.get("dirty_diff") else commit
