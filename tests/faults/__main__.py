"""The long form of tests/faults: many faults of every kind, counted by kind and outcome.

    python -m tests.faults
    python -m tests.faults --per-kind 50 --seed 3

What follows these options goes to pytest. The counts are printed and written to tests/faults/counts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from losslens.core import provenance

FOLDER = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=60, help="faults of each kind, at least")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--counts", type=Path, default=FOLDER / "counts.json", help="file for the counts")
    asked, rest = parser.parse_known_args()
    print(f"seed {asked.seed}, {asked.per_kind} faults of a kind", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "faults.jsonl"
        environment = {
            **os.environ, "LOSSLENS_FAULTS": str(file), "LOSSLENS_FAULTS_PER_KIND": str(asked.per_kind),
            "LOSSLENS_FAULTS_SEED": str(asked.seed),
        }  # fmt: skip
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "2",
            *(rest or [str(FOLDER), str(FOLDER.parent / "test_bad_input.py")]),
        ]
        status = subprocess.run(line, env=environment, cwd=FOLDER.parents[1], check=False).returncode
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    counts = count([json.loads(line) for line in lines])
    about = {"seed": asked.seed, "per_kind": asked.per_kind, "commit": provenance.code_version()["commit"]}
    asked.counts.write_text(json.dumps({**about, "counts": counts}, indent=2) + "\n", encoding="utf-8")
    print(table(counts))
    return status


def count(faults: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    """Counts faults by kind and outcome."""
    counts: dict[str, Counter[str]] = {}
    for fault in faults:
        counts.setdefault(fault["kind"], Counter())[fault["outcome"]] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def table(counts: dict[str, dict[str, int]]) -> str:
    """Lays out the counts: a line per kind, a column per outcome, and the totals."""
    outcomes = sorted({outcome for of_kind in counts.values() for outcome in of_kind})
    rows = [["kind", *outcomes, "all"]]
    for kind, of_kind in counts.items():
        rows.append([kind, *(str(of_kind.get(outcome, 0)) for outcome in outcomes), str(sum(of_kind.values()))])
    totals = [sum(of_kind.get(outcome, 0) for of_kind in counts.values()) for outcome in outcomes]
    rows.append(["all", *map(str, totals), str(sum(totals))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not n else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
