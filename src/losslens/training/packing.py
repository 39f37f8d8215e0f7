"""Batches without padding: the tokens of all rows lie end to end, and attention is computed row by row.

Callers see nothing of it: they pass a padded batch to the model and get the hidden states of a padded batch back. In
between, embeddings, linear layers and norms process real tokens only.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch<2.10
    varlen_attn = None  # type: ignore[assignment]

# Name of the attention below in transformers' registry.
_NAME = "losslens_packed_sdpa"
# Off CUDA, rows whose lengths differ by less than this factor are padded to one length within attention, where a
# kernel call costs more than a few tokens.
_SIMILAR = 0.85
# Arguments of attention functions that change what is computed, and that this one does not implement.
_NOT_IMPLEMENTED = ("softcap", "position_bias", "s_aux", "cache")
# Largest relative difference of hidden states that counts as rounding, in float32 and in half precision.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


@dataclass(frozen=True)
class PackedRows:
    """Layout of the rows of a packed batch.

    Attributes:
        starts: Offsets of the rows and the total number of tokens M, shape (N + 1,), int32.
        longest: Tokens of the longest row.
        gather: Tokens of the rows, padded within groups of similar length, as positions in the packed batch; shape
            (M',), where M' ≥ M.
        scatter: Positions in `gather` of the tokens of the packed batch, shape (M,); None if there is no padding.
        groups: Number of rows and padded length of each group.
    """

    starts: torch.Tensor
    longest: int
    gather: torch.Tensor
    scatter: torch.Tensor | None
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> PackedRows:
        """Lays out rows of the given lengths (at least 1), one after the other."""
        starts = torch.tensor([0, *lengths]).cumsum(0)
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        groups: list[list[int]] = []
        for row in order:
            if not groups or lengths[row] < _SIMILAR * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(row)
        gather, scatter, placed = [], torch.empty(int(starts[-1]), dtype=torch.long), 0
        for group in groups:
            longest = lengths[group[0]]
            for row in group:
                positions = torch.arange(longest).clamp(max=lengths[row] - 1) + starts[row]
                gather.append(positions)
                scatter[starts[row] : starts[row] + lengths[row]] = torch.arange(placed, placed + lengths[row])
                placed += longest
        shapes = tuple((len(group), lengths[group[0]]) for group in groups)
        in_place = placed == len(scatter) and bool((scatter == torch.arange(placed)).all())
        return cls(
            starts.to(device, torch.int32),
            max(lengths),
            torch.cat(gather).to(device),
            None if in_place else scatter.to(device),
            shapes,
        )


def pack_rows(model: PreTrainedModel) -> bool:
    """Makes a model's backbone process padded batches without their padding, and returns whether it can.

    It applies to calls with a 2D `attention_mask` that has padding, and `use_cache=False`. It needs scaled
    dot-product attention or FlashAttention from transformers' registry, and layers that mix tokens in attention alone.
    This is tested: two rows must get the same hidden states as alone, up to rounding; otherwise the model stays
    unchanged. At positions of padding the hidden states are 0.

    Args:
        model: The causal language model; the `forward` of its backbone is replaced and its attention exchanged.
    """
    backbone, config = model.base_model, model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "flash_attention_2") or getattr(config, "attention_chunk_size", None):
        return False
    before = dict(vars(backbone))
    backbone.forward = types.MethodType(_packed(backbone.forward), backbone)
    if implementation == "sdpa":
        config._attn_implementation_internal = _NAME
    if _is_exact(backbone, config):
        return True
    vars(backbone).clear()
    vars(backbone).update(before)
    config._attn_implementation_internal = implementation
    return False


def _packed(plain: Any) -> Any:
    """Returns the `forward` of a backbone that packs the rows of its batch before it calls `plain`."""

    @functools.wraps(plain.__func__)
    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        given = [name for name in ("position_ids", "past_key_values", "inputs_embeds") if kwargs.get(name) is not None]
        if (
            given
            or input_ids is None
            or attention_mask is None
            or attention_mask.ndim != 2
            or kwargs.get("use_cache") is not False
            or kwargs.get("output_router_logits")
        ):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        real = attention_mask.bool()
        lengths = [length for length in real.sum(dim=1).tolist() if length]
        if sum(lengths) in (0, real.numel()):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        rows = PackedRows.of(lengths, input_ids.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(input_ids.device)
        output = plain(
            input_ids=input_ids[real][None],
            position_ids=positions[None],
            # For FlashAttention, under transformers' names.
            cu_seq_lens_q=rows.starts,
            cu_seq_lens_k=rows.starts,
            max_length_q=rows.longest,
            max_length_k=rows.longest,
            packed_rows=rows,
            **kwargs,
        )
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.new_zeros(*real.shape, hidden.shape[-1]).index_put((real,), hidden[0])
        return output

    return forward


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention within the rows of a packed batch, or that of transformers in any other.

    Shapes: query (1, heads, M, D), key and value (1, heads of keys, M, D); returns (1, M, heads, D).
    """
    if packed_rows is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    unknown = [name for name in _NOT_IMPLEMENTED if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal")
    if unknown or not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError(f"attention of packed rows with {unknown or 'no causal mask'}")
    window, scale, dropout = kwargs.get("sliding_window"), kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    grouped = query.shape[1] != key.shape[1]
    tokens = [each[0].transpose(0, 1) for each in (query, key, value)]  # (M, heads, D)
    if _has_kernel(query) and not dropout:
        starts, longest = packed_rows.starts, packed_rows.longest
        q, k, v = (each.contiguous() for each in tokens)
        behind = -1 if window is None else window - 1
        mixed = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scale, window_size=(behind, 0), enable_gqa=grouped
        )
        assert isinstance(mixed, torch.Tensor)
        return mixed[None], None
    if packed_rows.scatter is not None:
        tokens = [each.index_select(0, packed_rows.gather) for each in tokens]
    parts = [each.split([rows * length for rows, length in packed_rows.groups]) for each in tokens]
    outputs = []
    for number, (rows, length) in enumerate(packed_rows.groups):
        q, k, v = (each[number].unflatten(0, (rows, length)).transpose(1, 2) for each in parts)
        # Padding comes after a row's tokens, so under a causal mask none of them attends to it.
        mask = None if window is None or length <= window else _banded(length, window, query.device)
        mixed = scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs)
    return (joined if packed_rows.scatter is None else joined.index_select(0, packed_rows.scatter))[None], None


def _has_kernel(query: torch.Tensor) -> bool:
    """Returns True if torch has a kernel for rows of several lengths on this device and in this precision."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and query.device.type == "cuda" and half


def _banded(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token attends: to itself and the `window` − 1 tokens before it; shape (length, length)."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


def _mask(attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """Makes no mask for a packed batch, and transformers' in any other.

    A packed batch has position ids that start anew and no mask; transformers then forbids to skip its own.
    """
    if attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


@torch.no_grad()
def _is_exact(backbone: Any, config: Any) -> bool:
    """Returns True if two rows have the same hidden states in a padded batch and in a packed one, up to rounding."""
    training, device = backbone.training, backbone.device
    lengths = (7, 4)
    ids = torch.arange(2 * lengths[0], device=device).reshape(2, -1) % config.vocab_size
    mask = torch.arange(lengths[0], device=device) < torch.tensor(lengths, device=device)[:, None]
    backbone.eval()
    try:
        packed = backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]
        alone = [
            backbone(input_ids=ids[row, :length][None], use_cache=False).last_hidden_state[0]
            for row, length in enumerate(lengths)
        ]
    except Exception:  # whatever an architecture raises that cannot process a packed batch
        return False
    finally:
        backbone.train(training)
    expected = torch.cat(alone).float()
    half = packed.dtype in (torch.float16, torch.bfloat16)
    difference = torch.linalg.vector_norm(packed.float() - expected)
    return bool(difference <= (_HALF_TOLERANCE if half else _TOLERANCE) * torch.linalg.vector_norm(expected))
