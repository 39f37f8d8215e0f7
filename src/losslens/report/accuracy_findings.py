"""What the accuracies say: a difference is called one only where Holm's corrected p is at most .05."""

from __future__ import annotations

from typing import Any

import pandas as pd

from losslens.report.arms import arms as ablation_arms
from losslens.report.arms import short
from losslens.report.comparison import Comparison
from losslens.report.folder import AnalysisFolder
from losslens.report.numbers import listed, number, p_value, percent, points, rate, whole
from losslens.report.parts import Finding
from losslens.report.style import name_of


def accuracies(analysis: AnalysisFolder, comparison: Comparison) -> list[Finding]:
    """Whose accuracy differs from the base's, and from SFT's, after Holm's correction."""
    arms = ablation_arms(analysis)
    runs = analysis.table("runs", ("run", "method", "benchmark"), ("accuracy", "n", "base_detectable"))
    base = runs[(runs["method"] == "base") & runs["accuracy"].notna()]
    if len(arms):
        arms = arms[arms["accuracy"].notna()]
        base = base[base["benchmark"].isin(arms["benchmark"])]
    if arms.empty:
        return []
    names = {loss.arm: loss.name for loss in comparison.losses}
    arms = arms.assign(shown=[names.get(arm.arm) or _name(arm) for arm in arms.itertuples()])
    sentences = []
    if len(base) and arms["base_diff"].notna().any():
        sentences.append(_against(arms, "base", f"the base ({percent(base['accuracy'].iloc[0])})"))
    sft = arms[(arms["method"] == "sft") & (arms["cosine_to_sft"] == 1)]
    if len(sft) and arms["sft_diff"].notna().any():
        first = sft.iloc[0]
        sentences.append(_against(arms, "sft", f"{first['shown']} ({percent(first['accuracy'])})"))
    if not sentences:
        return []
    about = f"Accuracy on {whole(arms['n'].max())} problems of {arms['benchmark'].iloc[0]}: "
    return [Finding(f"{about}{'; '.join(sentences)}.{_detectable(runs)}", "learning-rate")]


def _name(arm: Any) -> str:
    return " ".join(part for part in (name_of(arm.method), rate(arm.learning_rate), short(arm.settings)) if part)


def _against(arms: pd.DataFrame, to: str, name: str) -> str:
    tested = arms[arms[f"{to}_diff"].notna()]
    verdicts = tested[f"{to}_verdict"]
    parts = []
    for verdict in ("better", "worse"):
        those = tested[verdicts == verdict].sort_values(f"{to}_diff", key=abs, ascending=False)
        if len(those):
            each = [
                f"{arm['shown']} ({points(arm[f'{to}_diff'])} points, {_p(arm[f'{to}_p_holm'])})"
                for _, arm in those.iterrows()
            ]
            parts.append(f"{listed(each)} {'is' if len(those) == 1 else 'are'} {verdict} than {name}")
    rest = tested[~verdicts.isin(["better", "worse"])]
    if not parts:
        widest = rest.loc[rest[f"{to}_diff"].abs().idxmax()]
        if (rest[f"{to}_diff"] == 0).all():
            parts.append(f"none differs from {name}: all differences are 0")
        else:
            interval = f"{points(widest[f'{to}_diff_low'])} … {points(widest[f'{to}_diff_high'])}"
            parts.append(
                f"no difference from {name} was shown; the largest is that of {widest['shown']}, "
                f"{points(widest[f'{to}_diff'])} points (95% {interval}, {_p(widest[f'{to}_p_holm'])})"
            )
    elif len(rest):
        parts.append(
            "of the others no difference was shown" if len(rest) > 1 else "of the other no difference was shown"
        )
    weak = rest[rest[f"{to}_verdict"] == "underpowered"]
    if len(weak):
        parts.append(
            f"of {listed(list(weak['shown']))} too few answers differ for any difference to be shown (underpowered)"
        )
    return "; ".join(parts)


def _detectable(runs: pd.DataFrame) -> str:
    known = runs["base_detectable"].dropna()
    if known.empty:
        return ""
    low, high = (number(100 * value, 1) for value in (known.min(), known.max()))
    span = high if low == high else f"{low} to {high}"
    return f" A difference of {span} points between a run and the base would be found in four of five such samples."


def _p(value: float) -> str:
    shown = p_value(value)
    return f"p {shown.replace('<', '< ')}" if shown.startswith("<") else f"p = {shown}"
