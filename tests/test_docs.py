"""The documentation says what is so: commands compose, links lead somewhere, generated tables are up to date.

Fenced blocks are run as a reader would have them: a block of Python or YAML that begins with its own file name
(`# my_losses.py`) is a file of that name in the reader's folder, for all commands of its page.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from losslens.cli import compare
from losslens.cli.arguments import in_full, prepare_arguments
from losslens.cli.key_values import KeyValueParser
from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.identity import formerly
from losslens.config.parse import build, parse, renamed_options
from losslens.config.training import TrainConfig
from losslens.losses import Batch, Method, builtin_methods
from losslens.measures import Measure
from losslens.models.loading import LoadedModel
from losslens.runs.spec import own_options
from tests.conftest import ROOT, train_frozen
from tools.reference import pages as generated_pages
from tools.reference import written

DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + [page for page in DOCS.rglob("*.md") if "_build" not in page.relative_to(DOCS).parts]
)
SCHEMAS = {"train": TrainConfig, "rollout": RolloutConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig}
# Commands of an installed LossLens, and the scripts that do the same in a checkout.
INSTALLED = {
    "status": "launch/status.py", "sync": "launch/wandb_sync.py", "dashboard": "launch/wandb_dashboard.py",
    "migrate": "launch/migrate.py",
}  # fmt: skip
# What is no command of LossLens.
OTHERS = {"git", "cd", "source", "sudo", "pip", "eval", "wandb", "npm", "pipx", "pre-commit"}
# Columns, files and values that were renamed, beside the options that `renamed_options` knows.
OLD_NAMES = (
    "ablation.csv", "map.csv", "orthogonal_a_to_b", "orthogonal_b_to_a", "share_right", "same_as", "logps/right",
    "logps/wrong", "weight/right", "weight/wrong", "log_ratio/right", "logps_right", "logger.references", "dpo_rows",
)  # fmt: skip


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


_COMMAND = re.compile(r"(python |losslens |launch/\w+\.sh |(train|rollout|evaluate|analyze)\.py )")


class Block(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str:
        """The file that it is, by its first line; empty if it is none."""
        found = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else ""


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2]) for m in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command in its fenced blocks, and of those between backticks that are whole."""
    for block in blocks_of(page):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from commands_in(shlex.split(line, comments=True))
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page)):
        if _COMMAND.match(span) and not re.search(r"[…<]|experiment=NAME", span):
            yield from commands_in(shlex.split(span))


def commands_in(words: list[str]) -> Iterator[list[str]]:
    """Those that && parts."""
    for is_and, group in itertools.groupby(words, key=lambda word: word == "&&"):
        if not is_and:
            yield list(group)


WRONG = DOCS / "reference" / "bad_input.md"  # its commands are wrong on purpose: tests/test_bad_input.py
COMMANDS = [
    (page, words) for page in PAGES if page != WRONG for words in commands_of(page) if words and words[0] not in OTHERS
]
# One that several pages have is checked once.
DIFFERENT = list({tuple(words): (page, words) for page, words in COMMANDS}.values())


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """For each page a folder with the files that it tells its reader to write."""
    found = {}
    for page in PAGES:
        found[page] = tmp_path_factory.mktemp("reader")
        for block in blocks_of(page):
            if block.file and not block.file.startswith("src/"):
                file = found[page] / block.file
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
    return found


@pytest.fixture(scope="module", autouse=True)
def _each_file_is_read_once() -> Iterator[None]:
    """Most of composing is reading the same YAML again."""
    read, found = FileConfigSource.load_config, {}

    def load_config(self: FileConfigSource, config_path: str) -> Any:
        key = self.path, config_path
        if key not in found:
            found[key] = read(self, config_path)
        return deepcopy(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileConfigSource, "load_config", load_config)
        yield


# Commands


@pytest.mark.parametrize(("page", "words"), DIFFERENT, ids=[f"{name_of(page)}:{' '.join(w)}" for page, w in DIFFERENT])
def test_a_command_is_one(
    page: Path, words: list[str], folders: dict[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options are there, take these values, and come together to a configuration."""
    monkeypatch.syspath_prepend(folders[page])
    check_command(words, folders[page], monkeypatch)


def check_command(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = words
    if name == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if name == "torchrun":
        script = arguments.index("train.py")
        name, arguments = arguments[script], arguments[script + 1 :]
    if name == "python":
        if arguments[0] == "-c":
            check_imports(arguments[1])
            return
        name, *arguments = arguments[1:] if arguments[0] == "-m" else arguments
    if name == "losslens":
        name, *arguments = arguments
        if name == "slurm":
            is_pipeline = arguments[:1] == ["pipeline"]
            name = "launch/pipeline.sh" if is_pipeline else "launch/local_slurm.sh"
            arguments = arguments[is_pipeline:]
        if name == "compare":
            compare.parser().parse_args(arguments or ["adapter"])  # named alone, in a table
            return
        name = INSTALLED.get(name, f"{name}.py") if "/" not in name else name
    if name.startswith("--help") or arguments == ["--help"]:
        return
    assert (ROOT / name).exists()
    if name == "launch/local_slurm.sh":
        return
    if name == "launch/pipeline.sh":
        analyze = [argument.removeprefix("analyze.") for argument in arguments if argument.startswith("analyze.")]
        check_hydra("train", ["-m", *(a for a in arguments if not a.startswith("analyze."))], folder)
        check_hydra("analyze", analyze, folder)
    elif Path(name).stem in SCHEMAS:
        check_hydra(Path(name).stem, arguments, folder)
    elif name.startswith("launch/") or name == "tools/dashboard_picture.py":
        check_key_values(name, arguments, monkeypatch)


def check_hydra(script: str, arguments: list[str], folder: Path) -> None:
    """The line composes with the first value of whatever it sweeps over, and takes each other value alone."""
    config_only = "--cfg" in arguments
    given = [each for each in in_full(arguments) if not each.startswith("-") and not (config_only and each == "job")]
    overrides = OverridesParser.create().parse_overrides(prepare_arguments(given, f"{script}.py", SCHEMAS[script]))
    values = [list(each.sweep_string_iterator()) if each.is_sweep_override() else [] for each in overrides]
    sweeps = "-m" in arguments or any(each.startswith(("experiment=", "hydra/launcher=slurm")) for each in given)
    assert sweeps or not any(values)
    lines = [f"{each.get_key_element()}={values[n][0]}" if values[n] else given[n] for n, each in enumerate(overrides)]
    check_line(script, lines, folder)
    for n, override in enumerate(overrides):
        for value in values[n][1:]:
            group = ROOT / "conf" / override.key_or_group
            assert not group.is_dir() or (group / f"{value}.yaml").exists()
            if not group.is_dir():
                check_line(script, [*lines[:n], f"{override.get_key_element()}={value}", *lines[n + 1 :]], folder)


def check_line(script: str, line: list[str], folder: Path) -> None:
    """It composes, and what comes out passes the schema; so do the loss and its options."""
    overrides = OverridesParser.create().parse_overrides(prepare_arguments(line, f"{script}.py", SCHEMAS[script]))
    options = {each.key_or_group: each.value() for each in overrides if each.key_or_group in PLAIN}
    chosen = [
        each
        for each in overrides
        if each.key_or_group not in options
        and (each.is_hydra_override() or (ROOT / "conf" / each.key_or_group).is_dir())
    ]
    rest = [each for each in overrides if each not in chosen and each.key_or_group not in options]
    config = deepcopy(composed(script, tuple(str(each.input_line) for each in chosen), folder))
    for group, option in options.items():
        file = f"conf/{group}/{option}.yaml"
        found = next(place / file for place in (folder, ROOT) if (place / file).exists())
        config[group] = OmegaConf.load(found)
    ConfigLoaderImpl._apply_overrides_to_config(rest, config)
    if script == "evaluate" and not config.get("benchmark"):
        return  # which is to be chosen, as `losslens evaluate` alone is a name
    parse(SCHEMAS[script], config)
    if script == "train":
        assert isinstance(build("method", own_options(OmegaConf.to_container(config.method, resolve=True))), Method)


# Groups whose options are one file each, with no defaults of their own: set in place, since composing is slow.
PLAIN = ("method", "lr", "lora_rank", "logger")
_COMPOSED: dict[tuple[str, tuple[str, ...], Path | None], DictConfig] = {}


def composed(script: str, choices: tuple[str, ...], folder: Path) -> DictConfig:
    """A command's configuration with options of groups chosen; they may be of the reader's own `conf/`."""
    own = folder / "conf"
    mine = any((own / f"{choice.replace('=', '/')}.yaml").exists() for choice in choices)
    key = script, choices, own if mine else None
    if key not in _COMPOSED:
        search = [f"hydra.searchpath=[file://{own}]"] if mine else []
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            _COMPOSED[key] = compose(script, [*search, *choices])
    return _COMPOSED[key]


def check_key_values(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher takes them; it is stopped before it does anything."""

    class Taken(Exception):  # noqa: N818
        pass

    parse_arguments = KeyValueParser.parse

    def stop(self: KeyValueParser, given: list[str]) -> None:
        parse_arguments(self, given)
        raise Taken

    with monkeypatch.context() as patch:
        patch.setattr(KeyValueParser, "parse", stop)
        patch.setattr("losslens.cli.key_values.guard_streams", lambda: None)
        with pytest.raises(Taken):
            runpy.run_path(str(ROOT / name))["main"](arguments)


def check_imports(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names)


def test_commands_are_found() -> None:
    names = {" ".join(words[:2]) for _, words in COMMANDS}
    assert {"python train.py", "python analyze.py", "python rollout.py", "python evaluate.py"} < names
    assert len(COMMANDS) > 100


# Names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_are_there(page: Path) -> None:
    for file, names in re.findall(r"\b(tests/[\w/]+\.py)((?:::\w+)*)", page.read_text(encoding="utf-8")):
        found: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for name in filter(None, names.split("::")):
            inside = [node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == name]
            assert inside, f"{file}{names}"
            found = inside[0]


@pytest.mark.parametrize("page", [page for page in PAGES if page != WRONG], ids=name_of)
def test_no_page_has_an_old_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    kinds = builtin_methods().values()
    losses = {f"method.{mark.name}" for kind in kinds for mark in formerly(kind).values()}
    losses -= {
        f"method.{option}" for kind in kinds for option in kind.model_fields
    }  # one loss's may be another's of today
    for old in {*renamed_options(), *losses, *OLD_NAMES}:
        if "." in old or old in OLD_NAMES:
            assert not re.search(rf"(?<![\w.]){re.escape(old)}(?![\w.])", text), old
        else:
            assert not re.search(rf"(?<![\w./{{]){old}=", text), f"{old}="


# Links


def anchors_of(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub and MyST make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", prose_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def test_pages_that_the_code_names_are_there() -> None:
    files = [file for folder in ("src", "conf", "launch", "tools", "tests") for file in (ROOT / folder).rglob("*")]
    for file in [*files, *ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        if file.suffix in (".py", ".yaml", ".toml", ".sh", ".jinja") and file != Path(__file__):
            for named in re.findall(r"\bdocs/[\w/.-]*\w", file.read_text(encoding="utf-8")):
                assert (ROOT / named).exists(), f"{name_of(file)}: {named}"


def test_every_page_is_on_the_site() -> None:
    listed = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            listed |= {(page.parent / f"{line}.md").resolve() for line in tree.splitlines() if line and line[0] != ":"}
    assert listed == {page for page in PAGES if page.is_relative_to(DOCS)} - {DOCS / "index.md"}


def test_every_loss_has_its_page() -> None:
    pages = {page.stem for page in (DOCS / "reference" / "losses").glob("*.md")}
    assert pages == {*builtin_methods(), "index", "family"}


# Tables


@pytest.mark.parametrize("page", [*generated_pages(), ROOT / "README.md"], ids=name_of)
def test_generated_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert written(text) == text, "out of date: make docs"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if "](docs/reference/losses/" not in line]) <= 120  # but for a line per loss


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    line = ["-W", "--keep-going", "--quiet", "-b", "html", str(DOCS), str(tmp_path / "html")]
    built = subprocess.run([sys.executable, "-m", "sphinx", *line], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


# Files that guides show


def test_the_loss_of_the_guide_trains(
    folders: dict[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_plan: Any, base: LoadedModel,
    tokenised: pd.DataFrame,
) -> None:  # fmt: skip
    """π = ½ in a correct rollout and γ = 2: (½)²·ln 2; an incorrect one gives nothing. Two steps move the adapter."""
    monkeypatch.syspath_prepend(folders[DOCS / "guides" / "own_loss.md"])
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    loss = build("method", {"_target_": "my_losses.Focal", "name": "focal"})
    logps = torch.full((2, 1), 0.5).log()
    terms = loss.terms(Batch(logps=logps, mask=logps < 0, reward=torch.tensor([1.0, 0.0])))
    assert terms.flatten().tolist() == pytest.approx([np.log(2) / 4, 0])
    said = train_frozen(make_plan(loss, max_steps=2, batch_size=8), base, tokenised, tmp_path / "run")
    assert said


def test_the_measure_of_the_guide_measures() -> None:
    """Three modules of norms 1, 2 and 2: the largest has 4 of 9; an update of 0 has no largest one."""
    [block] = [block for block in blocks_of(DOCS / "guides" / "own_measure.md") if block.language == "python"]
    scope: dict[str, Any] = {}
    exec(compile(block.text, "own_measure.md", "exec"), scope)
    [measure] = scope["MEASURES"]
    assert isinstance(measure, Measure)
    assert measure.value(SimpleNamespace(squared=np.array([[1.0, 4.0, 4.0], [0.0, 0.0, 0.0]]))) == pytest.approx(
        [4 / 9, np.nan], nan_ok=True
    )
