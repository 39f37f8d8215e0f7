"""Datasets and models from the hub: with local files of the same layout, and offline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.parse import parse
from losslens.core import hub
from losslens.core.errors import InputError, UnavailableError
from losslens.problems import ProblemSource
from losslens.rollouts.sample import problem_source
from tests.conftest import ROOT

GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# Grade School Math
"""


def gsm8k_rows(count: int, first: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Ann has {n} apples and buys 2. How many?",
            "answer": f"She has {n}+2=<<{n}+2={n + 2}>>{n + 2}.\n#### {n + 2:,}",
        }
        for n in range(first, first + count)
    ]  # fmt: skip


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    folder = tmp_path / "gsm8k"
    for split, rows in (("train", gsm8k_rows(30, 0)), ("test", gsm8k_rows(1200, 1000)[::100])):
        (folder / "main").mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(folder / "main" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(GSM8K_CARD)
    return folder


@pytest.fixture
def deepscaler(tmp_path: Path) -> Path:
    folder = tmp_path / "deepscaler"
    folder.mkdir()
    rows = [{"problem": f"What is ${n}/7$?", "answer": f"\\frac{{{n}}}{{7}}", "solution": "…"} for n in range(200)]
    rows += [rows[0], {"problem": "No answer?", "answer": "", "solution": ""}]
    (folder / "deepscaler.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def aime26(tmp_path: Path) -> Path:
    folder = tmp_path / "aime26"
    folder.mkdir()
    rows = [{"id": n, "problem": f"Find ${n}+1$.", "answer": f"{n + 1}"} for n in range(30)]
    (folder / "aime2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(option: str, *overrides: str) -> ProblemSource:
    """The problems as `conf/data/<option>.yaml` configures them."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return problem_source(parse(RolloutConfig, compose("rollout", [f"data={option}", *overrides])).data)


def benchmark_of(option: str, *overrides: str) -> ProblemSource:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(EvaluateConfig, compose("evaluate", [f"benchmark={option}", *overrides]))
    return problem_source(config.benchmark[option])


def test_gsm8k(gsm8k: Path) -> None:
    source = data_of("gsm8k", f"data.source.repo={gsm8k}")
    train, test = source.problems("train", None, 0), source.problems("eval", None, 0)
    assert (len(train), len(test)) == (30, 12)
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert {p.answer for p in test} == {f"{n + 2:,}" for n in range(1000, 2200, 100)}
    assert all(p.prompt.endswith(r"put your final answer within \boxed{}.") for p in train)
    assert source.problems("train", 5, 3) == source.problems("train", None, 3)[:5] != train[:5]
    one = next(p for p in test if p.answer == "1,002")
    assert source.verifier(one, r"That is \boxed{1002}.").correct
    assert not source.verifier(one, r"That is \boxed{1003}.").correct


def test_deepscaler_is_divided_by_the_question(deepscaler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data_of("deepscaler", f"data.source.repo={deepscaler}")
    train, test = source.problems("train", None, 0), source.problems("eval", None, 1)
    assert len(train) + len(test) == 200
    assert 5 <= len(test) <= 40
    assert not {p.id for p in train} & {p.id for p in test}
    assert "deepscaler, split 'train': skipped 2 rows" in capsys.readouterr().out
    assert source.verifier(train[0], f"\\boxed{{{train[0].answer}}}").correct


def test_aime26(aime26: Path) -> None:
    source = benchmark_of("aime26", f"benchmark.aime26.source.repo={aime26}")
    problems = source.problems("eval", None, 0)
    assert sorted(int(p.answer) for p in problems) == list(range(1, 31))
    with pytest.raises(InputError, match=r"splits\.train: aime26 has no such split"):
        source.problems("train", 1, 0)


def empty_file(folder: Path) -> None:
    (folder / "main" / "train-00000-of-00001.parquet").write_bytes(b"")


def no_rows(folder: Path) -> None:
    pd.DataFrame(gsm8k_rows(1, 0)).iloc[:0].to_parquet(folder / "main" / "train-00000-of-00001.parquet")


def not_parquet(folder: Path) -> None:
    (folder / "main" / "train-00000-of-00001.parquet").write_text("question,answer")


@pytest.mark.parametrize(
    ("change", "overrides", "told"),
    [
        (
            None,
            ["data.source.columns={prompt: problem, answer: answer}"],
            "split 'train': no column 'problem'; columns are 'question', 'answer'",
        ),
        (None, ["data.source.splits={train: training, eval: test}"], "split 'training': "),
        (None, ["data.source.config=other"], "other"),
        (empty_file, [], "split 'train': "),
        (no_rows, [], "split 'train': an empty or damaged file"),
        (not_parquet, [], "Parquet magic bytes not found"),
        (None, ["data.source.answer_pattern='=> (.*)'"], "contains no problems for split 'train'"),
    ],
)  # fmt: skip
def test_errors_in_files_are_one_line(
    gsm8k: Path, change: Callable[[Path], None] | None, overrides: list[str], told: str
) -> None:
    if change is not None:
        change(gsm8k)
    source = data_of("gsm8k", f"data.source.repo={gsm8k}", *overrides)
    with pytest.raises(InputError) as error:
        source.problems("train", None, 0)
    assert str(error.value).startswith(f"data.source.repo={gsm8k}, ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_more_problems_than_there_are(gsm8k: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train_size=31: .* has 30 problems; data\.train_size=null uses all"):
        data_of("gsm8k", f"data.source.repo={gsm8k}").problems("train", 31, 0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.source.answer_pattern='(' ", "answer_pattern"),
        ("data.source.answer_pattern=x", "source.answer_pattern must contain a group"),
        ("data.source.template=x", "source.template must contain {question}"),
        ("+data.source.columns.id=a", "names prompt and answer"),
        ("data.source.repo=no/such/folder", "no such folder"),
    ],
)
def test_invalid_settings(override: str, told: str) -> None:
    with pytest.raises(InputError, match=told.replace("{", r"\{").replace("}", r"\}")):
        _ = data_of("gsm8k", override.strip()).identity("train")


def test_problems_are_identified_by_their_content(gsm8k: Path, tmp_path: Path) -> None:
    identity = data_of("gsm8k", f"data.source.repo={gsm8k}").identity("train")
    moved = gsm8k.rename(tmp_path / "moved")
    assert data_of("gsm8k", f"data.source.repo={moved}").identity("train") == identity
    (moved / "main" / "more.txt").write_text("x")
    assert data_of("gsm8k", f"data.source.repo={moved}").identity("train") != identity


def test_all_hub_ids_are_pinned() -> None:
    """Every hub id in `conf/` has a full commit, so that it cannot change and needs no network to resolve."""
    found = 0
    for file in [*(ROOT / "conf").glob("*/*.yaml")]:
        lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
        for line in lines:
            name, _, value = line.partition(": ")
            if name in ("repo", "path", "teacher") and hub.is_hub_id(value.strip()) and "/" in value:
                found += 1
                revision = {"repo": "revision", "path": "revision", "teacher": "teacher_revision"}[name]
                assert any(re.match(rf"{revision}: (.*\b)?[0-9a-f]{{40}}\b", other) for other in lines), (
                    f"{file}: {value}"
                )
    assert found == 6


def test_offline_a_branch_resolves_to_the_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    copy = tmp_path / "models--me--mine"
    (copy / "refs").mkdir(parents=True)
    (copy / "refs" / "main").write_text(commit)
    (copy / "snapshots" / commit).mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    hub.resolve_commit.cache_clear()
    assert hub.resolve_commit("model.path", "me/mine", None) == commit
    assert hub.is_available("model.path", "me/mine", None)
    with pytest.raises(UnavailableError, match=r"model\.path=me/other"):
        hub.resolve_commit("model.path", "me/other", None)
    assert not hub.is_available("model.path", "me/other", "v1")
