"""Measures what LossLens promises, beside what would be used instead, and prints one table: met or not.

    python benchmarks/bars.py                  every part but cosines, in under half an hour on two cores
    python benchmarks/bars.py sweep planning   some of them
    python benchmarks/bars.py cosines          those of 500 adapters, nine minutes more

Seconds are by the clock: run it on an idle machine. The table is kept as JSON in benchmarks/results/; rows that were
not measured now are printed as they were, with their commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import geometry
import submission
import sweep

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A promise, and what was measured.

    Attributes:
        part: What is measured.
        ours: Median, in `unit`.
        theirs: The same of what would be used instead; None if there is nothing.
        unit: Unit of both.
        bar: Smallest ratio theirs/ours if `theirs` is given, else the largest `ours`.
        spread: Largest over smallest of the repetitions of ours and of theirs.
    """

    part: str
    ours: float
    theirs: float | None
    unit: str
    bar: float
    spread: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.theirs / self.ours

    @property
    def is_met(self) -> bool:
        return self.ours <= self.bar if self.ratio is None else self.ratio >= self.bar


def six_methods(model: str, title: str, turns: int, bars: dict[str, float]) -> Iterator[Row]:
    """Six methods with two workers here, and six processes of stock TRL, with the smallest ratio for each way."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = sweep.compare(model, turns, Path(folder), ("ours, two workers", *bars), again=len(bars) > 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spreads = {name: max(values) / min(values) for name, values in seconds.items()}
    ours = "ours, two workers"
    for name, bar in bars.items():
        yield Row(f"{title}; {name}", medians[ours], medians[name], "s", bar, (spreads[ours], spreads[name]))


def embedded(turns: int) -> Iterator[Row]:
    """The sweep of the README, without its scores; one by one, and two at a time."""
    bars = dict(zip(sweep.STOCK, (2.5, 1.5), strict=True))
    yield from six_methods("tiny", "six methods, embedded model, 100 steps of 32", turns, bars)


def smollm2(_: int) -> Iterator[Row]:
    """A few steps of a real language model, once; one by one."""
    yield from six_methods("smollm2", "six methods, SmolLM2-135M, 5 steps of 8", 1, {sweep.STOCK[0]: 2.5})


def first_sweep(_: int) -> Iterator[Row]:
    """What `make sweep` runs after the installation, and the analysis in it."""
    with tempfile.TemporaryDirectory() as folder:
        lines = re.search(r"^sweep:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert lines is not None
        seconds = []
        for line in lines[1].strip().splitlines():
            words = [sys.executable, *line.split()[1:], f"output_dir={folder}"]
            started = time.monotonic()
            sweep.run(words, {"WANDB_MODE": "offline"})
            seconds.append(time.monotonic() - started)
    yield Row("make sweep, after installation", sum(seconds), None, "s", 200)
    yield Row("of it the analysis of eight runs", seconds[-1], None, "s", 100)


def planning(_: int) -> Iterator[Row]:
    """A sweep of 1,000 runs, from the command to the submitted jobs, with all checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        submission.write_commands(folder)
        seconds = submission.seconds(folder, "ours", 1000, ["hydra/launcher=slurm"], {})
    yield Row("planning and submitting 1,000 runs", seconds, None, "s", 12)


def cosines(_: int) -> Iterator[Row]:
    """Norms and cosines of 500 adapters of the paper's shapes in int8, from one of 36 layers; 48 files, read again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        geometry.measured("make", folder, 48)
        found = geometry.measured("cosines_int8", folder, 500)
    yield Row("cosines of 500 adapters, int8", found["seconds"], None, "s", 600)
    yield Row("of them the peak memory", found["peak_mb"] / 1000, None, "GB", 4)


def two_adapters(_: int) -> Iterator[Row]:
    """`losslens compare` of two adapters of the paper's shapes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        geometry.measured("make", folder, 2)
        paths = [str(geometry.path_of(folder, number)) for number in range(2)]
        seconds = []
        for turn in range(3):
            started = time.monotonic()
            sweep.run([sys.executable, "-m", "losslens", "compare", *paths, "--output-dir", str(folder / str(turn))])
            seconds.append(time.monotonic() - started)
    spread = max(seconds) / min(seconds)
    yield Row("losslens compare of two adapters of 4B shapes", statistics.median(seconds), None, "s", 3, (spread,))


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "sweep": embedded, "smollm2": smollm2, "first_sweep": first_sweep, "planning": planning, "compare": two_adapters,
    "cosines": cosines,
}  # fmt: skip


def main() -> None:
    """Prints the table, and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"{', '.join(PARTS)}; default: all but cosines"
    )
    parser.add_argument("--turns", type=int, default=1, help="repetitions of the sweep of the embedded model")
    options = parser.parse_args()
    started, measured = time.monotonic(), []
    for name in options.parts or [part for part in PARTS if part != "cosines"]:
        rows = []
        for row in PARTS[name](options.turns):
            rows.append(row)
            print(line(row), flush=True)
        keep(rows)  # at once: a later part may fail, or take too long
        measured += [row.part for row in rows]
    for earlier in kept_rows():
        if earlier["part"] not in measured:
            known = {field.name: earlier[field.name] for field in fields(Row)}
            print(f"{line(Row(**known))}  (at {earlier['commit']})")
    print(f"{time.monotonic() - started:.0f} s in all")


def results() -> Path:
    """Returns the file of this kind of machine."""
    return ROOT / "benchmarks" / "results" / f"{machine_name()}.json"


def kept_rows() -> list[dict[str, Any]]:
    """Reads the rows of that file."""
    file = results()
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []


def keep(rows: list[Row]) -> None:
    """Puts the rows in place of earlier ones of the same parts in the file of this kind of machine."""
    file = results()
    file.parent.mkdir(exist_ok=True)
    kept = [row for row in kept_rows() if row["part"] not in {new.part for new in rows}]
    when = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}
    new = [{**asdict(row), "ratio": row.ratio, "met": row.is_met, **when} for row in rows]
    content = {"machine": machine(), "command": "python benchmarks/bars.py", "rows": [*kept, *new]}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """Formats a row of the table."""
    theirs = "" if row.theirs is None else f"{row.theirs:.1f} {row.unit}"
    ratio = f"{row.ratio:.2f}x" if row.ratio is not None else ""
    bar = f">= {row.bar:g}x" if row.ratio is not None else f"<= {row.bar:g} {row.unit}"
    spread = " ".join(f"{value:.2f}" for value in row.spread)
    met = "met" if row.is_met else "NOT MET"
    return f"{row.part:<72} {row.ours:8.1f} {row.unit:<2} {theirs:>9} {ratio:>7} {bar:>9} {met:<8} {spread}"


def machine() -> dict[str, Any]:
    """Describes the machine, without its name."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return {"processor": models[0] if models else platform.processor(), "cores": cores, "memory_gib": round(memory)}


def machine_name() -> str:
    """Returns the name of the file for this kind of machine."""
    about = machine()
    return re.sub(r"[^a-z0-9]+", "-", f"cpu-{about['processor']}-{about['cores']}-cores".lower()).strip("-")


def commit() -> str:
    """Returns the commit that is measured."""
    git = shutil.which("git") or "git"
    return subprocess.run(
        [git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
