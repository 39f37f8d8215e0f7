"""Parsing and comparison of answers: hundreds of pairs in the styles of common datasets, and incorrect answers."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from losslens.analysis.probe_set import _require_held_out, probe_set
from losslens.config.analysis import ProbeSet
from losslens.config.data import RolloutConfig
from losslens.config.parse import parse
from losslens.core.errors import InputError, UnavailableError
from losslens.core.hashing import hash_json
from losslens.problems import Problem, Verdict
from losslens.problems.hub_dataset import HubDataset
from losslens.problems.judges import identity_of, verifier_of
from losslens.problems.mathematics import MathVerify
from losslens.problems.questions import SeenQuestions
from losslens.problems.table import cell_text, require_readable
from losslens.problems.verification import verdicts
from losslens.rollouts.frozen import FrozenRollouts, freeze, load_rollouts
from losslens.rollouts.sample import held_out_rollouts, rollouts_identity
from losslens.runs.recorded import Trust
from tests.conftest import ROOT, TINY

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()]


def problem(answer: str, row: int = 0) -> Problem:
    return Problem(f"p{row}", "?", answer, {"row": row})


def test_pairs_of_every_style_are_judged_correctly() -> None:
    judge = MathVerify()
    faults = [
        pair for pair in PAIRS if judge(problem(pair["reference"]), pair["completion"]).correct is not pair["right"]
    ]
    assert faults == []
    assert Counter(pair["style"] for pair in PAIRS).keys() == {
        "gsm8k", "math", "deepscaler", "aime", "olympiad", "choice",
    }  # fmt: skip
    assert sum(not pair["right"] for pair in PAIRS) > 80


def test_every_reference_can_be_parsed() -> None:
    assert [pair["reference"] for pair in PAIRS if not MathVerify.reads(pair["reference"])] == []


@pytest.mark.parametrize(
    ("reference", "completion", "correct"),
    [
        ("5", "the interim answer is 4, then <answer> 5 </answer><answer></answer>", True),
        ("5", r"\boxed{5} and an empty one: \boxed{\ldots}", True),
        ("1,2", r"\boxed{1}. But no: \boxed{2}", False),
        ("5 apples", r"\boxed{5}", True),
        ("5 km", r"\boxed{5\text{ m}}", False),
        ("5 km", r"\boxed{5000\text{ m}}", True),
        ("0.5", r"\boxed{50\%}", True),
        ("0.5", r"\boxed{50}", False),
        ("1e-8", r"\boxed{1.1e-8}", False),
        ("3.14159", r"\boxed{\pi}", True),
        ("3.14", r"\boxed{\pi}", False),
        ("east", r"\boxed{seat}", False),
        ("xy", r"\boxed{yx}", False),
        ("2xy", r"\boxed{2yx}", True),
    ],
)
def test_decisions(reference: str, completion: str, correct: bool) -> None:
    assert MathVerify()(problem(reference), completion).correct is correct


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>" * 20_000,
        r"\boxed{" * 20_000,
        "**a " * 20_000,
        "the answer " * 10_000,
        "$" * 50_000,
        r"\[ " * 20_000,
        "1,234" * 10_000,
        "- " * 30_000,
        r"\boxed{" + "1 " * 5_000 + "}",
        "a b " * 10_000 + "=",
        "The answer is 4 " + r"\[ " * 20_000,
        "The answer is 4 (" + "=" * 60_000,
        "The answer is " + "5 apples and three " * 3_000,
    ],
)
def test_a_long_completion_is_searched_in_bounded_time(completion: str) -> None:
    started = time.process_time()
    # A value error is told as trouble by the process that checks.
    with contextlib.suppress(ValueError):
        assert not MathVerify()(problem("5"), completion).correct
    assert time.process_time() - started < 5


def test_unreadable_references_are_named_and_refused_if_frequent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = [problem(answer, row) for row, answer in enumerate(["72", "$x+1$", "east", r"\frac{1}{2}"], 1)]
    bad = [problem(r"\frac{1}{", 5), problem("It is what one gets when the sum is taken over all of them", 6)]
    require_readable("mine.jsonl", MathVerify(), good)
    assert capsys.readouterr().out == ""
    require_readable("mine.jsonl", MathVerify(), good + bad)
    said = capsys.readouterr().out
    assert said.startswith("mine.jsonl: 2 of 6 references cannot be parsed; ")
    assert r"row 5 '\\frac{1}{', row 6 'It is what" in said
    with pytest.raises(InputError, match=r"mine.jsonl: 2 of 3 references cannot be parsed, .*row 5 .*, row 6"):
        require_readable("mine.jsonl", MathVerify(), good[:1] + bad)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"), (7, "7"), (7.0, "7"), (0.00005, "0.00005"), (1e-10, "0.0000000001"), (1234567.25, "1234567.25"),
        (1e22, "10000000000000000000000"), (True, "True"), (["72"], "72"), ([5e-5], "0.00005"),
    ],
)  # fmt: skip
def test_cells(value: Any, text: str) -> None:
    assert cell_text("f", 1, "answer", value, listed=True) == text


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "missing"),
        (float("nan"), "missing"),
        (" ", "empty"),
        ([], "a list of 0"),
        (["1", "2"], "a list of 2"),
        ({"a": 1}, "is a struct (a)"),
        (float("inf"), "inf is not text"),
        (b"x", "b'x' is not text"),
    ],
)
def test_invalid_cells(value: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        cell_text("f", 3, "answer", value, listed=True)
    assert str(error.value).startswith("f: row 3, column 'answer': ")
    assert told in str(error.value)


class Lenient:
    """A user-defined verifier: an answer is correct if it contains the reference."""

    needs_network: ClassVar[bool] = False

    def __init__(self, folded: bool = False) -> None:
        self.folded = folded

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        text = completion.casefold() if self.folded else completion
        return Verdict("seen", problem.answer in text)


def judged_by_length(problem: Problem, completion: str) -> bool:
    return len(completion) == int(problem.answer)


def test_a_user_defined_verifier_by_its_path() -> None:
    options = {"_target_": "tests.test_answers.Lenient", "folded": True}
    for setting, completion, correct in (
        ("tests.test_answers.Lenient", "It is 5", True),
        ("tests.test_answers.judged_by_length", "12345", True),
        ("tests.test_answers.judged_by_length", "123", False),
        (options, "it is 5", True),
    ):
        [verdict] = verdicts(verifier_of(setting), [problem("5")], [completion], seconds=60)
        assert verdict.correct is correct, verdict
    assert not verifier_of("tests.test_answers.Lenient").needs_network  # type: ignore[attr-defined]
    identities = [identity_of(setting) for setting in (None, "tests.test_answers.Lenient", options)]
    assert len({json.dumps(identity) for identity in identities}) == 3


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("nothing", "a Python path such as"),
        ("no.such.module", "source.verifier=no.such.module: ModuleNotFoundError"),
        ("tests.test_answers.Nobody", "tests.test_answers has no Nobody"),
        ("tests.test_answers.PAIRS", "neither a class nor a function"),
        ({"folded": True}, "a Python path such as"),
        ({"_target_": "tests.test_answers.judged_by_length", "x": 1}, "only a class can have options"),
        ({"_target_": "tests.test_answers.Lenient", "colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_invalid_verifiers(setting: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        verifier_of(setting)


def test_rows_of_a_hub_dataset_that_differ_in_case_and_space_are_one_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": f"How much is {n}+{n}?", "a": [str(2 * n)]} for n in range(40)]
    rows += [{"q": "how much is  3+3? ", "a": ["6"]}, {"q": None, "a": ["1"]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"train": "train", "eval": "train"}
    source = HubDataset("mine", str(tmp_path), splits, {"prompt": "q", "answer": "a"})
    train, held_out = source.problems("train", None, 0), source.problems("eval", None, 0)
    assert len(train) + len(held_out) == 40
    assert "skipped 2 rows (1 repeated, first in row 41, 1 incomplete, first in row 42)" in capsys.readouterr().out


def hub_dataset(folder: Path, **given: Any) -> HubDataset:
    return HubDataset("mine", str(folder), {"train": "train", "eval": "train"}, {"prompt": "q", "answer": "a"}, **given)


@pytest.mark.parametrize(
    "file",
    ["http://127.0.0.1:9/x.json", "hf://datasets/a/b/x.json", "zip://x.json::http://a/b.zip", "x::y", "../x.json",
     "data/../../x.json", "/etc/x.json", "\\\\host\\x.json", "c:/x.json", "~/x.json", "", 3, ["x.json"]],
)  # fmt: skip
def test_files_of_a_dataset_must_be_inside_it(file: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^source\.files\.train\b"):
        hub_dataset(tmp_path, files={"train": file})


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_data_files_outside_the_repository_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "1+1?", "a": "2"}\n')
    about = (
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [http://127.0.0.1:9/x.jsonl]\n"
    )
    (tmp_path / name).write_text(f"---\n{about}---\n" if name == "README.md" else about)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(InputError, match=r"data_files of its README\.md: 'http://127\.0\.0\.1:9/x\.jsonl' is outside"):
        hub_dataset(tmp_path).problems("train", None, 0)


def test_a_dataset_in_a_folder_with_the_name_of_a_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json").mkdir()
    rows = "".join(json.dumps({"q": f"How much is {n}+{n}?", "a": str(2 * n)}) + "\n" for n in range(40))
    (tmp_path / "json" / "train.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    assert hub_dataset(Path("json"), files={"train": "*.jsonl"}).problems("train", None, 0)
    with pytest.raises(InputError, match=r"source\.repo=pandas is a loader of the datasets library"):
        hub_dataset(Path("pandas"), revision="0" * 40).problems("train", None, 0)


def test_a_missing_reader_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ImportError("no module named so")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(InputError, match="split 'train': no module named so"):
        hub_dataset(tmp_path).problems("train", None, 0)


def test_a_pattern_for_answers_takes_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losslens.problems.hub_dataset._PATTERN_SECONDS", 0.2)
    (tmp_path / "train.jsonl").write_text(json.dumps({"q": "?", "a": "a" * 60}) + "\n")
    with pytest.raises(InputError, match=r"^source\.answer_pattern takes too long"):
        hub_dataset(tmp_path, answer_pattern=r"((?:a|aa|a.?)+)!").problems("train", None, 0)


@pytest.mark.parametrize("pattern", ["((a{9999}){9999})", "(((a{1,99}){1,99}){,99})", "(" + "a" * 2000 + ")", 5])
def test_a_pattern_for_answers_takes_bounded_memory(pattern: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^source\.answer_pattern: (the regular expression is too long|.* must be a string)"
    ):
        hub_dataset(tmp_path, answer_pattern=pattern)


def test_prompts_are_identified_by_their_text() -> None:
    template = "{question}\nPlease reason step by step."
    asked = SeenQuestions(
        ["What is 0 + 1?", "Solve this.\nWhat is 1 + 1?", "Gold:\n2\nAns"], ids=["0", "mine-0123456789ab"]
    )
    for prompt in ("What is 0 + 1?", " what  is 0 + 1? ", "What is \uff10 + 1?", "What is 1 + 1?"):
        assert asked.has(prompt), prompt
    assert asked.has("What is 0 + 1?\nPlease reason step by step.")  # instructions of its own line
    assert asked.has("Q: What is 0 + 1? A:", ["Q: {question} A:"])
    assert asked.has("another text", problem_id="mine-0123456789ab")
    for prompt in ("What is 0 + 2?", "How much is 0 + 1?", "Solve this.\nWhat is 1 + 2?", "Gold:\n3\nAns"):
        assert not asked.has(prompt, problem_id="0"), prompt
    assert SeenQuestions(["What is 2?\nPlease reason step by step."], [template]).has("What is 2?")


def test_held_out_completions_are_identified_by_their_prompts(tmp_path: Path) -> None:
    """The same prompts under other ids are refused; other prompts under the same ids are accepted."""

    def frozen(name: str, prompts: list[str], ids: list[str]) -> FrozenRollouts:
        rows = [
            {
                "problem_id": problem_id, "prompt": prompt, "prompt_text": None, "completion": "1", "reward": 1.0,
                "answer": "1", "sample": 0, "source": "me", "tokens": None, "finished": True,
            }
            for prompt, problem_id in zip(prompts, ids, strict=True)
        ]  # fmt: skip
        folder = tmp_path / "rollouts"
        folder.mkdir(exist_ok=True)
        return load_rollouts(freeze(pd.DataFrame(rows), folder, name, {"keys": [name]}))

    trained_on = frozen("file", ["What is 0 + 1?", "What is 1 + 2?"], ["0", "1"])
    run: Any = SimpleNamespace(rollouts=SimpleNamespace(folder=trained_on.folder.name))
    _require_held_out(frozen("other", ["How much is 0 + 1?", "What is 5 + 2?"], ["0", "1"]), tmp_path, run)
    with pytest.raises(InputError, match=r"trained on 1 of its problems, 'what is 1  \+ 2\?' for one|'what is 1 \+ 2"):
        _require_held_out(frozen("same", ["what is 1  + 2?", "What is 7 + 2?"], ["h0", "h1"]), tmp_path, run)


class TestHeldOutWhereTheBaseWasMoved:
    """Answers of a server, read with the base's tokenizer: the base is part of what they are known by."""

    def config(self, output_dir: Path, model: Path) -> RolloutConfig:
        server = ["rollouts.engine=openai", "rollouts.server.model=m", "rollouts.max_tokens=96"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return parse(
                RolloutConfig, compose("rollout", [f"output_dir={output_dir}", f"model.path={model}", *server])
            )

    def test_completions_are_found_with_model_path(self, tmp_path: Path) -> None:
        asked = self.config(tmp_path, TINY / "student")
        rollouts = asked.rollouts.model_copy(update={"samples_per_prompt": 1})
        data = asked.data.model_copy(update={"train_size": 5})
        identity = rollouts_identity(asked.model_copy(update={"rollouts": rollouts, "data": data}), "eval")
        rows = [
            {
                "problem_id": str(n), "prompt": str(n), "prompt_text": None, "completion": "1", "reward": 1.0,
                "answer": "1", "sample": 0, "source": "m", "tokens": None, "finished": True,
            }
            for n in range(5)
        ]  # fmt: skip
        folder = freeze(pd.DataFrame(rows), tmp_path / "rollouts", "heldout", {"keys": [hash_json(identity, 16)]})
        run: Any = SimpleNamespace(config=self.config(tmp_path, tmp_path / "gone"))
        settings = ProbeSet(completions=None, problems=5, base_url=None, api_key_env="NONE")
        assert probe_set(settings, tmp_path, run, Trust(), str(TINY / "student")).folder == folder
        with pytest.raises(UnavailableError, match="no such folder"):
            probe_set(settings, tmp_path, run, Trust())

    def test_problems_that_exceed_the_base_do_not_stop_the_analysis(self, tmp_path: Path) -> None:
        shutil.copytree(TINY / "student", tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
        with pytest.raises(UnavailableError, match=r"no users here.*set probe_set\.completions"):
            held_out_rollouts(self.config(tmp_path, tmp_path / "model"), 5)
