"""Divergences between a teacher's and a student's next-token distributions.

p is the teacher, q the student; m is their mixture. Everything is in nats, per token, unreduced, and has a gradient
with respect to the student only. The divergences are true ones at the given temperature T, not multiplied by T²: their
gradient shrinks like 1/T² as T grows (Hinton et al. 2015, arXiv:1503.02531, sec. 2.1), so multiply by T² where a
distillation loss is added to another one and T is tuned.

Vocabularies of different sizes share their first tokens (models of one family pad theirs differently); both
distributions are renormalised over the shared ones.

Shapes: M tokens, V vocabulary, H hidden width, k kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_losses._head import HeadGradient, LogitMap, accumulation_dtype, buffer_for, check_head, chunks_of

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]
_Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, shared_vocab: int | None = None
) -> Tensor:
    """KL of the student from the teacher, KL(p ‖ q) = Σ_v p (log p − log q): covers all that the teacher says.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V']`.
        temperature: T, divides both logits.
        shared_vocab: number of first tokens that mean the same to both; by default min(V, V').

    Returns:
        `[...]`; 0 where the distributions agree.

    Source: Hinton et al. 2015, sec. 2 (arXiv:1503.02531).
    """
    return _forward_kl(*_log_probs(student_logits, teacher_logits, temperature, shared_vocab))


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, shared_vocab: int | None = None
) -> Tensor:
    """KL of the teacher from the student, KL(q ‖ p) = Σ_v q (log q − log p): says only what the teacher could.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V']`.
        temperature: T, divides both logits.
        shared_vocab: number of first tokens that mean the same to both; by default min(V, V').

    Returns:
        `[...]`; 0 where the distributions agree.

    Source: Gu et al. 2023, MiniLLM, eq. 1 (arXiv:2306.08543).
    """
    return _reverse_kl(*_log_probs(student_logits, teacher_logits, temperature, shared_vocab))


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    shared_vocab: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence, β KL(p ‖ m) + (1 − β) KL(q ‖ m),  m = β p + (1 − β) q.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V']`.
        beta: β in (0, 1), weight of the teacher. Divided by β it tends to the forward KL as β → 0; divided by 1 − β to
            the reverse KL as β → 1.
        temperature: T, divides both logits.
        shared_vocab: number of first tokens that mean the same to both; by default min(V, V').

    Returns:
        `[...]`, between 0 and the entropy of a coin with bias β (log 2 for β = 1/2).

    Source: Agarwal et al. 2023, GKD, eq. 1 (arXiv:2306.13649).
    """
    _check_kind("jsd", beta, 0.0)
    return _jsd(*_log_probs(student_logits, teacher_logits, temperature, shared_vocab), beta=beta)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    shared_vocab: int | None = None,
) -> Tensor:
    """KL of a mixture from the teacher, KL(p ‖ α p + (1 − α) q): a forward KL bounded by −log α.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V']`.
        alpha: α in [0, 1), share of the teacher in the mixture; 0 is the forward KL.
        temperature: T, divides both logits.
        shared_vocab: number of first tokens that mean the same to both; by default min(V, V').

    Returns:
        `[...]`; 0 where the distributions agree.

    Source: Ko et al. 2024, DistiLLM, eq. 3 (arXiv:2402.03898).
    """
    _check_kind("skew_kl", 0.5, alpha)
    return _skew_kl(*_log_probs(student_logits, teacher_logits, temperature, shared_vocab), alpha=alpha)


def topk_forward_kl(
    student_logits: Tensor, topk_logps: Tensor, topk_indices: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL from the teacher's k most likely tokens, with all other tokens as one outcome.

    Σ_{v ∈ top k} p_v (log p_v − log q_v) + p_rest (log p_rest − log q_rest),  p_rest = 1 − Σ_{v ∈ top k} p_v

    A true divergence over k + 1 outcomes, and so at most the full forward KL and equal to it at k = V. The mass beyond
    k is kept in place: renormalising the top k instead would teach the student to have none.

    Args:
        student_logits: `[..., V]`.
        topk_logps: the teacher's log-probs, at the same temperature and not renormalised, `[..., k]`.
        topk_indices: their token ids, each at most once per row, `[..., k]`.
        temperature: T, divides the student's logits.

    Returns:
        `[...]`.

    Source: Hinton et al. 2015, sec. 2 (arXiv:1503.02531), over a partition of the vocabulary.
    """
    dtype = accumulation_dtype(student_logits.dtype)
    z = student_logits.to(dtype) / temperature
    log_p = topk_logps.detach().to(dtype)
    log_q = z.gather(-1, topk_indices)
    normaliser = z.logsumexp(-1, keepdim=True)
    lowest = torch.finfo(dtype).min / 4
    if topk_indices.shape[-1] < z.shape[-1]:
        p_rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(dtype).tiny)
        # The rest of the student is summed and not subtracted from 1, which would cancel once it is small.
        log_q_rest = z.scatter(-1, topk_indices, lowest).logsumexp(-1, keepdim=True)
        log_p, log_q = torch.cat([log_p, p_rest.log()], -1), torch.cat([log_q, log_q_rest], -1)
    return _forward_kl(log_p.clamp(min=lowest), (log_q - normaliser).clamp(min=lowest))


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
    check_head(student_hidden, student_weight, student_bias, "student_")
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"teacher_hidden must have {len(student_hidden)} rows like student_hidden, got {len(teacher_hidden)}; "
            "both models must read the same tokens"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student_hidden.shape[:1]):
        raise ValueError(
            f"mask must be boolean [{len(student_hidden)}], got {mask.dtype} {list(mask.shape)}; flatten the batch"
        )
    _check_kind(kind, beta, alpha)
    divergences: dict[str, _Divergence] = {
        "forward_kl": _forward_kl,
        "reverse_kl": _reverse_kl,
        "jsd": partial(_jsd, beta=beta),
        "skew_kl": partial(_skew_kl, alpha=alpha),
    }
    teacher = (teacher_hidden.detach().to(teacher_weight.dtype), teacher_weight, teacher_bias)
    return _LinearDivergence.apply(
        student_hidden.to(student_weight.dtype),
        student_weight,
        student_bias,
        *teacher,
        mask,
        divergences[kind],
        LogitMap(temperature, student_softcap, student_logit_scale),
        LogitMap(temperature, teacher_softcap, teacher_logit_scale),
        _shared(len(student_weight), len(teacher_weight), shared_vocab),
        chunk_size,
    )


class _LinearDivergence(torch.autograd.Function):
    """The plain formula, chunk by chunk; torch differentiates it with respect to the student's logits of the chunk."""

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
        divergence: _Divergence,
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
                out[chunk] = divergence(log_p, _log_softmax(z))
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
                with torch.enable_grad():
                    leaf = z.detach().requires_grad_()
                    total = ctx.divergence(log_p, _log_softmax(leaf)).sum()
                (dlogits,) = torch.autograd.grad(total, leaf)
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
    student_buffer = buffer_for(chunks, vocabulary, dtype, hidden.device)
    teacher_buffer = buffer_for(chunks, vocabulary, teacher_dtype, hidden.device)
    weight, teacher_weight = weight[:vocabulary], teacher_weight[:vocabulary]
    bias, teacher_bias = (None if b is None else b[:vocabulary] for b in (bias, teacher_bias))
    for chunk in chunks:
        z = logit_map.logits(hidden[chunk], weight, bias, student_buffer[: len(chunk)])
        teacher_z = teacher_map.logits(
            teacher_hidden[chunk], teacher_weight, teacher_bias, teacher_buffer[: len(chunk)]
        )
        yield chunk, z, _log_softmax(teacher_z).to(dtype)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _forward_kl(log_q, log_p)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _forward_kl(log_p, log_m) + (1 - beta) * _forward_kl(log_q, log_m)


def _skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return _forward_kl(log_p, log_q if alpha == 0 else _log_mixture(log_p, log_q, alpha))


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(s p + (1 − s) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probs with a finite floor: a token of probability 0 then contributes 0 · finite, not 0 · inf."""
    return logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min / 4)


def _log_probs(student: Tensor, teacher: Tensor, temperature: float, shared: int | None) -> tuple[Tensor, Tensor]:
    """Log-probs of teacher and student over the shared vocabulary, the teacher's without gradient."""
    vocabulary = _shared(student.shape[-1], teacher.shape[-1], shared)
    dtype = accumulation_dtype(student.dtype)
    log_p = _log_softmax(teacher.detach()[..., :vocabulary].to(dtype) / temperature)
    return log_p, _log_softmax(student[..., :vocabulary].to(dtype) / temperature)


def _shared(student: int, teacher: int, shared: int | None) -> int:
    smaller = min(student, teacher)
    if shared is not None and not 1 <= shared <= smaller:
        raise ValueError(f"shared_vocab must be between 1 and {smaller}, got {shared}; None takes all {smaller}")
    return shared or smaller


def _check_kind(kind: str, beta: float, alpha: float) -> None:
    if kind not in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        raise ValueError(f"kind must be forward_kl, reverse_kl, jsd or skew_kl, got {kind!r}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}; the limits are forward_kl (0) and reverse_kl (1)")
    if kind == "skew_kl" and not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}; at 1 the student would not matter")
