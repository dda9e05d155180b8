"""What language-model heads say of each token: how far two are apart, and the top k of one, in chunks of tokens.

Shapes: M tokens, c tokens of a chunk, H and V hidden width and vocabulary of the student, H' and V' of the teacher,
k kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_losses._divergence import Divergence, DivergenceKind, divergence_of, log_softmax_, shared_vocabulary
from rlhf_losses._head import (
    BufferedHead,
    HeadGradient,
    LogitMap,
    accumulation_dtype,
    buffer_for,
    check_head,
    check_heads,
    chunks_of,
)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    shared_vocab: int | None = None,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Divergence of two language-model heads, without holding the logits of either.

    The divergences of this module on z = cap · tanh(s · (h Wᵀ + b) / cap) / T of student and teacher, in chunks of
    tokens; the backward pass computes each chunk again.

    Args:
        student_hidden: states that enter the student's head, `[M, H]`.
        student_weight: of the student's head, `[V, H]`.
        teacher_hidden: states that enter the teacher's head, `[M, H']`.
        teacher_weight: of the teacher's head, `[V', H']`.
        kind: "forward_kl", "reverse_kl", "jsd" (see `beta`) or "skew_kl" (see `alpha`).
        beta: weight of the teacher in `jsd`.
        alpha: share of the teacher in the mixture of `skew_kl`.
        temperature: T, divides both logits.
        shared_vocab: number of first tokens that mean the same to both; by default min(V, V').
        mask: True for tokens to compute, boolean `[M]`; by default all.
        student_bias: `[V]`.
        teacher_bias: `[V']`.
        student_softcap: bound of the student's logits before the temperature; None for models without one.
        teacher_softcap: of the teacher's.
        student_logit_scale: factor of the student's logits.
        teacher_logit_scale: of the teacher's.
        chunk_size: tokens held as logits at a time; by default as many as fit 64 MB (512 MB on a GPU) per model.

    Returns:
        `[M]`, float32 (float64 for float64 inputs), 0 outside the mask; gradient to the student only.

    Source: see `forward_kl`, `reverse_kl`, `jsd` and `skew_kl`.
    """
    check_heads(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student_hidden.shape[:1]):
        raise ValueError(
            f"mask must be boolean [{len(student_hidden)}], got {mask.dtype} {list(mask.shape)}; flatten the batch"
        )
    return _LinearDivergence.apply(
        student_hidden.to(student_weight.dtype),
        student_weight,
        student_bias,
        teacher_hidden.detach().to(teacher_weight.dtype),
        teacher_weight,
        teacher_bias,
        mask,
        divergence_of(kind, beta, alpha),
        LogitMap(temperature, student_softcap, student_logit_scale),
        LogitMap(temperature, teacher_softcap, teacher_logit_scale),
        shared_vocabulary(len(student_weight), len(teacher_weight), shared_vocab),
        chunk_size,
    )


@torch.no_grad()
def linear_topk_logps(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocabulary: int | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and ids of each state's k most likely tokens: what to keep of a teacher for `topk_forward_kl`.

    Args:
        hidden: states that enter the head, `[M, H]`; cast to the dtype of `weight`.
        weight: of the head, `[V, H]`.
        k: how many tokens to keep.
        temperature: T, divides the logits.
        bias: of the head, `[V]`.
        softcap: cap of models that bound their logits (Gemma 2); None for all others.
        logit_scale: s of models that scale their logits (Cohere); 1 for all others.
        vocabulary: number of first tokens that the student knows too; the distribution is over these. By default V.
        chunk_size: tokens held as logits at a time; by default as many as fit 64 MB (512 MB on a GPU).

    Returns:
        Log-probs over the first `vocabulary` tokens, highest first, not renormalised over the top k, float32 (float64
        for float64 inputs) `[M, k]`; and token ids, int64 `[M, k]`. Without gradient.

    Source: Hinton et al. 2015, sec. 2 (arXiv:1503.02531).
    """
    check_head(hidden, weight, bias)
    if vocabulary is not None and not 1 <= vocabulary <= len(weight):
        raise ValueError(f"vocabulary must be between 1 and {len(weight)}, got {vocabulary}; None takes all")
    count = vocabulary or len(weight)
    if not 1 <= k <= count:
        raise ValueError(f"k must be between 1 and {count}, the size of the vocabulary, got {k}")
    dtype = accumulation_dtype(weight.dtype)
    chunks = chunks_of(torch.arange(len(hidden), device=hidden.device), count, chunk_size, dtype)
    logit_map, buffer = LogitMap(temperature, softcap, logit_scale), buffer_for(chunks, count, dtype, hidden.device)
    head = BufferedHead(hidden.to(weight.dtype), weight, bias, logit_map, buffer)
    logps = torch.empty(len(hidden), k, dtype=dtype, device=hidden.device)
    indices = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks:
            logps[rows], indices[rows] = log_softmax_(head.logits(rows)).topk(k)
    return logps, indices


class _LinearDivergence(torch.autograd.Function):
    """Keeps nothing but its inputs, and computes each chunk again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        mask: Tensor | None,
        divergence: Divergence,
        logit_map: LogitMap,
        teacher_map: LogitMap,
        vocabulary: int,
        chunk_size: int | None,
    ) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device) if mask is None else mask.nonzero()[:, 0]
        saved = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, rows)
        how = (logit_map, teacher_map, vocabulary, chunk_size)
        ctx.save_for_backward(*saved)
        ctx.how, ctx.divergence = how, divergence
        out = torch.zeros(len(hidden), dtype=accumulation_dtype(weight.dtype), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, z, log_p in _paired_logits(*saved, *how):
                out[chunk] = divergence(log_p, log_softmax_(z))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, *_ = ctx.saved_tensors
        logit_map, _, vocabulary, _ = ctx.how
        gradient = HeadGradient(hidden, weight, bias, ctx.needs_input_grad[:3], logit_map.gain)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, z, log_p in _paired_logits(*ctx.saved_tensors, *ctx.how):
                slope = logit_map.slope(z)
                _, dlogits = ctx.divergence.with_gradient(log_p, log_softmax_(z))
                gradient.add(dlogits, grad[chunk, None], slope, chunk, hidden[chunk], weight[:vocabulary])
        return *gradient.cast(), *(None,) * 9


def _paired_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    rows: Tensor,
    logit_map: LogitMap,
    teacher_map: LogitMap,
    vocabulary: int,
    chunk_size: int | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each chunk's rows `[c]`, student's logits `[c, V]` and teacher's log-probs `[c, V]`."""
    dtype, teacher_dtype = accumulation_dtype(weight.dtype), accumulation_dtype(teacher_weight.dtype)
    chunks = chunks_of(rows, vocabulary, chunk_size, dtype)
    student = BufferedHead(hidden, weight, bias, logit_map, buffer_for(chunks, vocabulary, dtype, hidden.device))
    teacher_buffer = buffer_for(chunks, vocabulary, teacher_dtype, hidden.device)
    teacher = BufferedHead(teacher_hidden, teacher_weight, teacher_bias, teacher_map, teacher_buffer)
    for chunk in chunks:
        yield chunk, student.logits(chunk), log_softmax_(teacher.logits(chunk)).to(dtype)
