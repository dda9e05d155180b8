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

from torch import Tensor

from rlhf_losses._divergence import divergence_of, kl, log_softmax, shared_vocabulary, top_and_rest
from rlhf_losses._head import accumulation_dtype


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
    return divergence_of("forward_kl")(*_log_probs(student_logits, teacher_logits, temperature, shared_vocab))


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
    return divergence_of("reverse_kl")(*_log_probs(student_logits, teacher_logits, temperature, shared_vocab))


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
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature, shared_vocab)
    return divergence_of("jsd", beta=beta)(log_p, log_q)


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
    log_p, log_q = _log_probs(student_logits, teacher_logits, temperature, shared_vocab)
    return divergence_of("skew_kl", alpha=alpha)(log_p, log_q)


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
    log_q = (student_logits.to(accumulation_dtype(student_logits.dtype)) / temperature).log_softmax(-1)
    return kl(*top_and_rest(log_q, topk_logps.detach(), topk_indices))


def _log_probs(student: Tensor, teacher: Tensor, temperature: float, shared: int | None) -> tuple[Tensor, Tensor]:
    """Log-probs of teacher and student over the shared vocabulary, the teacher's without gradient."""
    vocabulary = shared_vocabulary(student.shape[-1], teacher.shape[-1], shared)
    dtype = accumulation_dtype(student.dtype)
    log_p = log_softmax(teacher.detach()[..., :vocabulary].to(dtype) / temperature)
    return log_p, log_softmax(student[..., :vocabulary].to(dtype) / temperature)
