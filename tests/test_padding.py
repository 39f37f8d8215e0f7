"""Batches without padding: the same numbers, and no more arithmetic than the tokens take."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)
from trl import DistillationTrainer

from losslens.config.training import Optim
from losslens.losses import Loss, builtin_losses
from losslens.losses.asft import Asft
from losslens.losses.dpo import Dpo
from losslens.losses.eaft import Eaft
from losslens.losses.kto import Kto
from losslens.losses.online_grpo import OnlineGrpo
from losslens.losses.opd import Opd
from losslens.losses.sft import Sft
from losslens.models.adapters import initial_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.training import packing
from losslens.training.batches import split_by_length
from losslens.training.packing import pack_rows
from losslens.training.reference import ReferenceCache
from losslens.training.run import TrainingPlan, make_trainer
from losslens.training.source import OnPolicySource, data_order
from tests.conftest import LORA, OPTIM, frozen_source
from tests.test_on_policy import a_group, inputs_of, rounds_of
from tests.test_on_policy import trainer_of as on_policy_trainer
from tests.test_trainers import trainer_of, usable

# Floating-point operations over the floor, in a step of 32 rows.
BARS = {"default": 1.10, "log-normal": 1.15}


def two_products(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Operations of Q Kᵀ and P V, of shapes (rows, heads, T, D): T² entries each, with or without a causal mask."""
    rows, heads, length, width = query
    return 4 * rows * heads * length * key[2] * width


def five_products(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """Operations of attention's backward pass, which computes Q Kᵀ anew."""
    return 5 * two_products(query, key) // 2


# The attention kernels of the CPU, which torch's counter does not know.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: two_products,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: five_products,
}


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        yield counter


def floor(config: Any, tokens: int, scored: int, backward: bool = True, adapter: bool = True) -> int:
    """Operations for one row of Qwen3 with LoRA on its attention: real tokens, and the head on scored ones only.

    Forward, a matrix costs 2 operations an entry and token, and backward as many for the gradient of its input. Only
    A and B need the gradient of a weight, and in the first layer nothing needs that of the input.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    of_input = hidden * heads + 2 * hidden * keys
    a_of_input = 3 * LORA.r * hidden
    base = of_input + heads * hidden + 3 * hidden * config.intermediate_size
    lora = LORA.r * (3 * hidden + heads + 2 * keys + heads + hidden) if adapter else 0
    head, attention, layers = 2 * scored * hidden * config.vocab_size, 2 * tokens**2 * heads, config.num_hidden_layers
    forward = layers * (2 * tokens * (base + lora) + 2 * attention) + head
    if not backward:
        return forward
    first = 2 * tokens * (of_input + a_of_input)
    return forward + layers * (2 * tokens * (base + 2 * lora) + 5 * attention) + head - first


def student(layers: int) -> PreTrainedModel:
    """A model of the embedded one's widths, with room for long rows."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=319, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def one_layer() -> PreTrainedModel:
    return student(layers=1)


@pytest.fixture(scope="module")
def two_layers() -> PreTrainedModel:
    return student(layers=2)


@pytest.fixture(scope="module")
def long_rows() -> pd.DataFrame:
    """Sixteen prompts with a correct and an incorrect rollout, whose lengths are log-normal: σ = 0.7, mean 350."""
    rng = np.random.default_rng(0)
    # The quantiles in the middle of 32 equal shares, so that the lengths do not depend on luck.
    normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(32) + 0.5) / 32).numpy()
    lengths = rng.permutation(np.exp(0.7 * normal))
    lengths = (350 * lengths / lengths.mean()).round().astype(int)
    return pd.DataFrame(
        {
            "problem_id": [str(row // 2) for row in range(32)],
            "group": np.arange(32) // 2,
            "place": np.arange(32),
            "reward": [1.0, 0.0] * 16,
            "completion": "",
            "prompt_ids": [rng.integers(3, 319, 20).tolist() for _ in lengths],
            "completion_ids": [rng.integers(3, 319, length - 20).tolist() for length in lengths],
        }
    )


@contextmanager
def training(
    method: Any, model: Any, tokenizer: Any, rows: pd.DataFrame, folder: Path, **options: Any
) -> Iterator[Any]:
    """Yields a trainer of steps of 32 rows, with the reference scored."""
    batch = 16 if method.unit == "pair" else 32
    optim = Optim(**{**OPTIM, "batch_size": batch, "max_steps": 1})
    initial = initial_adapter(folder, {}, model, LORA, init_seed=0)
    plan = TrainingPlan(method, 1e-3, LORA, initial, optim, seed=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    with preserved(model):
        source = frozen_source(plan, rows, reference=ReferenceCache(folder / "references", {}))
        trainer = make_trainer(plan, LoadedModel(model, tokenizer), source, folder, [], **options)
        trainer.model.train()
        yield trainer


def ratio(method: Loss, model: Any, tokenizer: Any, rows: pd.DataFrame, folder: Path, **options: Any) -> float:
    """Operations of a step over the floor: a forward and a backward pass, and what else the loss's definition asks."""
    with training(method, model, tokenizer, rows, folder, **options) as trainer:
        with counted() as counter:
            batches, count = trainer.get_batch_samples(iter(()), 1, torch.device("cpu"))
            for batch in batches:
                trainer.training_step(trainer.model, batch, count)
        examples = trainer.source.batch(0, trainer.model)
        least = 0
        config = model.config
        others = examples.mismatched() if "mismatched_log_ratio" in method.needs else None
        for number, members in enumerate(examples.rows):
            for row in members:
                prompt, completion = (len(examples.table[f"{part}_ids"].iloc[row]) for part in ("prompt", "completion"))
                least += floor(config, prompt + completion, completion)
                if "divergence" in method.needs:
                    least += floor(config, prompt + completion, completion, backward=False, adapter=False)
                if others is not None:
                    other = len(examples.table["completion_ids"].iloc[examples.rows[others[number]][0]])
                    for adapter in (True, False):
                        least += floor(config, prompt + other, other, backward=False, adapter=adapter)
    return counter.get_total_flops() / least


ALL = [usable(name, kind) for name, kind in builtin_losses().items()]
# One of each kind of pass: the policy's alone, on pairs, with what else is computed within a step.
KINDS = [Sft(name="sft"), Dpo(name="dpo"), Kto(name="kto"), Asft(name="asft"), Eaft(name="eaft")]


def named(losses: list[Any]) -> Any:
    return pytest.mark.parametrize("method", losses, ids=lambda method: method.name)


@named(ALL)
def test_padding_on_the_default_data(
    method: Loss, two_layers: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    assert 1 <= ratio(method, two_layers, base.tokenizer, tokenised.iloc[:80], tmp_path) <= BARS["default"]


def test_every_kind_of_pass_is_here() -> None:
    of_step = {"mismatched_log_ratio", "top_entropy", "divergence"}
    assert {need for loss in ALL for need in loss.needs & of_step} == {
        need for loss in KINDS for need in loss.needs & of_step
    }


@named(KINDS)
def test_padding_on_reasoning_lengths(
    method: Loss, one_layer: Any, base: LoadedModel, long_rows: pd.DataFrame, tmp_path: Path
) -> None:
    assert 1 <= ratio(method, one_layer, base.tokenizer, long_rows, tmp_path) <= BARS["log-normal"]


def test_the_floor_is_what_rows_of_one_length_take(one_layer: Any, base: LoadedModel, tmp_path: Path) -> None:
    """To the operation, and without packing. With one row of 60 tokens beside 31 of 20, padding is counted."""
    columns = {"group": range(32), "place": range(32), "reward": 1.0, "completion": ""}
    rows = pd.DataFrame({**columns, "problem_id": [str(n) for n in range(32)], "prompt_ids": [[5] * 8] * 32})
    equal = rows.assign(completion_ids=[[7] * 12] * 32)
    uneven = rows.assign(completion_ids=[[7] * 52] + [[7] * 12] * 31)
    method = Sft(name="sft")
    assert ratio(method, one_layer, base.tokenizer, equal, tmp_path / "equal", packed=False) == 1
    assert ratio(method, one_layer, base.tokenizer, uneven, tmp_path / "padded", packed=False) > 2
    assert ratio(method, one_layer, base.tokenizer, uneven, tmp_path / "packed") == 1


@pytest.mark.parametrize("name", ["online_grpo", "dapo", "opd"])
def test_padding_of_on_policy_methods(
    name: str, make_plan: Any, base: LoadedModel, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step that trains, on samples of 5 to 40 tokens. The teacher of distillation is the base."""
    method: Any = (
        Opd(name="opd") if name == "opd" else
        OnlineGrpo(name="online_grpo", recipe="dapo" if name == "dapo" else "grpo", samples_per_prompt=4)
    )  # fmt: skip
    teacher = copy.deepcopy(base) if name == "opd" else None
    samples = OnPolicySource(method, source.problems("train", 8, seed=3), source.verifier, 10, 60, teacher)
    config, least = base.model.config, 0
    with on_policy_trainer(make_plan(method, batch_size=8), base, samples, tmp_path) as trainer:
        inputs = inputs_of(samples, [2, 5] if name != "opd" else list(range(8)))
        given = a_group(trainer, [True, False] * 4, [5, 40, 9, 33, 14, 28, 20, 24])
        if name == "opd":
            prompts = [trainer.encode(row["prompt"]) for row in inputs]
            ids = [completion for completion, _ in given]
            monkeypatch.setattr(DistillationTrainer, "_generate", lambda *_: (prompts, ids, None, None, None))
            monkeypatch.setattr(OnPolicySource, "correct", lambda _, numbers, texts: [True] * len(texts))
        else:
            rounds_of(trainer, monkeypatch, given)
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs(inputs)
        monkeypatch.setattr(trainer, "_prepare_inputs", lambda _: batch)
        with counted() as counter:
            trainer.training_step(trainer.model, inputs, None)
        for row in range(8):
            prompt, completion = (int(batch[f"{part}_mask"][row].sum()) for part in ("prompt", "completion"))
            least += floor(config, prompt + completion, completion)
            if name == "opd":
                least += floor(config, prompt + completion, completion, backward=False, adapter=False)
    assert 1 <= counter.get_total_flops() / least <= BARS["default"]


# The same numbers


WIDTHS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
PACKED = {
    "llama": LlamaConfig(**WIDTHS),
    "grouped queries": Qwen3Config(**WIDTHS, num_key_value_heads=2, head_dim=8),
    "experts": Qwen3MoeConfig(
        **WIDTHS, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "sliding window": MistralConfig(**WIDTHS, num_key_value_heads=2, sliding_window=4),
    "both": Gemma3TextConfig(**WIDTHS, num_key_value_heads=1, head_dim=8, sliding_window=4),
    "learned positions": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        word_embed_proj_dim=32, max_position_embeddings=64,
    ),
}  # fmt: skip
NOT_PACKED = {
    "state space": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "convolution": Lfm2Config(**WIDTHS, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "capped scores": Gemma2Config(**WIDTHS, num_key_value_heads=2, head_dim=8),
}


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # the attention is noted in it
    config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # so that a token that is attended to by mistake is seen
    return model


LENGTHS = [3, 12, 0, 7, 11, 1]
IDS = torch.randint(1, 64, (6, 14), generator=torch.Generator().manual_seed(1))
BEHIND = torch.arange(14) < torch.tensor(LENGTHS)[:, None]
MASKS = {"right": BEHIND, "left": BEHIND.flip(1)}


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_are_what_each_row_is_alone(kind: str, side: str) -> None:
    """Hidden states and gradients of rows of 0 to 12 tokens, padded on either side; 0 where there is padding."""
    model, mask = model_of(PACKED[kind]), MASKS[side]
    weights = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(2))

    def passed(hidden: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        parameters = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
        return hidden.detach(), torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)

    rows = [ids[keep][None] for ids, keep in zip(IDS, mask, strict=True) if keep.any()]
    model.set_attn_implementation("eager")
    alone = passed(torch.cat([model.base_model(input_ids=row, use_cache=False)[0][0] for row in rows]))
    model.set_attn_implementation("sdpa")
    assert pack_rows(model)
    states = model.base_model(input_ids=IDS, attention_mask=mask.long(), use_cache=False)[0]
    assert not states[~mask].any()
    together = passed(states[mask])
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-4)
    gradients = [(ours, theirs) for ours, theirs in zip(together[1], alone[1], strict=True) if theirs is not None]
    smallest = 1e-6 * torch.stack([theirs.norm() for _, theirs in gradients]).norm()
    for ours, theirs in gradients:
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + smallest


def kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, key_starts: torch.Tensor,
    longest: int, longest_key: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of rows one after the other, by torch's definition of `varlen_attn`; shape (M, heads, D)."""
    assert torch.equal(starts, key_starts)
    assert longest == longest_key == int(starts.diff().max())
    behind, ahead = window_size
    assert ahead == 0
    rows = []
    for first, last in itertools.pairwise(starts.tolist()):
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (distance >= 0) & ((distance <= behind) | (behind < 0))
        q, k, v = (each[first:last].transpose(0, 1) for each in (query, key, value))
        k, v = (each.repeat_interleave(len(q) // len(each), dim=0) for each in (k, v)) if enable_gqa else (k, v)
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)


def flash_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, sliding_window: int | None = None,
    cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None, max_length_q: Any = None, max_length_k: Any = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """FlashAttention as transformers calls it, on one row or on several that are packed."""
    assert mask is None
    length = query.shape[2]
    starts, longest = (torch.tensor([0, length]), length) if cu_seq_lens_q is None else (cu_seq_lens_q, max_length_q)
    other = (starts, length) if cu_seq_lens_k is None else (cu_seq_lens_k, max_length_k)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    tokens = (each[0].transpose(0, 1) for each in (query, key, value))
    mixed = kernel(*tokens, starts, other[0], longest, other[1], scale=scaling, window_size=window, enable_gqa=True)
    return mixed[None], None


@pytest.mark.parametrize("implementation", ["varlen_attn", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["llama", "both"])
def test_kernels_for_rows_of_several_lengths(kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's kernel and FlashAttention are given on CUDA, with stand-ins for the two."""
    model, mask, called = model_of(PACKED[kind]), MASKS["right"], []

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        called.append(arguments)
        return kernel(*arguments, **options)

    with torch.no_grad():
        expected = model.base_model(input_ids=IDS, attention_mask=mask.long(), use_cache=False)[0][mask]
        if implementation == "varlen_attn":
            monkeypatch.setattr(packing, "varlen_attn", noted)
            monkeypatch.setattr(packing, "_has_kernel", lambda _: True)
        else:
            monkeypatch.setitem(AttentionInterface._global_mapping, implementation, flash_attention)
            model.config._attn_implementation_internal = implementation
        assert pack_rows(model)
        found = model.base_model(input_ids=IDS, attention_mask=mask.long(), use_cache=False)[0][mask]
    assert bool(called) == (implementation == "varlen_attn")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NOT_PACKED)
def test_a_model_that_cannot_be_packed_stays_as_it_is(kind: str) -> None:
    """Its layers mix neighbouring tokens, or its attention does more than scaled products."""
    model = model_of(NOT_PACKED[kind])
    before = vars(model.base_model).keys(), model.config._attn_implementation
    assert not pack_rows(model)
    assert (vars(model.base_model).keys(), model.config._attn_implementation) == before


def test_other_calls_of_a_packed_model_are_transformers(base: LoadedModel) -> None:
    """Generation, with its cache and left padding, and a batch without a mask."""
    ids, mask = IDS[[1, 3]], MASKS["left"][[1, 3]].long()

    def called() -> tuple[torch.Tensor, torch.Tensor]:
        written = base.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True
        )
        return written, base.model(input_ids=ids).logits

    with torch.no_grad(), preserved(base.model):
        before = called()
        assert pack_rows(base.model)
        after = called()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert base.model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(base.model.base_model)


def test_a_part_with_a_configuration_of_its_own_is_restored() -> None:
    """As in models that read images, too, whose attention follows the configuration of the part."""
    model = model_of(PACKED["llama"])
    part = model.model.config = copy.deepcopy(model.config)
    with preserved(model):
        part._attn_implementation_internal = "another"
    assert model.model.config is part
    assert part._attn_implementation == "sdpa"


@named(KINDS)
def test_a_packed_step_has_the_gradient_of_a_padded_one(
    method: Loss, two_layers: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Up to rounding, with gradient checkpointing, which repeats the packed pass, and in four micro-batches."""
    gradients = []
    for number, (packed, plan) in enumerate([(False, (32, False)), (True, (32, True)), (True, (8, False))]):
        share = plan[0] // 2 if method.unit == "pair" else plan[0]
        options = {"packed": packed, "microbatch_plan": (share, plan[1])}
        folder = tmp_path / str(number)
        with training(method, two_layers, base.tokenizer, tokenised.iloc[:80], folder, **options) as trainer:
            torch.manual_seed(0)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            batches, count = trainer.get_batch_samples(iter(()), 32 // plan[0], torch.device("cpu"))
            for batch in batches:
                trainer.training_step(trainer.model, batch, count)
            gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_with_dropout_the_layout_is_that_of_the_rows(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """What is dropped follows from the layout: runs with dropout keep theirs, and so their bytes."""
    plan = make_plan(Sft(name="sft"), max_steps=1, batch_size=8, micro_batch=4)
    found = []
    for dropout in (0.1, 0.0):
        changed = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=dropout))
        with trainer_of(changed, base, tokenised, tmp_path) as trainer:
            batches, _ = trainer.get_batch_samples(iter(()), 2, torch.device("cpu"))
            found.append([batch["attention_mask"].sum(dim=1).tolist() for batch in batches])
            assert ("forward" in vars(trainer.model.get_base_model().base_model)) == (not dropout)
    rows = tokenised.iloc[data_order(len(tokenised), 8, plan.seed)]
    lengths = (rows["prompt_ids"].map(len) + rows["completion_ids"].map(len)).tolist()
    assert found[0] == [lengths[:4], lengths[4:]]
    assert sorted(found[1][0] + found[1][1]) == sorted(lengths)
    assert min(found[1][0]) >= max(found[1][1])


# Micro-batches by length


def test_micro_batches_of_equal_size_by_hand() -> None:
    """Two of 60 padded tokens each: the long row with the middle one, and the three short ones."""
    parts = split_by_length(np.array([10, 30, 20, 25, 10]), 2)
    assert [part.tolist() for part in parts] == [[1, 3], [0, 2, 4]]
    assert [part.tolist() for part in split_by_length(np.array([5, 5, 5]), 3)] == [[0], [1], [2]]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_by_length_has_a_smaller_largest_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, 9)
    parts = int(rng.integers(1, 10))
    found = split_by_length(lengths, parts)
    assert sorted(np.concatenate(found)) == list(range(9))
    assert len(found) == parts

    def largest(split: list[np.ndarray]) -> int:
        return max(len(part) * lengths[part].max() for part in split)

    order = np.argsort(-lengths, kind="stable")
    cuts = itertools.combinations(range(1, 9), parts - 1)
    assert largest(found) == min(largest(np.split(order, cut)) for cut in cuts)
