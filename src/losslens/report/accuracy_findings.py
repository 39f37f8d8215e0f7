"""Findings on accuracy: a difference, or equivalence, is reported only if its Holm-corrected p is at most .05."""

from __future__ import annotations

import pandas as pd

from losslens.report.arm_comparison import arm_rows, base_on
from losslens.report.components import Finding
from losslens.report.loss_comparison import LossComparison
from losslens.report.names import loss_name
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import listed, number, p_value, percent, points, whole

# Most losses that a sentence names.
_MOST_NAMED = 6


def accuracies(analysis: AnalysisFolder, comparison: LossComparison) -> list[Finding]:
    """Reports which losses differ in accuracy from the base and from SFT, and which are equivalent to them."""
    arms = arm_rows(analysis)
    arms = arms[arms["accuracy"].notna()] if len(arms) else arms
    if arms.empty:
        return []
    base = base_on(analysis, arms["benchmark"])
    names = {loss.arm: loss.name for loss in comparison.losses}
    arms = arms.assign(
        shown=[
            names.get(arm.arm) or loss_name(arm.method, arm.learning_rate, arm.settings) for arm in arms.itertuples()
        ]
    )
    sentences = []
    if len(base) and arms["base_diff"].notna().any():
        sentences.append(_against(arms, "base", f"the base ({percent(base['accuracy'].iloc[0])})"))
    for name, compared in arms[arms["sft_p_holm"].notna()].groupby("sft", sort=False):
        for _, sft in arms[arms["arm"] == name].iterrows():
            sentences.append(_against(compared, "sft", f"{sft['shown']} ({percent(sft['accuracy'])})"))
    if not sentences:
        return []
    benchmark = arms["benchmark"].iloc[0]
    about = f"Accuracy ({whole(arms['n'].max())} problems of {benchmark}, p after Holm's correction): "
    return [Finding(f"{about}{'; '.join(sentences)}.{_detectable(comparison, benchmark)}", "learning-rate")]


def _against(arms: pd.DataFrame, to: str, name: str) -> str:
    tested = arms[arms[f"{to}_p_holm"].notna()]
    verdicts = tested[f"{to}_verdict"]
    parts = []
    for verdict in ("better", "worse"):
        differing = tested[verdicts == verdict].sort_values(f"{to}_diff", key=abs, ascending=False)
        if len(differing):
            losses = [f"{arm['shown']} ({_numbers(arm, to)})" for _, arm in differing.iterrows()]
            parts.append(f"{listed(losses)} {'is' if len(differing) == 1 else 'are'} {verdict} than {name}")
    equal, unclear = (tested[verdicts == verdict] for verdict in ("equivalent", "cannot say"))
    if len(equal):
        margin = f"{100 * equal[f'{to}_equivalence_margin'].max():g}"
        parts.append(
            f"{_names(equal, tested)} {'is' if len(equal) == 1 else 'are'} equivalent to {name} within ±{margin} points"
        )
    if len(unclear):
        widest = unclear.loc[unclear[f"{to}_diff"].abs().idxmax()]
        largest = f"the largest difference is that of {widest['shown']}: " * (len(unclear) > 1)
        parts.append(
            f"whether {_names(unclear, tested)} differ{'s' * (len(unclear) == 1)} from {name}, the data cannot say "
            f"({largest}{_numbers(widest, to)})"
        )
    return "; ".join(parts)


def _names(arms: pd.DataFrame, of: pd.DataFrame) -> str:
    """Returns the names of the arms, or that they are all; of more than six, how many."""
    if len(arms) == len(of) > 1:
        return "all losses"
    return listed(list(arms["shown"])) if len(arms) <= _MOST_NAMED else f"{len(arms)} of the losses"


def _numbers(arm: pd.Series, to: str) -> str:
    """Returns `−4.2 points, 95% −7.2 … −1.2, p = 0.052`."""
    interval = f"95% {points(arm[f'{to}_diff_low'])} … {points(arm[f'{to}_diff_high'])}"
    shown = p_value(arm[f"{to}_p_holm"])
    p = f"p {shown.replace('<', '< ')}" if shown.startswith("<") else f"p = {shown}"
    return f"{points(arm[f'{to}_diff'])} points, {interval}, {p}"


def _detectable(comparison: LossComparison, benchmark: str) -> str:
    pairs = comparison.arm_pairs
    known = pairs.loc[pairs["arm_b"] == "base", "detectable_diff"].dropna()
    if known.empty:
        return ""
    low, high = (number(100 * value, 1) for value in (known.min(), known.max()))
    span = high if low == high else f"{low} to {high}"
    return (
        f" With this many problems of {benchmark}, a difference of {span} points between a loss and the base would be "
        "detected in four of five samples."
    )
