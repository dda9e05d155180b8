"""The divergences of `distillation` on log-probs, and their gradients.

p is the teacher, q = softmax(z) the student, D a divergence over V outcomes. `pull` is q ∂D/∂q, up to a multiple of q;
with it ∂D/∂z = pull − q Σ pull.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_losses._head import blocks_of

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """One of the divergences, as functions of log p and log q, `[..., V]`.

    Args:
        share: s, of the teacher in the mixture m = s p + (1 − s) q; None where there is none.
        value: D, of log p, log q and log m, `[...]`.
        pull: of the same, see above, in memory of its own, `[..., V]`.
    """

    share: float | None
    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D, `[...]`; differentiable."""
        return self.value(log_p, log_q, self._log_mixture(log_p, log_q))

    def with_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """D, `[...]`, and ∂D/∂z, `[..., V]`."""
        log_m = self._log_mixture(log_p, log_q)
        pull = self.pull(log_p, log_q, log_m)
        value = self.value(log_p, log_q, log_m)
        return value, pull.sub_(log_q.exp().mul_(pull.sum(-1, keepdim=True)))

    def _log_mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.share is None:
            return log_q
        return torch.logaddexp(log_p + math.log(self.share), log_q + math.log1p(-self.share))


def divergence_of(kind: DivergenceKind, beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """The divergence of that name; raises where its parameter is out of range."""
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}; the limits are forward_kl (0) and reverse_kl (1)")
    if kind == "skew_kl" and not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}; at 1 the student would not matter")
    match kind:
        case "forward_kl":
            return Divergence(None, lambda p, q, _: kl(p, q), lambda p, q, _: p.exp().neg_())
        case "reverse_kl":
            return Divergence(None, lambda p, q, _: kl(q, p), lambda p, q, _: q.exp().mul_(q - p))
        case "jsd":
            return Divergence(
                beta,
                lambda p, q, m: beta * kl(p, m) + (1 - beta) * kl(q, m),
                lambda p, q, m: q.exp().mul_(q - m).mul_(1 - beta),
            )
        case "skew_kl" if alpha == 0:
            return divergence_of("forward_kl")
        case "skew_kl":
            return Divergence(alpha, lambda p, _, m: kl(p, m), lambda p, q, m: (p + (q - m)).exp_().mul_(alpha - 1))
        case _:
            raise ValueError(f"kind must be forward_kl, reverse_kl, jsd or skew_kl, got {kind!r}")


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q), `[...]`."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probs with a finite floor: a token of probability 0 then contributes 0 · finite, not 0 · inf."""
    return logits.log_softmax(-1).clamp(min=floor(logits.dtype))


def log_softmax_(logits: Tensor) -> Tensor:
    """The same in place of the logits."""
    for block in blocks_of(logits):
        block.sub_(block.amax(-1, keepdim=True))
        block.sub_(block.exp().sum(-1, keepdim=True).log_()).clamp_(min=floor(logits.dtype))
    return logits


def floor(dtype: torch.dtype) -> float:
    """Lowest log-probability that is told apart; differences of two of them are finite."""
    return torch.finfo(dtype).min / 4


def shared_vocabulary(student: int, teacher: int, shared: int | None) -> int:
    """Number of first tokens that mean the same to both."""
    smaller = min(student, teacher)
    if shared is not None and not 1 <= shared <= smaller:
        raise ValueError(f"shared_vocab must be between 1 and {smaller}, got {shared}; None takes all {smaller}")
    return shared or smaller


def top_and_rest(log_q: Tensor, topk_logps: Tensor, topk_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of teacher and student over the teacher's top k and the rest, `[..., k + 1]`, or `[..., V]` at k = V.

    Args:
        log_q: the student's, `[..., V]`.
        topk_logps: the teacher's, `[..., k]`.
        topk_indices: their token ids, `[..., k]`.
    """
    lowest = floor(log_q.dtype)
    log_p, top = topk_logps.to(log_q.dtype), log_q.gather(-1, topk_indices)
    if topk_indices.shape[-1] < log_q.shape[-1]:
        p_rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(log_q.dtype).tiny)
        # The rest of the student is summed and not subtracted from 1, which would cancel once it is small.
        log_q_rest = log_q.scatter(-1, topk_indices, lowest).logsumexp(-1, keepdim=True)
        log_p, top = torch.cat([log_p, p_rest.log()], -1), torch.cat([top, log_q_rest], -1)
    return log_p.clamp(min=lowest), top.clamp(min=lowest)


def top_and_rest_gradient(log_q: Tensor, log_p: Tensor, top: Tensor, topk_indices: Tensor) -> Tensor:
    """∂/∂z of the KL over the outcomes of `top_and_rest`, `[..., V]`: q − p, the teacher's rest spread as q is."""
    k = topk_indices.shape[-1]
    p = log_p.exp()
    spread = p[..., k:] * (log_q - top[..., k:]).exp_() if k < log_p.shape[-1] else torch.zeros_like(log_q)
    return (log_q.exp().mul_(p.sum(-1, keepdim=True))).sub_(spread.scatter_(-1, topk_indices, p[..., :k]))
