"""The frozen set: a parquet file and a manifest, in a folder that is named after its content."""

from __future__ import annotations

import hashlib
import json
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
from losslens.problems.questions import SeenQuestions, templates_of

SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("prompt", pa.string()),  # the user's turn, before the chat template
        # What the writer was given, its chat template applied; null: not known, as with servers that do not say.
        ("prompt_text", pa.string()),
        ("completion", pa.string()),  # but for the token that ended it
        ("reward", pa.float64()),  # 1 right, 0 wrong
        ("answer", pa.string()),  # the problem's reference answer
        ("sample", pa.int64()),  # number of the rollout within its prompt
        ("source", pa.string()),  # who wrote it
        ("tokens", pa.int64()),  # length, the token that ended it included; null: not known
        ("finished", pa.bool_()),  # False: cut at the token limit
        # The tokens themselves, of the tokenizer in the manifest; null: only text is known.
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
    ]
)
IDS = ("prompt_ids", "completion_ids")  # which rollouts of before version 2 lack
_ALWAYS = ("problem_id", "prompt", "completion", "reward", "finished")
_END = re.compile(r"[0-9]{1,10}")  # a token id as JSON has it for a key
VERSION = 2  # raised when the same settings begin to mean other rollouts


@dataclass(frozen=True)
class FrozenRollouts:
    """Rollouts as they lie on disk.

    Attributes:
        folder: Where.
        table: One row a rollout, with the columns of `SCHEMA`.
        manifest: Who made them and how, and their counts.
    """

    folder: Path
    table: pd.DataFrame
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        """The hash of the content."""
        return self.manifest["sha256"]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells what is trained on from other rollouts (`identity_of`)."""
        return identity_of(self.manifest)


def identity_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The hash of the content, and whose tokens its ids are, which decides whether these are read or the text."""
    tokenizer = {"tokenizer": manifest["tokenizer"]} if "tokenizer" in manifest else {}
    return {"sha256": manifest["sha256"], **tokenizer}


def content_sha256(table: pd.DataFrame) -> str:
    """The SHA-256 of the rows as JSON lines, columns in the order of `SCHEMA`: the same for any writer of parquet."""
    digest = hashlib.sha256()
    columns = [list(map(_plain, table[name].tolist())) for name in SCHEMA.names if name in table]
    for row in zip(*columns, strict=True):
        digest.update(json.dumps(list(row), ensure_ascii=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _plain(cell: Any) -> Any:
    if isinstance(cell, (list, tuple, np.ndarray)):
        return [int(value) for value in cell]
    return None if pd.isna(cell) else cell


def count_rollouts(table: pd.DataFrame) -> dict[str, int | float | None]:
    """Rows, prompts, share of right rollouts, share of mixed groups, and rollouts that were cut off."""
    right = table["reward"] > 0
    groups = right.groupby(table["problem_id"])
    mixed = groups.any() & ~groups.all()
    return {
        "rollouts": len(table), "prompts": int(groups.ngroups), "pass_rate": float(right.mean()),
        "share_mixed_groups": float(mixed.mean()), "truncated": int((~table["finished"]).sum()),
        "tokens": int(table["tokens"].sum()) if table["tokens"].notna().all() else None,
    }  # fmt: skip


def freeze(table: pd.DataFrame, parent: Path, name: str, manifest: dict[str, Any]) -> Path:
    """Writes `<parent>/<name>-<hash>/` and returns it.

    Args:
        table: One row a rollout, with the columns of `SCHEMA`, of which `IDS` may be missing.
        parent: The folder that holds frozen rollouts.
        name: What the folder's name begins with.
        manifest: Who made them and how (`keys`: digests of the settings); counts and hash are added.

    Raises:
        InputError: A folder of this name is there and damaged.
    """
    table = table.assign(**{name: None for name in IDS if name not in table})
    table = pa.Table.from_pandas(table[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    # Read back as `load_rollouts` will see it, so that the hash is that of what is on disk.
    content = _frame(table)
    sha256 = content_sha256(content)
    folder = parent / f"{name}-{sha256[:12]}"
    if folder.is_dir():
        # Other settings gave the same content before: that folder stays, and is known by these settings too.
        known = load_rollouts(folder).manifest
        keys = sorted({*known.get("keys", []), *manifest.get("keys", [])})
        write_json(folder / "manifest.json", {**known, "keys": keys})
        return folder
    with atomic_folder(folder) as temporary:
        pq.write_table(table, temporary / "rollouts.parquet")
        write_json(temporary / "manifest.json", {**manifest, **count_rollouts(content), "sha256": sha256})
    return folder


def load_rollouts(folder: Path, field: str = "rollouts.path") -> FrozenRollouts:
    """The frozen rollouts in `folder`, after checking that they are what was frozen; `field` named it, for messages.

    Raises:
        InputError: A file is missing, cannot be read, lacks a column or a value, holds token ids that are none, or does
            not have the content it was frozen with.
    """
    file = folder / "rollouts.parquet"
    if not folder.is_dir():
        raise InputError(f"{field}={folder}: no such folder")
    manifest = read_manifest(folder)
    _require_tokenizer(folder / "manifest.json", manifest.get("tokenizer"))
    table = read_parquet(file, SCHEMA, optional=IDS)
    _require_whole(file, table)
    content = _frame(table)
    if content_sha256(content) != manifest["sha256"]:
        raise InputError(f"{file}: not the content that was frozen (its hash is not the manifest's sha256)")
    return FrozenRollouts(folder, content.assign(**{name: None for name in IDS if name not in content}), manifest)


def _require_whole(file: Path, table: pa.Table) -> None:
    """Refuses what no rollout is, whatever its hash: none at all, one without a text or a reward, ids that are none."""
    if not table.num_rows:
        raise InputError(f"{file}: no rollouts in it")
    for name in _ALWAYS:
        if table[name].null_count:
            row = table[name].is_null().to_pylist().index(True)
            raise InputError(f"{file}: row {row + 1}: {name} is null")
    for name in IDS:
        cells = table[name].to_pylist() if name in table.column_names else []
        for row, ids in enumerate(cells, 1):
            for id_ in ids or ():
                if id_ is None or id_ < 0:
                    raise InputError(f"{file}: row {row}: {name} holds {'null' if id_ is None else id_}, no token id")


def _require_tokenizer(file: Path, about: Any) -> None:
    """Refuses what `tokens.describe_tokenizer` would not say; it need not be there."""
    if about is None:
        return
    if not isinstance(about, dict):
        raise InputError(f"{file}: tokenizer: no JSON object")
    sha256, ends, control = (about.get(name) for name in ("sha256", "ends", "control"))
    if not isinstance(sha256, str):
        raise InputError(f"{file}: tokenizer.sha256: no text")
    if not isinstance(ends, dict) or not all(map(_END.fullmatch, ends)):
        raise InputError(f"{file}: tokenizer.ends: no JSON object from token ids to tokens")
    if not all(isinstance(token, (str, type(None))) for token in ends.values()):
        raise InputError(f"{file}: tokenizer.ends: a token that is no text")
    if not isinstance(control, list) or not all(isinstance(token, str) for token in control):
        raise InputError(f"{file}: tokenizer.control: no list of tokens")


def asked_in(frozen: FrozenRollouts) -> SeenQuestions:
    """The questions of frozen rollouts, to look others up in."""
    table = frozen.table
    return SeenQuestions(table["prompt"], templates_of(frozen.manifest.get("identity")), table["problem_id"].unique())


def _frame(table: pa.Table) -> pd.DataFrame:
    # Without a nullable type, lengths of which one is not known would be floats.
    frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    lists = {name: pd.Series(table[name].to_pylist(), dtype=object) for name in IDS if name in table.column_names}
    return frame.assign(**lists)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the frozen rollouts in `folder`.

    Raises:
        InputError: There is none, or none with a hash.
    """
    manifest = read_object(folder / "manifest.json")
    if not isinstance(manifest.get("sha256"), str):
        raise InputError(f"{folder / 'manifest.json'}: no sha256 in it")
    return manifest


def find_rollouts(parent: Path, key: str) -> Path | None:
    """The folder below `parent` whose rollouts were made with the settings that hash to `key`."""
    for file in sorted(parent.glob("[!.]*/manifest.json")):
        try:
            manifest = read_manifest(file.parent)
        except InputError:  # another folder's damage; its own is told when it is loaded
            continue
        keys = manifest.get("keys", [])
        if isinstance(keys, list) and key in keys:
            return file.parent
    return None
