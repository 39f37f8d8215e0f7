"""Milliseconds that the geometry of one logged step takes, with one reference, at two models' shapes.

What a run really spent on it stands in its `metrics.jsonl` as `geometry/share_of_time`.
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
    """The median over a run that has two lines behind it, as all but its first two have."""
    rng = np.random.default_rng(0)

    def point() -> dict[str, LoraUpdate]:
        return {
            f"layers.{layer}.self_attn.{name}_proj": LoraUpdate(
                rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), 2.0
            )
            for layer in range(layers)
            for name, (out, into) in shapes.items()
        }

    start, reference, points = point(), point(), [point() for _ in range(3)]
    live = WeightTracker(start, {"sft": reference}, list(start))
    taken = []
    for number in range(TIMES + 2):
        started = time.perf_counter()
        live.measure(points[number % 3])
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[2:])


def main() -> None:
    print(f"{'shapes':<10} {'modules':>8} {'rank':>5} {'ms a logged step':>17}")
    for name, (layers, rank, shapes) in SHAPES.items():
        print(f"{name:<10} {layers * len(shapes):>8} {rank:>5} {milliseconds(layers, rank, shapes):>17.1f}", flush=True)


if __name__ == "__main__":
    main()
