"""Multiple-choice problems in the user's own file, as in ARC, GPQA and MMLU."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any
from unicodedata import normalize

import numpy as np

from losslens.core.errors import InputError
from losslens.core.hashing import hash_file
from losslens.problems import Problem, ProblemSource, Split, Verdict, question_hash
from losslens.problems.questions import normalise
from losslens.problems.rows import read_rows
from losslens.problems.table import HashSplit, cell_text, require_columns, row_text, sample_problems


class MultipleChoice(ProblemSource):
    """A file of questions with lettered options, one of which is correct.

    A tenth of the questions is held out, chosen by hash, unless `eval_path` names a file of held-out questions.

    Args:
        path: JSON Lines, parquet, or CSV (`.csv`); None if only `eval_path` is used.
        columns: Names of the columns: `question`, `choices`, `answer`. `choices` is a column of lists (in CSV, JSON
            arrays; mappings with `text` and `label` as in ARC are accepted), or a list of columns with one option each.
            `answer` is a letter, a number counted from `first_index`, or the text of the correct option.
        eval_path: A file of held-out questions.
        template: Template of the prompt; `{question}` is replaced by the question and its options, one per line:
            `A. Paris`.
        first_index: Number of the first option, if answers are numbers.
        shuffle: Shuffles the options, seeded by the question, for files in which the correct option comes first.
    """

    def __init__(
        self,
        path: str | None,
        columns: Mapping[str, Any],
        eval_path: str | None = None,
        template: str = "{question}",
        first_index: int = 0,
        shuffle: bool = False,
    ) -> None:
        self.path = Path(path).expanduser() if path is not None else None
        self.eval_path = Path(eval_path).expanduser() if eval_path is not None else None
        self.template = template
        self.first_index = first_index
        self.shuffle = shuffle
        if set(columns) != {"question", "choices", "answer"}:
            raise InputError("source.columns must name exactly question, choices and answer")
        self.question, self.answer = str(columns["question"]), str(columns["answer"])
        self.choices = columns["choices"] if isinstance(columns["choices"], str) else list(columns["choices"])
        if "{question}" not in template:
            raise InputError("source.template must contain {question}")
        for role, file in (("path", self.path), ("eval_path", self.eval_path)):
            if file is not None and not file.is_file():
                raise InputError(f"{role}={file}: no such file")

    def identity(self, split: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`."""
        file = self.eval_path if split == "eval" and self.eval_path is not None else self.path
        settings = {
            name: getattr(self, name)
            for name in ("question", "choices", "answer", "template", "first_index", "shuffle")
        }
        return {
            "source": "multiple_choice",
            "version": 1,
            "sha256": None if file is None else hash_file(file),
            "divided": self.eval_path is None,
            **settings,
        }

    @property
    def verifier(self) -> LetterVerifier:
        """See `ProblemSource.verifier`."""
        return LetterVerifier()

    def rollouts(self) -> None:
        """See `ProblemSource.rollouts`; always None."""

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        file = self.eval_path if split == "eval" and self.eval_path is not None else self.path
        if file is None:
            raise InputError(f"{'eval_path' if split == 'eval' else 'path'}=FILE is required: no file is given")
        problems = self._problems(file)
        if self.eval_path is None:
            divided = HashSplit()
            problems = [problem for problem in problems if divided.is_in(problem.metadata["asked"], split)]
        elif split == "eval" and self.path is not None:
            trained_on = {normalise(p.metadata["asked"]): p.metadata["row"] for p in self._problems(self.path)}
            for problem in problems:
                if row := trained_on.get(normalise(problem.metadata["asked"])):
                    where = f"{file}: row {problem.metadata['row']}"
                    raise InputError(f"{where}: this question is also in {self.path}, row {row}")
        return sample_problems(problems, size, seed, str(file), split)

    def _problems(self, file: Path) -> list[Problem]:
        names, rows = read_rows(file, csv=True)
        require_columns(str(file), names, {"question": self.question, "answer": self.answer})
        for name in [self.choices] if isinstance(self.choices, str) else self.choices:
            require_columns(str(file), names, {"choices": name})
        problems: dict[str, Problem] = {}
        for number, row in rows:
            problem = self._problem(file, number, row)
            first = problems.setdefault(normalise(problem.metadata["question"]), problem)
            if first is not problem:
                raise InputError(
                    f"{file}: row {number}: the question and its options are already in row {first.metadata['row']}"
                )
        return list(problems.values())

    def _problem(self, file: Path, number: int, row: Mapping[str, Any]) -> Problem:
        asked = row_text(str(file), number, self.question, row).strip()
        labels, options = self._options(file, number, row)
        if not 2 <= len(options) <= len(ascii_uppercase):
            raise self._error(file, number, self.choices, f"{len(options)} options, not 2 to {len(ascii_uppercase)}")
        plain = [_plain(option) for option in options]
        if twice := next((option for n, option in enumerate(options) if plain[n] in plain[:n]), None):
            raise self._error(file, number, self.choices, f"{_shown(twice)} occurs twice")
        correct = self._correct(file, number, row, labels, plain)
        if self.shuffle:
            drawn = np.random.default_rng(int(question_hash(asked), 16)).permutation(len(options)).tolist()
            options, correct = [options[n] for n in drawn], drawn.index(correct)
        question = "\n".join([asked, *(f"{letter}. {option}" for letter, option in _lettered(options))])
        return Problem(
            f"choice-{question_hash(question)}",
            self.template.replace("{question}", question),
            ascii_uppercase[correct],
            {"question": question, "asked": asked, "choices": options, "row": number},
        )

    def _options(self, file: Path, number: int, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Returns the row's own labels of the options, if any, and their texts."""
        if isinstance(self.choices, list):
            return self.choices, [row_text(str(file), number, name, row).strip() for name in self.choices]
        given = row.get(self.choices)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                raise self._error(file, number, self.choices, f"{_shown(given)} is not a list of options") from None
        labels = given.get("label") if isinstance(given, Mapping) else None
        given = given.get("text") if isinstance(given, Mapping) else given
        if not isinstance(given, list) or (labels is not None and not isinstance(labels, list)):
            raise self._error(file, number, self.choices, f"{_shown(given)} is not a list of options")
        if labels is not None and len(labels) != len(given):
            raise self._error(file, number, self.choices, f"{len(labels)} labels for {len(given)} options")
        return [str(label) for label in labels or ()], [
            cell_text(str(file), number, self.choices, option).strip() for option in given
        ]

    def _correct(
        self, file: Path, number: int, row: Mapping[str, Any], labels: Sequence[str], plain: Sequence[str]
    ) -> int:
        """Returns the index of the correct option, given by its label, text, letter or number."""
        answer = row_text(str(file), number, self.answer, row).strip()
        if answer in labels:
            return labels.index(answer)
        if not isinstance(row[self.answer], int) and len(meant := _meant(_plain(answer), plain)) == 1:
            return meant[0]
        if len(answer) == 1 and answer.upper() in ascii_uppercase[: len(plain)]:
            return ascii_uppercase.index(answer.upper())
        if answer.isascii() and answer.isdigit() and 0 <= int(answer) - self.first_index < len(plain):
            return int(answer) - self.first_index
        raise self._error(file, number, self.answer, f"{_shown(answer)} is none of the {len(plain)} options")

    def _error(self, file: Path, number: int, column: str | list[str], what: str) -> InputError:
        return InputError(f"{file}: row {number}, column {column!r}: {what}")


def _lettered(options: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(ascii_uppercase, options, strict=False)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


_MARKUP = re.compile(r"[*`$]|\\[()\[\]]|\\(?:text|textbf|mathrm|mathbf)\s*(?=\{)|(?<!\w)_+|_+(?!\w)")
_AROUND = " \t\n\"'“”‘’.,;:!{}"


def _plain(text: str) -> str:
    """Removes markup, repeated whitespace and surrounding punctuation from an option, unless it is all punctuation."""
    words = " ".join(_MARKUP.sub("", normalize("NFKC", text)).split())
    return words.strip(_AROUND) or words


def _meant(words: str, plain: Sequence[str], begin: bool = False) -> list[int]:
    """Returns the options that `words` equals, or begins with if `begin`; ignores case if no option matches it."""
    end = r"(?!\w)" if begin else r"\Z"

    def matches(words: str, options: Sequence[str]) -> list[int]:
        return [n for n, option in enumerate(options) if option and re.match(re.escape(option) + end, words)]

    return matches(words, plain) or matches(words.casefold(), [option.casefold() for option in plain])


_MAX_ANNOUNCEMENTS = 100  # considered, from the last
# Matching takes linear time: every repetition is bounded, or of a character that nothing after it can match.
_WHAT = r"(?:answer|(?:correct|right|best|final)\s+(?:option|choice|letter|one|alternative))"
_STATED = re.compile(
    rf"\b{_WHAT}s?\b(?:\s+(?!is\b|are\b|would\b|must\b|should\b)[\w()'-]{{1,30}}){{0,8}}?\s{{0,9}}"
    r"(?:is|would\s+be|must\s+be|should\s+be|[:=])\s{0,9}[:=]?(?!\s{0,9}not\b)"
    r"|(?<!not )(?<!n't )\b(?:choose|select|pick|go\s+with)\s+"
    r"|####"
    r"|\\boxed\s{0,9}\{|<answer>",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?<![\w'])\(?([A-Z])\)?\s{1,9}is\s{1,9}(?:indeed\s+|clearly\s+|therefore\s+)?(?:the\s{1,9})?"
    r"(?:correct|right|best|answer)\b"
)
_LEADING = re.compile(
    r"(?:(?:the|either|option|choice|letter|answer|correct|right|best|is)\b\s*[:=]?\s*)+", re.IGNORECASE
)
_LETTER = re.compile(r"[\[({]?([A-Z])[\])}]?(?![\w'’])(?P<rest>.*)", re.DOTALL)
_OTHER = re.compile(r"\s*(?:,|/|&|or\b|and\b|,\s*or\b|,\s*and\b)\s*[\[({]?([A-Z])[\])}]?(?![\w'’])")
# After a letter that is also an English word.
_NO_WORD = re.compile(r"\s*(?:$|[^\w\s]|(?:because|since|as|which|for|due|given|and|or|is)\b)")
_AT_THE_END = re.compile(
    r"(?:\b(?:is|be|it's|so|thus|therefore|hence|with|option|choice)|[:=,→])\s+[\[(]?([A-Z])[\])]?[.!]?$", re.IGNORECASE
)


@dataclass(frozen=True)
class LetterVerifier:
    """The verifier of multiple-choice problems: compares the letter that a completion states last.

    A letter, or an option's own text, may be stated in a box, in an `<answer>` tag or after `####`; after “the answer
    is”, “Answer:”, “I choose” and the like, or before “is correct”; else by the last line, if it is a letter or an
    option and not the end of a list of options. Two letters at once count as none. Text before the last `</think>` is
    ignored.
    """

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`."""
        answer = stated(completion, problem.metadata["choices"])
        return Verdict(answer, answer == problem.answer)


def stated(completion: str, choices: Sequence[str]) -> str | None:
    """Returns the letter of the option that a completion states as its answer; None if it states none or several."""
    text = completion
    for end in ("</think>", "</thinking>", "</reasoning>"):
        text = text.rpartition(end)[2]
    text = _MARKUP.sub("", text)
    plain = [_plain(choice) for choice in choices]
    announced = [
        *deque(_STATED.finditer(text), _MAX_ANNOUNCEMENTS),
        *deque(_IS_RIGHT.finditer(text), _MAX_ANNOUNCEMENTS),
    ]
    for match in sorted(announced, key=lambda match: -match.start()):
        named = _letters(match[1] if match.re is _IS_RIGHT else _content(text, match), plain)
        if named:
            break
    else:
        named = _last_line(text, plain)
    return named if len(named) == 1 else None


def _content(text: str, match: re.Match[str]) -> str:
    """Returns the text after an announcement, up to the end of its box or tag, or of the first non-empty line."""
    rest = text[match.end() : match.end() + 2000]
    if match[0].lower() == "<answer>":
        return rest.partition("</")[0]
    if match[0].endswith("{"):
        return rest.partition("}")[0] if "{" not in rest.partition("}")[0] else rest.partition("}}")[0]
    return rest.lstrip().partition("\n")[0]


def _letters(content: str, plain: Sequence[str]) -> str:
    """Returns the letters of the options that a statement names: none, one, or several."""
    letters = ascii_uppercase[: len(plain)]
    content = _LEADING.sub("", content.strip(_AROUND), count=1) if _LEADING.match(content.strip(_AROUND)) else content
    content = content.strip().strip("\"'“”‘’{").strip()
    if re.fullmatch(r"[\[({]?[a-z][\])}]?[.!}]*", content):
        content = content.upper()
    match = _LETTER.match(content)
    if match and match[1] in letters and (match[1] not in "AI" or _NO_WORD.match(match["rest"])):
        other = _OTHER.match(match["rest"])
        return match[1] + (other[1] if other and other[1] in letters and other[1] != match[1] else "")
    words = _plain(content)
    begun = _meant(words, plain, begin=True)
    longest = max((len(plain[n]) for n in begun), default=0)
    named = [n for n in begun if len(plain[n]) == longest]
    if joined := re.match(r"\s*(?:,|/|\bor\b|\band\b)[\s,]*(?:or\s|and\s)?\s*", words[longest:]):
        named += _meant(words[longest + joined.end() :], plain, begin=True)
    return "".join(letters[n] for n in dict.fromkeys(named))


def _last_line(text: str, plain: Sequence[str]) -> str:
    """Returns the letter stated by the last line of a text without an announcement; empty if a list ends there."""
    lines = [line.strip() for line in text[-4000:].split("\n") if line.strip(_AROUND + "-#")]
    if not lines:
        return ""
    letters = ascii_uppercase[: len(plain)]
    last = lines[-1].lstrip("-# ")
    if match := _AT_THE_END.search(last):
        return match[1].upper() if match[1].upper() in letters else ""
    kinds = [_option(line.lstrip("-# "), plain) for line in lines[-2:]]
    is_list = len(kinds) == 2 and kinds[0] is not None and kinds[1] is not None and kinds[0][1] == kinds[1][1]
    return "" if kinds[-1] is None or is_list else kinds[-1][0]


def _option(line: str, plain: Sequence[str]) -> tuple[str, str] | None:
    """Returns the letter of the option that makes up a line, and its form: a letter, its words, or both."""
    letters = ascii_uppercase[: len(plain)]
    match = re.fullmatch(r"[\[(]?([A-Za-z])[\])]?\s*[.:)]?", line)
    if match and match[1].upper() in letters:
        return match[1].upper(), "letter"
    if len(named := _meant(_plain(line), plain)) == 1:
        return letters[named[0]], "words"
    match = re.match(r"[\[(]?([A-Z])[\])]?\s*[.:)]\s*(.*)", line)
    if match and match[1] in letters and _plain(match[2]) == plain[letters.index(match[1])]:
        return match[1], "both"
    return None
