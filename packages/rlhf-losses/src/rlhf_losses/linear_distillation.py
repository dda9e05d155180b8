"""Distillation objectives of language-model heads that make their gradients in the forward pass.

The divergences of `distillation` and the cross entropy, in chunks of tokens as in `linear`.

Shapes: M tokens, c tokens of a chunk, H and V hidden width and vocabulary of the student, H' and V' of the teacher,
k kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_losses._divergence import (
    DivergenceKind,
    divergence_of,
    kl,
    log_softmax_,
    shared_vocabulary,
    top_and_rest,
    top_and_rest_gradient,
)
from rlhf_losses._head import (
    BufferedHead,
    GradientInForward,
    HeadGradient,
    LogitMap,
    accumulation_dtype,
    buffer_for,
    check_head,
    check_heads,
    chunks_of,
)

# D of a chunk's rows `[c]`, and its gradient with respect to the logits that log q came from, `[c, V]`.
_Lesson = tuple[Tensor, Tensor | None]


def linear_distillation_sum(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    ce_weights: Tensor,
    kd_weights: Tensor,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    shared_vocab: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of cross entropies and divergences of two heads, with gradients made in the forward pass.

    L = Σ_i c_i · ℓ_i + d_i · D_i,  ℓ_i = −log π(y_i) at temperature 1 over V,  D_i as in `linear_divergence`

    Both terms read the same student logits, which are computed once, as are the teacher's; the backward pass only
    scales what is there, and needs nothing of the teacher. The scaling is in place; a second backward pass through the
    same graph is an error. Tokens with both weights 0 are not read.

    Args:
        student_hidden: states that enter the student's head, `[M, H]`; cast to the dtype of `student_weight`.
        student_weight: of the student's head, `[V, H]`.
        teacher_hidden: states that enter the teacher's head, `[M, H']`.
        teacher_weight: of the teacher's head, `[V', H']`.
        labels: token that each state predicts, int64 `[M]`; anything where `ce_weights` is 0.
        ce_weights: c, constant, `[M]`.
        kd_weights: d, constant, `[M]`. Include T² here to keep the gradient's size as T is tuned.
        kind: "forward_kl", "reverse_kl", "jsd" (see `beta`) or "skew_kl" (see `alpha`).
        beta: weight of the teacher in `jsd`.
        alpha: share of the teacher in the mixture of `skew_kl`.
        temperature: T, divides both logits in D.
        shared_vocab: number of first tokens that mean the same to both; by default min(V, V').
        student_bias: `[V]`.
        teacher_bias: `[V']`.
        student_softcap: bound of the student's logits before the temperature; None for models without one.
        teacher_softcap: of the teacher's.
        student_logit_scale: factor of the student's logits.
        teacher_logit_scale: of the teacher's.
        chunk_size: tokens held as logits at a time; by default as many as fit 64 MB (512 MB on a GPU) per model.

    Returns:
        The sum L, a scalar to call backward on, with gradient to the student only; D `[M]`, 0 where `kd_weights` is 0;
        and ℓ `[M]`, 0 where the label is no token or both weights are 0. D and ℓ are unweighted and without gradient.
        Float32 (float64 for float64 inputs).

    Source: Hinton et al. 2015, sec. 2 (arXiv:1503.02531), as in Hsu et al. 2024, Liger Kernel, sec. 3.2
        (arXiv:2410.10989).
    """
    check_heads(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    _check_tokens(student_hidden, labels, ce_weights, kd_weights)
    divergence = divergence_of(kind, beta, alpha)
    vocabulary = shared_vocabulary(len(student_weight), len(teacher_weight), shared_vocab)
    chunks = _read(student_weight, ce_weights, kd_weights, chunk_size)
    teacher = BufferedHead(
        # Select: the teacher's states are read with the student's, and may be anything where they do not count.
        teacher_hidden.detach().to(teacher_weight.dtype).masked_fill((kd_weights == 0)[:, None], 0),
        teacher_weight,
        teacher_bias,
        LogitMap(temperature, teacher_softcap, teacher_logit_scale),
        buffer_for(chunks, vocabulary, accumulation_dtype(teacher_weight.dtype), teacher_weight.device),
    )

    def teach(rows: Tensor, log_q: Tensor, with_gradient: bool) -> _Lesson:
        log_p = log_softmax_(teacher.logits(rows)).to(log_q.dtype)
        return divergence.with_gradient(log_p, log_q) if with_gradient else (divergence(log_p, log_q), None)

    student_map = LogitMap(temperature, student_softcap, student_logit_scale)
    return _LinearDistillationSum.apply(
        student_hidden.to(student_weight.dtype), student_weight, student_bias, labels, ce_weights, kd_weights,
        student_map, vocabulary, teach, chunks, torch.is_grad_enabled(),
    )  # fmt: skip


def linear_topk_distillation_sum(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_logps: Tensor,
    topk_indices: Tensor,
    labels: Tensor,
    *,
    ce_weights: Tensor,
    kd_weights: Tensor,
    temperature: float = 1.0,
    shared_vocab: int | None = None,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `linear_distillation_sum` with a teacher of which only the top k were kept: D as `topk_forward_kl`.

    Args:
        student_hidden: states that enter the student's head, `[M, H]`; cast to the dtype of `student_weight`.
        student_weight: of the student's head, `[V, H]`.
        topk_logps: the teacher's log-probs, at the same temperature and not renormalised, `[M, k]`.
        topk_indices: their token ids, each at most once per row, int64 `[M, k]`.
        labels: token that each state predicts, int64 `[M]`; anything where `ce_weights` is 0.
        ce_weights: c, constant, `[M]`.
        kd_weights: d, constant, `[M]`. Include T² here to keep the gradient's size as T is tuned.
        temperature: T, divides the student's logits in D.
        shared_vocab: number of first tokens that mean the same to both; by default all V.
        student_bias: `[V]`.
        student_softcap: bound of the student's logits before the temperature; None for models without one.
        student_logit_scale: factor of the student's logits.
        chunk_size: tokens held as logits at a time; by default as many as fit 64 MB (512 MB on a GPU).

    Returns:
        As `linear_distillation_sum`: the sum, D and ℓ.

    Source: see `topk_forward_kl` and `linear_distillation_sum`.
    """
    check_head(student_hidden, student_weight, student_bias, "student_")
    _check_tokens(student_hidden, labels, ce_weights, kd_weights)
    if topk_logps.shape != topk_indices.shape or topk_logps.ndim != 2 or len(topk_logps) != len(labels):
        raise ValueError(
            f"topk_logps and topk_indices must be [{len(labels)}, k] both, got {list(topk_logps.shape)} and "
            f"{list(topk_indices.shape)}"
        )
    vocabulary = shared_vocabulary(len(student_weight), len(student_weight), shared_vocab)
    unused = (kd_weights == 0)[:, None]
    kept_logps, kept_indices = topk_logps.detach().masked_fill(unused, 0), topk_indices.masked_fill(unused, 0)

    def teach(rows: Tensor, log_q: Tensor, with_gradient: bool) -> _Lesson:
        log_p, top = top_and_rest(log_q, kept_logps[rows], kept_indices[rows])
        return kl(log_p, top), top_and_rest_gradient(log_q, log_p, top, kept_indices[rows]) if with_gradient else None

    student_map = LogitMap(temperature, student_softcap, student_logit_scale)
    chunks = _read(student_weight, ce_weights, kd_weights, chunk_size)
    return _LinearDistillationSum.apply(
        student_hidden.to(student_weight.dtype), student_weight, student_bias, labels, ce_weights, kd_weights,
        student_map, vocabulary, teach, chunks, torch.is_grad_enabled(),
    )  # fmt: skip


class _LinearDistillationSum(GradientInForward):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ce_weights: Tensor,
        kd_weights: Tensor,
        logit_map: LogitMap,
        vocabulary: int,
        teach: Callable[[Tensor, Tensor, bool], _Lesson],
        chunks: tuple[Tensor, ...],
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(weight.dtype)
        needed = ctx.needs_input_grad[:3] if grad_enabled else (False, False, False)
        # The logits are those of the cross entropy; D's are made of them.
        temperature, logit_map = logit_map.temperature, replace(logit_map, temperature=1.0)
        student = BufferedHead(hidden, weight, bias, logit_map, buffer_for(chunks, len(weight), dtype, hidden.device))
        gradient = HeadGradient(hidden, weight, bias, needed, logit_map.gain)
        ce_weights, kd_weights = ce_weights.to(dtype), kd_weights.to(dtype)
        unlabelled = (ce_weights == 0) & ((labels < 0) | (labels >= len(weight)))
        targets = labels.masked_fill(unlabelled, 0)
        divergences = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        losses = torch.zeros_like(divergences)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks:
                z, y, c, d = student.logits(rows), targets[rows, None], ce_weights[rows, None], kd_weights[rows, None]
                slope = logit_map.slope(z) if any(needed) else None
                log_pi = log_softmax_(z)
                losses[rows] = -log_pi.gather(1, y)[:, 0]
                same = temperature == 1 and vocabulary == len(weight)
                log_q = log_pi if same else log_softmax_(log_pi[:, :vocabulary] / temperature)
                divergences[rows], kd_gradient = teach(rows, log_q, any(needed))
                if kd_gradient is not None:
                    dlogits = log_pi.exp_().mul_(c).scatter_add_(1, y, -c)
                    dlogits[:, :vocabulary].addcmul_(kd_gradient, d / temperature)
                    gradient.add(dlogits, torch.ones_like(c), slope, rows, hidden[rows], weight)
        GradientInForward.keep(ctx, gradient)
        # Select: a row without weight has a value that means nothing.
        divergences, losses = divergences.masked_fill_(kd_weights == 0, 0), losses.masked_fill_(unlabelled, 0)
        ctx.mark_non_differentiable(divergences, losses)
        return (ce_weights * losses + kd_weights * divergences).sum(), divergences, losses


def _read(weight: Tensor, ce_weights: Tensor, kd_weights: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
    """Chunks of the rows that any term counts."""
    rows = ((ce_weights != 0) | (kd_weights != 0)).nonzero()[:, 0]
    return chunks_of(rows, len(weight), chunk_size, accumulation_dtype(weight.dtype))


def _check_tokens(hidden: Tensor, labels: Tensor, ce_weights: Tensor, kd_weights: Tensor) -> None:
    for name, x in (("labels", labels), ("ce_weights", ce_weights), ("kd_weights", kd_weights)):
        if x.shape != hidden.shape[:1] or x.requires_grad:
            raise ValueError(
                f"{name} must be constants of shape [{len(hidden)}], got {list(x.shape)} with "
                f"requires_grad={x.requires_grad}; flatten the batch"
            )
