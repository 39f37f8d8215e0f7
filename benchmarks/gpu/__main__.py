"""Correctness, training speed and generation on this machine's GPU, within eight minutes and without a network.

    make gpu                                  Qwen3-4B's shapes on a GPU; little of everything on a CPU
    python -m benchmarks.gpu --small          little of everything, wherever
    python -m benchmarks.gpu --vllm '/path/to/env/bin/vllm serve'

Weights and tokens are random. Prints tables, and on a GPU writes benchmarks/results/gpu-CARD.json, from which
docs/performance.md is made (`python -m tools.reference`). Ends with status 1 if a comparison fails.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before torch is imported: one card is measured, and the hub is never asked.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# Shares of the time at which the comparisons end, and the measurements of training; vLLM needs time to start.
_CORRECTNESS_END, _SPEED_END, _SPEED_END_WITH_VLLM = 0.35, 0.88, 0.65
_TO_STOP = 20.0  # seconds in which vLLM answers, once it has started, and stops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models and few rows; always so without a GPU")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seconds", type=float, default=480, help="time for everything")
    parser.add_argument("--vllm", metavar="COMMAND", help="starts a vLLM server (on a GPU: vllm serve)")
    parser.add_argument("--commit", help="commit of the code, for a copy without .git")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    options = parser.parse_args()
    started = time.monotonic()

    import torch
    from rich.console import Console

    from benchmarks.gpu.results import show, write

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    console = Console()
    results = _measured(device, options, started)

    output = options.output or (None if results["small"] else Path(__file__).parents[1] / "results")
    file = None if output is None else write(results, output)
    show(results, console if console.is_terminal else Console(width=140))
    if file is not None:
        print(file)
    sys.exit(any(check["status"] == "failed" for check in results["checks"]))


def _measured(device: str, options: argparse.Namespace, started: float) -> dict[str, Any]:
    import datasets
    import torch
    import transformers

    from benchmarks.full_size import qwen3_4b
    from benchmarks.gpu import setting as settings
    from benchmarks.gpu.results import as_dicts, bars
    from benchmarks.gpu.speed import FLOPS, Track, matmul_rate
    from losslens.core.provenance import code_version, versions
    from losslens.models.loading import LoadedModel

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    # First, so that a package that is missing is missed before anything is measured.
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": options.commit or code_version()["commit"],
        "versions": {**versions(), "cuda": torch.version.cuda},
    }
    small = options.small or device == "cpu"
    setting = settings.small(device) if small else settings.full()
    longest = max(setting.lengths, key=lambda name: setting.lengths[name] or 0)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checks = _checks(device, folder / "correctness", started + _CORRECTNESS_END * options.seconds)
        rate = matmul_rate(setting)
        tokenizer = settings.student("cpu", "float32").tokenizer
        model = qwen3_4b(setting.layers, setting.dtype, device, **setting.changes).eval()
        base = LoadedModel(model, tokenizer)
        command = options.vllm or (None if small else "vllm serve")
        has_vllm = command is not None and shutil.which(command.split()[0]) is not None
        share = _SPEED_END_WITH_VLLM if has_vllm else _SPEED_END
        speeds = Track(setting, base, rate, folder / "speed", started + share * options.seconds).measure(_say)
        end = started + options.seconds - _TO_STOP
        generation = _generation(setting, base, command, end, folder)
    return {
        "card": setting.name,
        "small": small,
        "model": f"{setting.layers} layers, {model.num_parameters() / 1e6:,.1f}M parameters, LoRA r = {setting.rank}",
        **about,
        "matmul_flops": rate,
        "flops": FLOPS,
        "checks": as_dicts(checks),
        "speeds": as_dicts(speeds),
        "bars": bars([] if small else speeds, longest),
        "generation": generation,
        "seconds": time.monotonic() - started,
    }


def _checks(device: str, folder: Path, end: float) -> list[Any]:
    """Makes all comparisons that begin before `end`."""
    from accelerate.utils.memory import release_memory

    from benchmarks.gpu.correctness import Bench, all_checks
    from benchmarks.gpu.results import Check
    from losslens.core.errors import first_line

    checks: list[Check] = []
    for name, compare in all_checks(Bench(device, folder)):
        if time.monotonic() > end:
            checks.append(Check(name, device, "skipped", note="out of time"))
            continue
        _say(name)
        try:
            checks += compare()
        except Exception as error:  # the other comparisons are still worth having
            checks.append(Check(name, device, "failed", note=f"{type(error).__name__}: {first_line(error)}"))
    release_memory()
    return checks


def _generation(setting: Any, base: Any, command: str | None, end: float, folder: Path) -> list[Any]:
    """Measures the engines at hand; `command` starts vLLM, which must answer before `end`."""
    from benchmarks.gpu.generation import with_transformers, with_vllm
    from losslens.core.errors import first_line

    _say("generation, transformers")
    try:
        engines = [with_transformers(setting, base)]
    except Exception as error:  # the other figures are still worth having
        note = f"{type(error).__name__}: {first_line(error)}"
        engines = [{"engine": "transformers", "tokens_per_second": None, "note": note}]
    if command is not None:
        _say(f"generation, {command}")
        engines.append(with_vllm(setting, base, command, end - time.monotonic(), folder))
    return engines


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
