"""Losses on pairs of responses to one prompt.

Shapes: B pairs. `logps` are log-probs of whole responses in nats, sums over response tokens unless called mean.
Every loss is unreduced, one per pair.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

# Largest log-probability per token at which odds are still told apart from certainty in float32.
_ALMOST_CERTAIN = -1e-6


def preference_margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    """How much more the policy prefers the chosen response than the reference does.

    m = (log π(y⁺) − log π(y⁻)) − (log π_ref(y⁺) − log π_ref(y⁻))

    Args:
        policy_chosen_logps: log π(y⁺), `[B]`.
        policy_rejected_logps: log π(y⁻), `[B]`.
        reference_chosen_logps: log π_ref(y⁺), `[B]`.
        reference_rejected_logps: log π_ref(y⁻), `[B]`.

    Returns:
        Nats, `[B]`; 0 where policy and reference agree.

    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
    """
    return (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Reward that the policy is optimal for, r = β (log π(y) − log π_ref(y)), up to a constant of the prompt.

    Args:
        policy_logps: log π(y), `[B]`.
        reference_logps: log π_ref(y), `[B]`.
        beta: strength of the pull towards the reference.

    Returns:
        `[B]`, without gradient: a metric.

    Source: Rafailov et al. 2023, eq. 5 (arXiv:2305.18290).
    """
    return beta * (policy_logps - reference_logps).detach()


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood that the chosen response wins.

    L = −(1 − ε) log σ(β m) − ε log σ(−β m)

    Args:
        margin: m, see `preference_margin`, nats, `[B]`.
        beta: strength of the pull towards the reference.
        label_smoothing: ε, probability that a label is flipped (conservative DPO); 0 is plain DPO.

    Returns:
        `[B]`; log 2 at margin 0.

    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); Mitchell 2023, A note on DPO with noisy preferences, eq. 3.
    """
    logits = beta * margin
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust_dpo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO loss whose mean under labels flipped with probability ε is the loss of the true labels.

    L = (−(1 − ε) log σ(β m) + ε log σ(−β m)) / (1 − 2ε)

    Args:
        margin: m, see `preference_margin`, nats, `[B]`.
        beta: strength of the pull towards the reference.
        label_smoothing: ε, probability that a label is flipped, in [0, 1/2).

    Returns:
        `[B]`; unbounded below, as an unbiased estimate must be.

    Source: Chowdhury et al. 2024, eq. 11 (arXiv:2403.00409).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; labels that are wrong half the time say "
            "nothing, and for more swap chosen and rejected"
        )
    logits = beta * margin
    true = (1 - label_smoothing) * logsigmoid(logits)
    return (label_smoothing * logsigmoid(-logits) - true) / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """Squared distance of the margin from its target, (m − 1 / (2β))².

    The paper's margin is of summed log-probs. The target does not grow with length, so later implementations (and the
    authors) use log-probs averaged over response tokens: pass the margin of means for that, with a larger β.

    Args:
        margin: m, summed or averaged over tokens, nats, `[B]`.
        beta: the paper's τ; the target margin is 1 / (2β).

    Returns:
        `[B]`, nats².

    Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
    """
    return (margin - 1 / (2 * beta)).square()


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """Hinge on the margin, max(0, 1 − β m).

    Args:
        margin: m, see `preference_margin`; without a reference this is SLiC's own, nats, `[B]`.
        beta: reciprocal of the margin (in nats) from which a pair costs nothing.

    Returns:
        `[B]`.

    Source: Zhao et al. 2023, SLiC-HF, eq. 1 (arXiv:2305.10425); Liu et al. 2023, RSO, eq. 10 (arXiv:2309.06657).
    """
    return relu(1 - beta * margin)


def simpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Reference-free preference loss on average log-probs, −log σ(β (c̄ − r̄) − γ).

    Args:
        chosen_mean_logps: c̄, mean log-probability per token of the chosen response, `[B]`.
        rejected_mean_logps: r̄, of the rejected one, `[B]`.
        beta: scale of the difference.
        gamma: target reward margin.

    Returns:
        `[B]`.

    Source: Meng et al. 2024, eq. 6 (arXiv:2405.14734).
    """
    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def orpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """Log odds ratio loss, −log σ(log odds(y⁺) − log odds(y⁻)),  odds(y) = p / (1 − p),  p = exp(mean log π).

    The full objective adds `nll_regulariser` of the chosen response: L = L_NLL + λ · L_OR.

    Args:
        chosen_mean_logps: mean log-probability per token of the chosen response, nats below 0, `[B]`.
        rejected_mean_logps: of the rejected one, `[B]`.

    Returns:
        `[B]`; log 2 where both are equally likely.

    Source: Hong et al. 2024, eq. 7 (arXiv:2403.07691).
    """
    return -logsigmoid(_log_odds(chosen_mean_logps) - _log_odds(rejected_mean_logps))


def nll_regulariser(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Cross entropy per token of the chosen response, −log π(y⁺) / |y⁺|.

    Args:
        chosen_logps: summed over response tokens, nats, `[B]`.
        chosen_lengths: number of those tokens, `[B]`.

    Returns:
        Nats per token, `[B]`; 0 for an empty response.

    Source: Pang et al. 2024, Iterative Reasoning Preference Optimization, eq. 1 (arXiv:2404.19733).
    """
    return -chosen_logps / chosen_lengths.clamp(min=1)


def _log_odds(mean_logps: Tensor) -> Tensor:
    log_p = mean_logps.clamp(max=_ALMOST_CERTAIN)
    return log_p - torch.log(-torch.expm1(log_p))
