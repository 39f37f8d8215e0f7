"""Results of the kit: their JSON file, their tables, and the bars that speed is held against."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Ours against stock TRL on log-normal lengths, and the share of the card's matmul rate at rows of 4,096 tokens. NeMo
# publishes 402–423 TFLOP/s for LoRA of models of 7–8B parameters on an H100.
SPEEDUP, UTILISATION = 2.5, 0.55
LOSSES = ("sft", "dpo", "grpo")  # whose speed is measured


@dataclass(frozen=True)
class Check:
    """Outcome of one comparison.

    Attributes:
        name: What is compared.
        on: Device and precision.
        status: `passed`, `failed` or `skipped`.
        difference: The difference found; None if there is no number.
        bound: The largest that passes.
        note: What the difference is, or why it was skipped or failed.
    """

    name: str
    on: str
    status: str
    difference: float | None = None
    bound: float | None = None
    note: str = ""


def checked(name: str, on: str, difference: float, bound: float, note: str = "") -> Check:
    """Returns the outcome of a comparison by its bound; NaN fails."""
    return Check(name, on, "passed" if difference <= bound else "failed", difference, bound, note)


@dataclass(frozen=True)
class Speed:
    """Speed of one trainer on rows of one kind of length.

    Attributes:
        loss: `sft`, `dpo` or `grpo`.
        lengths: Tokens of a row, or `log-normal`.
        trainer: `ours` or `stock TRL`.
        tokens_per_second: Tokens without padding per second; None if nothing was measured.
        peak_bytes: Peak memory of the device; None on a CPU.
        utilisation: Model FLOPs over the measured matmul rate.
        rows: Rows (of pairs, pairs) in a forward pass.
        checkpointing: True with gradient checkpointing.
        steps: Steps measured, after one that was not.
        prepared: Seconds before the first step, with the scoring of the reference.
        note: Why nothing was measured.
    """

    loss: str
    lengths: str
    trainer: str
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    utilisation: float | None = None
    rows: int | None = None
    checkpointing: bool | None = None
    steps: int = 0
    prepared: float | None = None
    note: str = ""


def bars(speeds: list[Speed], longest: str) -> list[dict[str, Any]]:
    """Holds the figures of SFT, DPO and GRPO against the bars.

    Args:
        speeds: All speeds that count.
        longest: Name of the longest rows, at which the utilisation counts.

    Returns:
        Bar, loss, figure and verdict (`met`, `not met` or `not measured`) of each.
    """
    found = {(speed.loss, speed.lengths, speed.trainer): speed for speed in speeds}
    ratios, shares = [], []
    for loss in LOSSES:
        own, stock = (found.get((loss, "log-normal", trainer)) for trainer in ("ours", "stock TRL"))
        rates = [None if speed is None else speed.tokens_per_second for speed in (own, stock)]
        ratio = rates[0] / rates[1] if rates[0] and rates[1] else None
        ratios.append(_bar(f"≥ {SPEEDUP:g}× stock TRL on log-normal lengths", loss, ratio, SPEEDUP))
        own = found.get((loss, longest, "ours"))
        name = f"≥ {100 * UTILISATION:g}% of the measured matmul rate at {longest} tokens"
        shares.append(_bar(name, loss, None if own is None else own.utilisation, UTILISATION))
    return ratios + shares


def _bar(name: str, loss: str, figure: float | None, least: float) -> dict[str, Any]:
    verdict = "not measured" if figure is None else "met" if figure >= least else "not met"
    return {"bar": name, "loss": loss, "figure": figure, "verdict": verdict}


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes the results of a card to its file, in place of earlier ones, and returns the file."""
    card = re.sub(r"[^a-z0-9]+", "-", results["card"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu-{card}.json"
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def as_dicts(found: list[Any]) -> list[dict[str, Any]]:
    """Converts checks or speeds for the JSON file."""
    return [asdict(each) for each in found]


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the tables of the results."""
    console.print(f"\n{results['card']}, {results['model']}")
    checks = _table("Correctness", ("check", "on", "outcome", "difference", "bound", ""))
    for check in results["checks"]:
        numbers = (_number(check["difference"], "{:.2g}"), _number(check["bound"], "{:g}"))
        checks.add_row(check["name"], check["on"], check["status"], *numbers, check["note"])
    rates = _table("Training", ("loss", "tokens a row", "trainer", "tokens/s", "peak GB", "of matmul", "rows", ""))
    for speed in results["speeds"]:
        rows = "" if speed["rows"] is None else f"{speed['rows']}{' checkpointed' if speed['checkpointing'] else ''}"
        rates.add_row(
            speed["loss"],
            speed["lengths"],
            speed["trainer"],
            _number(speed["tokens_per_second"], "{:,.0f}"),
            _number(speed["peak_bytes"] and speed["peak_bytes"] / 1e9, "{:.1f}"),
            _number(speed["utilisation"], "{:.1%}"),
            rows,
            speed["note"],
        )
    held = _table("Bars", ("bar", "loss", "figure", "verdict"))
    for bar in results["bars"]:
        held.add_row(bar["bar"], bar["loss"], _number(bar["figure"], "{:.2f}"), bar["verdict"])
    engines = _table("Generation", ("engine", "tokens/s", ""))
    for engine in results["generation"]:
        engines.add_row(engine["engine"], _number(engine["tokens_per_second"], "{:,.0f}"), engine["note"])
    for table in (checks, rates, held, engines):
        if table.row_count:
            console.print(table)
    rate = results["matmul_flops"]
    if rate is not None:
        console.print(f"matmul rate of the card: {rate / 1e12:.3g} TFLOP/s; model FLOPs: {results['flops']}")
    console.print(f"{results['seconds']:.0f} s")


def _table(title: str, heads: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
