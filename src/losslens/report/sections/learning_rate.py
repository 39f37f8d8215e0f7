"""The learning-rate-matched comparison: what of a method's update is its loss, and what its learning rate."""

from __future__ import annotations

import pandas as pd

from losslens.report.arm_comparison import arms, base_on, is_matched
from losslens.report.arm_figures import arm_figures
from losslens.report.arm_table import arm_table
from losslens.report.components import Section
from losslens.report.legends import legend
from losslens.report.loss_comparison import Comparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import loss_title


def section(analysis: AnalysisFolder) -> Section | None:
    """The section; None where the analysis has no such comparison."""
    rows = arms(analysis)
    if rows.empty:
        return None
    looks = Comparison(analysis).looks
    matched, base = is_matched(rows), base_on(analysis, rows["benchmark"])
    about = "Arms at one learning rate differ in their loss, arms of one method in their rate."
    return Section(
        "learning-rate",
        "The learning-rate-matched comparison" if matched else "The losses, averaged over their runs",
        text=[about if matched else "An arm is all runs of one loss that differ in their seeds only."],
        key=legend(zip(rows["arm"], rows["method"], rows["beside"], strict=True), looks, lines=False),
        figures=arm_figures(rows, looks, None if base.empty else base.iloc[0]),
        tables=[arm_table(analysis, rows)],
        notes=[*_how_to_read(rows), *(note for _, arm in rows.iterrows() for note in _lost(arm))],
    )


def _how_to_read(rows: pd.DataFrame) -> list[str]:
    fewest, most = int(rows["seeds"].min()), int(rows["seeds"].max())
    counts = str(most) if fewest == most else f"{fewest} to {most}"
    notes = [f"Each arm is the average of {counts} run{'s' * (most != 1)}; ± is the standard deviation over them."]
    if rows["cosine_repeat"].notna().any():
        notes.append(
            "Arms are compared by their runs at different seeds: runs of one seed share their batches and read too "
            "high. Ceiling (of cosines and CKA): √(ρρ') of what the two have with themselves, trained again, what "
            "they would show if they were one loss; the ratio stands beside it, with its jackknife interval over "
            "seeds. Repeat (of angles and barriers): the mean of the two with themselves."
        )
    else:
        notes.append("There are no ceilings: no loss was trained in another order of the data.")
    if rows.filter(regex="_null$").notna().any(axis=None):
        notes.append(
            "Null: two updates with these shapes, ranks, singular values and initial adapter, and nothing else in "
            "common; a cosine's absolute value stays below it 95 times in 100."
        )
    return notes


def _lost(arm: pd.Series) -> list[str]:
    name = f"{loss_title(arm['method'])}, {arm['lr']}{', ' * bool(arm['settings'])}{arm['settings']}"
    total = arm["seeds"] + arm["diverged"]
    became = {"diverged": ("diverged", " not"), "collapsed": ("fell to nothing", "")}
    return [
        f"{name}: {arm[what]} of {total} run{'s' * (total != 1)} {said} and "
        f"{'is' if arm[what] == 1 else 'are'}{out} in the averages."
        for what, (said, out) in became.items()
        if arm[what]
    ]
