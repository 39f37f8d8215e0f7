"""Tables for papers, as Markdown and LaTeX (booktabs): runs, losses vs the reference, repeats, arms."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from losslens.core.files import atomic_file
from losslens.measures import Measure, measures_besides_cosine, pair_measures, run_measures
from losslens.report.arm_comparison import arm_rows, is_matched
from losslens.report.findings import ratio
from losslens.report.loss_comparison import LossComparison
from losslens.report.names import short
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, number, p_value, points, rate, whole
from losslens.tables.style import loss_title

# Most rows that fit on a page.
_MOST_ROWS = 45


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        label: Its label for references.
        caption: Its caption.
        heads: Column headings; the first column names the row, the others hold numbers.
        rows: The cells as plain text.
    """

    label: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_tables(folder: Path) -> list[Path]:
    """Writes `tables.md` and `tables.tex` into the folder of an analysis.

    Raises:
        InputError: The analysis has no manifest, or a table cannot be read.
    """
    analysis = AnalysisFolder(folder)
    comparison = LossComparison(analysis)
    name = ", ".join(map(str, analysis.manifest.get("sweeps") or [])) or "adapters"
    candidates = (_runs(analysis, comparison), _to_reference(comparison), _repeats(analysis), _arms(analysis))
    tables = [_without_empty_columns(table) for table in candidates if table and table.rows]
    written = []
    for kind, text in (("md", _markdown(name, tables)), ("tex", _latex(name, tables))):
        file = folder / f"tables.{kind}"
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
        written.append(file)
    return written


def _without_empty_columns(table: PaperTable) -> PaperTable:
    """Drops columns without any value."""
    kept = [place for place in range(len(table.heads)) if any(row[place] != NOTHING for row in table.rows)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return replace(table, heads=[table.heads[place] for place in kept], rows=rows)


def _runs(analysis: AnalysisFolder, comparison: LossComparison) -> PaperTable:
    texts = ("run", "method", "benchmark", "diverged")
    sizes = [measure.name for measure in run_measures("main")]
    numbers = ("learning_rate", "seed", "init_seed", *sizes, "accuracy", "ci_low", "ci_high", "base_diff")
    runs = analysis.table("runs", texts, numbers)
    names = {run: loss.name for loss in comparison.losses for run in loss.runs}
    order = {run: place for place, run in enumerate(run for loss in comparison.losses for run in loss.runs)}
    places = runs["run"].map(order).fillna(len(order)).where(runs["method"] != "base", -1)
    runs = runs.assign(place=places).sort_values("place", kind="stable")
    tested = _tests_of_runs(analysis)
    benchmarks = [name for name in runs["benchmark"].unique() if name]
    several = len(benchmarks) > 1
    rows = []
    for _, run in runs.iterrows():
        base = run["method"] == "base"
        mark = " ✕" if run["diverged"] else ""
        known = loss_title(run["method"]) if not pd.isna(run["learning_rate"]) else names.get(run["run"], run["run"])
        rows.append(
            [
                "base" if base else f"{known}{mark}", rate(run["learning_rate"]), whole(run["seed"]),
                whole(run["init_seed"]), *(measure.show(run[measure.name]) for measure in run_measures("main")),
                *([run["benchmark"] or NOTHING] if several else []),
                _percent(run["accuracy"]), _interval(run["ci_low"], run["ci_high"]), points(run["base_diff"]),
                p_value(tested.get((run["run"], run["benchmark"]), math.nan)),
            ]
        )  # fmt: skip
    heads = ["Loss", "LR", "Seed", "Init.", *_headings(run_measures("main")), *(["Benchmark"] if several else [])]
    heads += ["Acc. (%)", "95% CI", "Δ base", "p (Holm)"]
    caption = "Runs: norm of the update."
    if runs["accuracy"].notna().any():
        test = " and, for losses trained once, the test against the base" * bool(tested)
        about = f" on {benchmarks[0]}" if len(benchmarks) == 1 else ""
        caption = f"Runs: norm of the update and accuracy{about}, with Wilson intervals{test}."
    return PaperTable(
        "runs", f"{caption}{' ✕: diverged or collapsed.' * bool((runs['diverged'] != '').any())}", heads, rows
    )


def _tests_of_runs(analysis: AnalysisFolder) -> dict[tuple[str, str], float]:
    """Returns, for each (run, benchmark) whose arm has a single run, the arm's p against the base."""
    arms = arm_rows(analysis)
    runs = analysis.table("runs", ("run", "arm", "benchmark"), ())
    if arms.empty:
        return {}
    p = arms[arms["seeds"] == 1].set_index(["arm", "benchmark"])["base_p_holm"].dropna().to_dict()
    return {
        (run.run, run.benchmark): p[run.arm, run.benchmark]
        for run in runs.itertuples()
        if (run.arm, run.benchmark) in p
    }


def _to_reference(comparison: LossComparison) -> PaperTable | None:
    reference = comparison.reference
    if reference is None or not comparison.others:
        return None
    rows = []
    for loss in comparison.losses:
        own = loss is reference
        cosine = comparison.of("cosine", loss, reference)
        cells = [f"{loss.name} (repeat)" if own else loss.name, number(cosine.value)]
        cells += [number(cosine.level), ratio(cosine) if not math.isnan(cosine.relative) else NOTHING]
        cells += [number(cosine.null)]
        for measure in measures_besides_cosine("main"):
            beside = comparison.of(measure.name, loss, reference)
            cells += [measure.show(value) for value in (beside.value, beside.level, beside.null)]
        if cosine.known:
            rows.append(cells)
    if not rows:
        return None
    heads = ["Loss", "cos", "ceiling", "ratio", "null"]
    for measure in measures_besides_cosine("main"):
        heads += [measure.heading, measure.level, "null"]
    found = [comparison.of("cosine", loss, reference) for loss in comparison.others]
    others = [
        f"{measure.label}{measure.in_unit}"
        for measure in measures_besides_cosine("main")
        if any(comparison.of(measure.name, loss, reference).known for loss in comparison.others)
    ]
    ceilings = "Ceiling: √(ρρ') of the repeats of the two losses; ratio: cos/ceiling with its 95% jackknife interval. "
    ceilings *= any(not math.isnan(cosine.level) for cosine in found)
    caption = (
        f"Each loss against {reference.name}{_over(cosine.pairing for cosine in found if cosine.known)}: cosine of ΔW"
        f"{'; '.join(['', *others])}. {ceilings}Null: the value for two updates with nothing in common"
        f"{' but the initial A' * all(cosine.pairing in ('same seeds', 'same init') for cosine in found)}."
    )
    return PaperTable("to-reference", caption, heads, rows)


def _over(pairings: Iterable[str]) -> str:
    """Describes the seeds of the pairs of runs; empty if they are unknown."""
    kinds = {"different" if pairing in ("same init", "other") else pairing for pairing in pairings}
    same_seed = kinds & {"same seeds", "same order"}
    if not kinds or "" in kinds:
        return ""
    if not same_seed:
        return ", over runs at different seeds"
    if "different" in kinds:
        return ", over runs at different seeds where there are any"
    return ", over runs of the same seed"


def _repeats(analysis: AnalysisFolder) -> PaperTable:
    measures = pair_measures("more")
    names = [measure.name for measure in measures]
    repeats = analysis.table("repeats", ("arm", "method", "lr", "repeat_kind"), ("rank", "pairs", *names))
    rows = [
        [
            loss_title(row["method"]), row["lr"], row["repeat_kind"], whole(row["pairs"]),
            *(measure.show(row[measure.name]) for measure in measures),
        ]
        for _, row in repeats.iterrows()
    ]  # fmt: skip
    heads = ["Loss", "LR", "Changed", "Pairs", *_headings(measures)]
    changes = {
        "order": "in a different data order", "start": "from a different initial adapter", "order and start": "in a "
        "different data order from a different initial adapter", "data": "on different rollouts",
    }  # fmt: skip
    kinds = [change for kind, change in changes.items() if (repeats["repeat_kind"] == kind).any()]
    caption = f"Repeats: the same loss trained again {', or '.join(kinds)}."
    return PaperTable("repeats", caption, heads, rows)


def _arms(analysis: AnalysisFolder) -> PaperTable | None:
    arms = arm_rows(analysis)
    if not is_matched(arms) and not (len(arms) and (arms["seeds"] > 1).any()):
        return None
    settings = arms["settings"].any()
    rows = []
    for _, arm in arms.iterrows():
        lost = "".join(f" ({arm[what]} {what})" for what in ("diverged", "collapsed") if arm[what])
        accuracy = _percent(arm["accuracy"]) + _std(100 * arm["accuracy_std"], 1)
        rows.append(
            [
                loss_title(arm["method"]), rate(arm["learning_rate"]),
                *([short(arm["settings"]) or NOTHING] if settings else []),
                f"{arm['seeds']}{lost}", *(_with_std(arm, measure) for measure in run_measures("main")),
                number(arm["cosine_to_sft"]), number(arm["cosine_to_sft_ceiling"]),
                number(arm["cosine_to_dpo_conventional"]), accuracy,
                points(arm["base_diff"]), p_value(arm["base_p_holm"]),
            ]
        )  # fmt: skip
    heads = [
        "Loss",
        "LR",
        *(["Setting"] if settings else []),
        "Runs",
        *_headings(run_measures("main")),
        "cos SFT",
        "ceiling",
        "cos DPO",
    ]
    heads += ["Acc. (%)", "Δ base", "p (Holm)"]
    others = arms[(arms["arm"] != arms["sft"]) & arms["cosine_to_sft"].notna()]
    caption = (
        "The learning-rate-matched comparison: mean ± standard deviation over runs. cos SFT: cosine to SFT"
        f"{_over(others['pairing'])}; ceiling: √(ρρ') of the repeats of SFT and of the loss; cos DPO: cosine to "
        "conventional DPO; p: sign-flip test over problems, Holm over all comparisons of arms."
    )
    return PaperTable("arms", caption, heads, rows)


def _headings(measures: Iterable[Measure]) -> list[str]:
    names = [measure.heading for measure in measures]
    # Symbols are not capitalised.
    return [f"{name[0].upper()}{name[1:]}" if name[:2].isascii() and name[:2].isalpha() else name for name in names]


def _with_std(arm: pd.Series, measure: Measure) -> str:
    std = arm.get(f"{measure.name}_std", math.nan)
    return measure.show(arm[measure.name]) + ("" if pd.isna(std) else f" ± {measure.show(std)}")


def _std(value: float, digits: int) -> str:
    return "" if pd.isna(value) else f" ± {number(value, digits)}"


def _percent(value: float) -> str:
    return number(100 * value, 1)


def _interval(low: float, high: float) -> str:
    return NOTHING if pd.isna(low) else f"{_percent(low)}–{_percent(high)}"


# As Markdown


def _markdown(name: str, tables: Sequence[PaperTable]) -> str:
    blocks = [f"# {_cell(name)}"]
    for table in tables:
        lines = [table.heads, ["---", *["---:"] * (len(table.heads) - 1)], *table.rows]
        blocks.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
        blocks[-1] = f"**{_cell(table.caption)}**\n\n{blocks[-1]}"
    return "\n\n".join(blocks) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([\\|`*_<\[\]])", r"\\\1", " ".join(text.split()))


# As LaTeX

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "‖ΔW‖": r"$\|\Delta W\|$", "ΔW": r"$\Delta W$", "Δ": r"$\Delta$", "∠": r"$\angle$", "₁": r"$_1$",
    "√": r"$\surd$", "ρ": r"$\rho$", "σ": r"$\sigma$", "′": "'", "α": r"$\alpha$",
    "−": r"$-$", "–": "--", "…": r"\ldots{}", "±": r"$\pm$", "°": r"$^\circ$", "✕": r"$\times$", "×": r"$\times$",
    "÷": r"$\div$", "²": r"$^2$",
}  # fmt: skip


def escaped(text: str) -> str:
    """Escapes text for LaTeX; characters without a pdfLaTeX glyph lose their accents or become question marks."""
    parts = []
    for character in re.split(r"(‖ΔW‖|ΔW|.)", " ".join(text.split()), flags=re.DOTALL):
        if character in _ESCAPES:
            parts.append(_ESCAPES[character])
        elif character.isascii() and (character.isprintable() or not character):
            parts.append(character)
        else:
            plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
            parts.append("".join(_ESCAPES.get(letter, letter) for letter in plain if letter.isprintable()) or "?")
    return "".join(parts)


def _latex(name: str, tables: Sequence[PaperTable]) -> str:
    lines = [
        f"% LossLens, sweep {escaped(name)}. Include it with \\input; it needs \\usepackage{{booktabs}}.",
        "% The tables are too wide for one column of a two-column page: table* spans both.",
    ]
    for table in tables:
        parts = -(-len(table.rows) // _MOST_ROWS)
        length = -(-len(table.rows) // parts)
        for part in range(parts):
            lines += _latex_table(table, table.rows[part * length : (part + 1) * length], part)
    return "\n".join(lines) + "\n"


def _latex_table(table: PaperTable, rows: Sequence[Sequence[str]], part: int) -> list[str]:
    more = " (Continued.)" if part else ""
    label = f"tab:{table.label}{part + 1 if part else ''}"
    return [
        "",
        r"\begin{table*}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{3.5pt}",
        f"\\caption{{{escaped(table.caption + more)}}}\\label{{{label}}}\\smallskip",
        f"\\begin{{tabular}}{{@{{}}l{'r' * (len(table.heads) - 1)}@{{}}}}",
        r"\toprule",
        f"{' & '.join(map(escaped, table.heads))} \\\\",
        r"\midrule",
        *(f"{' & '.join(map(escaped, row))} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
