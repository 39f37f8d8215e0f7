"""What the accuracies say: a difference is called one only where Holm's corrected p is at most .05."""

from __future__ import annotations

import pandas as pd

from losslens.report.arm_comparison import arms as ablation_arms
from losslens.report.arm_comparison import base_on
from losslens.report.components import Finding
from losslens.report.loss_comparison import Comparison
from losslens.report.names import loss_name
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import listed, number, p_value, percent, points, whole


def accuracies(analysis: AnalysisFolder, comparison: Comparison) -> list[Finding]:
    """Whose accuracy differs from the base's, and from SFT's, after Holm's correction."""
    arms = ablation_arms(analysis)
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
    for name, held in arms[arms["sft_p_holm"].notna()].groupby("sft", sort=False):
        for _, sft in arms[arms["arm"] == name].iterrows():
            sentences.append(_against(held, "sft", f"{sft['shown']} ({percent(sft['accuracy'])})"))
    if not sentences:
        return []
    benchmark = arms["benchmark"].iloc[0]
    about = f"Accuracy ({whole(arms['n'].max())} problems of {benchmark}, p after Holm): "
    return [Finding(f"{about}{'; '.join(sentences)}.{_detectable(comparison, benchmark)}", "learning-rate")]


def _against(arms: pd.DataFrame, to: str, name: str) -> str:
    tested = arms[arms[f"{to}_p_holm"].notna()]
    verdicts = tested[f"{to}_verdict"]
    parts = []
    for verdict in ("better", "worse"):
        those = tested[verdicts == verdict].sort_values(f"{to}_diff", key=abs, ascending=False)
        if len(those):
            each = [f"{arm['shown']} ({_figures(arm, to)})" for _, arm in those.iterrows()]
            parts.append(f"{listed(each)} {'is' if len(those) == 1 else 'are'} {verdict} than {name}")
    rest = tested[~verdicts.isin(["better", "worse"])]
    if parts and len(rest):
        parts.append(f"of the other{'s' * (len(rest) > 1)} no difference was shown")
    elif not parts and (rest[f"{to}_diff"] == 0).all():
        whose = "all are" if len(rest) > 1 else f"that of {rest['shown'].iloc[0]} is"
        parts.append(f"{whose} that of {name}")
    elif not parts:
        widest = rest.loc[rest[f"{to}_diff"].abs().idxmax()]
        parts.append(
            f"no difference from {name} was shown, the largest is that of {widest['shown']} ({_figures(widest, to)})"
        )
    weak = rest[rest[f"{to}_verdict"] == "underpowered"]
    if len(weak):
        parts.append(f"of {listed(list(weak['shown']))} too few answers differ to show any (underpowered)")
    return "; ".join(parts)


def _figures(arm: pd.Series, to: str) -> str:
    """`−4.2 points, 95% −7.2 … −1.2, p = 0.052`."""
    interval = f"95% {points(arm[f'{to}_diff_low'])} … {points(arm[f'{to}_diff_high'])}"
    shown = p_value(arm[f"{to}_p_holm"])
    p = f"p {shown.replace('<', '< ')}" if shown.startswith("<") else f"p = {shown}"
    return f"{points(arm[f'{to}_diff'])} points, {interval}, {p}"


def _detectable(comparison: Comparison, benchmark: str) -> str:
    pairs = comparison.arm_pairs
    known = pairs.loc[pairs["arm_b"] == "base", "detectable_diff"].dropna()
    if known.empty:
        return ""
    low, high = (number(100 * value, 1) for value in (known.min(), known.max()))
    span = high if low == high else f"{low} to {high}"
    return (
        f" A difference of {span} points between a loss and the base would be found in four of five samples of as many "
        f"problems of {benchmark}."
    )
