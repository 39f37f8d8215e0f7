"""Makes figures, tables and numbers of the study from its results alone, without training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.core.errors import InputError
from losslens.core.files import atomic_file, write_json
from losslens.report.figures.canvas import style
from losslens.report.paper_tables import escaped
from losslens.tables.format import number
from losslens.tables.style import loss_title
from tools.study import claims, figures, findings, hypotheses, verdicts
from tools.study.crossed import Crossed, nanmean
from tools.study.figures import KIND_TITLES, MEASURE_TITLES
from tools.study.results import KINDS, Results
from tools.study.shared_problems import shared_problems
from tools.study.verdicts import ONE_RATE

# What suggested the hypotheses, and is left out of the tests on what nobody had seen.
SEEN = {"start": "42", "draw": "0"}
# The order whose runs choose the best rate of each loss.
CHOOSING = "42"
# What two of the figures are of, and the losses that the text names.
TITLE, NAMED = "embedded model, weights", ("sft", "dft", "dpo", "nft")


def available(folder: Path, sweep: str) -> Results | None:
    """Reads the results of a sweep; None if there are none yet."""
    return Results.read(folder, sweep) if (folder / sweep).is_dir() else None


def numbers(folder: Path, permutations: int = 9_999) -> dict[str, Any]:
    """Computes every number of the page from the results in `folder`.

    Args:
        folder: The folder of the results.
        permutations: Number of permutations of each test.
    """
    found: dict[str, Any] = {}
    for model, sweep in (("embedded", "study"), ("smollm2", "study_smollm2")):
        if (results := available(folder, sweep)) is not None:
            found[model] = _of_model(results, permutations)
            found[model]["shared_problems"] = shared_problems(sweep, sorted(results.runs["draw"].unique()))
    if (full := available(folder, "study_full")) is not None:
        found["full"] = {"geometry": hypotheses.explained_by_norm(full.runs)}
    found["matchings"] = {
        name: findings.findings(results, correct, norm) for name, (results, correct, norm) in matchings(folder).items()
    }
    if (rates := available(folder, "study_rates")) is not None:
        found["kl_per_norm_exponents"] = hypotheses.exponents(rates.runs)
        found["kl_at_norms_of_dpo"] = hypotheses.at_norms_of_dpo(rates.runs)
        found["rates"] = {rate: _of_rate(rates, rate) for rate in sorted(set(rates.runs["rate"]), key=_factor)}
    if (at_norm := available(folder, "study_rates-norm")) is not None:
        found["equal_norm"] = {"kl_per_norm": hypotheses.behaviour_per_norm(at_norm.runs)}
    found["matchings_unseen"] = {name: findings.findings(results) for name, results in unseen_matchings(folder).items()}
    if (one_rate := available(folder, "study_one_rate")) is not None:
        found["one_rate"] = {
            "kl_per_norm": hypotheses.behaviour_per_norm(one_rate.runs),
            "norm": hypotheses.norm_over_sft(one_rate.runs),
            "accuracy_of_dpo": accuracy_by_draw(one_rate.runs, "dpo"),
        }
    return found


def accuracy_by_draw(runs: pd.DataFrame, loss: str) -> dict[str, float]:
    """Computes the mean accuracy of a loss on each draw of the data."""
    accuracies = runs[runs["loss"] == loss].groupby("draw")["accuracy"].mean()
    return {str(draw): float(accuracy) for draw, accuracy in accuracies.items()}


def _of_rate(results: Results, rate: str) -> dict[str, Any]:
    """Computes how DPO compares with other losses at one rate for all."""
    own = findings.matched(results, results.runs["rate"] == rate)
    return {
        "kl_per_norm": hypotheses.behaviour_per_norm(own.runs),
        "norm": findings.findings(own)["F4"],
        "accuracy": own.runs.groupby("loss")["accuracy"].mean().to_dict(),
    }


def _factor(rate: str) -> float:
    """Returns the factor in the name of a rate: 0.03 of "x0.03"."""
    return float(rate.removeprefix("x"))


def _of_model(results: Results, permutations: int) -> dict[str, Any]:
    """Computes the numbers of a model, of all runs; and again of others.

    Returns:
        The numbers; in `unseen` the same without the runs that suggested the hypotheses, and in `without_draw` without
        each draw of the data.
    """
    found = _of_runs(results, permutations)
    draws = results.runs["draw"]
    found["without_draw"] = {
        draw: _of_runs(findings.matched(results, draws != draw), 1) for draw in draws.unique() if draws.nunique() > 1
    }
    seen = (results.runs[list(SEEN)] == pd.Series(SEEN)).all(axis=1)
    if seen.any() and not seen.all():
        found["unseen"] = _of_runs(findings.matched(results, ~seen), permutations)
    return found


def _of_runs(results: Results, permutations: int) -> dict[str, Any]:
    designs = hypotheses.designs(results)
    weights = designs["weights"]
    found: dict[str, Any] = {
        "runs": len(results.runs),
        "left_out": dict(results.left_out),
        "shares": {kind: hypotheses.share_table(design) for kind, design in designs.items()},
        "within_rates": hypotheses.within_rates(weights, results.runs),
        "factors_p": hypotheses.p_of_factors(weights, permutations),
        "pairs": pairs_of_all_kinds(results, designs),
        "persisting": hypotheses.persisting(weights),
        "likelihoods": hypotheses.likelihoods(weights),
        "kl_per_norm": hypotheses.behaviour_per_norm(results.runs),
        "function_less_weights": hypotheses.function_less_weights(designs),
        "accuracy": results.runs.groupby("loss")["accuracy"].agg(["mean", "min", "max"]).reset_index(),
        "accuracy_of_dpo": accuracy_by_draw(results.runs, "dpo"),
        "base_accuracy": float(results.runs["base_accuracy"].iloc[0]),
    }
    if len(results.gradients):
        found["decided"] = hypotheses.decided(results, weights, permutations)
        found["decided_by_kind"] = {kind: hypotheses.r_of_kind(results, design) for kind, design in designs.items()}
        found["sampling"] = hypotheses.sampling(results.gradients)
        found["gradient_to_end"] = float(results.runs["gradient_to_end"].mean())
    if "rotation" in results.runs:
        found["geometry"] = hypotheses.explained_by_norm(results.runs)
    return found


def pairs_of_all_kinds(results: Results, designs: Mapping[str, Crossed]) -> pd.DataFrame:
    """Computes what persists of each two losses, and what gradients said before, for each kind of similarity."""
    before = mean_before(results, designs["weights"].losses) if len(results.gradients) else None
    tables = [hypotheses.pair_table(design, before).assign(kind=kind) for kind, design in designs.items()]
    return pd.concat(tables, ignore_index=True)


def mean_before(results: Results, losses: Sequence[str]) -> NDArray[np.float64]:
    """Averages the cosines of gradients before step 1 over draws and starts, (L, L)."""
    matrices = hypotheses.gradient_matrices(results, losses)
    return nanmean(np.stack([matrix for (_, a, b), matrix in matrices.items() if a == b]), 0)


def matchings(folder: Path) -> dict[str, tuple[Results, str, str]]:
    """Returns, for each way of matching, the runs of six losses and the columns of their answers and norms."""
    found: dict[str, tuple[Results, str, str]] = {}
    if (conventional := available(folder, "study_rates-conventional")) is not None:
        found["equal steps, conventional rates"] = (conventional, "correct", "norm")
    rates = available(folder, "study_rates")
    if rates is not None:
        one = findings.matched(rates, rates.runs["rate"] == ONE_RATE)
        found["equal steps, one rate"] = (one, "correct", "norm")
    if (epochs := available(folder, "study_epochs")) is not None:
        own = findings.matched(epochs, epochs.runs["rate"] == "conventional")
        found["equal epochs, conventional rates"] = (own, "correct", "norm")
        # At the base rate the two names are of one run, which has the first of them.
        base_rate = epochs.runs["learning_rate"].max()
        one = findings.matched(epochs, epochs.runs["learning_rate"] == base_rate)
        found["equal epochs, one rate"] = (one, "correct", "norm")
    if (at_norm := available(folder, "study_rates-norm")) is not None:
        found["equal norm"] = (at_norm, "correct", "norm")
    if conventional is not None and "equal_kl_norm" in conventional.runs:
        found["equal KL"] = (conventional, "equal_kl_correct", "equal_kl_norm")
    if rates is not None and "accuracy_validation" in rates.runs:
        best = findings.at_best_rate(rates, "accuracy_validation", CHOOSING)
        found["each loss's best rate"] = (best, "correct", "norm")
    return found


def unseen_matchings(folder: Path) -> dict[str, Results]:
    """Returns the runs of six losses from the start that suggested nothing, for two of the matchings."""
    found: dict[str, Results] = {}
    if (study := available(folder, "study")) is not None:
        runs = study.runs
        own = findings.matched(study, (runs["start"] != SEEN["start"]) & runs["loss"].isin(findings.LOSSES))
        if len(own.runs):
            found["equal steps, conventional rates, unseen"] = own
    if (one_rate := available(folder, "study_one_rate")) is not None:
        found["equal steps, one rate, unseen"] = one_rate
    return found


def draw(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Draws the figures for which there are results."""
    drawn: dict[str, Any] = {}
    model = found.get("embedded")
    results = available(folder, "study")
    if model is None or results is None:
        return drawn
    weights = hypotheses.designs(results)["weights"]
    with style():
        models = {"embedded": model, "SmolLM2": found.get("smollm2", {"shares": {}})}
        drawn["shares"] = figures.shares(
            {
                f"{title}: {KIND_TITLES[kind]}": table
                for title, of in models.items()
                for kind, table in of["shares"].items()
            }
        )
        drawn["persistence"] = figures.persistence(model["pairs"].query("kind == 'weights'"), TITLE, NAMED)
        if "decided" in model:
            before = mean_before(results, weights.losses)
            ends = weights.between(same_draw=True)
            drawn["decided"] = figures.decided(before, ends, model["decided"]["r_of_means"], TITLE)
        if "geometry" in model:
            drawn["norm"] = figures.norm_in_disguise(results.runs, model["geometry"])
        tables = {"conventional rates (dots and interval: draws)": model["kl_per_norm"]}
        tables |= {"one rate (the same)": found["one_rate"]["kl_per_norm"]} if "one_rate" in found else {}
        at_norm = found.get("equal_norm")
        tables |= {"equal norm (one draw; interval: orders)": at_norm["kl_per_norm"]} if at_norm else {}
        drawn["behaviour"] = figures.behaviour(tables)
        if found["matchings"]:
            drawn["matchings"] = figures.matchings({**found["matchings"], **found["matchings_unseen"]})
    return drawn


def tables(found: Mapping[str, Any]) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """Returns the tables of the page: heads and rows of text."""
    made: dict[str, tuple[Sequence[str], list[list[str]]]] = {}
    models = {
        title: found[model] for model, title in (("embedded", "embedded"), ("smollm2", "SmolLM2")) if model in found
    }
    rows = []
    for title, model in models.items():
        for kind in KINDS:
            values = model["shares"][kind].set_index("share")
            rows.append([title, KIND_TITLES[kind], *(_interval(values.loc[name]) for name in values.index)])
    heads = ("common", "loss", "data", "both", "order", "data + both − loss", "data − loss", "data − loss − both")
    made["shares"] = (("model", "of", *heads), rows)
    for title, model in models.items():
        pairs = model["pairs"].query("kind == 'weights' and loss_a != loss_b")
        lines = [_pair(row) for row in pairs.sort_values("relative", ascending=False).to_dict("records")]
        of_pairs = ("pair", "before step 1", "one draw", "ceiling", "relative", "two draws", "relative on two draws")
        made[f"pairs {title}"] = ((*of_pairs, "persists", "two starts"), lines)
    if found.get("matchings"):
        rows = [
            [matching, *(f"{judged[name].verdict} ({_number(judged[name].value)})" for name in findings.FINDINGS)]
            for matching, judged in {**found["matchings"], **found["matchings_unseen"]}.items()
        ]
        made["matchings"] = (("matching", *findings.FINDINGS), rows)
    geometry = {"LoRA": found.get("embedded", {}).get("geometry"), "all weights": found.get("full", {}).get("geometry")}
    rows = [
        [
            what, MEASURE_TITLES[row["measure"]], _interval(row, "r2"), _number(row["r2_within"]),
            *(_ratio(row, which, null) for null in ("", "_to_noise") for which in ("least", "largest")),
        ]
        for what, table in geometry.items() if table is not None for row in table.to_dict("records")
    ]  # fmt: skip
    of_geometry = ("R² with log norm", "within a rate", "least ÷ copy", "most ÷ copy", "least ÷ noise", "most ÷ noise")
    made["geometry"] = (("updates of", "measure", *of_geometry), rows)
    rows = [
        [
            row["part"], row["model"], row["says"], _interval(row), _number(row["unseen"]),
            _range(row["without_low"], row["without_high"]), row["verdict"],
        ]
        for row in verdicts.verdicts(found).to_dict("records")
    ]  # fmt: skip
    made["verdicts"] = (("part", "model", "number", "value (95%)", "unseen", "without a draw", "verdict"), rows)
    return made


def _pair(row: Mapping[str, Any]) -> list[str]:
    relative = {"value": row["relative"], "low": row["relative_low"], "high": row["relative_high"]}
    pair = f"{loss_title(row['loss_a'])} – {loss_title(row['loss_b'])}"
    before = [_number(row[name]) for name in ("before", "same", "ceiling")]
    return [
        pair,
        *before,
        _interval(relative),
        *(_number(row[name]) for name in ("other", "relative_other", "persists", "two_starts")),
    ]


def _range(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{_number(low)} to {_number(high)}"


def _ratio(row: Mapping[str, Any], which: str, null: str) -> str:
    loss = row[f"{which}_loss{null}"]
    return f"{_number(row[f'{which}_ratio{null}'])} ({loss_title(loss)})" if loss else "–"


def _interval(row: Mapping[str, Any] | pd.Series, value: str = "value") -> str:
    known = _number(row[value])
    return known if math.isnan(row["low"]) else f"{known} ({_number(row['low'])} to {_number(row['high'])})"


def _number(value: float) -> str:
    """Formats a number as the other studies do: .68, −.12, 1.03."""
    return re.sub(r"^(−?)0\.", r"\1.", number(round(value, 2) + 0.0, 2))  # + 0.0: no −.00


def latex(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table in LaTeX (booktabs)."""
    lines = [rf"\begin{{tabular}}{{{'l' * len(heads)}}}", r"\toprule", rf"{' & '.join(map(escaped, heads))} \\"]
    lines += [r"\midrule", *(rf"{' & '.join(map(escaped, row))} \\" for row in rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def make(folder: Path) -> dict[str, Any]:
    """Writes numbers, tables and figures beside the results in `folder`, and returns the numbers.

    Raises:
        InputError: There are no results, or they are damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no results; make study STAGE=results measures the runs")
    found = numbers(folder)
    write_json(folder / "numbers.json", _plain(found))
    figures.save(draw(folder, found), folder)
    pairs = [found[model]["pairs"].assign(model=model) for model in ("embedded", "smollm2") if model in found]
    _write(folder / "pairs.csv", pd.concat(pairs).to_csv(index=False, float_format="%.6g") if pairs else "")
    made = tables(found)
    as_json: dict[str, Any] = {name: {"heads": list(heads), "rows": rows} for name, (heads, rows) in made.items()}
    as_json["claims"] = claims.claims(verdicts.verdicts(found).to_dict("records"), _number)
    write_json(folder / "tables.json", as_json)
    for name, (heads, rows) in made.items():
        _write(folder / f"{name.replace(' ', '-')}.tex", latex(heads, rows))
    return found


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _plain(value: Any) -> Any:
    """Turns numbers into JSON: tables into rows, estimates into objects, what is unknown into null."""
    if isinstance(value, pd.DataFrame):
        return _plain(value.to_dict("records"))
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        # Pairs have a file of their own.
        return {str(key): _plain(one) for key, one in value.items() if key != "pairs"}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else json.loads(f"{float(value):.6g}")
    return int(value) if isinstance(value, np.integer) else value
