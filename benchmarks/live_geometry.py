"""Milliseconds for the weight tracking of one logged step with one reference, at the shapes of two models.

The share of time that a run has spent on it is logged in its `metrics.jsonl` as `geometry/share_of_time`.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from losslens.measures.tracking import WeightTracker
from losslens.updates.lora import LoraUpdate

# layers, rank, and (out, in) of q, k, v, o
SHAPES = {
    "tiny": (5, 8, {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}),
    "Qwen3-4B": (36, 32, {"q": (4096, 2560), "k": (1024, 2560), "v": (1024, 2560), "o": (2560, 4096)}),
}
TIMES = 9


def milliseconds(layers: int, rank: int, shapes: dict[str, tuple[int, int]]) -> float:
    """Median time of a logged step, from the third step on, since earlier ones compare with fewer updates."""
    rng = np.random.default_rng(0)

    def random_update() -> dict[str, LoraUpdate]:
        return {
            f"layers.{layer}.self_attn.{name}_proj": LoraUpdate(
                rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), 2.0
            )
            for layer in range(layers)
            for name, (out, into) in shapes.items()
        }

    start, reference, updates = random_update(), random_update(), [random_update() for _ in range(3)]
    tracker = WeightTracker(start, {"sft": reference}, list(start))
    durations = []
    for number in range(TIMES + 2):
        started = time.perf_counter()
        tracker.measure(updates[number % 3])
        durations.append(1000 * (time.perf_counter() - started))
    return statistics.median(durations[2:])


def main() -> None:
    print(f"{'shapes':<10} {'modules':>8} {'rank':>5} {'ms per log step':>17}")
    for name, (layers, rank, shapes) in SHAPES.items():
        print(f"{name:<10} {layers * len(shapes):>8} {rank:>5} {milliseconds(layers, rank, shapes):>17.1f}", flush=True)


if __name__ == "__main__":
    main()
