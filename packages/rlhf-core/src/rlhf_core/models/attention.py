"""Attention over samples laid end to end, without flash-attn being a requirement.

`rlhf_ragged` is registered with transformers' `AttentionInterface`. The model call carries `cu_seq_lens_q`; every layer's
attention then stays within segments, or within a segment and the one it continues (see `Batch.prefixes`). On CUDA one
variable-length kernel does it, elsewhere one SDPA call per segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import is_flash_attn_2_available

RAGGED = "rlhf_ragged"
HALF = (torch.float16, torch.bfloat16)


def padded_implementation(text_config: Any) -> str | None:
    """The attention for padded calls: transformers' own choice, but for models whose soft cap its SDPA would drop."""
    return "eager" if getattr(text_config, "attn_logit_softcapping", None) else None


def ragged_implementation(device: torch.device, dtype: torch.dtype, share_prefix: bool = False) -> tuple[str, str]:
    """The best attention without padding for a device and number format: its name for transformers, and a line for the log.

    With `share_prefix`, of those that let several segments continue one.
    """
    if device.type == "cuda" and dtype not in HALF:
        return RAGGED, "one attention call per sample, samples laid end to end (the CUDA kernels want --bf16)"
    if device.type == "cuda" and share_prefix:
        return RAGGED, "torch's variable-length attention, samples laid end to end, shared prompts once"
    if device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2", "FlashAttention 2 (flash-attn), samples laid end to end"
    if device.type == "cuda":
        return RAGGED, "torch's variable-length attention, samples laid end to end (flash-attn is not installed)"
    return RAGGED, "one attention call per sample, samples laid end to end (there is no CUDA device for flash-attn)"


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    prefixes: tuple[int, ...] | None = None,
    key_places: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, and of each segment to the one it continues.

    Args:
        module: the attention layer.
        query: `[1, heads, T, D]`.
        key: `[1, key heads, T, D]`.
        value: `[1, key heads, T, D]`.
        attention_mask: unused; the limits of segments say it all.
        scaling: factor of the scores before the softmax.
        dropout: probability of dropping an attention weight while training.
        sliding_window: how many places back a token sees, itself included.
        cu_seq_lens_q: where each segment starts, and the end, `[S+1]`. Without it, one sample of T tokens (generation).
        cu_seq_lens_k: the same in the row of keys that `key_places` lays, prefixes before what continues them, `[S+1]`.
        max_length_q: length of the longest segment.
        max_length_k: the same with prefixes.
        prefixes: the segment that each segment continues, or -1; None if no segment continues another.
        key_places: where each key of that row is in `[0, T)`, `[K]`; None if no segment continues another.
        **kwargs: what transformers also passes on.

    Returns:
        `[1, T, heads, D]`, and no attention weights.

    Raises:
        ValueError: the layer asks for something that has no ragged form here (attention sinks, a soft cap).
    """
    unknown = [name for name in ("s_aux", "softcap", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} uses {', '.join(unknown)}, which attention without padding does not do here: "
            "leave out --flash_attn and --packing_samples"
        )
    dropout = dropout if module.training else 0.0
    if cu_seq_lens_q is None:
        if query.shape[0] > 1:
            raise ValueError(
                "attention without padding takes one row; a batch of rows needs cu_seq_lens_q or another attention"
            )
        return _attend(query, key, value, scaling, dropout, sliding_window).transpose(1, 2), None
    if query.device.type == "cuda" and query.dtype in HALF and query.shape[-1] % 8 == 0 and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if key_places is not None:
            k, v = k[key_places], v[key_places]
        window = (sliding_window - 1 if sliding_window else -1, 0)
        gqa = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            scale=scaling,
            window_size=window,
            enable_gqa=gqa,
        )
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    pieces = []
    for segment, prefix in enumerate(prefixes or (-1,) * len(lengths)):
        k, v = keys[segment], values[segment]
        if prefix >= 0:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        pieces.append(_attend(queries[segment], k, v, scaling, dropout, sliding_window))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of one sample, queries aligned to the end of the keys; `[1, heads, L, D]`."""
    length, context = query.shape[2], key.shape[2]
    mask = None
    if (window and context > window) or length != context:
        places = torch.arange(context, device=query.device)
        behind = places[context - length :, None] - places[None]
        mask = (behind >= 0) & (behind < (window or context))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


AttentionInterface.register(RAGGED, ragged_attention)
AttentionMaskInterface.register(RAGGED, lambda *args, **kwargs: None)
