"""Frozen rollouts: identified by their content, refused if it has changed, sampled only once."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from losslens.config.data import RolloutConfig
from losslens.config.parse import parse
from losslens.core.errors import InputError
from losslens.core.files import read_object, write_json
from losslens.rollouts.frozen import IDS, LOGPS, SCHEMA, content_sha256, count_rollouts, freeze, load_rollouts
from losslens.rollouts.sample import frozen_rollouts, rollouts_identity
from tests.conftest import ROOT, cold, script, start

SMALL = ["data.train_size=12", "rollouts.samples_per_prompt=3", "rollouts.max_tokens=64", "rollouts.batch_size=18"]


def config(output_dir: Path, *overrides: str) -> RolloutConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(RolloutConfig, compose("rollout", [f"output_dir={output_dir}", *SMALL, *overrides]))


def test_frozen_rollouts_are_loaded_unchanged(frozen: Path, rollouts: pd.DataFrame) -> None:
    loaded = load_rollouts(frozen)
    assert list(loaded.table.columns) == SCHEMA.names
    assert loaded.table["completion"].tolist() == rollouts["completion"].tolist()
    assert frozen.name == f"test-{loaded.sha256[:12]}"
    assert loaded.manifest["policy"] == "test"


def test_the_hash_depends_only_on_the_content(rollouts: pd.DataFrame, frozen: Path, tmp_path: Path) -> None:
    """Compression and manifest do not affect the hash; order and rewards do."""
    table = pq.read_table(frozen / "rollouts.parquet")
    pq.write_table(table, frozen / "rollouts.parquet", compression="gzip", row_group_size=7)
    load_rollouts(frozen)
    assert freeze(rollouts, tmp_path, "test", {"policy": "other"}).name == frozen.name
    assert content_sha256(rollouts[::-1]) != content_sha256(rollouts)
    assert content_sha256(rollouts.assign(reward=1.0)) != content_sha256(rollouts)


def test_counts() -> None:
    """Prompt a is mixed, b all correct, c all incorrect: 3 of 6 correct, 1 of 3 mixed, one rollout truncated."""
    table = pd.DataFrame(
        {
            "problem_id": list("aabbcc"),
            "reward": [1.0, 0, 1, 1, 0, 0],
            "finished": [True] * 5 + [False],
            "tokens": [2] * 6,
        }
    )
    assert count_rollouts(table) == {
        "rollouts": 6,
        "prompts": 3,
        "pass_rate": 0.5,
        "share_mixed_groups": pytest.approx(1 / 3),
        "truncated": 1,
        "tokens": 12,
    }


class TestDamage:
    def test_truncated(self, frozen: Path) -> None:
        file = frozen / "rollouts.parquet"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"rollouts\.parquet: not a readable parquet file"):
            load_rollouts(frozen)

    def test_edited(self, frozen: Path, rollouts: pd.DataFrame) -> None:
        rollouts.assign(reward=1.0).to_parquet(frozen / "rollouts.parquet")
        with pytest.raises(InputError, match=r"rollouts\.parquet: the content has changed"):
            load_rollouts(frozen)

    def test_lacks_a_column(self, frozen: Path, rollouts: pd.DataFrame) -> None:
        rollouts.drop(columns="reward").to_parquet(frozen / "rollouts.parquet")
        with pytest.raises(InputError, match=r"rollouts\.parquet: no column 'reward'"):
            load_rollouts(frozen)

    def test_wrong_type(self, frozen: Path, rollouts: pd.DataFrame) -> None:
        rollouts.assign(reward="good").to_parquet(frozen / "rollouts.parquet")
        with pytest.raises(InputError, match=r"rollouts\.parquet: .*good"):
            load_rollouts(frozen)

    def test_no_file(self, frozen: Path) -> None:
        (frozen / "rollouts.parquet").unlink()
        with pytest.raises(InputError, match="no such file"):
            load_rollouts(frozen)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha'])
    def test_manifest(self, frozen: Path, text: str) -> None:
        (frozen / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json"):
            load_rollouts(frozen)


def test_sampled_verified_and_frozen(tmp_path: Path) -> None:
    rollouts = frozen_rollouts(config(tmp_path))
    table, manifest = rollouts.table, rollouts.manifest
    assert len(table) == 36
    assert table["problem_id"].nunique() == 12
    assert table.groupby("problem_id")["sample"].apply(list).tolist() == [[0, 1, 2]] * 12
    assert set(table["reward"]) <= {0.0, 1.0}
    answered = table["completion"].str.extract(r"<answer>(.*)</answer>")[0]
    assert ((answered == table["answer"]) == (table["reward"] == 1)).all()
    assert manifest["policy"] == "teacher"
    assert manifest["pass_rate"] == table["reward"].mean()
    assert "torch" in manifest["versions"]
    assert manifest["identity"]["sampling"]["k"] == 3


def test_rollouts_are_reused_for_the_same_settings_only(tmp_path: Path) -> None:
    first = frozen_rollouts(config(tmp_path))
    made = (first.folder / "manifest.json").stat().st_mtime_ns
    assert frozen_rollouts(config(tmp_path)).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == made
    others = [frozen_rollouts(config(tmp_path, o)).folder for o in ("rollouts.seed=1", "rollouts.policy=base")]
    assert len({first.folder, *others}) == 3
    again = frozen_rollouts(config(tmp_path / "elsewhere"))
    assert again.folder.name == first.folder.name


def test_other_settings_with_the_same_rollouts_share_the_folder(tmp_path: Path) -> None:
    """No completion reaches either limit: one folder, sampled once, registered under both settings."""
    first = frozen_rollouts(config(tmp_path)).folder
    inode = (first / "rollouts.parquet").stat().st_ino
    other = config(tmp_path, "rollouts.max_tokens=80")
    assert frozen_rollouts(other).folder == first
    made = (first / "manifest.json").read_text()
    assert frozen_rollouts(config(tmp_path)).folder == frozen_rollouts(other).folder == first
    assert (first / "manifest.json").read_text() == made
    assert (first / "rollouts.parquet").stat().st_ino == inode


def test_other_damaged_folders_are_ignored(tmp_path: Path) -> None:
    folder = frozen_rollouts(config(tmp_path)).folder
    for name in ("aa-1", ".left-over.tmp"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "manifest.json").write_text("{")
    (folder.parent / ".left-over.tmp" / "manifest.json").write_text((folder / "manifest.json").read_text())
    assert frozen_rollouts(config(tmp_path)).folder == folder


def _make(output_dir: Path) -> tuple[str, int]:
    folder = frozen_rollouts(config(output_dir)).folder
    return folder.name, (folder / "manifest.json").stat().st_ino


def test_concurrent_processes_sample_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(_make, [tmp_path, tmp_path]))
    # The one that came second found the very file of the first: made anew, it would be another file.
    assert made[0] == made[1]
    assert len(list((tmp_path / "rollouts").glob("*/manifest.json"))) == 1


def test_the_script(tmp_path: Path) -> None:
    outcome = cold("rollout.py", f"output_dir={tmp_path}", *SMALL)
    assert "share mixed groups" in outcome.stdout
    [manifest] = (tmp_path / "rollouts").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["rollouts"] == 36
    refused = script("rollout.py", f"output_dir={tmp_path}", "model.teacher=null", check=2)
    assert refused.stderr.strip().count("\n") == 0
    assert "model.teacher" in refused.stderr


def test_killed_sampling_resumes_to_the_same_rollouts(tmp_path: Path) -> None:
    """36 rollouts in batches of 6, SIGKILL after the second or third: the remaining ones are unchanged."""
    small = [*SMALL, "rollouts.batch_size=6", "rollouts.temperature=1.5"]
    partial = tmp_path / "killed" / "rollouts" / ".partial"
    with start("rollout.py", f"output_dir={tmp_path / 'killed'}", *small) as process:
        while sum(file.read_text().count("state") for file in partial.glob("*.jsonl")) < 2:
            assert process.poll() is None, process.stderr
            time.sleep(0.005)
    [journal] = partial.glob("*.jsonl")
    assert 12 <= journal.read_text().count('"text"') < 36
    resumed = frozen_rollouts(config(tmp_path / "killed", *small[len(SMALL) :]))
    whole = frozen_rollouts(config(tmp_path / "whole", *small[len(SMALL) :]))
    assert resumed.sha256 == whole.sha256
    assert not list(partial.glob("*.jsonl"))


def test_the_rendered_prompt_is_stored(tmp_path: Path) -> None:
    table = frozen_rollouts(config(tmp_path)).table
    expected = "<|im_start|>user\n" + table["prompt"] + "<|im_end|>\n<|im_start|>assistant\n"
    assert (table["prompt_text"] == expected).all()


TOKENIZER = {"sha256": "another", "ends": {"2": "<|im_end|>"}, "control": ["<|im_end|>"]}


class TestFromElsewhere:
    """A folder from an untrusted source, whose hash is correct."""

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            (
                {"completion_ids": [5, None]},
                r"rollouts\.parquet: row 2: completion_ids contains null, which is not a token id",
            ),
            (
                {"completion_ids": [5, -1]},
                r"rollouts\.parquet: row 2: completion_ids contains -1, which is not a token id",
            ),
            ({"prompt_ids": [-1]}, r"rollouts\.parquet: row 2: prompt_ids contains -1, which is not a token id"),
            ({"completion": None}, r"rollouts\.parquet: row 2: completion is null"),
            ({"finished": None}, r"rollouts\.parquet: row 2: finished is null"),
        ],
    )
    def test_invalid_rows(self, frozen: Path, rollouts: pd.DataFrame, changes: dict[str, Any], told: str) -> None:
        rows = rollouts.assign(**dict.fromkeys((*IDS, *LOGPS)))[SCHEMA.names].head(3).to_dict("records")
        rows[1] |= changes
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), frozen / "rollouts.parquet")
        with pytest.raises(InputError, match=told):
            load_rollouts(frozen)

    def test_no_rows(self, frozen: Path) -> None:
        pq.write_table(SCHEMA.empty_table(), frozen / "rollouts.parquet")
        with pytest.raises(InputError, match="contains no rollouts"):
            load_rollouts(frozen)

    @pytest.mark.parametrize(
        ("tokenizer", "field"),
        [
            ([], "tokenizer must"),
            ({}, r"tokenizer\.sha256"),
            ({**TOKENIZER, "sha256": 5}, r"tokenizer\.sha256"),
            ({**TOKENIZER, "ends": []}, r"tokenizer\.ends"),
            ({**TOKENIZER, "ends": {"abc": "x"}}, r"tokenizer\.ends"),
            ({**TOKENIZER, "ends": {"-1": "x"}}, r"tokenizer\.ends"),
            ({**TOKENIZER, "ends": {"2": 5}}, r"tokenizer\.ends"),
            ({**TOKENIZER, "control": 5}, r"tokenizer\.control"),
            ({**TOKENIZER, "control": [5]}, r"tokenizer\.control"),
        ],
    )
    def test_invalid_tokenizers(self, frozen: Path, tokenizer: Any, field: str) -> None:
        self.say(frozen, tokenizer=tokenizer)
        with pytest.raises(InputError, match=rf"manifest\.json: {field}"):
            load_rollouts(frozen)

    def test_the_tokenizer_is_part_of_the_identity(self, frozen: Path, tmp_path: Path) -> None:
        given = config(tmp_path / "out", f"rollouts.path={frozen}")
        manifest = read_object(frozen / "manifest.json")
        assert rollouts_identity(given) == {"sha256": manifest["sha256"]}  # as that of folders of before
        identities = []
        for tokenizer in (TOKENIZER, {**TOKENIZER, "sha256": "other"}, {**TOKENIZER, "ends": {}}, None):
            self.say(frozen, tokenizer=tokenizer)
            assert load_rollouts(frozen).identity == rollouts_identity(given)
            identities.append(json.dumps(rollouts_identity(given)))
        assert len(set(identities)) == 4

    def say(self, folder: Path, **changes: Any) -> None:
        file = folder / "manifest.json"
        write_json(file, {**read_object(file), **changes})
