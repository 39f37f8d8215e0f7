"""Compares two whole models of Qwen3-4B's shapes with their base, from bf16 shards on disk.

    python benchmarks/dense.py               one layer and the embeddings, extrapolated to 36 layers
    python benchmarks/dense.py --layers 36   all of it

Weights are random: 36 layers of q (4096×2560), k and v (1024×2560), o (2560×4096), gate and up (9728×2560) and down
(2560×9728), and tied embeddings (151936×2560). Each module is made, compared and freed in turn, so peak memory does not
grow with the layers. It is that of the process that compares, with its imports.

Needs 3 GB of disk space for one layer, and 24 GB for all.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS, TOP = 36, 10
SHAPES = {
    "self_attn.q_proj": (4096, 2560), "self_attn.k_proj": (1024, 2560), "self_attn.v_proj": (1024, 2560),
    "self_attn.o_proj": (2560, 4096), "mlp.gate_proj": (9728, 2560), "mlp.up_proj": (9728, 2560),
    "mlp.down_proj": (2560, 9728),
}  # fmt: skip
EMBEDDINGS = (151936, 2560)
MODELS = ("base", "first", "second")


def make(folder: Path, layers: int) -> dict[str, Any]:
    """Writes the base and two models, a shard per layer; their updates have decaying spectra."""
    import torch
    from safetensors.torch import save_file

    shards: dict[str, dict[str, str]] = {model: {} for model in MODELS}

    def write(number: int, shapes: dict[str, tuple[int, int]]) -> None:
        start = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
        for model in MODELS:
            weights = {}
            for name, (out, into) in shapes.items():
                change = torch.zeros(())
                if model != "base":
                    change = 2e-3 * torch.randn(out, 32) * torch.logspace(0, -1.5, 32) @ torch.randn(32, into)
                    change += 1e-4 * torch.randn(out, into)
                weights[name] = (start[name] + change).bfloat16()
            file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
            save_file(weights, folder / model / file)
            shards[model] |= dict.fromkeys(weights, file)

    for model in MODELS:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    write(1, {"model.embed_tokens.weight": EMBEDDINGS})
    for layer in range(layers):
        write(layer + 2, {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()})
    for model, map_ in shards.items():
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    return {}


def ours(folder: Path, layers: int) -> dict[str, Any]:
    """Times the comparison of the modules, and the account of the rest of the weights."""
    from losslens.measures.comparison import compare
    from losslens.updates.checkpoint import Checkpoint, open_update

    with (
        open_update(folder / "first", folder / "base") as first,
        open_update(folder / "second", folder / "base") as second,
    ):
        started = time.perf_counter()
        runs, pairs = compare([first, second], first.modules, top=TOP)
        compared = time.perf_counter()
        for update in (first, second):
            assert isinstance(update, Checkpoint)
            update.composition(update.modules)
        counted = time.perf_counter()
    assert runs[0].singular_values.shape == (len(SHAPES) * layers, 2560)
    assert pairs[0, 1].inner.shape == (len(SHAPES) * layers,)
    return {"compared": compared - started, "counted": counted - compared}


def measured(variant: str, folder: Path, layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", variant, str(folder), str(layers)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def weights_of(layers: int) -> int:
    return EMBEDDINGS[0] * EMBEDDINGS[1] + layers * sum(out * into for out, into in SHAPES.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help=f"layers to make and compare, of {LAYERS}")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        measured("make", Path(name), layers)
        found = measured("ours", Path(name), layers)
    note = "" if layers == LAYERS else f", extrapolated from {layers} of {LAYERS} layers"
    compared = found["compared"] * LAYERS / layers
    counted = found["counted"] * weights_of(LAYERS) / weights_of(layers)
    print(f"two models of {weights_of(LAYERS) / 1e9:.1f} billion weights against their base{note}")
    print(f"norms, cosines, spectra and the {TOP} leading directions of all modules: {compared / 60:.0f} minutes")
    print(f"the share of the weights that are not compared:  {counted / 60:.1f} minutes")
    print(f"peak memory: {found['peak_mb']:.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        outcome = {"make": make, "ours": ours}[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(json.dumps({**outcome, "peak_mb": peak}))
    else:
        main()
