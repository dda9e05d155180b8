"""Returns and advantages over time.

Every function takes a padded batch, `[B, T]` with an optional mask of the same shape, or a ragged one, `[T]` with
`cu_seqlens` `[N + 1]` (and an optional mask `[T]`). Tokens outside the mask are left out of the recursion: the token
after them is the next one. Discounts are per token. Nothing here has a gradient. Linear in the number of tokens, and
computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_losses._layout import Layout
from rlhf_losses.masks import masked_whiten

# The recursion runs over blocks of this many steps, each one matrix product; 32 to 128 take about the same time.
BLOCK = 64


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and the returns that values are fitted to.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1},  R_t = A_t + V_t;  after the last token A = 0, V = bootstrap

    Args:
        rewards: r, reward of each token, `[B, T]` or `[T]`.
        values: V, value of the state in which each token was chosen, same shape.
        gamma: γ, discount per token.
        lambda_: λ; 0 gives TD errors (least variance), 1 gives returns minus values (no bias).
        mask: True for response tokens, boolean, same shape; by default all.
        cu_seqlens: cumulative sequence lengths from 0 to T of a ragged batch, `[N + 1]`.
        bootstrap: value of the state after the last token, `[B]` or `[N]`: 0 where the episode ended, V where it was
            cut off by a length limit. By default 0, as if all had ended.

    Returns:
        Advantages and returns, each the shape of `rewards`; 0 outside the mask.

    Source: Schulman et al. 2015, eq. 16 (arXiv:1506.02438).
    """
    layout = Layout(rewards, mask, cu_seqlens)
    v = layout.pack(values)  # [N, L]
    next_v = torch.nn.functional.pad(v[:, 1:], (0, 1)) if layout.width else v
    if bootstrap is not None:
        layout.check_sequences(bootstrap, "bootstrap")
        last = (layout.lengths - 1).clamp(min=0)[:, None]
        after = torch.where(layout.lengths > 0, bootstrap.double(), 0)[:, None]
        next_v = next_v.scatter_add(1, last, after)
    advantages = _discounted_sum(layout.pack(rewards) + gamma * next_v - v, gamma * lambda_)
    return layout.unpack(advantages).to(rewards.dtype), layout.unpack(advantages + v).to(rewards.dtype)


@torch.no_grad()
def discounted_returns(
    rewards: Tensor, *, gamma: float = 1.0, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Discounted sum of the rewards from each token on, G_t = r_t + γ G_{t+1}.

    Args:
        rewards: r, reward of each token, `[B, T]` or `[T]`.
        gamma: γ, discount per token.
        mask: True for response tokens, boolean, same shape; by default all.
        cu_seqlens: cumulative sequence lengths from 0 to T of a ragged batch, `[N + 1]`.

    Returns:
        The shape of `rewards`; 0 outside the mask.

    Source: Sutton and Barto 2018, Reinforcement Learning, eq. 3.9.
    """
    layout = Layout(rewards, mask, cu_seqlens)
    return layout.unpack(_discounted_sum(layout.pack(rewards), gamma)).to(rewards.dtype)


def reinforce(
    rewards: Tensor,
    *,
    baseline: float = 0.0,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """REINFORCE advantages, A_t = G_t − b.

    Args:
        rewards: reward of each token, `[B, T]` or `[T]`.
        baseline: b, a number that does not depend on these responses, such as a running mean of returns.
        gamma: discount per token.
        mask: True for response tokens, boolean, same shape; by default all.
        cu_seqlens: cumulative sequence lengths from 0 to T of a ragged batch, `[N + 1]`.

    Returns:
        The shape of `rewards`; 0 outside the mask.

    Source: Williams 1992, Simple Statistical Gradient-Following Algorithms, eq. 11.
    """
    returns = discounted_returns(rewards, gamma=gamma, mask=mask, cu_seqlens=cu_seqlens)
    return returns - baseline if mask is None else torch.where(mask, returns - baseline, 0)


def reinforce_plus_plus(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """REINFORCE++ advantages, the returns of all tokens of the batch whitened, A_t = (G_t − μ) / σ.

    Args:
        rewards: reward of each token, KL penalty included (see `kl_penalised_rewards`), `[B, T]` or `[T]`.
        gamma: discount per token.
        mask: True for response tokens, boolean, same shape; by default all.
        cu_seqlens: cumulative sequence lengths from 0 to T of a ragged batch, `[N + 1]`.
        moments: of the returns of all ranks, `masked_moments(discounted_returns(...), mask)` summed, `[3]`; by default
            of this batch.

    Returns:
        The shape of `rewards`; 0 outside the mask, and everywhere if all returns are equal.

    Source: Hu et al. 2025, eq. 6 to 8 (arXiv:2501.03262).
    """
    returns = discounted_returns(rewards, gamma=gamma, mask=mask, cu_seqlens=cu_seqlens)
    return masked_whiten(returns, torch.ones_like(returns, dtype=torch.bool) if mask is None else mask, moments=moments)


def _discounted_sum(x: Tensor, discount: float) -> Tensor:
    """y_t = x_t + d · y_{t+1} along the last dimension of `[N, L]`.

    Inside a block, y is a product with the triangular matrix of decays; then only the first element of each block is
    passed on, so that Python takes L / BLOCK steps and not L.
    """
    n, length = x.shape
    blocks = -(-length // BLOCK)
    steps = torch.arange(BLOCK, device=x.device)
    lag = steps[:, None] - steps  # from time s (row) back to time t (column)
    decay = torch.where(lag >= 0, torch.pow(discount, lag.clamp(min=0).double()), 0)
    y = torch.nn.functional.pad(x, (0, blocks * BLOCK - length)).view(n, blocks, BLOCK) @ decay
    reach = torch.pow(discount, (BLOCK - steps).double())  # from the next block's first step back to each of this one
    for block in range(blocks - 2, -1, -1):
        y[:, block] += y[:, block + 1, :1] * reach
    return y.reshape(n, blocks * BLOCK)[:, :length]
