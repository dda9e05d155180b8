"""Losses of reward models, on pairs of responses and on steps of one.

Shapes: B pairs, S steps, C classes. Half-precision scores are compared in float32.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from rlhf_losses._head import accumulation_dtype


def pairwise_sigmoid_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the preference, −log σ(r⁺ − r⁻ − m).

    Args:
        chosen_rewards: r⁺, `[B]`.
        rejected_rewards: r⁻, `[B]`.
        margin: m, by how much the chosen response should win, `[B]`; by default 0.

    Returns:
        `[B]`, float32; log 2 at equal rewards without margin.

    Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); Touvron et al. 2023, eq. 2, for the margin (arXiv:2307.09288).
    """
    return -logsigmoid(_lead(chosen_rewards, rejected_rewards, margin))


def pairwise_logexp_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> Tensor:
    """Pairwise loss in its other usual form, log(1 + exp(r⁻ − r⁺ + m)).

    The same function as `pairwise_sigmoid_loss`, computed as softplus: the formula as written overflows at 89.

    Args:
        chosen_rewards: r⁺, `[B]`.
        rejected_rewards: r⁻, `[B]`.
        margin: m, by how much the chosen response should win, `[B]`; by default 0.

    Returns:
        `[B]`, float32; log 2 at equal rewards without margin.

    Source: Burges et al. 2005, Learning to Rank using Gradient Descent, eq. 3.
    """
    return softplus(-_lead(chosen_rewards, rejected_rewards, margin))


def process_reward_loss(step_logits: Tensor, step_labels: Tensor) -> Tensor:
    """Cross entropy of each step's label, −Σ_c q_c log softmax(z)_c.

    Args:
        step_logits: z, at the token that ends each step, only the columns of the label tokens, `[S, C]`.
        step_labels: class of each step, int64 `[S]`, −100 to skip; or probabilities q, `[S, C]`.

    Returns:
        `[S]`, float32; 0 where skipped.

    Source: Lightman et al. 2023, sec. 2.6 (arXiv:2305.20050); Wang et al. 2023, eq. 2 (arXiv:2312.08935).
    """
    expected = step_logits.shape if step_labels.is_floating_point() else step_logits.shape[:1]
    if step_labels.shape != expected:
        raise ValueError(
            f"step_labels must be {list(expected)} for logits {list(step_logits.shape)}, got "
            f"{list(step_labels.shape)}; pass int64 classes [S] or probabilities [S, C]"
        )
    logits = step_logits.to(accumulation_dtype(step_logits.dtype))
    labels = step_labels.to(logits.dtype) if step_labels.is_floating_point() else step_labels
    return cross_entropy(logits, labels, reduction="none")


def _lead(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(chosen.dtype)
    lead = chosen.to(dtype) - rejected.to(dtype)
    return lead if margin is None else lead - margin
