"""The header of the page: what was compared."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import percent, whole


def title(analysis: AnalysisFolder) -> str:
    """Returns the names of the sweeps, or `adapters` if there are none."""
    return ", ".join(map(str, analysis.manifest.get("sweeps") or [])) or "adapters"


def header_facts(analysis: AnalysisFolder) -> list[tuple[str, str]]:
    """Returns the known facts about the analysis as (name, value)."""
    manifest = analysis.manifest
    runs = analysis.table("runs", ("run", "method", "diverged"), ("seed",))
    origins = manifest.get("origins") or {}
    facts: list[tuple[str, Any]] = [("base", ", ".join(map(str, manifest.get("bases") or [])))]
    if len(runs):
        trained = runs[runs["method"] != "base"].drop_duplicates("run")
        diverged = int((trained["diverged"] != "").sum())
        seeds = sorted(trained["seed"].dropna().unique())
        facts += [
            ("runs", f"{len(trained)}, of which {diverged} diverged or collapsed" if diverged else str(len(trained))),
            ("seeds", f"{len(seeds)} ({', '.join(map(whole, seeds))})" if len(seeds) else ""),
        ]
    facts += [("data", ", ".join(map(str, origins.get("data") or []))), ("rollouts", _rollouts(origins))]
    written = datetime.fromtimestamp((analysis.path / "manifest.json").stat().st_mtime, UTC)
    facts += [
        ("benchmark", manifest.get("benchmark")),
        ("compared", _checkpoint(manifest.get("settings") or {}, manifest.get("points") or {})),
        ("LossLens", (manifest.get("versions") or {}).get("losslens")),
        ("commit", _commit(manifest)),
        ("analysed", f"{written:%Y-%m-%d %H:%M} UTC"),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _rollouts(origins: dict[str, Any]) -> str:
    """Returns the number of rollouts and their pass rate; the folders if there are several sets."""
    sets = [rollouts for rollouts in origins.get("rollouts") or [] if rollouts.get("rollouts")]
    if len(sets) != 1:
        return ", ".join(str(rollouts.get("folder")) for rollouts in sets)
    correct, mixed = percent(sets[0]["pass_rate"]), percent(sets[0]["share_mixed_groups"])
    return f"{sets[0]['rollouts']}, {correct} correct; {mixed} of prompts with both correct and incorrect ones"


def _checkpoint(settings: dict[str, Any], points: dict[str, Any]) -> str:
    """Returns the point of training that is compared; empty for the end."""
    checkpoint = settings.get("checkpoint", "end")
    if checkpoint == "end":
        return ""
    if checkpoint != "norm":
        return f"at step {checkpoint}"
    norms = {point["norm"] for point in points.values() if "norm" in point}
    return f"at ‖ΔW‖ = {norms.pop():.4g}" if len(norms) == 1 else "at the same norm"


def _commit(manifest: dict[str, Any]) -> str:
    code = manifest.get("code") or {}
    commit = str(code.get("commit") or "")[:12]
    return f"{commit}, with uncommitted changes" if commit and code.get("dirty_diff") else commit
