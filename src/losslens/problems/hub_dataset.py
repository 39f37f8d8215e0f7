"""Problems from a dataset on the Hugging Face hub, or from a local folder of the same layout."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from losslens.core import hub
from losslens.core.errors import InputError, first_line
from losslens.core.hashing import hash_file, hash_json
from losslens.core.notices import print_once
from losslens.core.patterns import compile_pattern
from losslens.problems import Problem, ProblemSource, Split, Verifier, question_hash
from losslens.problems.judges import VerifierSetting, identity_of, verifier_of
from losslens.problems.questions import normalise
from losslens.problems.table import HashSplit, cell_text, is_missing, require_columns, require_readable, sample_problems

_WHOLE = r"(?s)\s*(.*?)\s*$"  # the whole answer without surrounding whitespace
_PATTERN_SECONDS = 20.0  # time limit for all answers of a split; a sensible pattern takes microseconds per answer


class HubDataset(ProblemSource):
    """Questions and answers of a dataset.

    Rows without a question or an answer, and repeated questions, are skipped; their number is printed.

    Args:
        name: Prefix of the problems' ids.
        repo: Hub id, or a local folder of the same layout.
        splits: The dataset's splits to use for `train` and `eval`; None if there is none. If both are the same, a tenth
            of the questions is held out, chosen by the hash of their text.
        columns: Names of the columns with `prompt` and `answer`.
        revision: Commit, tag or branch of the repository; None is the main branch.
        config: Configuration (subset) of the dataset.
        files: Data file of each of the dataset's splits, if the repository does not declare it; a path inside it.
        answer_pattern: Regular expression whose first group extracts the reference answer; None: the whole cell.
        template: Template of the prompt, which contains `{question}`.
        verifier: Verifier of the answers (`judges.verifier_of`); None: `MathVerify`.
    """

    def __init__(
        self,
        name: str,
        repo: str,
        splits: Mapping[str, str | None],
        columns: Mapping[str, str],
        revision: str | None = None,
        config: str | None = None,
        files: Mapping[str, str] | None = None,
        answer_pattern: str | None = None,
        template: str = "{question}",
        verifier: VerifierSetting = None,
    ) -> None:
        self.name = name
        self.repo = repo
        self.splits = dict(splits)
        self.columns = dict(columns)
        self.revision = revision
        self.config = config
        self.files = dict(files or {})
        self.template = template
        self._judge = verifier
        if set(self.columns) != {"prompt", "answer"}:
            raise InputError("source.columns must name exactly prompt and answer")
        if "{question}" not in template:
            raise InputError("source.template must contain {question}")
        for split, file in self.files.items():
            _require_inside(f"source.files.{split}", file)
        try:
            self.answer_pattern = compile_pattern(answer_pattern or _WHOLE)
        except ValueError as error:
            raise InputError(f"source.answer_pattern: {error}") from error
        if self.answer_pattern.groups < 1:
            raise InputError("source.answer_pattern must contain a group")

    def identity(self, split: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`; contains the commit, or the hash of a folder's content."""
        folder = self._folder
        if folder is None:
            where = {
                "repo": self.repo,
                "revision": hub.resolve_commit("source.repo", self.repo, self.revision, "dataset"),
            }
        else:
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            # Names that begin with a dot belong to git or the hub's client.
            hashes = {name: hash_file(path) for name, path in files.items() if not re.search(r"(^|/)\.", name)}
            where = {"sha256": hash_json(hashes, 64)}
        settings = {name: getattr(self, name) for name in ("columns", "config", "files", "template")}
        return {
            "source": "hub_dataset",
            **where,
            **settings,
            "split": self.splits.get(split),
            "divided": self._divided,
            "answer_pattern": self.answer_pattern.pattern,
            **identity_of(self._judge),
        }

    @property
    def verifier(self) -> Verifier:
        """See `ProblemSource.verifier`."""
        return verifier_of(self._judge)

    def rollouts(self) -> None:
        """See `ProblemSource.rollouts`; always None."""

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        name = self.splits.get(split)
        if name is None:
            raise InputError(f"source.splits.{split}: {self.name} has no such split; choose other data for it")
        rows = self._rows(name)
        where = f"source.repo={self.repo}, split {name!r}"
        require_columns(where, rows, self.columns)
        count = len(rows[self.columns["prompt"]])
        if count == 0:
            raise InputError(f"{where}: contains no rows")
        reference = _Reference(self.answer_pattern)
        problems: dict[str, Problem] = {}
        skipped: dict[str, list[int]] = {"repeated": [], "incomplete": []}
        cells = zip(rows[self.columns["prompt"]], rows[self.columns["answer"]], strict=True)
        for number, (question_cell, answer_cell) in enumerate(cells, 1):
            if is_missing(question_cell) or is_missing(answer_cell):
                skipped["incomplete"].append(number)
                continue
            question = cell_text(where, number, self.columns["prompt"], question_cell)
            answer = reference.of(cell_text(where, number, self.columns["answer"], answer_cell, listed=True))
            if not answer:
                skipped["incomplete"].append(number)
            elif normalise(question) in problems:
                skipped["repeated"].append(number)
            else:
                problems[normalise(question)] = self._problem(question, answer, number)
        if len(problems) < count:
            why = ", ".join(f"{len(at)} {what}, first in row {at[0]}" for what, at in skipped.items() if at)
            print_once(f"{self.name}, split {name!r}: skipped {count - len(problems)} rows ({why})")
        divided = HashSplit()
        available = [
            problem
            for problem in problems.values()
            if not self._divided or divided.is_in(problem.metadata["question"], split)
        ]
        selected = sample_problems(available, size, seed, where, split)
        require_readable(where, self.verifier, selected)
        return selected

    def _problem(self, question: str, answer: str, row: int) -> Problem:
        prompt = self.template.replace("{question}", question)
        metadata = {"question": question, "row": row}
        return Problem(f"{self.name}-{question_hash(question)}", prompt, answer, metadata)

    @property
    def _divided(self) -> bool:
        """True if both splits come from the same split of the dataset, divided by the hash of the question."""
        return self.splits.get("train") == self.splits.get("eval")

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.repo).expanduser()
        if folder.is_dir():
            return folder
        if not hub.is_hub_id(self.repo):
            raise InputError(f"source.repo={self.repo}: no such folder")
        return None

    def _rows(self, split: str) -> dict[str, list[Any]]:
        """Loads the columns of a split."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        commit, folder = None, self._folder
        if folder is None:
            if self.repo in _PACKAGED_DATASETS_MODULES:  # would read files from anywhere
                raise InputError(f"source.repo={self.repo} is a loader of the datasets library, not a dataset")
            commit = hub.resolve_commit("source.repo", self.repo, self.revision, "dataset")
        files = {split: self.files[split]} if split in self.files else None
        where = f"source.repo={self.repo}, split {split!r}"
        if commit and not hub.is_available("source.repo", self.repo, commit, "dataset"):
            raise InputError(f"{where}: the hub cannot be reached, and there is no local copy")
        with ExitStack() as stack:
            # The library caches downloads by commit, but folders by name, even if their content has changed.
            cache = None if commit else stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
            try:
                for name in _declared_files(folder, self.repo, commit):
                    _require_inside(f"source.repo={self.repo}: the data_files of its README.md", name)
                rows = load_dataset(
                    # The full path, since a folder's name alone could be that of one of the library's loaders.
                    self.repo if folder is None else str(folder.resolve()),
                    self.config,
                    split=split,
                    data_files=files,
                    revision=commit,
                    cache_dir=cache,
                )
                return dict(rows.to_dict())
            except InputError:
                raise
            except DatasetGenerationError as error:
                raise InputError(
                    f"{where}: an empty or damaged file ({first_line(error.__cause__ or error)})"
                ) from error
            except Exception as error:  # depends on the library that reads the files' format
                raise InputError(f"{where}: {first_line(error)}") from error


class _Reference:
    """Extracts the reference answers of a split with a pattern, which may be untrusted, in bounded time."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self._seconds_left = _PATTERN_SECONDS

    def of(self, text: str) -> str:
        """Returns the first group without surrounding whitespace; empty if the pattern does not match.

        Raises:
            InputError: The pattern takes too long.
        """
        if self._pattern.pattern == _WHOLE:
            return text.strip()
        began = time.monotonic()
        try:
            match = self._pattern.search(text, timeout=max(self._seconds_left, 0.001))
        except TimeoutError as error:
            raise InputError("source.answer_pattern takes too long to match") from error
        self._seconds_left -= time.monotonic() - began
        return (match[1] or "").strip() if match else ""


def _require_inside(field: str, path: Any) -> None:
    """Requires a relative path inside the repository, since the datasets library would open any address.

    Raises:
        InputError: It is not such a path.
    """
    if not isinstance(path, str) or not path:
        raise InputError(f"{field} must be a path inside the repository, not {str(path)[:60]!r}")
    plain = path.replace("\\", "/")
    is_absolute = "://" in plain or "::" in plain or _scheme(plain) or plain.startswith(("/", "~"))
    if is_absolute or ".." in PurePosixPath(plain).parts:
        raise InputError(f"{field}: {path[:100]!r} is outside the repository; use a relative path inside it")


def _scheme(path: str) -> str:
    try:
        return urlsplit(path).scheme
    except ValueError:  # an incomplete IPv6 address
        return "?"


def _declared_files(folder: Path | None, repo: str, commit: str | None) -> Iterator[Any]:
    """Yields the paths of the data files that the repository's own description declares."""
    import yaml
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in ("README.md", ".huggingface.yaml"):
        if folder is not None:
            file = folder / name
            if not file.is_file():
                continue
        else:
            try:
                file = Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))
            except EntryNotFoundError:
                continue
        card = DatasetCard.load(file).data.to_dict() if name == "README.md" else yaml.safe_load(file.read_bytes())
        configs = card.get("configs") if isinstance(card, Mapping) else None
        for config in configs if isinstance(configs, list) else []:
            if isinstance(config, Mapping):
                yield from _texts_in([config.get("data_files"), config.get("data_dir")])


def _texts_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = [entry for name, entry in value.items() if name != "split"]
    if isinstance(value, list):
        for entry in value:
            yield from _texts_in(entry)
    elif value:
        yield value
