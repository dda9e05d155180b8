"""The head of a language model fused with its log-softmax, in chunks of tokens.

The logits of M tokens over a vocabulary of V are the largest tensor of a training step, and only one number of each
row is wanted. Here rows are computed, reduced and dropped chunk by chunk, so memory does not grow with M · V, in the
forward pass or the backward pass. Rows whose label is `ignore_index` are not computed at all.

Shapes: M tokens, H hidden width, V vocabulary. `hidden` are the states that enter the head, already shifted so that
row i predicts `labels[i]`. Log-probs and entropies are in nats, float32 (float64 for float64 inputs).

The weight is used inside forward and backward only and saved as the parameter itself, never as a view or copy: under
DeepSpeed ZeRO-3 its storage is released in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_losses._head import (
    GradientInForward,
    HeadGradient,
    LogitMap,
    accumulation_dtype,
    blocks_of,
    buffer_for,
    check_head,
    chunks_of,
    exponentiate_,
    exponentiate_with_entropy_,
)

Slope = Callable[[Tensor, Tensor], Tensor]
"""See `linear_token_logps`."""

NOTHING = (False, False, False)
"""Of hidden states, weight and bias, which need a gradient."""


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    with_entropy: Literal[False] = False,
    slope: Slope | None = None,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    with_entropy: Literal[True],
    slope: Slope | None = None,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    with_entropy: bool = False,
    slope: Slope | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under a language-model head, without holding the logits.

    z = cap · tanh(s · (h Wᵀ + b) / cap) / T,  log π(y) = z_y − log Σ_v exp z_v,  H = −Σ_v π(v) log π(v)

    The backward pass computes each chunk's logits again: four matrix products per chunk. Where a token's gradient can be told
    from its own log-prob, as in PPO, `slope` saves one of them: gradients are made in the forward pass, while logits are at
    hand, and the backward pass only scales them. A prediction that does not come true costs time and nothing else.

    Args:
        hidden: states that enter the head, `[M, H]`; cast to the dtype of `weight`.
        weight: of the head, `[V, H]`.
        labels: token that each state predicts, `[M]`, or `ignore_index`.
        bias: of the head, `[V]`.
        temperature: T, the temperature the tokens were sampled at.
        softcap: cap of models that bound their logits (Gemma 2); None for all others.
        logit_scale: s of models that scale their logits (Cohere); 1 for all others.
        ignore_index: label of tokens to skip.
        chunk_size: tokens held as logits at a time; by default as many as fit 64 MB (512 MB on a GPU).
        with_entropy: also return the entropy of each distribution, differentiable too.
        slope: predicts the derivative of the loss by each log-prob, but for one factor that all tokens share: takes the
            log-probs `[c]` of some tokens, and which of the M they are, `[c]`; returns `[c]`. What arrives in the backward pass
            is compared with it, and if it is not that, the logits are computed again. A second backward pass through the same
            graph is then an error.

    Returns:
        Log-probs `[M]`, 0 where ignored; with entropies `[M]`, 0 where ignored, as a second tensor if asked for.

    Source: Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009), sec. 4.
    """
    _check_labels(hidden, weight, bias, labels)
    logit_map = LogitMap(temperature, softcap, logit_scale)
    # Inside a Function gradients are always off, so it is asked here whether anybody wants them.
    slope = slope if torch.is_grad_enabled() else None
    logps, entropies = _LinearTokenLogps.apply(
        hidden.to(weight.dtype), weight, bias, labels, logit_map, ignore_index, chunk_size, with_entropy, slope
    )
    return (logps, entropies) if with_entropy else logps


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross entropies of a language-model head, with gradients made in the forward pass.

    L = Σ_i w_i · ℓ_i,  ℓ_i = −log π(y_i);  ∂L/∂z_i = w_i (π(·) − 1[· = y_i])

    The gradient that arrives from above is one number, so ∂L/∂hidden and ∂L/∂weight are complete while the chunk's
    logits are still at hand, and the backward pass only scales them: three matrix products per chunk where
    recomputation needs four. The scaling is in place; a second backward pass through the same graph is an error.

    Args:
        hidden: states that enter the head, `[M, H]`; cast to the dtype of `weight`.
        weight: of the head, `[V, H]`.
        labels: token that each state predicts, `[M]`, or `ignore_index`.
        token_weights: w, constant, `[M]`; by default 1.
        bias: of the head, `[V]`.
        temperature: T, divides the logits.
        softcap: cap of models that bound their logits (Gemma 2); None for all others.
        logit_scale: s of models that scale their logits (Cohere); 1 for all others.
        ignore_index: label of tokens to skip.
        chunk_size: tokens held as logits at a time; by default as many as fit 64 MB (512 MB on a GPU).

    Returns:
        The sum L, a scalar to be divided by the global token count and to call backward on; and the losses ℓ of all
        tokens, `[M]`, unweighted, 0 where ignored, without gradient.

    Source: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989), sec. 3.2, FusedLinearCrossEntropy.
    """
    _check_labels(hidden, weight, bias, labels)
    if token_weights is not None and (token_weights.shape != labels.shape or token_weights.requires_grad):
        raise ValueError(
            f"token_weights must be constants of shape {list(labels.shape)}, got {list(token_weights.shape)} with "
            f"requires_grad={token_weights.requires_grad}; to differentiate them weigh linear_token_logps instead"
        )
    logit_map = LogitMap(temperature, softcap, logit_scale)
    # Inside a Function gradients are always off, so it is asked here whether anybody wants them.
    wanted = torch.is_grad_enabled()
    return _LinearCrossEntropySum.apply(
        hidden.to(weight.dtype), weight, bias, labels, token_weights, logit_map, ignore_index, chunk_size, wanted
    )


def _check_labels(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    check_head(hidden, weight, bias)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels must be [{hidden.shape[0]}] like the rows of hidden, got {list(labels.shape)}; "
            "flatten the batch and shift the labels by one"
        )


class _LinearTokenLogps(torch.autograd.Function):
    """Keeps one log-normaliser (and entropy) per token and recomputes a chunk's logits in the backward pass.

    With a predicted slope it makes the gradient that this slope would give in the forward pass, and keeps both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_map: LogitMap,
        ignore_index: int,
        chunk_size: int | None,
        with_entropy: bool,
        slope: Slope | None,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = accumulation_dtype(weight.dtype)
        rows = (labels != ignore_index).nonzero()[:, 0]
        chunks = chunks_of(rows, weight.shape[0], chunk_size, dtype)
        buffer = buffer_for(chunks, weight.shape[0], dtype, hidden.device)
        logps = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
        normaliser = torch.zeros_like(logps)
        entropies = torch.zeros_like(logps) if with_entropy else None
        predicted = None if slope is None else torch.zeros_like(logps)
        gradient = HeadGradient(hidden, weight, bias, ctx.needs_input_grad[:3] if slope else NOTHING, logit_map.gain)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks:
                h, y = hidden[chunk], labels[chunk, None]
                z = logit_map.logits(h, weight, bias, buffer[: len(chunk)])
                label_z = z.gather(1, y)
                softcap = logit_map.slope(z) if slope else None
                if entropies is None:
                    peak, total = exponentiate_(z)
                else:
                    peak, total, entropy = exponentiate_with_entropy_(z)
                    entropies[chunk] = entropy[:, 0]
                lse = peak + total.log()
                normaliser[chunk] = lse[:, 0]
                logps[chunk] = (label_z - lse)[:, 0]
                if slope is not None and predicted is not None:
                    predicted[chunk] = g = slope(logps[chunk], chunk)
                    # 1[· = y] − π is (total · 1[· = y] − eᶻ) / total: sign and division are left to the rows.
                    z.scatter_add_(1, y, -total)
                    gradient.add(z, -g[:, None] / total, softcap, chunk, h, weight)
        made = (gradient.hidden, gradient.weight, gradient.bias)
        ctx.save_for_backward(hidden, weight, bias, labels, rows, normaliser, entropies, predicted, *made)
        ctx.logit_map, ctx.chunk_size = logit_map, chunk_size
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, rows, normaliser, entropies, predicted, *made = ctx.saved_tensors
        logit_map: LogitMap = ctx.logit_map
        dtype = normaliser.dtype
        if grad_logps is None:
            grad_logps = torch.zeros_like(normaliser)
        if predicted is not None and grad_entropies is None:
            factor = _factor(grad_logps[rows], predicted[rows])
            if factor is not None:
                grads = (None if grad is None else grad.mul_(factor).to(weight.dtype) for grad in made)
                return *grads, *(None,) * (len(ctx.needs_input_grad) - 3)
        chunks = chunks_of(rows, weight.shape[0], ctx.chunk_size, dtype)
        buffer = buffer_for(chunks, weight.shape[0], dtype, hidden.device)
        gradient = HeadGradient(hidden, weight, bias, ctx.needs_input_grad[:3], logit_map.gain)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks:
                h, y, g = hidden[chunk], labels[chunk, None], grad_logps[chunk, None]
                z = logit_map.logits(h, weight, bias, buffer[: len(chunk)])
                slope = logit_map.slope(z)
                if grad_entropies is None:  # ∂ log π(y) / ∂z = 1[· = y] − π
                    blocks = blocks_of(z)
                    for block, lse in zip(blocks, normaliser[chunk, None].split(len(blocks[0])), strict=True):
                        block.sub_(lse).exp_()
                    dlogits, scale = z, -g
                    dlogits.scatter_add_(1, y, torch.full_like(g, -1))
                else:  # ∂H / ∂z = −π (log π + H)
                    log_p = z.sub_(normaliser[chunk, None])
                    p = log_p.exp()
                    pull = log_p.add_(entropies[chunk, None]).mul_(grad_entropies[chunk, None]).add_(g)
                    dlogits, scale = p.mul_(pull), -torch.ones_like(g)
                    dlogits.scatter_add_(1, y, -g)
                gradient.add(dlogits, scale, slope, chunk, h, weight)
        return *gradient.cast(), *(None,) * (len(ctx.needs_input_grad) - 3)


def _factor(grad: Tensor, predicted: Tensor) -> Tensor | None:
    """What `predicted` `[m]` is to be multiplied with to be `grad`, up to rounding; None if it is something else."""
    if not len(grad):
        return grad.new_ones(())
    at = predicted.abs().argmax()
    factor = torch.where(predicted[at] == 0, 1.0, grad[at] / predicted[at])
    tolerance = 64 * torch.finfo(grad.dtype).eps
    return factor if torch.allclose(grad, factor * predicted, rtol=tolerance, atol=0.0) else None


class _LinearCrossEntropySum(GradientInForward):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        logit_map: LogitMap,
        ignore_index: int,
        chunk_size: int | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(weight.dtype)
        needed = ctx.needs_input_grad[:3] if grad_enabled else (False, False, False)
        rows = (labels != ignore_index).nonzero()[:, 0]
        chunks = chunks_of(rows, weight.shape[0], chunk_size, dtype)
        buffer = buffer_for(chunks, weight.shape[0], dtype, hidden.device)
        losses = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
        weights = torch.ones_like(losses) if token_weights is None else token_weights.to(dtype)
        gradient = HeadGradient(hidden, weight, bias, needed, logit_map.gain)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks:
                h, y = hidden[chunk], labels[chunk, None]
                z = logit_map.logits(h, weight, bias, buffer[: len(chunk)])
                slope = logit_map.slope(z) if any(needed) else None
                label_z = z.gather(1, y)
                peak, total = exponentiate_(z)
                losses[chunk] = (peak + total.log() - label_z)[:, 0]
                if any(needed):
                    # π − 1[· = y] is (eᶻ − total · 1[· = y]) / total: the division is left to the rows.
                    z.scatter_add_(1, y, -total)
                    gradient.add(z, weights[chunk, None] / total, slope, chunk, h, weight)
        GradientInForward.keep(ctx, gradient)
        ctx.mark_non_differentiable(losses)
        # Select: an ignored token may carry any weight, NaN too.
        return torch.where(labels != ignore_index, losses * weights, 0.0).sum(), losses
