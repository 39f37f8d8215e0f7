"""The learning-rate-matched comparison: it separates the effect of a loss from that of its learning rate."""

from __future__ import annotations

import pandas as pd

from losslens.report.arm_comparison import arm_rows, base_on, is_matched
from losslens.report.arm_figures import arm_figures
from losslens.report.arm_table import arm_table
from losslens.report.components import Section
from losslens.report.legends import legend
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import loss_title


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None if the analysis has no arms."""
    rows = arm_rows(analysis)
    if rows.empty:
        return None
    looks = LossComparison(analysis).looks
    matched, base = is_matched(rows), base_on(analysis, rows["benchmark"])
    about = (
        "An arm is all runs that differ only in their seeds. Arms at the same learning rate differ in their loss; arms "
        "of the same method differ in their learning rate."
    )
    return Section(
        "learning-rate",
        "The learning-rate-matched comparison" if matched else "The losses, averaged over their runs",
        text=[about if matched else "An arm is all runs of one loss that differ only in their seeds."],
        key=legend(zip(rows["arm"], rows["method"], rows["beside"], strict=True), looks, lines=False),
        figures=arm_figures(rows, looks, None if base.empty else base.iloc[0]),
        tables=[arm_table(analysis, rows)],
        notes=[*_how_to_read(rows), *(note for _, arm in rows.iterrows() for note in _lost(arm))],
    )


def _how_to_read(rows: pd.DataFrame) -> list[str]:
    fewest, most = int(rows["seeds"].min()), int(rows["seeds"].max())
    counts = str(most) if fewest == most else f"{fewest} to {most}"
    notes = [f"Each arm is the average of {counts} run{'s' * (most != 1)}; ± is the standard deviation over runs."]
    if rows["cosine_repeat"].notna().any():
        notes.append(
            "Arms are compared by their runs at different seeds: runs of the same seed share their batches and read "
            "too high. Ceiling (of cosines and CKA): √(ρρ') of the repeats of the two arms, which they would show if "
            "they were the same loss; next to it is the ratio to the ceiling, with its jackknife interval over seeds. "
            "Repeat (of angles and barriers): the mean of the two repeats, which they would show if they were the same "
            "loss."
        )
    else:
        notes.append("There are no ceilings: no loss was trained with a second data order.")
    if rows.filter(regex="_null$").notna().any(axis=None):
        notes.append(
            "Null: the value for two updates with these shapes, ranks, singular values and initial adapter but nothing "
            "else in common; the absolute value of a cosine stays below it in 95 of 100 cases."
        )
    return notes


def _lost(arm: pd.Series) -> list[str]:
    name = f"{loss_title(arm['method'])}, {arm['lr']}{', ' * bool(arm['settings'])}{arm['settings']}"
    total = arm["seeds"] + arm["diverged"]
    in_averages = {"diverged": "not included", "collapsed": "included"}
    return [
        f"{name}: {arm[what]} of {total} run{'s' * (total != 1)} {what} and "
        f"{'is' if arm[what] == 1 else 'are'} {included} in the averages."
        for what, included in in_averages.items()
        if arm[what]
    ]
