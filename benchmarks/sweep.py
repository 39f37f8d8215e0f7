"""Six methods with `train.py`, side by side with six processes of stock TRL: seconds from command to last adapter.

    python benchmarks/sweep.py                       the embedded model, 100 steps of 32
    python benchmarks/sweep.py --model smollm2       SmolLM2-135M, 5 steps of 8
    python benchmarks/sweep.py --turns 1 --json FILE

Nothing is scored and nothing is logged to W&B on either side; rollouts are made before the clock starts. The ways take
turns, so that what else runs on the machine meets all of them. Medians over turns, and the spread (largest over
smallest).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHODS = ("sft", "rft", "dft", "rift", "grpo", "dpo")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 100, "batch": 32, "overrides": []},
    "smollm2": {"steps": 5, "batch": 8, "overrides": ["experiment=smollm2_cpu"]},
}
STOCK = ("stock TRL, one by one", "stock TRL, two at a time")


def main() -> None:
    """Prints the table, and writes it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = compare(options.model, options.turns, Path(folder))
    for name, values in seconds.items():
        spread = max(values) / min(values)
        print(f"{name:<28} {statistics.median(values):8.1f} s   spread {spread:.2f}   {len(values)} turns")
    if options.json:
        options.json.write_text(json.dumps(seconds), encoding="utf-8")


def compare(
    model: str, turns: int, folder: Path, chosen: tuple[str, ...] = (), *, again: bool = False
) -> dict[str, list[float]]:
    """Returns the seconds of each turn, by the way in which the six runs are made.

    Args:
        model: The model, of `SIZES`.
        turns: Repetitions.
        folder: An empty folder.
        chosen: The ways; by default all.
        again: The first way once more at the end, which shows whether the machine has become slower meanwhile.
    """
    size = SIZES[model]
    made = folder / "made"
    shared = [
        *size["overrides"],
        "data.eval_size=0",
        "logger=none",
        f"optim.max_steps={size['steps']}",
    ]
    shared.append(f"optim.batch_size={size['batch']}")
    run([sys.executable, "rollout.py", *size["overrides"], f"output_dir={made}"])
    [frozen] = [file.parent for file in (made / "rollouts").glob("*/rollouts.parquet")]
    path = base_of(size["overrides"])
    rows = folder / "rollouts.jsonl"
    export(frozen, rows)

    def ours(*launcher: str) -> Callable[[], None]:
        def sweep() -> None:
            output = folder / "ours"
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(made, output)
            run(
                [
                    sys.executable,
                    "train.py",
                    "-m",
                    f"method={','.join(METHODS)}",
                    *shared,
                    *launcher,
                    f"output_dir={output}",
                ]
            )

        return sweep

    def theirs(workers: int) -> Callable[[], None]:
        threads = {"OMP_NUM_THREADS": "1"} if workers > 1 else {}
        line = [sys.executable, "benchmarks/stock_trl.py"]

        def processes() -> None:
            with ThreadPoolExecutor(workers) as pool:
                arguments = [path, str(rows), str(size["steps"]), str(size["batch"])]
                list(pool.map(lambda method: run([*line, method, *arguments], threads), METHODS))

        return processes

    ways = {
        "ours": ours(),
        "ours, two workers": ours("hydra/launcher=local", "hydra.launcher.workers=2"),
        STOCK[0]: theirs(1),
        STOCK[1]: theirs(2),
    }
    ways = {name: way for name, way in ways.items() if name in (chosen or ways)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*list(ways) * turns, *list(ways)[: int(again)]]:
        started = time.monotonic()
        ways[name]()
        seconds[name].append(time.monotonic() - started)
    return seconds


def export(frozen: Path, file: Path) -> None:
    """Writes the rollouts in the form in which they are given to TRL."""
    import pandas as pd

    table = pd.read_parquet(frozen / "rollouts.parquet")
    text = table["prompt_text"].fillna(table["prompt"])
    plain = pd.DataFrame({"prompt": text, "completion": table["completion"], "reward": table["reward"]})
    plain.to_json(file, orient="records", lines=True)


def base_of(overrides: list[str]) -> str:
    """Returns the folder of the base that these options of `train.py` train."""
    from hydra import compose, initialize_config_dir

    from losslens.config.parse import parse
    from losslens.config.training import TrainConfig
    from losslens.models.loading import locate, source_of

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(TrainConfig, compose("train", [*overrides, "method=sft"]))
    return locate(source_of(config.model))[0]


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs a command in the project's root; ends the program with its output if it fails."""
    outcome = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if outcome.returncode:
        sys.exit(f"sweep.py: {' '.join(command)} failed:\n{outcome.stdout[-1000:]}\n{outcome.stderr[-3000:]}")


if __name__ == "__main__":
    main()
