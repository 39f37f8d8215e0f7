"""Prompts that runs were trained on: of frozen rollouts, or recorded by a run that sampled its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from losslens.core.errors import InputError
from losslens.core.files import atomic_file, read_parquet
from losslens.core.hashing import hash_json
from losslens.problems.questions import SeenQuestions, templates_of
from losslens.rollouts.frozen import load_rollouts, seen_questions
from losslens.runs.run import Run

_FILE = "prompts.parquet"
_SCHEMA = pa.schema([("problem_id", pa.string()), ("prompt", pa.string())])


def prompts_sha256(prompts: pd.DataFrame) -> str:
    """Computes the SHA-256 of a set of prompts, whatever their order and how often each occurs.

    Args:
        prompts: A table with the columns `problem_id` and `prompt`, such as frozen rollouts.
    """
    return hash_json(sorted(set(zip(prompts["problem_id"], prompts["prompt"], strict=True))), 64)


def write_prompts(run: Run, prompts: Iterable[tuple[str, str]]) -> str:
    """Writes the prompts of an on-policy run, pairs of the problem's id and the text, and returns their hash."""
    table = pd.DataFrame(prompts, columns=_SCHEMA.names)
    with atomic_file(run.folder / _FILE) as temporary:
        table.to_parquet(temporary, index=False)
    return prompts_sha256(table)


def questions_trained_on(run: Run) -> SeenQuestions:
    """Collects the questions that a run, or the run of a snapshot, was trained on.

    Raises:
        InputError: They are not recorded (a run of an earlier version), missing, or changed.
    """
    run = Run(run.folder.parents[1]) if run.folder.parent.name == "snapshots" else run
    manifest = run.manifest if isinstance(run.manifest, dict) else {}
    if manifest.get("rollouts") is None:
        return _own_questions(run, manifest)
    return seen_questions(load_rollouts(_rollouts_folder(run, manifest)))


def _own_questions(run: Run, manifest: dict[str, Any]) -> SeenQuestions:
    if "prompts_sha256" not in manifest:
        raise InputError(f"{run.folder / 'manifest.json'}: the run has recorded no prompts (older version)")
    table = read_parquet(run.folder / _FILE, _SCHEMA).to_pandas()
    if prompts_sha256(table) != manifest["prompts_sha256"]:
        raise InputError(f"{run.folder / _FILE}: its hash is not the manifest's prompts_sha256")
    identity = manifest.get("identity")
    problems = identity.get("rollouts") if isinstance(identity, dict) else None
    return SeenQuestions(table["prompt"], templates_of(problems), table["problem_id"])


def _rollouts_folder(run: Run, manifest: dict[str, Any]) -> Path:
    """Returns the folder of a run's frozen rollouts: beside its sweep, or where `rollouts.path` said."""
    try:
        beside = run.folder.parents[1] / "rollouts" / Path(str(manifest["rollouts"]["folder"])).name
        given = manifest["config"]["rollouts"]["path"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run.folder / 'manifest.json'}: the run has recorded no rollouts (older version)") from error
    return beside if beside.is_dir() or given is None else Path(given)
