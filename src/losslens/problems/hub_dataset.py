"""Problems from a dataset of the Hugging Face hub, or from a local folder of the same layout."""

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
from losslens.core.notices import say_once
from losslens.core.patterns import compile_pattern
from losslens.problems import Problem, ProblemSource, Split, Verifier, question_hash
from losslens.problems.judges import VerifierSetting, identity_of, verifier_of
from losslens.problems.questions import normalise
from losslens.problems.table import Divided, cell, is_missing, require_columns, require_readable, select_split

_WHOLE = r"(?s)\s*(.*?)\s*$"  # an answer as it stands, without the space around it
_SECONDS = 20.0  # for one pattern on all answers of a split; a sensible pattern takes microseconds an answer


class HubDataset(ProblemSource):
    """Questions and answers of a dataset.

    Args:
        name: What the problems' ids begin with.
        repo: The hub id, or a local folder of the same layout.
        splits: The dataset's own split that `train` and `eval` are taken from; null where there is none. Where both are
            the same, the questions whose text hashes into the last tenth are held out.
        columns: Names of the columns that hold `prompt` and `answer`.
        revision: Commit, tag or branch of the repository; null is its main branch.
        config: The dataset's configuration (a subset's name).
        files: The data file of each of the dataset's splits, where the repository does not say; a path inside it.
        answer_pattern: A regular expression whose first group is the reference answer in its column; null: all of it.
        template: The prompt, with `{question}` in it.
        verifier: Who checks the answers (`judges.verifier_of`); null: `MathVerify`.

    A row without a question or an answer is left out, and so is a question that came before; how many is said.
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
            raise InputError("source.columns: names prompt and answer, and nothing else")
        if "{question}" not in template:
            raise InputError("source.template: no {question} in it")
        for split, file in self.files.items():
            _require_inside(f"source.files.{split}", file)
        try:
            self.answer_pattern = compile_pattern(answer_pattern or _WHOLE)
        except ValueError as error:
            raise InputError(f"source.answer_pattern: {error}") from error
        if self.answer_pattern.groups < 1:
            raise InputError("source.answer_pattern: no group in it")

    def identity(self, split: Split) -> dict[str, Any]:
        """See `ProblemSource.identity`: the commit, or the content of a folder."""
        folder = self._folder
        if folder is None:
            where = {
                "repo": self.repo,
                "revision": hub.resolve_commit("source.repo", self.repo, self.revision, "dataset"),
            }
        else:
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            # What begins with a dot is the client's and git's.
            kept = {name: hash_file(path) for name, path in files.items() if not re.search(r"(^|/)\.", name)}
            where = {"sha256": hash_json(kept, 64)}
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
        """See `ProblemSource.rollouts`: there are none."""

    def problems(self, split: Split, size: int | None, seed: int) -> list[Problem]:
        """See `ProblemSource.problems`."""
        name = self.splits.get(split)
        if name is None:
            raise InputError(f"source.splits.{split}: {self.name} has no split for it; choose other data for it")
        rows = self._rows(name)
        where = f"source.repo={self.repo}, split {name!r}"
        require_columns(where, rows, self.columns)
        count = len(rows[self.columns["prompt"]])
        if count == 0:
            raise InputError(f"{where}: no row in it")
        reference = _Reference(self.answer_pattern)
        found: dict[str, Problem] = {}
        left_out: dict[str, list[int]] = {"repeated": [], "not complete": []}
        cells = zip(rows[self.columns["prompt"]], rows[self.columns["answer"]], strict=True)
        for number, (question_cell, answer_cell) in enumerate(cells, 1):
            if is_missing(question_cell) or is_missing(answer_cell):
                left_out["not complete"].append(number)
                continue
            question = cell(where, number, self.columns["prompt"], question_cell)
            answer = reference.of(cell(where, number, self.columns["answer"], answer_cell, listed=True))
            if not answer:
                left_out["not complete"].append(number)
            elif normalise(question) in found:
                left_out["repeated"].append(number)
            else:
                found[normalise(question)] = self._problem(question, answer, number)
        if len(found) < count:
            why = ", ".join(f"{len(those)} {what}, row {those[0]} first" for what, those in left_out.items() if those)
            say_once(f"{self.name}, split {name!r}: {count - len(found)} rows left out ({why})")
        divided = Divided()
        kept = [
            problem
            for problem in found.values()
            if not self._divided or divided.is_in(problem.metadata["question"], split)
        ]
        picked = select_split(kept, size, seed, where, split)
        require_readable(where, self.verifier, picked)
        return picked

    def _problem(self, question: str, answer: str, row: int) -> Problem:
        prompt = self.template.replace("{question}", question)
        about = {"question": question, "row": row}
        return Problem(f"{self.name}-{question_hash(question)}", prompt, answer, about)

    @property
    def _divided(self) -> bool:
        """Whether both splits come from one of the dataset's, and are told apart by the question."""
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
        """The columns of a split."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        commit, folder = None, self._folder
        if folder is None:
            if self.repo in _PACKAGED_DATASETS_MODULES:  # it would read whatever files it is given, from anywhere
                raise InputError(f"source.repo={self.repo}: a loader of the datasets library, not a dataset")
            commit = hub.resolve_commit("source.repo", self.repo, self.revision, "dataset")
        files = {split: self.files[split]} if split in self.files else None
        where = f"source.repo={self.repo}, split {split!r}"
        if commit and not hub.is_available("source.repo", self.repo, commit, "dataset"):
            raise InputError(f"{where}: the hub cannot be reached, and there is no local copy")
        with ExitStack() as stack:
            # What is downloaded is kept by its commit; a folder would be kept by its name, whatever is in it now.
            cache = None if commit else stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
            try:
                for name in _declared_files(folder, self.repo, commit):
                    _require_inside(f"source.repo={self.repo}: the data_files of its README.md", name)
                rows = load_dataset(
                    # A folder by its whole path: by its name it could be one of the library's own loaders.
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
            except Exception as error:  # of whatever library reads the format that the files turn out to be in
                raise InputError(f"{where}: {first_line(error)}") from error


class _Reference:
    """Reads the reference answers of a split by a pattern, which may be a stranger's, in bounded time."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self._left = _SECONDS

    def of(self, text: str) -> str:
        """The first group, without space around it; empty where the pattern does not match.

        Raises:
            InputError: The pattern takes too long.
        """
        if self._pattern.pattern == _WHOLE:
            return text.strip()
        began = time.monotonic()
        try:
            found = self._pattern.search(text, timeout=max(self._left, 0.001))
        except TimeoutError as error:
            raise InputError("source.answer_pattern: takes too long to match") from error
        self._left -= time.monotonic() - began
        return (found[1] or "").strip() if found else ""


def _require_inside(field: str, path: Any) -> None:
    """Refuses what is not a relative path inside the repository: the datasets library would open any address.

    Raises:
        InputError: It leads elsewhere.
    """
    if not isinstance(path, str) or not path:
        raise InputError(f"{field}: a path inside the repository, not {str(path)[:60]!r}")
    plain = path.replace("\\", "/")
    leads_on = "://" in plain or "::" in plain or _scheme(plain) or plain.startswith(("/", "~"))
    if leads_on or ".." in PurePosixPath(plain).parts:
        raise InputError(f"{field}: {path[:100]!r} leads out of the repository; a relative path inside it, please")


def _scheme(path: str) -> str:
    try:
        return urlsplit(path).scheme
    except ValueError:  # half an address of IPv6
        return "?"


def _declared_files(folder: Path | None, repo: str, commit: str | None) -> Iterator[Any]:
    """Where the repository's own description says that its data are."""
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
        about = DatasetCard.load(file).data.to_dict() if name == "README.md" else yaml.safe_load(file.read_bytes())
        configs = about.get("configs") if isinstance(about, Mapping) else None
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
