"""Loss on single responses that are desirable or not (Kahneman-Tversky optimisation).

Shapes: B examples, K unrelated pairs. `logps` are sums over response tokens, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Prospect-theoretic loss of each example relative to a reference point.

    L = λ_D (1 − σ(β (r − z))) if desirable, λ_U (1 − σ(β (z − r))) if not
    r = log π(y) − log π_ref(y),  z = max(0, kl)

    Args:
        policy_logps: log π(y), `[B]`.
        reference_logps: log π_ref(y), `[B]`.
        labels: True for desirable, boolean `[B]`.
        kl: reference point in nats, scalar, averaged over all ranks, see `kto_kl`. Negative estimates count as 0, and
            no gradient flows through it.
        beta: strength of the pull towards the reference.
        desirable_weight: λ_D. The paper asks for λ_D n_D / (λ_U n_U) between 1 and 4/3.
        undesirable_weight: λ_U.

    Returns:
        `[B]`; half the weight where r = z.

    Source: Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306).
    """
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be boolean, got {labels.dtype}; compare with the desirable label first")
    log_ratio = policy_logps - reference_logps
    reference_point = kl.detach().clamp(min=0)
    gain = torch.where(labels, log_ratio - reference_point, reference_point - log_ratio)
    weights = torch.where(labels, desirable_weight, undesirable_weight).to(gain.dtype)
    # 1 − σ(x) = σ(−x), which does not cancel for large x.
    return weights * torch.sigmoid(-beta * gain)


def kto_kl(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from responses to other prompts, mean of log π(y'|x) − log π_ref(y'|x).

    y' must answer another prompt than x: with its own response the reference point would follow the example and the
    loss say nothing. The estimate is left as it is, so that ranks can average theirs; `kto_loss` takes the maximum
    with 0, after the average.

    Args:
        policy_logps: log π(y'|x) of unrelated pairs, `[K]`.
        reference_logps: log π_ref(y'|x), `[K]`.

    Returns:
        Nats, scalar, without gradient.

    Source: Ethayarajh et al. 2024, sec. 4.1 (arXiv:2402.01306).
    """
    if not len(policy_logps):
        raise ValueError("policy_logps is empty; KTO needs at least two examples to make an unrelated pair")
    return (policy_logps - reference_logps).detach().mean()
