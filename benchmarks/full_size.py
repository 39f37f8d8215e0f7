"""Trains and analyses a randomly initialised model of Qwen3-4B's size (geometry, connectivity and CKA).

    python benchmarks/full_size.py              36 layers on a GPU, else 2
    python benchmarks/full_size.py --layers 2

Nothing is downloaded: weights and rollouts are random, the tokenizer is that of the embedded student. Prints tokens per
second and peak memory of SFT and DPO (LoRA r = 32, 8 rollouts per step), and the time of the analysis.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 10, 8


def qwen3_4b(layers: int = 36, dtype: Any = None, device: str = "cpu", **changes: Any) -> Any:
    """Builds Qwen3-4B-Instruct-2507, according to its config.json, with `layers` layers and random weights.

    The weights are drawn on `device` in `dtype` (None: float32). `changes` replace other values of its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
        "tie_word_embeddings": True,
    }
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen3Config(**config | changes), dtype=dtype or torch.float32)


def saved(model: Any, folder: Path) -> Path:
    """Saves a model with the tokenizer of the embedded student, whose ids fit every vocabulary."""
    from transformers import AutoTokenizer

    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "src" / "losslens" / "tiny" / "student").save_pretrained(folder)
    return folder


def rollouts(prompts: int, seed: int, characters: int) -> pd.DataFrame:
    """Generates random prompts with four random completions each, of which two have reward 1."""
    draw = random.Random(seed)
    rows = [
        {
            "problem_id": f"{seed}-{number}",
            "prompt": f"{draw.random()} + {draw.random()} =",
            "prompt_text": None,
            "completion": "".join(draw.choice("0123456789+-= ") for _ in range(characters)),
            "reward": float(sample % 2),
            "answer": "0",
            "sample": sample,
            "source": "drawn",
            "tokens": None,
            "finished": True,
        }
        for number in range(prompts)
        for sample in range(4)
    ]
    return pd.DataFrame(rows)


def run(script: str, *arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    import torch

    from losslens.rollouts.frozen import freeze

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36 if torch.cuda.is_available() else 2)
    parser.add_argument("--characters", type=int, default=400, help="characters per completion")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output_dir = Path(temporary)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model = qwen3_4b(options.layers).to(dtype)
        parameters = model.num_parameters()
        folder = saved(model, output_dir / "model")
        del model
        train = freeze(rollouts(40, 0, options.characters), output_dir / "given", "train", {})
        other = freeze(rollouts(8, 1, options.characters), output_dir / "given", "other", {})
        sizes = [f"optim.max_steps={STEPS}", f"optim.batch_size={BATCH}", "optim.log_steps=5", "optim.save_steps=10"]
        given = [
            f"model.path={folder}",
            "model.name=drawn",
            f"rollouts.path={train}",
            "data.eval_size=0",
            "lora_rank=r32",
        ]
        common = [f"output_dir={output_dir}", "logger=none"]
        run("train.py", "-m", "method=sft,dpo", *common, *given, *sizes)
        analysis = run(
            "analyze.py", f"output_dir={output_dir}", f"probe_set.completions={other}", "connectivity.points=5"
        )
        print(f"{options.layers} layers, {parameters / 1e9:.2f}B parameters, {dtype}".replace("torch.", ""))
        for manifest in sorted(output_dir.glob("main/*/manifest.json")):
            facts = json.loads(manifest.read_text(encoding="utf-8"))
            metrics = (manifest.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            tokens, training = json.loads(metrics[-1])["train/num_tokens"], facts["training"]
            memory = training["peak_gpu_bytes"] or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            pair = pd.read_csv(output_dir / "main" / "analysis" / "pairs.csv").iloc[0]
            print(
                f"{facts['method']}: {tokens / training['seconds']:.0f} tokens/s, peak memory {memory / 1e9:.1f} GB, "
                f"micro-batch {training['micro_batch']}"
            )
        print(f"analysis: {analysis:.0f} s; cosine {pair['cosine']:.4f}, CKA of the last layer {pair['cka_last']:.4f}")


if __name__ == "__main__":
    main()
