"""Multiple-choice problems: reading of files, and the letter that a completion states."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from losslens.core.errors import InputError
from losslens.problems import Problem
from losslens.problems.multiple_choice import MultipleChoice, stated
from losslens.runs.recorded import Trust, data_of
from tests.conftest import script

COLUMNS: dict[str, Any] = {"question": "question", "choices": "choices", "answer": "answer"}
CITIES = ["Rome", "Paris", "New York", "York"]
ROW = {"question": "Where is the Louvre?", "choices": CITIES, "answer": "B"}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def source(file: Path | None, columns: dict[str, Any] = COLUMNS, **given: Any) -> MultipleChoice:
    return MultipleChoice(None if file is None else str(file), columns, **given)


def asked(file: Path, columns: dict[str, Any] = COLUMNS, **given: Any) -> list[Problem]:
    """All questions of a file, in its order."""
    problems = source(None, columns, eval_path=str(file), **given).problems("eval", None, 0)
    return sorted(problems, key=lambda problem: problem.metadata["row"])


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        # In a place of its own.
        (r"So \boxed{B}.", "B"),
        (r"So $\boxed{\text{(B)}}$.", "B"),
        (r"\boxed{Paris}", "B"),
        ("<answer>b</answer>", "B"),
        ("#### B", "B"),
        # Announced.
        ("Answer: (C)", "C"),
        ("**Answer:** C", "C"),
        ("The answer is **C**.", "C"),
        ("The answer is C.", "C"),
        ("the correct answer is option c", "C"),
        ("The correct option is: C) New York", "C"),
        ("Final Answer\n\nAnswer:\nC", "C"),
        ("The best choice would be D because it is old.", "D"),
        ("The answer to this question is A because of its age.", "A"),
        ("I choose D.", "D"),
        ("Therefore, (D) is correct.", "D"),
        ("D is the right answer.", "D"),
        ("The answer is Paris.", "B"),
        ("The answer is “New York”, of course.", "C"),  # not York, nor a letter of it
        ("Answer: york", "D"),
        # At the end.
        ("B", "B"),
        ("(b)", "B"),
        ("**B.**", "B"),
        ("It has to be in France.\nB", "B"),
        ("It has to be in France, so it's B.", "B"),
        ("It has to be in France.\n\n**B. Paris**", "B"),
        ("It has to be in France.\n\nParis", "B"),
        # The options before, and a choice after them.
        ("A. Rome\nB. Paris\nC. New York\nD. York\n\nAnswer: B", "B"),
        ("A. Rome\nB. Paris\nC. New York\nD. York\n\nB", "B"),
        # The last word counts.
        ("The answer is A. Wait, that is wrong: the answer is C.", "C"),
        (r"\boxed{A} No. Answer: C", "C"),
        (r"Answer: C. In a box: \boxed{B}", "B"),
        ("The answer is A.\nB is correct, then.", "B"),
        ("<think>The answer is A.</think>The answer is D.", "D"),
        ("The answer is not A. The answer is B.", "B"),
        ("The answer is B, not A.", "B"),
        # Nothing is chosen.
        ("", None),
        ("I do not know.", None),
        ("A. Rome\nB. Paris\nC. New York\nD. York", None),
        ("- **A.** Rome\n- **B.** Paris\n- **C.** New York\n- **D.** York", None),
        ("Option A: Rome\nOption B: Paris\nOption C: New York\nOption D: York", None),
        ("Rome\nParis\nNew York\nYork", None),
        ("A\nB\nC\nD", None),
        ("The answer is A or B.", None),
        ("The answer is Rome or Paris.", None),
        ("The answer is either A or D.", None),
        ("The answer is B. Or, the answer is A, C.", None),
        ("The answer is a matter of taste.", None),
        ("The answer is E.", None),
        ("I would not choose A", None),
        ("<think>The answer is A.</think>", None),
        ("Paris is a city, and so is Rome.", None),
        ("Answer: LETTER", None),
    ],
)
def test_the_letter_that_is_stated(completion: str, letter: str | None) -> None:
    assert stated(completion, CITIES) == letter


def test_options_that_look_like_others() -> None:
    numbers = ["1", "10", "1.5", "None of the above"]
    assert [stated(f"The answer is {option}.", numbers) for option in numbers] == list("ABCD")
    genotypes = ["AA", "Aa", "aa"]
    assert [stated(f"The answer is {option}.", genotypes) for option in genotypes] == list("ABC")
    assert stated("The answer is aA.", genotypes) is None
    assert [stated(f"Answer: {sign}", ["+", "-", "."]) for sign in "+-."] == list("ABC")
    formulas = ["$x^2$", "$x^2 + 1$", "$2x$"]
    assert [stated(f"The answer is {option}", formulas) for option in formulas] == list("ABC")


@pytest.mark.parametrize(
    "text", ["answer " * 20_000, "is " * 50_000, r"\boxed{" * 20_000, "A or " * 30_000, "(" * 90_000]
)
def test_hostile_completions_take_little_time(text: str) -> None:
    began = time.monotonic()
    stated(text, CITIES)
    assert time.monotonic() - began < 5


def test_the_verifier(tmp_path: Path) -> None:
    [problem] = asked(written(tmp_path, ROW), template="{question}\nEnd with the letter.")
    assert problem.prompt == ("Where is the Louvre?\nA. Rome\nB. Paris\nC. New York\nD. York\nEnd with the letter.")
    verifier = source(None).verifier
    said = [verifier(problem, text) for text in ("Answer: B", "Answer: A", "Well.")]
    assert [(verdict.answer, verdict.correct) for verdict in said] == [("B", True), ("A", False), (None, False)]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"answer": "b"}, {}),
        ({"answer": "Paris"}, {}),
        ({"answer": "paris."}, {}),
        ({"answer": "Aa", "choices": ["AA", "Aa", "aa"]}, {}),
        ({"answer": 1}, {}),
        ({"answer": "2"}, {"first_index": 1}),
        ({"choices": {"text": CITIES, "label": ["1", "2", "3", "4"]}, "answer": "2"}, {}),
        ({"choices": json.dumps(CITIES)}, {}),
        ({"choices": ["1", "2", "4"], "answer": 1}, {}),
    ],
)
def test_the_correct_option(changes: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    [problem] = asked(written(tmp_path, {**ROW, **changes}), **options)
    assert problem.answer == "B"


def test_columns_of_options_in_csv_and_parquet(tmp_path: Path) -> None:
    """As in GPQA: the correct option comes first, so the options are shuffled, seeded by the question."""
    names = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2"]
    table = pd.DataFrame([(f"Question {n}?", "yes", "no", "perhaps") for n in range(40)], columns=["Question", *names])
    columns = {"question": "Question", "choices": names, "answer": "Correct Answer"}
    table.to_csv(tmp_path / "q.csv", index=False)
    table.to_parquet(tmp_path / "q.parquet")
    problems = asked(tmp_path / "q.csv", columns, shuffle=True)
    assert problems == asked(tmp_path / "q.parquet", columns, shuffle=True)
    assert {problem.answer for problem in problems} == set("ABC")
    assert all(f"{problem.answer}. yes" in problem.prompt for problem in problems)
    assert {problem.answer for problem in asked(tmp_path / "q.csv", columns)} == {"A"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "E"}, "row 2, column 'answer': 'E' is none of the 4 options"),
        ({"answer": "Berlin"}, "row 2, column 'answer': 'Berlin' is none of the 4 options"),
        ({"answer": 4}, "row 2, column 'answer': '4' is none of the 4 options"),
        ({"answer": None}, "row 2, column 'answer': missing"),
        ({"question": " "}, "row 2, column 'question': empty"),
        ({"choices": None}, "row 2, column 'choices': None is not a list of options"),
        ({"choices": "Rome, Paris"}, "row 2, column 'choices': 'Rome, Paris' is not a list of options"),
        ({"choices": ["Rome", ""]}, "row 2, column 'choices': empty"),
        ({"choices": ["Rome", "Rome. ", "Paris"]}, "row 2, column 'choices': 'Rome.' occurs twice"),
        ({"choices": ["Rome"], "answer": "A"}, "row 2, column 'choices': 1 options, not 2 to 26"),
        ({"choices": [str(n) for n in range(27)]}, "row 2, column 'choices': 27 options, not 2 to 26"),
        ({"choices": {"text": CITIES, "label": ["A"]}}, "row 2, column 'choices': 1 labels for 4 options"),
        ({"question": ROW["question"]}, "row 2: the question and its options stand in row 1 already"),
    ],
)
def test_errors_name_file_and_row(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path, ROW, {**ROW, "question": "Where is the other Louvre?", **changes})
    with pytest.raises(InputError) as refused:
        asked(file)
    assert str(refused.value) == f"{file}: {message}"


def test_missing_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'choices'"):
        asked(written(tmp_path, {"question": "?", "answer": "A"}))
    (tmp_path / "short.csv").write_text("question,choices,answer\n1,2\n")
    with pytest.raises(InputError, match=r"short\.csv: row 1: the number of cells"):
        asked(tmp_path / "short.csv")
    with pytest.raises(InputError, match=r"^path=.*no such file"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"source\.columns: "):
        source(None, {"question": "q"})
    with pytest.raises(InputError, match=r"source\.template: "):
        source(None, template="?")


def test_splits_share_no_question(tmp_path: Path) -> None:
    """A question with different options counts as the same question."""
    rows = [{**ROW, "question": f"Question {n}?", "choices": [*CITIES, str(m)]} for n in range(60) for m in range(2)]
    file = written(tmp_path, *rows)
    train, held_out = (source(file).problems(split, None, 0) for split in ("train", "eval"))
    assert not {p.metadata["asked"] for p in train} & {p.metadata["asked"] for p in held_out}
    assert len(train) + len(held_out) == 120
    assert source(file).problems("train", 5, 1) == source(file).problems("train", 5, 1)
    assert source(file).identity("train") == source(file).identity("eval")
    assert source(file).identity("train") != source(file, shuffle=True).identity("train")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[7]) + "\n")
    with pytest.raises(InputError, match=r"other\.jsonl: row 1: .* also in .*, row 8$"):
        source(file, eval_path=str(other)).problems("eval", None, 0)


def test_the_entry_scripts(tmp_path: Path) -> None:
    """Rollouts, a run and its scores on the embedded model, which knows no answer; then a benchmark."""
    rows = [
        {"question": f"Which is {n}+1?", "choices": [str(n + m) for m in (3, 1, 2)], "answer": "B"} for n in range(60)
    ]
    file, out = written(tmp_path, *rows), tmp_path / "out"
    line = ["data=multiple_choice", f"data.path={file}", "data.train_size=4", "data.eval_size=2", f"output_dir={out}"]
    line += [
        "rollouts.policy=base",
        "rollouts.samples_per_prompt=2",
        "rollouts.max_tokens=8",
        "rollouts.accept=[all_incorrect,mostly_cut]",
    ]
    few = ["optim.max_steps=1", "optim.batch_size=4", "lora_rank=r4", "logger=none", "evaluation.max_tokens=8"]
    script("rollout.py", *line)
    script("train.py", *line, *few, "method=sft")
    [run] = out.glob("main/sft-*/manifest.json")
    assert (run.parent / "eval" / "multiple_choice.parquet").is_file()
    told = json.loads(run.read_text())["config"]["data"]
    assert data_of(told, Trust()).path == str(file)  # a stranger's manifest may name it: it runs no code
    benchmark = ["benchmark=multiple_choice", f"benchmark.multiple_choice.eval_path={file}", "evaluation.max_tokens=8"]
    script("evaluate.py", *benchmark, "benchmark.multiple_choice.eval_size=3", f"output_dir={out}")
    assert len(list(run.parent.glob("eval/*.parquet"))) == 2
    bad = written(tmp_path, {**ROW, "answer": "E"})
    outcome = script("rollout.py", *line, check=2)
    assert outcome.stderr.strip().endswith(f"{bad}: row 1, column 'answer': 'E' is none of the 4 options")
