"""Weight-space measures from LoRA factors compared with dense matrices, at the shapes of arXiv 2606.23740, from disk.

36 layers of q (4096×2560), k and v (1024×2560) and o (2560×4096), r = 32: 144 modules. Adapters are random: a shared A
with small perturbations, and B with decaying columns. Each row of the table is measured in a process of its own, so
that peak memory is that of the row alone; imports count towards memory, but not time.

- ours: `losslens.measures.comparison.compare`: inner products, singular values, principal angles of the top 10 on both
  sides, u1, v1 and drift of A, for every module and pair, in float64.
- dense: the same measures from ΔW = s·B·A in float32, with full SVDs, `scipy.linalg.subspace_angles` and flattened
  inner products. One layer is measured and multiplied by 36.
- cosines: `losslens.measures.products.all_products`, what `losslens compare --measures cosines` computes of many
  adapters: singular values in float64, and inner products of all pairs in float32, or in int8 with `--precision int8`.
  One layer is read and measured, and multiplied by 36; the error is that of the cosines of six adapters, over three
  layers. Of more than 48 adapters the files are those of the 48 again, opened and read as others would be.
- files: reading every byte.

Seconds are by the clock; CPU is the time of all cores together, which other programs change little.

Needs 5 GB of disk space for the 48 adapters (less with `--most 12 --cosines 12`).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

LAYERS, RANK, TOP = 36, 32, 10
SHAPES = {"q_proj": (4096, 2560), "k_proj": (1024, 2560), "v_proj": (1024, 2560), "o_proj": (2560, 4096)}
COUNTS = (6, 12, 24, 48)
MANY = (48, 96, 192, 500)


def module_name(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def make(folder: Path, count: int) -> dict[str, Any]:
    """Writes adapters 0 … count − 1 and the initial adapter."""
    import torch
    from safetensors.torch import save_file

    for number in [-1, *range(count)]:
        start, own = torch.Generator().manual_seed(2**31), torch.Generator().manual_seed(number + 1)
        weights = {}
        for layer in range(LAYERS):
            for name, (out, into) in SHAPES.items():
                key = f"base_model.model.{module_name(layer, name)}.lora_"
                a = (2 * torch.rand(RANK, into, generator=start) - 1) / into**0.5
                b = torch.zeros(out, RANK)
                if number >= 0:
                    a += 1e-3 * torch.randn(RANK, into, generator=own)
                    b = 1e-3 * torch.randn(out, RANK, generator=own) * torch.logspace(0, -1.5, RANK)
                weights |= {f"{key}A.weight": a, f"{key}B.weight": b}
        adapter = path_of(folder, number)
        adapter.mkdir()
        save_file(weights, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    return {}


def path_of(folder: Path, number: int) -> Path:
    return folder / ("initial" if number < 0 else f"adapter{number:02d}")


def ours(folder: Path, count: int) -> dict[str, Any]:
    from losslens.measures.comparison import compare
    from losslens.updates.folder import open_adapter

    started = time.perf_counter()
    with ExitStack() as stack:
        initial = stack.enter_context(open_adapter(path_of(folder, -1)))
        adapters = [stack.enter_context(open_adapter(path_of(folder, n))) for n in range(count)]
        runs, pairs = compare(adapters, initial.modules, top=TOP, initial=[initial] * count)
    seconds = time.perf_counter() - started
    layer = [initial_module(initial.modules, name) for name in SHAPES]
    first, other = runs[0], pairs[0, 1]
    return {
        "seconds": seconds,
        "values": [float(v) for m in layer for v in first.singular_values[m]],
        "inner": [float(other.inner[m]) for m in layer],
        "angles": [float(v) for m in layer for v in (*other.angles_left[m], *other.angles_right[m])],
    }


def cosines(folder: Path, count: int, precision: Any = "float32") -> dict[str, Any]:
    import numpy as np

    from losslens.measures.products import all_products
    from losslens.updates.folder import open_adapter

    distinct = len(list(folder.glob("adapter*")))
    started, worked = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        adapters = [stack.enter_context(open_adapter(path_of(folder, n % distinct))) for n in range(count)]
        layer = [module_name(0, name) for name in SHAPES]
        opened, set_up = time.perf_counter(), time.process_time()
        all_products(adapters, layer, precision=precision)
        seconds, cpu = time.perf_counter() - opened, time.process_time() - set_up
        few = adapters[:6]
        modules = [module_name(number, name) for number in range(3) for name in SHAPES]
        rough, exact = (_cosines(all_products(few, modules, precision=p)) for p in (precision, "float64"))
    return {
        "seconds": opened - started + LAYERS * seconds,
        "cpu": set_up - worked + LAYERS * cpu,
        "difference": float(np.abs(rough - exact).max()),
    }


def cosines_int8(folder: Path, count: int) -> dict[str, Any]:
    import torch  # noqa: F401  # the time of its import is no part of the row

    return cosines(folder, count, "int8")


def _cosines(products: Any) -> Any:
    import numpy as np

    norms = np.sqrt(np.nansum(products.singular_values**2, axis=(1, 2)))
    first, second = np.triu_indices(len(norms), 1)
    return products.inner.sum(axis=1) / (norms[first] * norms[second])


def initial_module(modules: list[str], name: str) -> int:
    return modules.index(module_name(0, name))


def dense(folder: Path, count: int) -> dict[str, Any]:
    import numpy as np
    from safetensors import safe_open
    from scipy.linalg import subspace_angles

    found: dict[str, Any] = {"values": [], "inner": [], "angles": []}
    started = time.perf_counter()
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path_of(folder, n) / "adapter_model.safetensors", framework="np"))
            for n in range(-1, count)
        ]
        for name in SHAPES:
            key = f"base_model.model.{module_name(0, name)}.lora_"
            a = [file.get_tensor(f"{key}A.weight") for file in files]
            deltas = [2 * file.get_tensor(f"{key}B.weight") @ a[n + 1] for n, file in enumerate(files[1:])]
            svds = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
            for n in range(count):
                subspace_angles(a[n + 1].T, a[0].T)
            for i, j in combinations(range(count), 2):
                inner = float(deltas[i].ravel() @ deltas[j].ravel())
                left = subspace_angles(svds[i][0][:, :TOP], svds[j][0][:, :TOP])[::-1]
                right = subspace_angles(svds[i][2][:TOP].T, svds[j][2][:TOP].T)[::-1]
                if (i, j) == (0, 1):
                    found["values"] += svds[0][1][:RANK].tolist()
                    found["inner"].append(inner)
                    found["angles"] += [*left.tolist(), *right.tolist()]
    return {"seconds": LAYERS * (time.perf_counter() - started), **found}


def files(folder: Path, count: int) -> dict[str, Any]:
    started = time.perf_counter()
    for number in range(-1, count):
        with (path_of(folder, number) / "adapter_model.safetensors").open("rb") as file:
            while file.read(1 << 20):
                pass
    return {"seconds": time.perf_counter() - started}


def measured(variant: str, folder: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", variant, str(folder), str(count)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(outcome.stdout)


def print_row(variant: str, count: int, result: dict[str, Any], note: str = "") -> None:
    pairs = count * (count - 1) // 2
    print(
        f"{variant:<18} {count:>8} {pairs:>6} {result['seconds']:>10.1f} {result['peak_mb']:>8.0f}  {note}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="largest number of adapters to compare in full")
    parser.add_argument("--cosines", type=int, nargs="+", default=MANY, help="numbers of adapters for cosines alone")
    options = parser.parse_args()
    most = options.most
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured("make", folder, most)
        print(f"{'variant':<18} {'adapters':>8} {'pairs':>6} {'seconds':>10} {'peak MB':>8}")
        print_row("files only", 6, measured("files", folder, 6))
        first = measured("ours", folder, 6)
        print_row("ours", 6, first)
        reference = measured("dense", folder, 6)
        print_row("dense, float32", 6, reference, f"extrapolated from one of {LAYERS} layers")
        print(f"{reference['seconds'] / first['seconds']:.0f} times faster; largest differences from dense float32:")
        for quantity in ("values", "inner"):
            pairs = zip(first[quantity], reference[quantity], strict=True)
            scale = max(map(abs, reference[quantity]))
            print(f"  {quantity}: {max(abs(x - y) for x, y in pairs) / scale:.1e} of the largest")
        print(f"  angles: {max(abs(x - y) for x, y in zip(first['angles'], reference['angles'], strict=True)):.1e} rad")
        for count in COUNTS[1:]:
            if count <= most:
                print_row("ours", count, measured("ours", folder, count))
        print_cosines(folder, options.cosines)


def print_cosines(folder: Path, counts: Sequence[int]) -> None:
    import numpy as np

    taken = []
    for count in counts:
        taken.append(measured("cosines", folder, count))
        for name, row in (("float32", taken[-1]), ("int8", measured("cosines_int8", folder, count))):
            note = f"CPU {row['cpu']:.0f} s; from one of {LAYERS} layers; error {row['difference']:.1e}"
            print_row(f"cosines, {name}", count, row, note)
    powers = np.array([[count, count**2] for count in counts], dtype=float)
    for name in ("seconds", "cpu"):
        linear, square = np.linalg.lstsq(powers, np.array([one[name] for one in taken]), rcond=None)[0]
        print(f"fit to N adapters, {name}: {linear:.2g}·N + {square:.2g}·N²")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        variant = {
            "make": make,
            "ours": ours,
            "cosines": cosines,
            "cosines_int8": cosines_int8,
            "dense": dense,
            "files": files,
        }[sys.argv[2]]
        outcome = variant(Path(sys.argv[3]), int(sys.argv[4]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(json.dumps({**outcome, "peak_mb": peak}))
    else:
        main()
