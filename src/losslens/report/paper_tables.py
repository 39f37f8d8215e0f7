"""Tables for papers, as Markdown and as LaTeX with booktabs: runs, losses against the reference, repeats, arms."""

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
from losslens.report.arm_comparison import arms as ablation_arms
from losslens.report.arm_comparison import is_matched
from losslens.report.findings import ratio
from losslens.report.loss_comparison import Comparison
from losslens.report.names import short
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, number, p_value, points, rate, whole
from losslens.tables.style import loss_title

# A page holds no more rows of this size.
_MOST_ROWS = 45


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        label: For references.
        caption: What it shows.
        heads: Of its columns; the first names the row, the others are of numbers.
        rows: Their cells, plain text.
    """

    label: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_tables(folder: Path) -> list[Path]:
    """Writes `tables.md` and `tables.tex` into the folder of an analysis.

    Raises:
        InputError: The analysis has no manifest, or a table is none.
    """
    analysis = AnalysisFolder(folder)
    comparison = Comparison(analysis)
    name = ", ".join(map(str, analysis.manifest.get("sweeps") or [])) or "adapters"
    made = (_runs(analysis, comparison), _to_reference(comparison), _repeats(analysis), _ablation(analysis))
    tables = [_without_empty_columns(table) for table in made if table and table.rows]
    written = []
    for kind, text in (("md", _markdown(name, tables)), ("tex", _latex(name, tables))):
        file = folder / f"tables.{kind}"
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
        written.append(file)
    return written


def _without_empty_columns(table: PaperTable) -> PaperTable:
    """Without what is not known of any row."""
    kept = [place for place in range(len(table.heads)) if any(row[place] != NOTHING for row in table.rows)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return replace(table, heads=[table.heads[place] for place in kept], rows=rows)


def _runs(analysis: AnalysisFolder, comparison: Comparison) -> PaperTable:
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
    caption = "Runs: size of the update."
    if runs["accuracy"].notna().any():
        test = " and, of losses trained once, the test against the base" * bool(tested)
        about = f" on {benchmarks[0]}" if len(benchmarks) == 1 else ""
        caption = f"Runs: size of the update and accuracy{about}, with Wilson intervals{test}."
    return PaperTable(
        "runs", f"{caption}{' ✕: diverged or collapsed.' * bool((runs['diverged'] != '').any())}", heads, rows
    )


def _tests_of_runs(analysis: AnalysisFolder) -> dict[tuple[str, str], float]:
    """Of each run that is all of its arm, and of the benchmark that was tested, the p of the arm against the base."""
    arms = ablation_arms(analysis)
    runs = analysis.table("runs", ("run", "arm", "benchmark"), ())
    if arms.empty:
        return {}
    p = arms[arms["seeds"] == 1].set_index(["arm", "benchmark"])["base_p_holm"].dropna().to_dict()
    return {
        (run.run, run.benchmark): p[run.arm, run.benchmark]
        for run in runs.itertuples()
        if (run.arm, run.benchmark) in p
    }


def _to_reference(comparison: Comparison) -> PaperTable | None:
    reference = comparison.reference
    if reference is None or not comparison.others:
        return None
    rows = []
    for loss in comparison.losses:
        own = loss is reference
        cosine = comparison.of("cosine", loss, reference)
        cells = [f"{loss.name} (again)" if own else loss.name, number(cosine.value)]
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
    ceilings = "Ceiling: √(ρρ') of the two losses' own repeats, ratio: cos/ceiling with its 95% jackknife interval. "
    ceilings *= any(not math.isnan(cosine.level) for cosine in found)
    caption = (
        f"Each loss against {reference.name}{_over(cosine.pairing for cosine in found if cosine.known)}: cosine of ΔW"
        f"{'; '.join(['', *others])}. {ceilings}Null: two updates with nothing in common"
        f"{' but the initial A' * all(cosine.pairing in ('same seeds', 'same init') for cosine in found)}."
    )
    return PaperTable("to-reference", caption, heads, rows)


def _over(pairings: Iterable[str]) -> str:
    """Of which runs the pairs are; where all are of one kind, or of different seeds and not, it is said."""
    kinds = {"different" if pairing in ("same init", "other") else pairing for pairing in pairings}
    one_seed = kinds & {"same seeds", "same order"}
    if not kinds or "" in kinds:
        return ""
    if not one_seed:
        return ", over runs at different seeds"
    return ", over runs at different seeds where there are any" if "different" in kinds else ", over runs of one seed"


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
    heads = ["Loss", "LR", "Other", "Pairs", *_headings(measures)]
    how = {
        "order": "in another order of the data", "start": "from another start", "order and start": "from another start "
        "in another order", "data": "on other rollouts",
    }  # fmt: skip
    kinds = [said for kind, said in how.items() if (repeats["repeat_kind"] == kind).any()]
    caption = f"Repeats: one loss trained again {', or '.join(kinds)}."
    return PaperTable("repeats", caption, heads, rows)


def _ablation(analysis: AnalysisFolder) -> PaperTable | None:
    arms = ablation_arms(analysis)
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
        f"{_over(others['pairing'])}; ceiling: √(ρρ') of SFT's and the loss's own repeats; cos DPO: cosine to "
        "conventional DPO; p: sign-flip test over problems, Holm over all comparisons of arms."
    )
    return PaperTable("arms", caption, heads, rows)


def _headings(measures: Iterable[Measure]) -> list[str]:
    names = [measure.heading for measure in measures]
    # Of a symbol the capital is another one.
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
}  # fmt: skip


def escaped(text: str) -> str:
    """`text` for LaTeX; a character that pdfLaTeX has no glyph for loses its accents, or is a question mark."""
    found = []
    for character in re.split(r"(‖ΔW‖|ΔW|.)", " ".join(text.split()), flags=re.DOTALL):
        if character in _ESCAPES:
            found.append(_ESCAPES[character])
        elif character.isascii() and (character.isprintable() or not character):
            found.append(character)
        else:
            plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
            found.append("".join(_ESCAPES.get(part, part) for part in plain if part.isprintable()) or "?")
    return "".join(found)


def _latex(name: str, tables: Sequence[PaperTable]) -> str:
    lines = [
        f"% LossLens, sweep {escaped(name)}. \\input this; it needs \\usepackage{{booktabs}}.",
        "% One column of a two-column page is too narrow for these: table* spans both.",
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
