"""Frozen rollouts: a parquet file and a manifest, in a folder named after the hash of the content."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from losslens.core.errors import InputError
from losslens.core.files import atomic_folder, read_object, read_parquet, write_json
from losslens.core.notices import print_once
from losslens.problems.questions import SeenQuestions, templates_of

SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("prompt", pa.string()),  # the user turn, before the chat template
        # The prompt as rendered for sampling, with the chat template; null if unknown, as for most servers.
        ("prompt_text", pa.string()),
        ("completion", pa.string()),  # without the end token
        ("reward", pa.float64()),  # 1 correct, 0 incorrect; some losses take any number
        ("answer", pa.string()),  # the problem's reference answer
        ("sample", pa.int64()),  # index of the rollout within its prompt
        ("source", pa.string()),  # policy or model that sampled it
        ("tokens", pa.int64()),  # length including the end token; null if unknown
        ("finished", pa.bool_()),  # False: truncated at the token limit
        # Token ids of the tokenizer in the manifest; null if only the text is known.
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        # Log-probability of each of `completion_ids` under the policy that sampled it, nats, of the distribution that
        # it sampled from and at temperature 1 without truncation; null if unknown.
        ("sampler_logps", pa.list_(pa.float32())),
        ("sampler_raw_logps", pa.list_(pa.float32())),
    ]
)
IDS = ("prompt_ids", "completion_ids")  # missing in rollouts before version 2
# Not part of the content that identifies rollouts, since they depend on rounding; earlier rollouts lack them.
LOGPS = ("sampler_logps", "sampler_raw_logps")
_REQUIRED = ("problem_id", "prompt", "completion", "reward", "finished")
_TOKEN_ID_KEY = re.compile(r"[0-9]{1,10}")  # a token id as a key in JSON
VERSION = 2  # incremented when the same settings result in different rollouts


@dataclass(frozen=True, eq=False)
class FrozenRollouts:
    """Frozen rollouts in memory, equal if their content and their tokenizer are.

    Attributes:
        folder: Their folder.
        table: One row per rollout, with the columns of `SCHEMA`.
        manifest: How they were sampled, and their counts.
    """

    folder: Path
    table: pd.DataFrame
    manifest: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenRollouts) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @property
    def _content(self) -> tuple[str | None, ...]:
        tokenizer = self.manifest.get("tokenizer")
        return self.sha256, self.manifest.get("logps_sha256"), json.dumps(tokenizer, sort_keys=True)

    @property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return str(self.manifest["sha256"])

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the rollouts as training data (`identity_of`)."""
        return identity_of(self.manifest)


def identity_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the hash of the content, and the tokenizer, which determines if token ids or texts are trained on."""
    tokenizer = {"tokenizer": manifest["tokenizer"]} if "tokenizer" in manifest else {}
    return {"sha256": manifest["sha256"], **tokenizer}


def content_sha256(table: pd.DataFrame) -> str:
    """Computes the SHA-256 of the rows as JSON lines, columns in the order of `SCHEMA`; independent of parquet.

    `LOGPS` are excluded.
    """
    digest = hashlib.sha256()
    names = [name for name in SCHEMA.names if name in table and name not in LOGPS]
    columns = [list(map(_plain, table[name].tolist())) for name in names]
    for row in zip(*columns, strict=True):
        digest.update(json.dumps(list(row), ensure_ascii=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def logps_sha256(table: pd.DataFrame) -> str | None:
    """Computes the SHA-256 of `LOGPS`, as float32; None if there are none."""
    cells = [cell for name in LOGPS if name in table for cell in table[name]]
    if all(cell is None for cell in cells):
        return None
    digest = hashlib.sha256()
    for cell in cells:
        digest.update(np.array([-1 if cell is None else len(cell)], dtype="<i8").tobytes())
        digest.update(np.array([] if cell is None else cell, dtype="<f4").tobytes())
    return digest.hexdigest()


def _plain(cell: Any) -> Any:
    if isinstance(cell, (list, tuple, np.ndarray)):
        return [int(value) for value in cell]
    return None if pd.isna(cell) else cell


def count_rollouts(table: pd.DataFrame) -> dict[str, int | float | None]:
    """Counts rollouts, prompts, truncated rollouts and tokens; computes pass rate and share of mixed groups."""
    correct = table["reward"] > 0
    groups = correct.groupby(table["problem_id"])
    mixed = groups.any() & ~groups.all()
    return {
        "rollouts": len(table), "prompts": int(groups.ngroups), "pass_rate": float(correct.mean()),
        "share_mixed_groups": float(mixed.mean()), "truncated": int((~table["finished"]).sum()),
        "tokens": int(table["tokens"].sum()) if table["tokens"].notna().all() else None,
    }  # fmt: skip


def freeze(table: pd.DataFrame, parent: Path, name: str, manifest: dict[str, Any]) -> Path:
    """Writes the folder `<parent>/<name>-<hash>` and returns its path.

    Args:
        table: One row per rollout, with the columns of `SCHEMA`; `IDS` and `LOGPS` may be missing.
        parent: Folder of all frozen rollouts.
        name: Prefix of the folder's name.
        manifest: How they were sampled (`keys`: hashes of the settings); counts and hashes are added.

    A damaged folder of this name is written anew.
    """
    table = table.assign(**{name: None for name in (*IDS, *LOGPS) if name not in table})
    table = pa.Table.from_pandas(table[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    # Converted as in `load_rollouts`, so that the hash is that of the content on disk.
    content = _frame(table)
    sha256 = content_sha256(content)
    folder = parent / f"{name}-{sha256[:12]}"
    if (known := _intact_manifest(folder)) is not None:
        # Other settings gave the same content before: the folder is also registered under these settings.
        keys = sorted({*known.get("keys", []), *manifest.get("keys", [])})
        write_json(folder / "manifest.json", {**known, "keys": keys}, sealed=True)
        # The log-probabilities stay those of the first sampling, or none: runs may have trained on them, and the
        # manifest says how that one sampled. Those of the same settings differ from them by rounding at most.
        if "logps_sha256" in known and known.get("identity") != manifest.get("identity"):
            print_once(
                f"{folder}: other settings sampled the same rollouts before; the log-probabilities of the policy that"
                " sampled them stay theirs"
            )
        return folder
    with atomic_folder(folder) as temporary:
        pq.write_table(table, temporary / "rollouts.parquet")
        logps = logps_sha256(content)
        hashes = {"sha256": sha256, **({} if logps is None else {"logps_sha256": logps})}
        write_json(temporary / "manifest.json", {**manifest, **count_rollouts(content), **hashes}, sealed=True)
    return folder


def _intact_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of frozen rollouts; None if there is no such folder or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        return load_rollouts(folder).manifest
    except InputError as error:
        print(f"{error}; the same rollouts were made again, and replace it", flush=True)
        return None


def load_rollouts(folder: Path, field: str = "rollouts.path") -> FrozenRollouts:
    """Loads the frozen rollouts in `folder` and verifies their content; `field` is its option, for messages.

    Raises:
        InputError: A file is missing or cannot be read, a column or value is missing, a token id or log-probability is
            invalid, or the content or the log-probabilities do not match the manifest's hashes.
    """
    file = folder / "rollouts.parquet"
    if not folder.is_dir():
        raise InputError(f"{field}={folder}: no such folder")
    manifest = read_manifest(folder)
    _require_tokenizer(folder / "manifest.json", manifest.get("tokenizer"))
    table = read_parquet(file, SCHEMA, optional=(*IDS, *LOGPS))
    _require_complete(file, table)
    content = _frame(table)
    if content_sha256(content) != manifest["sha256"]:
        raise InputError(f"{file}: the content has changed since it was frozen (its hash is not the manifest's sha256)")
    if logps_sha256(content) != manifest.get("logps_sha256"):
        raise InputError(
            f"{file}: the log-probabilities of the sampler have changed since they were frozen (their hash is not the"
            " manifest's logps_sha256)"
        )
    content = content.assign(**{name: None for name in (*IDS, *LOGPS) if name not in content})
    _require_logps(file, content)
    return FrozenRollouts(folder, content, manifest)


def _require_complete(file: Path, table: pa.Table) -> None:
    """Refuses an empty table, missing texts and rewards, and invalid token ids, whatever the hash."""
    if not table.num_rows:
        raise InputError(f"{file}: contains no rollouts")
    for name in _REQUIRED:
        if table[name].null_count:
            row = table[name].is_null().to_pylist().index(True)
            raise InputError(f"{file}: row {row + 1}: {name} is null")
    for row, reward in enumerate(table["reward"].to_pylist(), 1):
        if not math.isfinite(reward):
            raise InputError(f"{file}: row {row}: reward is {reward}, which is not a finite number")
    for name in IDS:
        cells = table[name].to_pylist() if name in table.column_names else []
        for row, ids in enumerate(cells, 1):
            for id_ in ids or ():
                if id_ is None or id_ < 0:
                    value = "null" if id_ is None else id_
                    raise InputError(f"{file}: row {row}: {name} contains {value}, which is not a token id")


def _require_logps(file: Path, table: pd.DataFrame) -> None:
    """Refuses log-probabilities that are not one finite number, at most 0, for each of `completion_ids`."""
    for name in LOGPS:
        for row, (values, ids) in enumerate(zip(table[name], table["completion_ids"], strict=True), 1):
            if values is None:
                continue
            if ids is None or len(values) != len(ids):
                tokens = "no" if ids is None else len(ids)
                raise InputError(f"{file}: row {row}: {name} has {len(values)} numbers for {tokens} completion_ids")
            if not np.all((values <= 0) & np.isfinite(values)):
                raise InputError(f"{file}: row {row}: {name} contains a number that is not a log-probability")


def _require_tokenizer(file: Path, description: Any) -> None:
    """Checks a manifest's description of the tokenizer (`tokens.describe_tokenizer`), which may be missing."""
    if description is None:
        return
    if not isinstance(description, dict):
        raise InputError(f"{file}: tokenizer must be a JSON object")
    sha256, ends, control = (description.get(name) for name in ("sha256", "ends", "control"))
    if not isinstance(sha256, str):
        raise InputError(f"{file}: tokenizer.sha256 must be a string")
    if not isinstance(ends, dict) or not all(map(_TOKEN_ID_KEY.fullmatch, ends)):
        raise InputError(f"{file}: tokenizer.ends must be a JSON object from token ids to tokens")
    if not all(isinstance(token, (str, type(None))) for token in ends.values()):
        raise InputError(f"{file}: tokenizer.ends: every token must be a string")
    if not isinstance(control, list) or not all(isinstance(token, str) for token in control):
        raise InputError(f"{file}: tokenizer.control must be a list of tokens")


def seen_questions(frozen: FrozenRollouts) -> SeenQuestions:
    """Collects the questions of frozen rollouts, to check others against."""
    table = frozen.table
    return SeenQuestions(table["prompt"], templates_of(frozen.manifest.get("identity")), table["problem_id"].unique())


def _frame(table: pa.Table) -> pd.DataFrame:
    # With a nullable type, so that an unknown length does not turn the column into floats.
    frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    lists = {name: pd.Series(table[name].to_pylist(), dtype=object) for name in IDS if name in table.column_names}
    return frame.assign(**lists)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of the frozen rollouts in `folder`.

    Raises:
        InputError: The manifest is missing or contains no hash.
    """
    manifest = read_object(folder / "manifest.json")
    if not isinstance(manifest.get("sha256"), str):
        raise InputError(f"{folder / 'manifest.json'}: sha256 is missing")
    return manifest


def find_rollouts(parent: Path, key: str) -> Path | None:
    """Finds the folder in `parent` with the rollouts of the settings that hash to `key`; None if there is none."""
    for file in sorted(parent.glob("[!.]*/manifest.json")):
        try:
            manifest = read_manifest(file.parent)
        except InputError:  # an unrelated damaged folder, reported if it is ever loaded
            continue
        keys = manifest.get("keys", [])
        if isinstance(keys, list) and key in keys:
            return file.parent
    return None
