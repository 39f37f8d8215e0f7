"""Writes the generated tables of docs/ anew, between their marks: `make docs`.

A mark is `<!-- KIND: NAME -->`, and the table ends at `<!-- end -->`. Measures, losses and options are read from where
they are declared (`losslens.measures`, `losslens.losses`, `conf/`), and figures of GPUs from `benchmarks/results/`, so
that no page can say something else.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import losslens
from losslens.config import interpolations
from losslens.core.files import atomic_file
from losslens.losses import Loss, Method, Need, builtin_losses, builtin_methods
from losslens.losses.on_policy import OnPolicy
from losslens.losses.presentation import builtin_presentations
from losslens.measures import (
    Measure,
    PairMeasure,
    function_measures,
    run_function_measures,
    run_weight_measures,
    weight_measures,
)
from losslens.tables.descriptions import glossary
from tests.faults.bad_input import CATALOGUE

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
DOCS = ROOT / "docs"
STUDY = DOCS / "studies" / "how_much_is_the_loss"
SCRIPTS = ("train", "rollout", "evaluate", "analyze")

interpolations.register()

_BLOCK = re.compile(r"(<!-- (\w+): ([\w ]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """The text of a page with its marked tables as they are now.

    Raises:
        KeyError: A mark names no table.
    """
    return _BLOCK.sub(lambda match: match[1] + _KINDS[match[2]](match[3]) + match[4], text)


def pages() -> list[Path]:
    """The pages that hold generated tables."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _BLOCK.search(page.read_text(encoding="utf-8"))]


# Measures


def _measures(name: str) -> str:
    live: list[tuple[str, Measure]] = [(m.name, m) for m in run_weight_measures() if m.logged]
    live += [(f"{m.name}_to_<label>", m) for m in weight_measures("main")]
    tables: dict[str, Callable[[], str]] = {
        "words": lambda: _table(("term", "in plain words"), glossary().items()),
        "runs": lambda: _runs(run_weight_measures()),
        "run functions": lambda: _runs(run_function_measures()),
        "weights": lambda: _pairs(weight_measures()),
        "functions": lambda: _pairs(function_measures()),
        "live": lambda: _table(("name", "definition", "unit"), ((f"`{n}`", m.definition, m.unit) for n, m in live)),
    }
    return tables[name]()


def _runs(measures: Iterable[Measure]) -> str:
    return _table(("column", "definition", "null", "source"), ((*_first(m), _yes(m), m.source) for m in measures))


def _pairs(measures: Iterable[PairMeasure]) -> str:
    heads = ("column", "definition", "of identical updates", "null", "beside it", "source")
    return _table(heads, ((*_first(m), f"{m.identical:g}", _yes(m), f"`_{m.level}`", m.source) for m in measures))


def _first(measure: Measure) -> tuple[str, str]:
    unit = f" ({measure.unit})" * (measure.unit == "nats per token")
    return f"`{measure.name}`", f"{measure.definition}{unit}"


def _yes(measure: Measure) -> str:
    return f"`{measure.name}_null`" if measure.has_null else ""


# Losses

_DIVISORS = {
    "tokens": "completion tokens in the effective batch",
    "rollouts": "rollouts in the effective batch",
    "pairs": "pairs in the effective batch",
}
# Of the six losses of arXiv 2606.23740, which the README explains; the others are named there.
_PLACES_OF_STUDY = range(1, 7)

# In the order of tables.
_NEEDS: dict[Need, str] = {
    "reference": "the base's log-probabilities",
    "mismatched_log_ratio": "completions of other prompts, scored in each step",
    "sampler": "the sampling policy's log-probabilities",
    "sampler_raw": "the sampling policy's log-probabilities at temperature 1",
    "top_entropy": "the entropy of the most likely tokens",
    "divergence": "the base's next-token distributions, in each step",
}


def _losses(name: str) -> str:
    known = builtin_presentations()
    tables: dict[str, Callable[[], str]] = {
        "index": lambda: _table(
            ("loss", "in plain words", "unit", "paper"),
            (
                (
                    f"[`{loss}`]({loss}.md)",
                    said.summary,
                    getattr(_kind(loss), "unit", "own samples"),
                    _linked(said.paper),
                )
                for loss, said in known.items()
            ),
        ),
        "short": lambda: _table(
            ("loss", "in plain words"),
            [
                *((_in_readme(loss), said.summary) for loss, said in known.items() if said.place in _PLACES_OF_STUDY),
                ("others", ", ".join(_in_readme(loss) for loss in known if known[loss].place not in _PLACES_OF_STUDY)),
            ],
        ),
        "family": lambda: _table(
            (
                "loss",
                "one term for each",
                "reward",
                "tokens",
                "saturation",
                "length",
                "weights vanish when",
                "bounded",
                "first step",
            ),
            (_family(loss) for loss in known if loss in builtin_losses()),
        ),
        "rates": lambda: _table(
            ("loss", "`lr=conventional`"),
            ((f"[`{loss}`]({loss}.md)", f"{_kind(loss).conventional_lr_scale:g} × `lr.peak`") for loss in known),
        ),
    }
    return tables[name]()


def _family(name: str) -> tuple[str, ...]:
    """The row of a loss with its default options: its unit and its factors."""
    loss = _kind(name)(name=name)
    assert isinstance(loss, Loss)
    factors = loss.factors
    assert factors is not None
    words = (factors.outcome, factors.gate, factors.saturation, factors.length, factors.stops.replace("|", "\\|"))
    return (f"[`{name}`]({name}.md)", loss.unit, *words, _word(loss.bounded), factors.first_step.replace("|", "\\|"))


def _in_readme(loss: str) -> str:
    return f"[`{loss}`](docs/reference/losses/{loss}.md)"


def _loss(about: str) -> str:
    name, _, table = about.partition(" ")
    kind = _kind(name)
    tables: dict[str, Callable[[], str]] = {
        "summary": lambda: f"{kind.summary}\n",
        "facts": lambda: _facts(name),
        "options": lambda: _options(name),
        "metrics": lambda: _table(
            ("name", "what it is"), ((f"`train/{n}`", said) for n, said in kind.diagnostic_titles.items())
        ),
    }
    return tables[table]()


def _unit(name: str) -> str:
    kind = _kind(name)
    return kind.unit if issubclass(kind, Loss) else "own samples"


@cache
def _kind(name: str) -> type[Method]:
    return builtin_methods()[name]


def _facts(name: str) -> str:
    kind = _kind(name)
    method = kind(name=name)
    source = Path(inspect.getfile(kind))
    rows = [("run it", f"`python train.py method={name}`")]
    if isinstance(method, Loss):
        needs = "; ".join(text for need, text in _NEEDS.items() if need in method.needs)
        rows += [
            ("one term for each", method.unit),
            ("sum divided by", _DIVISORS[method.divisor]),
            ("uses the reward", _word(method.uses_reward)),
            ("needs", needs or "nothing else"),
            ("bounded below", _word(method.bounded)),
        ]
    elif isinstance(method, OnPolicy):
        rows += [
            ("trains on", f"samples of its policy, {method.group_size} per prompt and step"),
            ("needs a teacher", _word(method.needs_teacher)),
        ]
    rows += [
        ("peak learning rate with `lr=conventional`", f"{kind.conventional_lr_scale:g} × `lr.peak`"),
        ("version in the [identity](../identity.md)", f"{kind.version}"),
        ("paper", _linked(kind.paper) or "–"),
        ("code", f"[`losses/{source.name}`](../../../src/losslens/losses/{source.name})"),
    ]
    return _table(("", ""), rows)


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def _options(name: str) -> str:
    """The options of a loss: types and defaults of its class, meanings from its configuration or its docstring."""
    kind = _kind(name)
    options = {option: field for option, field in kind.model_fields.items() if option != "name"}
    if not options:
        return "This loss has no options.\n"
    said = {line.key: line.comment for line in _lines(_file("method", name))}
    rows = (
        (
            f"`method.{option}`",
            f"`{_plain(field.default)}`",
            _values(field.annotation, field.metadata),
            said.get(option) or _attribute(kind, option),
        )
        for option, field in options.items()
    )
    return _table(("option", "default", "values", "meaning"), rows)


def _attribute(kind: type[Method], name: str) -> str:
    """What the docstring of a class, or of one that it derives from, says of an attribute."""
    for each in kind.__mro__:
        found = re.search(rf"\n    {name}: (.+?)(?=\n    \w+: |\n\n|\Z)", inspect.getdoc(each) or "", re.DOTALL)
        if found:
            return " ".join(found[1].split()).rstrip(".")
    return ""


def _values(annotation: Any, metadata: Iterable[Any]) -> str:
    """What an option takes, in words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _values(get_args(annotation)[0], metadata)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_values(part, metadata) for part in get_args(annotation))
    if annotation is type(None):
        return "`null`"
    if annotation is bool:
        return "`true`, `false`"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return " ".join(["number", *bounds])


def _plain(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


# Options


class Line(NamedTuple):
    """An option of a configuration file.

    Attributes:
        key: Its path within the file, with dots.
        value: As it is written there.
        comment: What is said of it, beside it or on the lines above it.
    """

    key: str
    value: str
    comment: str


def _configs(name: str) -> str:
    if name == "scripts":
        return "\n".join(_script(script) for script in SCRIPTS)
    if name == "methods":
        return _table(
            ("option", "what it is"),
            (
                (f"[`method={option}`](losses/{loss}.md)", _heading(_file("method", option))[0])
                for loss in _in_order()
                for option in (loss, *_OTHER_FILES.get(loss, ()))
            ),
        )
    if name == "experiments":
        files = sorted((CONF / "experiment").glob("*.yaml"))
        return _table(("experiment", "what it is"), ((f"`experiment={f.stem}`", _experiment(f)) for f in files))
    if name == "benchmarks":
        files = sorted((CONF / "benchmark").glob("*.yaml"))
        return _table(("option", "what it is"), ((f"`benchmark={f.stem}`", _benchmark(f)) for f in files))
    documented = {*_GROUPS, "method", "experiment", "benchmark", "hydra", "server"}
    assert documented == {p.name for p in CONF.iterdir() if p.is_dir()}, "a new group of options: say where it stands"
    return "\n".join(map(_group, (*_GROUPS, "hydra/launcher", "server")))


# Configuration files that select options of a method.
_OTHER_FILES = {"online_grpo": ("dapo",)}
_GROUPS = ("lr", "lora_rank", "model", "data", "rollouts", "logger", "resources")


def _in_order() -> Iterable[str]:
    return builtin_presentations()


def _file(group: str, option: str) -> Path:
    return CONF / group / f"{option}.yaml"


def _experiment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    beside = next(re.split(r" {4,}", line)[1:] for line in lines if line.startswith("# python"))
    title = beside[0].strip() if beside else ""
    return ". ".join(part for part in (title[:1].upper() + title[1:], _heading(file)[0]) if part)


def _benchmark(file: Path) -> str:
    said, _ = _heading(file)
    same = _file("data", file.stem)
    return said or f"The held-out problems of `data={same.stem}`"


def _script(script: str) -> str:
    said, _ = _heading(CONF / f"{script}.yaml")
    return f"### {script}.py\n\n{said.rstrip(':')}.\n\n{_option_table('', script, _lines(CONF / f'{script}.yaml'), [])}"


def _group(group: str) -> str:
    """A heading for each option of a group; of those that only differ in some values, what differs."""
    files = sorted((CONF / group).glob("*.yaml"), key=lambda file: (not _is_default(group, file.stem), file.stem))
    first = {line.key: line.value for line in _lines(files[0])}
    parts = [f"### {group}\n"]
    for file in files:
        default = " (default)" * _is_default(group, file.stem)
        lines = _lines(file)
        parts.append(f"#### {group}={file.stem}{default}\n")
        said, command = _heading(file)
        if said:
            parts.append(f"{said.rstrip(':')}{'' if said.endswith('.') else '.'}\n")
        if command and group != "server":
            parts.append(f"```bash\n{command}\n```\n")
        base = _inherited(file)
        if base or (file != files[0] and [line.key for line in lines] == list(first)):
            lines = [line for line in lines if base or line.value != first[line.key]]
            parts.append(f"Differs from `{group}={base or files[0].stem}` in:\n")
        parts.append(_option_table(group, "train", lines, [f"{group}={file.stem}"]))
    return "\n".join(parts)


def _is_default(group: str, option: str) -> bool:
    defaults = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return any(isinstance(entry, dict) and entry.get(group) == option for entry in defaults)


def _inherited(file: Path) -> str:
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    return next((entry for entry in defaults if isinstance(entry, str) and entry != "_self_"), "")


def _option_table(group: str, script: str, lines: list[Line], overrides: list[str]) -> str:
    place = {"hydra/launcher": "hydra.launcher", "server": "rollouts.server"}.get(group, group)
    rows = [
        (f"`{key}`", _default(key, line.value, script, overrides), line.comment.replace("<", "\\<"))
        for line in lines
        if line.key.rpartition(".")[2] != "_target_"
        for key in [f"{place}.{line.key}" if place else line.key]
    ]
    return _table(("option", "default", "meaning"), rows) if rows else ""


def _default(key: str, value: str, script: str, overrides: list[str]) -> str:
    if value == "???":
        return "required"
    if other := re.fullmatch(r"\$\{([a-z_][\w.]*)\}", value):
        return f"that of `{other[1]}`"
    if relative := re.fullmatch(r"\$\{\.\.([\w.]*)\}", value):
        return f"that of `{key.split('.')[0]}.{relative[1]}`"
    return f"`{_composed(script, tuple(overrides), key) if '${' in value else value}`"


@cache
def _config(script: str, overrides: tuple[str, ...]) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(script, list(overrides))


def _composed(script: str, overrides: tuple[str, ...], key: str) -> str:
    value = OmegaConf.select(_config(script, overrides), key)
    text = json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value).replace('"', "")
    return text.replace(str(Path(losslens.__file__).parent), "losslens")


def _heading(file: Path) -> tuple[str, str]:
    """What a file says of itself on top: its sentences, and its first command."""
    said, command = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        if text.startswith(" @package"):
            continue
        if re.match(r" +(python|launch)\b", text):
            command = command or re.split(r" {4,}", text.strip())[0]
        elif not text.startswith("  "):
            said.append(text.strip())
    return " ".join(said), command


def _lines(file: Path) -> list[Line]:
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text)
    return list(_below(root, "", text.splitlines(), file.name == "train.yaml")) if root is not None else []


def _below(node: Any, prefix: str, source: list[str], defaults: bool) -> Iterator[Line]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if path in ("defaults", "hydra"):
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _below(value, f"{path}.", source, defaults)
            continue
        first, last = value.start_mark, value.end_mark
        written = source[first.line][first.column : last.column if first.line == last.line else None].strip()
        after = source[last.line][last.column :] if first.line == last.line else ""
        comment = after.partition("#")[2].strip()
        yield Line(path, re.sub(r"^(['\"])(.*)\1$", r"\2", written), comment or _above(source, key.start_mark.line))


def _above(source: list[str], line: int) -> str:
    """The comment lines directly above an option, where they are no heading of the file."""
    found: list[str] = []
    while line > 0 and source[line - 1].lstrip().startswith("#") and any(not s.startswith("#") for s in source[:line]):
        line -= 1
        found.insert(0, source[line].lstrip("# ").strip())
    return " ".join(found)


# Performance


def _performance(name: str) -> str:
    if name == "cpu":
        tables = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))
        return "\n".join(bars_of(json.loads(file.read_text(encoding="utf-8"))) for file in tables)
    assert name == "gpu", name
    files = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    if not files:
        return "No GPU has been measured yet.\n"
    return "\n".join(performance_of(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def bars_of(found: dict[str, Any]) -> str:
    """The table of one kind of machine, from the JSON file that `make bench` wrote."""
    about = found["machine"]
    rows = (
        (
            row["part"], f"{row['ours']:.1f} {row['unit']}",
            "" if row["theirs"] is None else f"{row['theirs']:.1f} {row['unit']}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}×",
            f"≤ {row['bar']:g} {row['unit']}" if row["ratio"] is None else f"≥ {row['bar']:g}×",
            "met" if row["met"] else "not met", ", ".join(f"{value:.2f}" for value in row["spread"]),
            f"{row['date']}, {row['commit']}",
        )
        for row in found["rows"]
    )  # fmt: skip
    head = f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB (`{found['command']}`):\n"
    return "\n".join([head, _table(("part", "ours", "theirs", "ratio", "bar", "", "spread", "measured"), rows)])


def performance_of(card: dict[str, Any]) -> str:
    """The tables of one card, from the JSON file that `make gpu` wrote."""
    held = (
        (bar["bar"], bar["loss"], _figure(bar["figure"], ".2f"), bar["verdict"])
        for bar in card["bars"]
    )  # fmt: skip
    trained = (
        (
            each["loss"], each["lengths"], each["trainer"], _figure(each["tokens_per_second"], ",.0f"),
            _figure(each["peak_bytes"] and each["peak_bytes"] / 1e9, ".1f"), _figure(each["utilisation"], ".1%"),
            each["note"],
        )
        for each in card["speeds"]
    )  # fmt: skip
    generated = ((e["engine"], _figure(e["tokens_per_second"], ",.0f"), e["note"]) for e in card["generation"])
    outcomes = [check["status"] for check in card["checks"]]
    failed = ", ".join(f"{check['name']} ({check['on']})" for check in card["checks"] if check["status"] == "failed")
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in ("passed", "failed", "skipped"))
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    parts = [
        f"### {card['card']}\n",
        f"{card['model']}; matmul rate {card['matmul_flops'] / 1e12:.0f} TFLOP/s. `{card['command']}`, {card['date']}, "
        f"commit {card['commit'] or 'unknown'}; {versions}.\n",
        f"Comparisons: {counts}{': ' * bool(failed)}{failed}.\n",
        _table(("bar", "loss", "figure", "verdict"), held),
        _table(("loss", "tokens a row", "trainer", "tokens/s", "peak GB", "of the matmul rate", ""), trained),
        _table(("engine", "tokens/s", ""), generated),
    ]
    return "\n".join(parts)


def _faults(_: str) -> str:
    """The faults that `make faults` counted, by kind and outcome; damage of files by its kind and by the file."""
    file = ROOT / "tests" / "faults" / "counts.json"
    if not file.exists():
        return "Not counted yet.\n"
    found = json.loads(file.read_text(encoding="utf-8"))
    whole: Counter[str] = sum(map(Counter, found["counts"].values()), Counter())
    accepted = ["same bytes", "clear line"]
    outcomes = accepted + sorted(set(whole) - set(accepted))
    files = (kind for kind in found["counts"] if ": " in kind and not kind.startswith("disk: "))
    damaged = {kind: found["counts"][kind] for kind in files}
    tables = {"kind": {kind: of_kind for kind, of_kind in found["counts"].items() if kind not in damaged}}
    for head, part in (("damage of a file", 0), ("damaged file", 1)):
        grouped: dict[str, Counter[str]] = {}
        for kind, of_kind in damaged.items():
            grouped.setdefault(kind.split(": ", 1)[part], Counter()).update(of_kind)
        tables[head] = dict(sorted(grouped.items()))
    tables["kind"]["damaged files, [below](#damaged-files)"] = sum(map(Counter, damaged.values()), Counter())
    tables["kind"]["**all**"] = whole
    made = {
        head: _table(
            (head, *outcomes, "all"),
            ((kind, *(str(of.get(one, 0)) for one in outcomes), str(sum(of.values()))) for kind, of in rows.items()),
        )
        for head, rows in tables.items()
    }
    first, *rest = made.values()
    about = f"`make faults N={found['per_kind']}`, seed {found['seed']}, commit {found['commit'][:7]}:"
    return f"{about}\n\n{first}\n### Damaged files\n\nThe same faults by damage, and by file:\n\n" + "\n".join(rest)


def _study(name: str) -> str:
    """A table of the study "How much of it is the loss?", as `make study STAGE=figures` wrote it from its results."""
    found = json.loads((STUDY / "tables.json").read_text(encoding="utf-8")).get(name)
    if found is None:  # its sweep has not been run
        return "Not measured yet.\n"
    return "".join(f"{line}\n" for line in found) if name == "claims" else _table(found["heads"], found["rows"])


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bad_input(name: str) -> str:
    parts = []
    for title, inputs in CATALOGUE.items():
        rows = (
            (f"`{_in_code(wrong.shown)}`", wrong.needs, f"{_words(wrong.names)}: {_words(wrong.says)}")
            for wrong in inputs
        )
        parts += [f"## {title}\n", _table(("command line", "the folder holds", "the line says"), rows)]
    return "\n".join(parts)


def _in_code(text: str) -> str:
    return text.replace("\n", "\\n").replace("`", "'")


def _words(text: str) -> str:
    return f"`{_in_code(text)}`"


_KINDS: dict[str, Callable[[str], str]] = {
    "measures": _measures, "losses": _losses, "loss": _loss, "configs": _configs, "performance": _performance,
    "faults": _faults, "bad_input": _bad_input, "study": _study,
}  # fmt: skip


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0]), *([_cell(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\\|", "|").replace("|", "\\|")


def rewrite(page: Path) -> None:
    """Writes a page anew, with its marked tables as they are now."""
    text = written(page.read_text(encoding="utf-8"))
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    for page in [Path(name) for name in sys.argv[1:]] or [*pages(), ROOT / "README.md"]:
        rewrite(page)
