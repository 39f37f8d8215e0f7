"""Table of the learning-rate-matched comparison: each measure with its ceiling or repeat level and its null."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from losslens.measures import pair_measures, run_measures
from losslens.report.arm_comparison import is_matched, went_wrong
from losslens.report.components import Cell, Column, Row, Table, downloadable
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, difference, number, p_value, percent, rate, within
from losslens.tables.style import colour, loss_title

_SAME_RATE = "cosine_to_sft_same_rate"
_LOST = ("diverged", "collapsed")
_PASS_RATE = ("pass_rate", "pass rate", percent)


def _measures() -> list[tuple[str, str, Callable[[float], str]]]:
    """Returns the column, heading and number format of each measure."""
    to_sft = [(f"{m.name}_to_sft", f"{m.label} to SFT{m.in_unit}", m.show) for m in pair_measures("main")]
    to_sft.insert(1, (_SAME_RATE, "cosine to SFT at the same rate", number))
    sizes = [(measure.name, measure.label, measure.show) for measure in run_measures("more")]
    return [*sizes, *to_sft, ("cosine_to_dpo_conventional", "cosine to conventional DPO", number)]


def arm_table(analysis: AnalysisFolder, arms: pd.DataFrame) -> Table:
    """Builds the table, one row per arm; measures that no arm has are left out."""
    measures = [measure for measure in _measures() if arms[measure[0]].notna().any()]
    if not is_matched(arms):  # it would repeat the cosine to SFT
        measures = [measure for measure in measures if measure[0] != _SAME_RATE]
    # Shown only if the arms learned from different rollouts.
    measures += [_PASS_RATE] if arms["pass_rate"].nunique() > 1 else []
    scored = arms["accuracy"].notna().any()
    against = [to for to in ("base", "sft") if arms[f"{to}_diff"].notna().any()]
    columns = [
        Column("arm", numeric=False), Column("learning rate"), Column("runs"),
        *(Column(heading) for _, heading, _ in measures),
        *([Column("accuracy")] if scored else []),
        *(Column({"base": "vs base", "sft": "vs SFT"}[to]) for to in against),
    ]  # fmt: skip
    rows = []
    for _, arm in arms.iterrows():
        cells = [
            Cell(
                loss_title(arm["method"]),
                below="\n".join(filter(None, (arm["lr"], arm["settings"], own_rows(arm)))),
                colour=colour(arm["method"]),
            ),
            Cell(rate(arm["learning_rate"])),
            Cell(str(arm["seeds"]), bad="\n".join(f"✕ {arm[what]} {what}" for what in _LOST if arm[what])),
            *(
                Cell(show(arm[name]), _spread(arm, name, show), "\n".join(lines_below(arm, name, show)))
                for name, _, show in measures
            ),
            *([_accuracy(arm)] if scored else []),
            *(_against(arm, to) for to in against),
        ]
        rows.append(Row(cells, marked=went_wrong(arm)))
    return downloadable(analysis, "arms", "One row per arm: mean ± standard deviation over seeds", columns, rows)


def own_rows(arm: pd.Series) -> str:
    """Returns `own rows` for an arm that trained on samples of its own policy, else an empty text."""
    return "own rows" if arm["samples"] == "own" else ""


def lines_below(arm: pd.Series, name: str, show: Callable[[float], str]) -> list[str]:
    """Returns the lines below a measure: ceiling and ratio, or repeat level; verdict; null."""
    known = {what: arm.get(f"{name}_{what}") for what in ("ceiling", "repeat", "relative", "low", "high", "null")}
    lines = [f"{what} {show(known[what])}" for what in ("ceiling", "repeat") if not pd.isna(known[what])]
    if not pd.isna(known["ceiling"]) and not pd.isna(known["relative"]):
        interval = "" if pd.isna(known["low"]) else f" [{number(known['low'], 2)}, {number(known['high'], 2)}]"
        lines[-1] += f", ratio {number(known['relative'], 2)}{interval}"
    verdict = arm.get(f"{name}_verdict", "")
    lines += [verdict] * (verdict not in ("", "too few seeds"))
    return lines + ([] if pd.isna(known["null"]) else [f"null {show(known['null'])}"])


def _spread(arm: pd.Series, name: str, show: Callable[[float], str]) -> str:
    return "" if pd.isna(arm.get(f"{name}_std")) else f"± {show(arm[f'{name}_std'])}"


def _accuracy(arm: pd.Series) -> Cell:
    several = not pd.isna(arm["accuracy_min"]) and arm["seeds"] > 1
    below = [] if pd.isna(arm["ci_low"]) else [f"95% {percent(arm['ci_low'])} … {percent(arm['ci_high'])}"]
    below += [f"runs {percent(arm['accuracy_min'])} … {percent(arm['accuracy_max'])}"] if several else []
    return Cell(percent(arm["accuracy"]), _spread(arm, "accuracy", percent), "\n".join(below))


def _against(arm: pd.Series, to: str) -> Cell:
    if pd.isna(arm[f"{to}_diff"]):
        return Cell(NOTHING)
    interval = f"{difference(arm[f'{to}_diff_low'])} … {difference(arm[f'{to}_diff_high'])}"
    verdict = arm[f"{to}_verdict"]
    test = "" if pd.isna(arm[f"{to}_p_holm"]) else f"\np (Holm) {p_value(arm[f'{to}_p_holm'])}"
    margin = "" if pd.isna(arm[f"{to}_equivalent_within"]) else f"\nwithin {within(arm[f'{to}_equivalent_within'])}"
    return Cell(difference(arm[f"{to}_diff"]), below=f"{verdict}\n{interval}{test}{margin}".lstrip())
