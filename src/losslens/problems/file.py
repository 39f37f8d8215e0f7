"""Problems or complete rollouts in the user's own parquet or JSON Lines file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from losslens.core.errors import InputError
from losslens.core.hashing import hash_file
from losslens.problems import Problem, ProblemSource, Split, Verifier, question_hash
from losslens.problems.judges import VerifierSetting, identity_of, verifier_of
from losslens.problems.questions import SeenQuestions
from losslens.problems.rows import read_rows
from losslens.problems.table import HashSplit, require_columns, require_readable, row_text, sample_problems

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("id", "prompt", "answer", "completion", "reward", "sample", "source", "finished")


class File(ProblemSource):
    """A file of prompts and answers, or of complete rollouts with their rewards.

    A file with a completion and a reward in each row contains rollouts; all of its prompts are trained on. Of a file of
    problems, a tenth of the prompts is held out, chosen by hash, unless `eval_path` names a file of held-out problems.

    Args:
        path: Parquet or JSON Lines, with any extension; None if only `eval_path` is used.
        columns: Names of the columns: `prompt`, `answer`; `id` (optional; by default the hash of the prompt); for
            rollouts `completion`, `reward` (0 or 1), and optionally `sample`, `source` and `finished`.
        eval_path: A file of held-out problems.
        template: Template of the prompt, which contains `{question}`.
        verifier: Verifier of the answers (`judges.verifier_of`); None: `MathVerify`.
    """

    def __init__(
        self,
        path: str | None,
        columns: Mapping[str, str],
        eval_path: str | None = None,
        template: str = "{question}",
        verifier: VerifierSetting = None,
    ) -> None:
        self.path = Path(path).expanduser() if path is not None else None
        self.eval_path = Path(eval_path).expanduser() if eval_path is not None else None
        self.columns = dict(columns)
        self.template = template
        self._judge = verifier
        for name, file in (("path", self.path), ("eval_path", self.eval_path)):
            if file is not None and file.is_dir():
                raise InputError(f"{name}={file} is a folder; name a parquet or JSON Lines file in it")
            if file is not None and not file.is_file():
                raise InputError(f"{name}={file}: no such file")
        if set(self.columns) != set(_COLUMNS):
            raise InputError(f"source.columns must name exactly {', '.join(_COLUMNS)}")
        if "{question}" not in template:
            raise InputError("source.template must contain {question}")

    def identity(self, split: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`."""
        file = self.eval_path if split == "eval" and self.eval_path is not None else self.path
        holds_rollouts = self.path is not None and self._holds_rollouts(read_rows(self.path)[0])
        return {
            "source": "file",
            "sha256": None if file is None else hash_file(file),
            # All rollouts are trained on, whatever they are scored on.
            "divided": self.eval_path is None and not holds_rollouts,
            "columns": self.columns,
            "template": self.template,
            # Rollouts include their rewards.
            **({} if holds_rollouts and split == "train" else identity_of(self._judge)),
        }

    @property
    def verifier(self) -> Verifier:
        """See `ProblemSource.verifier`."""
        return verifier_of(self._judge)

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        if split == "eval" and self.eval_path is not None:
            problems = self._problems(self.eval_path)
            self._require_unseen(problems)
            return self._select(problems, size, seed, self.eval_path, split)
        if self.path is None:
            name = "eval_path" if split == "eval" else "path"
            raise InputError(f"{name}=FILE is required: no file of problems is given")
        names, _ = read_rows(self.path)
        if split == "eval" and self._holds_rollouts(names):
            raise InputError(
                f"data.eval_path: all rollouts of {self.path} are trained on; set held-out problems with "
                "data.eval_path=FILE or benchmark=…, or skip scoring with data.eval_size=0"
            )
        problems = self._problems(self.path)
        if self.eval_path is None:
            divided, count = HashSplit(), len(problems)
            problems = [problem for problem in problems if divided.is_in(problem.metadata["question"], split)]
            if not problems and split == "eval":
                raise InputError(
                    f"{self.path}: a tenth of the prompts is held out by hash, but none of these {count} is; "
                    "set held-out problems with data.eval_path=FILE or benchmark=…, or skip scoring with "
                    "data.eval_size=0"
                )
        return self._select(problems, size, seed, self.path, split)

    def _select(self, problems: list[Problem], size: int | None, seed: int, file: Path, split: Split) -> list[Problem]:
        selected = sample_problems(problems, size, seed, str(file), split)
        require_readable(str(file), self.verifier, selected)
        return selected

    def rollouts(self) -> pd.DataFrame | None:
        """See `ProblemSource.rollouts`.

        Raises:
            InputError: A row is incomplete or invalid; the message names row and column.
        """
        import pandas as pd

        if self.path is None:
            return None
        names, rows = read_rows(self.path)
        if not self._holds_rollouts(names):
            return None
        require_columns(str(self.path), names, self._column_names("prompt", "completion", "reward"))
        prompts: dict[str, tuple[str, int]] = {}
        seen: dict[tuple[str, int], int] = {}
        samples: dict[str, int] = {}
        rollouts = []
        for number, row in rows:
            prompt = self._text(number, "prompt", row)
            problem_id = self._id(number, prompt, row, names)
            first_prompt, first_row = prompts.setdefault(problem_id, (prompt, number))
            if first_prompt != prompt:
                raise self._error(number, "id", f"{problem_id!r} has a different prompt in row {first_row}")
            if self.columns["sample"] in names:
                sample = self._sample(number, row)
            else:
                sample = samples.get(problem_id, 0)
                samples[problem_id] = sample + 1
            first = seen.setdefault((problem_id, sample), number)
            if first != number:
                what = (
                    f"{problem_id!r}, sample {sample},"
                    if self.columns["id"] in names
                    else f"sample {sample} of the prompt"
                )
                raise self._error(number, self._id_column(names), f"{what} is already in row {first}")
            rollouts.append(
                {
                    "problem_id": problem_id,
                    "prompt": self.template.replace("{question}", prompt),
                    "prompt_text": None,
                    "completion": self._text(number, "completion", row),
                    "reward": self._reward(number, row),
                    "answer": self._text(number, "answer", row) if self.columns["answer"] in names else "",
                    "sample": sample,
                    "source": self._text(number, "source", row) if self.columns["source"] in names else self.path.name,
                    "tokens": None,
                    "finished": self._finished(number, row, names),
                }
            )
        self._require_one_id_per_prompt(prompts)
        return pd.DataFrame(rollouts)

    def _require_one_id_per_prompt(self, prompts: Mapping[str, tuple[str, int]]) -> None:
        ids: dict[str, tuple[str, int]] = {}
        for problem_id, (prompt, number) in prompts.items():
            other, first = ids.setdefault(prompt, (problem_id, number))
            if other != problem_id:
                raise self._error(number, "id", f"{problem_id!r} has the same prompt as {other!r} in row {first}")

    def _require_unseen(self, held_out_problems: list[Problem]) -> None:
        if self.path is None:
            return
        _, rows = read_rows(self.path)
        prompts = [(number, self._text(number, "prompt", row)) for number, row in rows]
        trained_on = SeenQuestions((prompt for _, prompt in prompts), [self.template])
        for problem in held_out_problems:
            question = problem.metadata["question"]
            if trained_on.has(question, [self.template]):
                alike = (number for number, prompt in prompts if SeenQuestions([prompt], [self.template]).has(question))
                what = f"this prompt is also in {self.path}, row {next(alike, '?')}"
                raise self._error(problem.metadata["row"], "prompt", what, self.eval_path)

    def _column_names(self, *columns: str) -> dict[str, str]:
        return {name: self.columns[name] for name in columns}

    def _holds_rollouts(self, names: list[str]) -> bool:
        return self.columns["completion"] in names or self.columns["reward"] in names

    def _problems(self, file: Path) -> list[Problem]:
        names, rows = read_rows(file)
        require_columns(str(file), names, self._column_names("prompt", "answer"))
        problems: dict[str, tuple[Problem, int]] = {}
        questions: dict[str, int] = {}
        for number, row in rows:
            question = self._text(number, "prompt", row, file)
            problem_id = self._id(number, question, row, names, file)
            problem = Problem(
                problem_id,
                self.template.replace("{question}", question),
                self._text(number, "answer", row, file),
                {"question": question, "row": number},
            )
            if problem_id in problems and self.columns["id"] in names:
                raise self._error(number, "id", f"{problem_id!r} is already in row {problems[problem_id][1]}", file)
            first = questions.setdefault(question, number)
            if first != number:
                raise self._error(number, "prompt", f"the prompt is already in row {first}", file)
            problems[problem_id] = problem, number
        return [problem for problem, _ in problems.values()]

    def _text(self, number: int, name: str, row: Mapping[str, Any], file: Path | None = None) -> str:
        return row_text(str(file or self.path), number, self.columns[name], row, listed=name == "answer")

    def _error(self, number: int, name: str, what: str, file: Path | None = None) -> InputError:
        return InputError(f"{file or self.path}: row {number}, column {self.columns[name]!r}: {what}")

    def _id(
        self, number: int, question: str, row: Mapping[str, Any], names: list[str], file: Path | None = None
    ) -> str:
        if self.columns["id"] not in names:
            return f"prompt-{question_hash(question)}"
        return self._text(number, "id", row, file)

    def _id_column(self, names: list[str]) -> str:
        """Returns the column that identifies a problem."""
        return "id" if self.columns["id"] in names else "prompt"

    def _reward(self, number: int, row: Mapping[str, Any]) -> float:
        value = row.get(self.columns["reward"])
        if value is None:
            raise self._error(number, "reward", "missing")
        if isinstance(value, float) and math.isnan(value):
            raise self._error(number, "reward", "NaN")
        if isinstance(value, str):
            raise self._error(number, "reward", f"{value[:40]!r} is a string; write 1 or 0 without quotes")
        if not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
            raise self._error(number, "reward", f"{value!r} is not a number")
        if value not in (0, 1):
            raise self._error(number, "reward", f"{str(value)[:40]} is neither 1 (correct) nor 0 (incorrect)")
        return float(value)

    def _sample(self, number: int, row: Mapping[str, Any]) -> int:
        value = row.get(self.columns["sample"])
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer)) or value not in range(1 << 31):
            raise self._error(number, "sample", f"{value!r} is not an integer from 0 to 2³¹ − 1")
        return int(value)

    def _finished(self, number: int, row: Mapping[str, Any], names: list[str]) -> bool:
        if self.columns["finished"] not in names:
            return True
        value = row.get(self.columns["finished"])
        if not isinstance(value, (bool, np.bool_)):
            raise self._error(number, "finished", f"{value!r} is neither true nor false")
        return bool(value)
