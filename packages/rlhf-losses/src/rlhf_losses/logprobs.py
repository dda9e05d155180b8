"""Log-probs and entropies from full logits.

The plain formulas. In training prefer `linear_token_logps`, which never holds the logits that these take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_losses._head import accumulation_dtype


def token_logps(logits: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    """Log-probability of each label, log π(y) = z_y / T − log Σ_v exp(z_v / T).

    Args:
        logits: already shifted, so that `logits[..., t, :]` predicts `labels[..., t]`, `[..., V]`.
        labels: token ids, `[...]`, or `ignore_index`.
        temperature: T, the temperature the tokens were sampled at.
        ignore_index: label of tokens to skip.

    Returns:
        Nats, `[...]`, float32 (float64 for float64 logits); 0 where ignored.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {list(logits.shape[:-1])} like the rows of logits, got {list(labels.shape)}; "
            "shift labels by one and drop the last logits"
        )
    ignored = labels == ignore_index
    z = _scaled(logits, temperature)
    # Select before the reduction: a NaN in an ignored row must not reach the gradient of the others' parameters.
    z = z.masked_fill(ignored[..., None], 0)
    label_z = z.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
    return (label_z - z.logsumexp(-1)).masked_fill(ignored, 0)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each distribution, H = −Σ_v π(v) log π(v).

    Args:
        logits: `[..., V]`; −inf is a token that cannot occur.
        temperature: T, divides the logits.

    Returns:
        Nats, `[...]`, float32 (float64 for float64 logits); between 0 and log V.
    """
    log_p = _scaled(logits, temperature).log_softmax(-1)
    p = log_p.exp()
    # lim p log p = 0, but 0 · −inf is NaN.
    return -(p * torch.where(p > 0, log_p, 0)).sum(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; use argmax for greedy decoding")
    z = logits.to(accumulation_dtype(logits.dtype))
    return z if temperature == 1 else z / temperature
