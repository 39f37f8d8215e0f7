"""The arms of the learning-rate-matched comparison, without duplicates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from losslens.measures import pair_measures, run_measures
from losslens.report import names
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import plot_order

_TEXTS = (
    "arm",
    "method",
    "lr",
    "settings",
    "alias_of",
    "samples",
    "benchmark",
    "base_verdict",
    "sft_verdict",
    "sft",
    "pairing",
    "cosine_to_sft_verdict",
)
_NUMBERS = (
    "learning_rate", "pass_rate",
    *(f"{measure.name}{end}" for measure in run_measures("more") for end in ("", "_std")),
    *(f"{m.name}_to_sft{end}" for m in pair_measures("main") for end in m.endings if end != "_verdict"),
    "cosine_repeat", "cosine_to_sft_same_rate", "cosine_to_dpo_conventional",
    "accuracy", "accuracy_std", "accuracy_min", "accuracy_max", "n", "ci_low", "ci_high",
    *(
        f"{other}_{column}"
        for other in ("base", "sft")
        for column in ("diff", "diff_low", "diff_high", "p", "p_holm", "equivalence_margin", "equivalent_within")
    ),
)  # fmt: skip
_COUNTS = ("seeds", "diverged", "collapsed")


def arm_rows(analysis: AnalysisFolder) -> pd.DataFrame:
    """Returns one row per arm, ordered by learning rate (largest first) and then by method.

    `lr` joins all learning-rate names that stand for the same runs. Added columns are `label` (the displayed name),
    `beside` (the name shortened for the row of a plot) and `place` (the y position of that row).
    """
    table = analysis.table("arms", _TEXTS, (*_NUMBERS, *_COUNTS))
    if table.empty:
        return table
    # The copy joins the blocks of the many columns, to which others are added below.
    table = table.fillna(dict.fromkeys(_COUNTS, 0)).astype(dict.fromkeys(_COUNTS, int)).copy()
    folded = table["alias_of"].isin(table.loc[table["alias_of"] == "", "arm"])
    rows = table[~folded].assign(order=table["method"].map(plot_order))
    rows = rows.sort_values(["learning_rate", "order"], ascending=[False, True], kind="stable", ignore_index=True)
    others = table[folded].groupby("alias_of")["lr"].agg(list)
    rows["lr"] = [" = ".join([arm.lr, *others.get(arm.arm, [])]) for arm in rows.itertuples()]
    rows["label"] = [names.loss_name(arm.method, arm.learning_rate, arm.settings) for arm in rows.itertuples()]
    rows["beside"] = names.all_cut(rows["label"].tolist())
    crosses = [" ✕" * went_wrong(arm) for arm in rows.itertuples()]
    for column in ("label", "beside"):
        rows[column] = [f"{label}{cross}" for label, cross in zip(rows[column], crosses, strict=True)]
    # Leaves a gap between learning rates.
    rows["place"] = rows.index + 0.6 * pd.factorize(rows["learning_rate"])[0]
    return rows


def base_on(analysis: AnalysisFolder, benchmarks: Iterable[str]) -> pd.DataFrame:
    """Returns the untrained base's accuracy and interval on these benchmarks; no rows where it was not scored."""
    runs = analysis.table("runs", ("method", "benchmark"), ("accuracy", "ci_low", "ci_high"))
    return runs[(runs["method"] == "base") & runs["benchmark"].isin(list(benchmarks)) & runs["accuracy"].notna()]


def is_matched(rows: pd.DataFrame) -> bool:
    """True if a method was trained at several learning rates; otherwise loss and learning rate are confounded."""
    return bool(len(rows)) and bool((rows.groupby("method")["learning_rate"].nunique() > 1).any())


def went_wrong(arm: Any) -> bool:
    """True if a run of the arm diverged or collapsed."""
    return bool(arm.diverged or arm.collapsed)
