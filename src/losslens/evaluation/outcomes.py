"""Outcomes on held-out problems: one row per answer, stored as parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from losslens.core.completions import Completion
from losslens.core.errors import InputError
from losslens.core.files import atomic_file, read_parquet, read_parquet_metadata
from losslens.core.hashing import hash_json
from losslens.problems import Problem, Verifier
from losslens.problems.verification import verdicts

SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("sample", pa.int64()),
        ("completion", pa.string()),
        ("answer", pa.string()),  # extracted from the completion; null if there is none
        ("correct", pa.bool_()),
        ("tokens", pa.int64()),  # of the completion, with its end token; null if a server does not say
        ("finished", pa.bool_()),  # false if the token limit cut the completion short
    ]
)
# Files of earlier versions lack them.
_LENGTHS = ("tokens", "finished")
_ASKED = b"losslens.asked"
_SCORED = b"losslens.scored"
_ENGINE = b"losslens.engine"


def outcomes_of(
    verifier: Verifier, problems: Sequence[Problem], completions: Sequence[Sequence[Completion]], seconds: float
) -> pd.DataFrame:
    """Verifies each completion of each problem, within `seconds` each; columns as in `SCHEMA`."""
    samples = [
        (problem, sample)
        for problem, group in zip(problems, completions, strict=True)
        for sample, _ in enumerate(group)
    ]
    flat = [completion for group in completions for completion in group]
    texts = [completion.text for completion in flat]
    results = verdicts(verifier, [problem for problem, _ in samples], texts, seconds)
    return pd.DataFrame(
        {
            "problem_id": [problem.id for problem, _ in samples], "sample": [sample for _, sample in samples],
            "completion": texts, "answer": [verdict.answer for verdict in results],
            "correct": [verdict.correct for verdict in results],
            "tokens": pd.array([completion.tokens for completion in flat], dtype="Int64"),
            "finished": [completion.finished for completion in flat],
        }
    )  # fmt: skip


def evaluate(
    model: Any,
    tokenizer: Any,
    verifier: Verifier,
    problems: Sequence[Problem],
    *,
    max_tokens: int,
    batch_size: int,
    seconds: float,
    description: str,
) -> pd.DataFrame:
    """Generates and verifies one greedy completion per problem; columns as in `SCHEMA`."""
    from losslens.sampling.local import generate_greedy

    completions = generate_greedy(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        max_new_tokens=max_tokens,
        batch_size=batch_size,
        description=description,
    )
    return outcomes_of(verifier, problems, [[completion] for completion in completions], seconds)


def write_outcomes(
    outcomes: pd.DataFrame, file: Path, asked: str, scored: str, engine: Mapping[str, Any] | None = None
) -> None:
    """Writes outcomes, with fingerprints of the task and of the model in the file's metadata.

    Args:
        outcomes: Columns as in `SCHEMA`.
        file: Path of the parquet file.
        asked: Fingerprint of the task (problems and decoding); outcomes are comparable if it is the same.
        scored: Fingerprint of the model (`model_fingerprint`).
        engine: Facts about the server that was started for them, if any.
    """
    table = pa.Table.from_pandas(outcomes, schema=SCHEMA, preserve_index=False)
    metadata = {_ASKED: asked.encode(), _SCORED: scored.encode()}
    metadata |= {_ENGINE: json.dumps(engine).encode()} if engine else {}
    with atomic_file(file) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary)


def is_scored(file: Path, asked: str, scored: str) -> bool:
    """True if `file` is intact and contains the outcomes with these fingerprints of task and model."""
    try:
        metadata = read_parquet(file).schema.metadata or {}
    except InputError:
        return False
    return (metadata.get(_ASKED), metadata.get(_SCORED)) == (asked.encode(), scored.encode())


def task_fingerprint(file: Path) -> str:
    """Reads the fingerprint of the task (`asked`) from a file of outcomes.

    Raises:
        InputError: The file cannot be read.
    """
    return _metadata(file, _ASKED)


def recorded_model_fingerprint(file: Path) -> str:
    """Reads the fingerprint of the model (`scored`) from a file of outcomes.

    Raises:
        InputError: The file cannot be read.
    """
    return _metadata(file, _SCORED)


def engine_facts(file: Path) -> dict[str, Any]:
    """Reads the facts about the server that was started for a file of outcomes; empty if there was none.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        facts = json.loads(_metadata(file, _ENGINE) or "{}")
    except ValueError as error:
        raise InputError(f"{file}: damaged metadata") from error
    return facts if isinstance(facts, dict) else {}


def model_fingerprint(base_identity: dict[str, str | None], adapter_sha256: str | None) -> str:
    """Computes the fingerprint of a base model with an adapter, or without one if that is None."""
    return hash_json([base_identity, adapter_sha256], 16)


def _metadata(file: Path, name: bytes) -> str:
    return read_parquet_metadata(file).get(name, b"").decode("utf-8", "replace")


def read_outcomes(file: Path) -> pd.DataFrame:
    """Reads a file of outcomes; `tokens` and `finished` are missing values where they were not recorded.

    Raises:
        InputError: The file cannot be read, lacks a column or a value, or contains a sample twice.
    """
    outcomes = read_parquet(file, SCHEMA, optional=_LENGTHS).to_pandas(ignore_metadata=True)
    if outcomes[["problem_id", "sample", "correct"]].isna().any(axis=None):
        raise InputError(f"{file}: a row lacks problem_id, sample or correct")
    if outcomes.duplicated(["problem_id", "sample"]).any():
        raise InputError(f"{file}: contains the same sample of a problem twice")
    known = outcomes.reindex(columns=SCHEMA.names)
    return known.astype({"tokens": "Int64", "finished": "boolean"})
