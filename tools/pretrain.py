"""Pretrains the tiny student or teacher: `python tools/pretrain.py student FOLDER`.

Both learn to add step by step, from problems of reasoning-gym's `chain_sum` in the "pretrain" split, which is used
neither for rollouts nor for evaluation.
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from losslens.models.tokens import encode_completion, encode_prompt
from losslens.problems import Problem
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.sampling.local import generate_greedy

SEED = 1
DIFFICULTY = {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 1}
SHARE = 0.8  # share of the questions that is reserved for pretraining
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Size and training of a tiny model."""

    hidden_size: int
    layers: int
    problems: int
    epochs: int
    learning_rate: float


RECIPES = {
    "student": Recipe(hidden_size=128, layers=5, problems=28_000, epochs=1, learning_rate=1e-3),
    "teacher": Recipe(hidden_size=192, layers=4, problems=32_000, epochs=1, learning_rate=1e-3),
}


def worked_solution(problem: Problem) -> str:
    """Returns the steps of a sum from left to right, then the answer in its tags.

    Example:
        `4 - 7 + 8` gives the lines `4 - 7 = -3`, `-3 + 8 = 5` and `<answer>5</answer>`.
    """
    first, *rest = re.findall(r"[+-]|\d+", problem.metadata["metadata"]["expression"])
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    assert str(total) == problem.answer
    return "\n".join([*lines, f"<answer>{total}</answer>"])


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with one token per digit: lossless for any text, one token per word of the problems."""
    words = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\nassistant\nsystem\n"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Builds an untrained Qwen3 with two query heads per key-value head."""
    heads = recipe.hidden_size // 32
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=3 * recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> Dataset:
    """Tokenises the prompt and the worked solution of each problem; labels of the prompt are masked."""
    rows = []
    for problem in problems:
        prompt = encode_prompt(tokenizer, problem.prompt)
        completion = encode_completion(tokenizer, worked_solution(problem), finished=True)
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return Dataset.from_list(rows)


def main() -> None:
    """Trains, saves and evaluates one of the two models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=sorted(RECIPES))
    parser.add_argument("folder", type=Path, help="folder for the model and the tokenizer")
    parser.add_argument("--problems", type=int, help="number of problems to train on, instead of the recipe's")
    args = parser.parse_args()
    recipe = RECIPES[args.role]
    source = ReasoningGym("chain_sum", DIFFICULTY, pretrain_share=SHARE)
    problems = source.problems("pretrain", args.problems or recipe.problems, seed=SEED)
    random.seed(0)
    torch.manual_seed(0)

    sample = problems[:2000]
    tokenizer = make_tokenizer([f"{problem.prompt}\n{worked_solution(problem)}" for problem in sample])
    model = make_model(recipe, tokenizer)
    print(f"{args.role}: {model.num_parameters():,} parameters, {len(problems):,} problems", flush=True)
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.folder / "trainer"),
            per_device_train_batch_size=16,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=0,
        ),
        train_dataset=tokenise(tokenizer, problems),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    ).train()

    # Saved in bfloat16, like large models; the rounded model is the one that is evaluated.
    model.to(torch.bfloat16).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    model = Qwen3ForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    held_out = source.problems("eval", 500, seed=2)
    completions = generate_greedy(model, tokenizer, [p.prompt for p in held_out], max_new_tokens=96, batch_size=128)
    correct = sum(
        source.verifier(problem, completion.text).correct
        for problem, completion in zip(held_out, completions, strict=True)
    )
    print(completions[0].text)
    print(f"{args.role}: {correct} of {len(held_out)} held-out problems correct (greedy)", flush=True)


if __name__ == "__main__":
    main()
