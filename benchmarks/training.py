"""Tokens per second and peak memory of a training step, by implementation of the language-model head.

Prints a table: positions selected before the head (used off CUDA), TRL's fused head (used on CUDA), and the full logits
of stock transformers. Measured on the tiny student and on the models given as arguments.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = 8
HEADS = ("selected", "fused", "full logits")


def measure(path: str, head: str) -> tuple[float, float]:
    """Returns tokens per second (median step) and peak memory in MB of forward and backward pass at 8 × 96 tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from losslens.training.lm_head import score_selected_positions

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    if head == "selected":
        score_selected_positions(model)
    elif head == "fused":
        add_fused_lm_head(model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    tokens = torch.randint(0, model.config.vocab_size, (8, 96), device=device)
    labels = tokens.masked_fill(torch.arange(96, device=device) < 32, -100)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        if head == "full logits":
            loss = model(input_ids=tokens, labels=labels).loss
        else:
            loss = -model(input_ids=tokens, labels=labels, fused_lm_head=True).log_probs.sum()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return tokens.numel() / statistics.median(seconds[2:]), peak / 1e6


def main() -> None:
    import losslens.tiny

    paths = [str(Path(losslens.tiny.__file__).parent / "student"), *sys.argv[1:]]
    print(f"{'model':<12} {'head':<12} {'tokens/s':>10} {'peak MB':>9}")
    for path in paths:
        for head in HEADS:
            # A process of its own, since the recorded peak memory never decreases.
            outcome = subprocess.run(
                [sys.executable, __file__, "--one", path, head], capture_output=True, text=True, check=True
            )
            speed, peak = outcome.stdout.split()
            print(f"{Path(path).name:<12} {head:<12} {float(speed):>10.0f} {float(peak):>9.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(*measure(sys.argv[2], sys.argv[3]))
    else:
        main()
