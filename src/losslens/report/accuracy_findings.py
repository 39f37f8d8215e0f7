"""Findings on accuracy: a difference is reported as one only if its Holm-corrected p is at most .05."""

from __future__ import annotations

import pandas as pd

from losslens.report.arm_comparison import arm_rows, base_on
from losslens.report.components import Finding
from losslens.report.loss_comparison import LossComparison
from losslens.report.names import loss_name
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import listed, number, p_value, percent, points, whole


def accuracies(analysis: AnalysisFolder, comparison: LossComparison) -> list[Finding]:
    """Reports which losses differ in accuracy from the base and from SFT, after Holm's correction."""
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
    rest = tested[~verdicts.isin(["better", "worse"])]
    if parts and len(rest):
        parts.append(f"no significant difference was found for the other{'s' * (len(rest) > 1)}")
    elif not parts and (rest[f"{to}_diff"] == 0).all():
        who = "all losses equal" if len(rest) > 1 else f"{rest['shown'].iloc[0]} equals"
        parts.append(f"{who} {name}")
    elif not parts:
        widest = rest.loc[rest[f"{to}_diff"].abs().idxmax()]
        parts.append(
            f"no significant difference from {name} was found; the largest is that of {widest['shown']} "
            f"({_numbers(widest, to)})"
        )
    weak = rest[rest[f"{to}_verdict"] == "underpowered"]
    if len(weak):
        parts.append(f"for {listed(list(weak['shown']))}, too few answers differ to show any difference (underpowered)")
    return "; ".join(parts)


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
