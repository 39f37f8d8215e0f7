"""Problems or complete rollouts in the user's own file; errors name row and column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from losslens.config.data import RolloutConfig
from losslens.config.parse import parse
from losslens.core.errors import InputError
from losslens.rollouts.sample import frozen_rollouts, held_out_rollouts, problem_source, rollouts_identity
from tests.conftest import METHODS, ROOT, command, script

Row = dict[str, Any]


def problem_rows(count: int) -> list[Row]:
    return [{"problem_id": f"p{n}", "prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


def rollout_rows(count: int) -> list[Row]:
    return [
        {**row, "completion": f"It is <answer>{int(row['answer']) + wrong}</answer>", "reward": 1 - wrong}
        for row in problem_rows(count)
        for wrong in (0, 1)
    ]


def written(file: Path, rows: list[Row]) -> Path:
    if file.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(output_dir: Path, file: Path, *overrides: str) -> RolloutConfig:
    line = ["data=file", f"data.path={file}", f"output_dir={output_dir}", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(RolloutConfig, compose("rollout", line))


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.parquet"])
def test_problems(tmp_path: Path, name: str) -> None:
    source = problem_source(config(tmp_path, written(tmp_path / name, problem_rows(200))).data)
    train, held_out = source.problems("train", None, 0), source.problems("eval", None, 0)
    assert len(train) + len(held_out) == 200
    assert 5 <= len(held_out) <= 40
    assert source.rollouts() is None
    assert {p.id for p in train} | {p.id for p in held_out} == {f"p{n}" for n in range(200)}
    assert all(source.verifier(p, f"\\boxed{{{p.answer}}}").correct for p in held_out)


def test_held_out_problems_in_a_separate_file(tmp_path: Path) -> None:
    file, other = written(tmp_path / "a.jsonl", problem_rows(20)), written(tmp_path / "b.jsonl", problem_rows(30)[20:])
    source = problem_source(config(tmp_path, file, f"data.eval_path={other}").data)
    assert len(source.problems("train", None, 0)) == 20
    assert {p.id for p in source.problems("eval", None, 0)} == {f"p{n}" for n in range(20, 30)}


def test_held_out_problems_must_not_be_trained_on(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", problem_rows(20))
    other = written(tmp_path / "b.jsonl", problem_rows(22)[18:])
    source = problem_source(config(tmp_path, file, f"data.eval_path={other}").data)
    with pytest.raises(InputError, match=r"b.jsonl: row 1, column 'prompt': .* also in .*a.jsonl, row 19"):
        source.problems("eval", None, 0)


def test_held_out_problems_do_not_affect_the_training_set(tmp_path: Path) -> None:
    file, other = written(tmp_path / "a.jsonl", problem_rows(20)), written(tmp_path / "b.jsonl", problem_rows(30)[20:])
    more = written(tmp_path / "c.jsonl", problem_rows(40)[20:])
    small = ["data.train_size=4", "rollouts.policy=base"]
    identities = [rollouts_identity(config(tmp_path, file, f"data.eval_path={f}", *small)) for f in (other, more)]
    assert identities[0] == identities[1] != rollouts_identity(config(tmp_path, file, *small))


def test_held_out_completions_of_fewer_problems_than_requested(tmp_path: Path) -> None:
    """A hundred problems are requested, but only three of the file are held out."""
    file, other = written(tmp_path / "a.jsonl", problem_rows(20)), written(tmp_path / "b.jsonl", problem_rows(23)[20:])
    small = [f"data.eval_path={other}", "rollouts.policy=base", "rollouts.max_tokens=8"]
    assert len(held_out_rollouts(config(tmp_path, file, *small), 100).table) == 3
    assert len(held_out_rollouts(config(tmp_path, file, *small), 2).table) == 2


def test_without_ids_prompts_are_identified_by_their_text(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "gold": row["answer"]} for row in problem_rows(40)]
    names = ["data.source.columns.prompt=question", "data.source.columns.answer=gold"]
    source = problem_source(config(tmp_path, written(tmp_path / "a.jsonl", rows), *names, "data.eval_size=1").data)
    assert len({p.id for p in source.problems("train", None, 0)}) >= 30
    assert source.problems("train", 1, 0)[0].id.startswith("prompt-")


def test_numbers_as_answers(tmp_path: Path) -> None:
    rows = [{**row, "answer": value} for row, value in zip(problem_rows(3), (7, 7.0, 1234567.25), strict=True)]
    other = written(tmp_path / "b.jsonl", rows)
    file = written(tmp_path / "a.jsonl", problem_rows(9)[3:])
    source = problem_source(config(tmp_path, file, f"data.eval_path={other}").data)
    assert sorted(p.answer for p in source.problems("eval", None, 0)) == ["1234567.25", "7", "7"]


@pytest.mark.parametrize("name", ["theirs.jsonl", "theirs.parquet"])
def test_rollouts_are_frozen_unchanged(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name, rollout_rows(10))
    frozen = frozen_rollouts(config(tmp_path, file))
    assert list(frozen.table["completion"]) == [row["completion"] for row in rollout_rows(10)]
    assert list(frozen.table["reward"]) == [1.0, 0.0] * 10
    assert list(frozen.table["sample"]) == [0, 1] * 10
    assert set(frozen.table["source"]) == {name}
    assert frozen.table["finished"].all()
    assert frozen.manifest["pass_rate"] == 0.5
    assert frozen.manifest["tokens"] is None
    assert frozen_rollouts(config(tmp_path, file)).folder == frozen.folder
    assert len(frozen_rollouts(config(tmp_path, file, "data.train_size=3")).table) == 6


def test_rollouts_are_identified_by_the_content_of_their_file(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", rollout_rows(10))
    identity = rollouts_identity(config(tmp_path, file))
    assert rollouts_identity(config(tmp_path, file.rename(tmp_path / "b.jsonl"))) == identity
    # How others would be sampled does not matter.
    assert (
        rollouts_identity(config(tmp_path, tmp_path / "b.jsonl", "rollouts.samples_per_prompt=7", "model=smollm2"))
        == identity
    )
    changed = written(tmp_path / "c.jsonl", rollout_rows(11))
    assert rollouts_identity(config(tmp_path, changed)) != identity


def changed(row: int, **cells: Any) -> list[Row]:
    rows = rollout_rows(4)
    rows[row - 1] = {**rows[row - 1], **cells}
    return rows


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (changed(3, reward="good"), "row 3, column 'reward': 'good' is a string; write 1 or 0 without quotes"),
        (changed(3, reward="1"), "row 3, column 'reward': '1' is a string; write 1 or 0 without quotes"),
        (changed(3, reward=float("nan")), "row 3, column 'reward': NaN"),
        (changed(3, reward=None), "row 3, column 'reward': missing"),
        (changed(3, reward=float("inf")), "row 3, column 'reward': inf is neither 1 (correct) nor 0 (incorrect)"),
        (changed(3, reward=0.5), "row 3, column 'reward': 0.5 is neither 1 (correct) nor 0 (incorrect)"),
        (changed(4, problem_id=None), "row 4, column 'problem_id': missing"),
        (changed(4, problem_id=" "), "row 4, column 'problem_id': empty"),
        (changed(4, problem_id="p3"), "row 7, column 'problem_id': 'p3' has a different prompt in row 4"),
        (changed(5, completion=""), "row 5, column 'completion': empty"),
        (changed(5, completion=None), "row 5, column 'completion': missing"),
        (changed(5, completion=["a"]), "row 5, column 'completion': ['a'] is a list of 1"),
        (changed(5, completion="\ud83d"), "row 5, column 'completion': the text contains a lone surrogate"),
        (changed(3, reward=10**400), "row 3, column 'reward': 1000"),
        (changed(1, prompt=None), "row 1, column 'prompt': missing"),
        (changed(2, answer=None), "row 2, column 'answer': missing"),
        (
            [{**row, "sample": 0} for row in rollout_rows(2)],
            "row 2, column 'problem_id': 'p0', sample 0, is already in row 1",
        ),
        ([{**row, "sample": 10**30} for row in rollout_rows(2)], "is not an integer from 0"),
        ([{**row, "sample": -1} for row in rollout_rows(2)], "is not an integer from 0"),
        ([{**row, "sample": "x"} for row in rollout_rows(2)], "row 1, column 'sample': 'x' is not an integer"),
        (
            [{**row, "finished": "yes"} for row in rollout_rows(2)],
            "row 1, column 'finished': 'yes' is neither true nor false",
        ),
        ([{k: v for k, v in row.items() if k != "reward"} for row in rollout_rows(2)], "no column 'reward'"),
        ([], "contains no rows"),
    ],
)  # fmt: skip
def test_errors_in_rollouts_name_row_and_column(tmp_path: Path, rows: list[Row], told: str) -> None:
    file = written(tmp_path / "theirs.jsonl", rows)
    with pytest.raises(InputError) as error:
        frozen_rollouts(config(tmp_path, file))
    assert str(error.value).startswith(f"{file}: ")
    assert told in str(error.value)


def test_a_reward_that_is_not_a_number_in_parquet(tmp_path: Path) -> None:
    rows = [{**row, "reward": np.nan if n == 2 else row["reward"]} for n, row in enumerate(rollout_rows(3))]
    with pytest.raises(InputError, match="row 3, column 'reward': missing"):
        frozen_rollouts(config(tmp_path, written(tmp_path / "theirs.parquet", rows)))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([*problem_rows(3), problem_rows(2)[1]], "row 4, column 'problem_id': 'p1' is already in row 2"),
        ([*problem_rows(3), {"problem_id": "x", "prompt": "?"}], "row 4, column 'answer': missing"),
        ([{"problem_id": "x", "question": "?"}], "no column 'prompt'; columns are 'problem_id', 'question'"),
    ],
)
def test_errors_in_problems_name_row_and_column(tmp_path: Path, rows: list[Row], told: str) -> None:
    with pytest.raises(InputError) as error:
        problem_source(config(tmp_path, written(tmp_path / "mine.jsonl", rows)).data).problems("train", None, 0)
    assert told in str(error.value)


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(problem_rows(30)).replace(b"\n", b"\r\n\r\n \n")),
        ("a.jsonl", lines(problem_rows(30)).decode().encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(lines(problem_rows(30)))),
        ("a.pq", None),
        ("a.PARQUET", None),
        ("a.jsonl", None),
    ],
)
def test_formats_are_recognised_by_content(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = tmp_path / name
    if content is None:
        pd.DataFrame(problem_rows(30)).to_parquet(file)
    else:
        file.write_bytes(content)
    source = problem_source(config(tmp_path, file).data)
    count = len(source.problems("train", None, 0)) + len(source.problems("eval", None, 0))
    assert count == 30


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps(problem_rows(3)).encode(), ": a JSON array; write one object per line (JSON Lines)"),
        (json.dumps(problem_rows(3), indent=1).encode(), ": a JSON array; write one object per line (JSON Lines)"),
        (json.dumps(problem_rows(1)[0], indent=1).encode(), ": a JSON object on several lines"),
        (
            b"prompt,answer\n1+1,2\n",
            "row 1: not JSON, but 'prompt,answer'; only parquet and JSON Lines are supported (no CSV)",
        ),
        (b"PK\x03\x04...", ": a zip archive or a spreadsheet"),
        (b"version https://git-lfs.github.com/spec/v1\n", ": a Git LFS pointer"),
        (b'{"prompt": "caf\xe9", "answer": 1}\n', ": neither parquet nor UTF-8 text (line 1"),
        (b"\x1f\x8b\x08broken", ": not a readable gzip file"),
        (
            lines([{"prompt": "a", "answer": n} for n in (1, 2)]),
            "row 2, column 'prompt': the prompt is already in row 1",
        ),
        (
            lines([{"problem_id": n, "prompt": "a", "answer": 1} for n in (1, 2)]),
            "row 2, column 'prompt': the prompt is already in row 1",
        ),
        (lines([{"prompt": str(n), "answer": "\\frac{1}{"} for n in range(3)]), "3 of 3 references cannot be parsed"),
    ],
)
def test_unsupported_formats_are_named(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    other = written(tmp_path / "other.jsonl", problem_rows(3))
    with pytest.raises(InputError) as error:
        problem_source(config(tmp_path, file, f"data.eval_path={other}").data).problems("train", None, 0)
    assert str(error.value).startswith(f"{file}: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path=.* is a folder; name a parquet or JSON Lines file in it"):
        problem_source(config(tmp_path, tmp_path).data)


def test_few_prompts_of_which_none_is_held_out(tmp_path: Path) -> None:
    file = written(tmp_path / "few.jsonl", [{"prompt": f"What is {n} + {n + 1}?", "answer": n} for n in range(3)])
    with pytest.raises(InputError, match=r"none of these 3 is; .*data\.eval_path=FILE.*data\.eval_size=0"):
        problem_source(config(tmp_path, file).data).problems("eval", None, 0)


def test_prompts_that_differ_in_case_and_space_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "answer": n} for n in range(60)]
    rows += [{"prompt": f"what  is {n}?", "answer": n} for n in range(60)]
    source = problem_source(config(tmp_path, written(tmp_path / "a.jsonl", rows)).data)
    splits = [{" ".join(p.prompt.casefold().split()) for p in source.problems(s, None, 0)} for s in ("train", "eval")]
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == 60


def test_damaged_files(tmp_path: Path) -> None:
    for name, content, told in (
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "row 2: not JSON"),
        ("b.jsonl", b"[1]\n", "row 1: not a JSON object"),
        ("c.jsonl", b"\xff\xfe\x00", "neither parquet nor UTF-8 text"),
        ("d.jsonl", b"", "contains no rows"),
        ("f.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "row 1: not JSON"),
        ("g.jsonl", b"[" * 100_000, "row 1: not JSON"),
        ("e.parquet", b"PAR1", "not a readable parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=told):
            problem_source(config(tmp_path, tmp_path / name).data).problems("train", None, 0)
    with pytest.raises(InputError, match=r"path=.*missing.jsonl: no such file"):
        problem_source(config(tmp_path, tmp_path / "missing.jsonl").data)


def test_rollouts_in_a_file_train_all_six_methods(tmp_path: Path, rollouts: pd.DataFrame) -> None:
    """From a file to the analysis; scored on a benchmark, since all of the file is trained on."""
    theirs = rollouts[["problem_id", "prompt", "completion", "reward"]].rename(columns={"reward": "score"})
    file = tmp_path / "theirs.parquet"
    theirs.to_parquet(file)
    line = command(
        tmp_path / "out", "-m", METHODS, "data=file", f"data.path={file}", "data.train_size=null", "data.eval_size=null"
    )
    line += ["data.source.columns.reward=score", "optim.max_steps=4", "logger=none"]
    refused = script(*line, check=2)
    assert "data.eval_path: " in refused.stderr
    assert not list((tmp_path / "out" / "main").glob("*/adapter"))
    twice = ["benchmark=[arithmetic,arithmetic_long]", "benchmark.arithmetic_long.name=arithmetic"]
    assert "benchmark: two benchmarks have the name arithmetic" in script(*line, *twice, check=2).stderr
    scored = [
        "benchmark=[arithmetic,arithmetic_long]",
        "benchmark.arithmetic.eval_size=10",
        "benchmark.arithmetic_long.eval_size=8",
    ]
    script(*line, *scored)
    runs = [path for path in (tmp_path / "out" / "main").glob("*-conventional-*") if (path / "adapter").is_dir()]
    assert len(runs) == 6
    for run in runs:
        assert len(pd.read_parquet(run / "eval" / "arithmetic.parquet")) == 10
        assert len(pd.read_parquet(run / "eval" / "arithmetic_long.parquet")) == 8
    outcome = script("analyze.py", "sweep=main", f"output_dir={tmp_path / 'out'}", "pairs=[[sft,dpo]]")
    assert "so no further ones can be sampled; set probe_set.completions=FOLDER" in outcome.stdout
    pairs = pd.read_csv(tmp_path / "out" / "main" / "analysis" / "pairs.csv")
    assert len(pairs) == 15
    assert pairs["cosine"].notna().all()
    assert pairs["accuracy_diff"].notna().all()


def test_a_run_that_is_not_scored(tmp_path: Path) -> None:
    file = written(tmp_path / "theirs.jsonl", rollout_rows(20))
    line = command(
        tmp_path / "out", "data=file", f"data.path={file}", "data.train_size=null", "data.eval_size=0", "logger=none"
    )
    outcome = script(*line, "optim.max_steps=2")
    assert "completed, not scored" in outcome.stdout
    script("analyze.py", "sweep=main", f"output_dir={tmp_path / 'out'}")
