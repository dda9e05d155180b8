"""Advantages of several responses to one prompt, relative to one another.

Scores are rewards of whole responses, `[G, n]` for G prompts with n responses each, or `[B]` with `group_ids` `[B]`
(any integers, in any order; groups may differ in size). The result has the shape of the scores, float32 (float64 for
float64 scores), no gradient, and goes to every token of a response. Responses of equal score have exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_losses._head import accumulation_dtype
from rlhf_losses.masks import masked_whiten


@torch.no_grad()
def leave_one_out(scores: Tensor, group_ids: Tensor | None = None) -> Tensor:
    """RLOO advantages, the score minus the mean score of the other responses, A_i = s_i − Σ_{j≠i} s_j / (n − 1).

    Args:
        scores: reward of each response, `[G, n]`, or `[B]` with `group_ids`.
        group_ids: prompt of each response, integers `[B]`.

    Returns:
        The shape of `scores`.

    Source: Ahmadian et al. 2024, eq. 8 (arXiv:2402.14740).
    """
    group = _Groups(scores, group_ids)
    # s_i minus the mean of the others is n / (n − 1) times s_i minus the mean of all.
    return group.like_scores(group.deviation * (group.size / (group.size - 1)))


@torch.no_grad()
def group_normalised(scores: Tensor, group_ids: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """GRPO advantages, A_i = (s_i − mean(s)) / (std(s) + ε), std with n − 1.

    Args:
        scores: reward of each response, `[G, n]`, or `[B]` with `group_ids`.
        group_ids: prompt of each response, integers `[B]`.
        eps: ε, in units of the score: spreads far below it do not count.

    Returns:
        The shape of `scores`; exactly 0 in groups whose scores are all equal.

    Source: Shao et al. 2024, DeepSeekMath, sec. 4.1.2 (arXiv:2402.03300).
    """
    group = _Groups(scores, group_ids)
    std = (group.total(group.deviation.square()) / (group.size - 1)).sqrt()
    return group.like_scores(group.deviation / (std + eps))


@torch.no_grad()
def group_centred(scores: Tensor, group_ids: Tensor | None = None) -> Tensor:
    """Dr. GRPO advantages, A_i = s_i − mean(s), not divided by the group's spread.

    The spread would give prompts that are nearly always or nearly never solved more weight than those in between.

    Args:
        scores: reward of each response, `[G, n]`, or `[B]` with `group_ids`.
        group_ids: prompt of each response, integers `[B]`.

    Returns:
        The shape of `scores`.

    Source: Liu et al. 2025, Understanding R1-Zero-Like Training, sec. 3.2 (arXiv:2503.20783).
    """
    group = _Groups(scores, group_ids)
    return group.like_scores(group.deviation)


@torch.no_grad()
def reinforce_plus_plus_baseline(
    scores: Tensor, group_ids: Tensor | None = None, *, moments: Tensor | None = None
) -> Tensor:
    """REINFORCE++-baseline advantages: centred in the group, then whitened over the whole batch.

    A_i = (d_i − μ) / σ,  d_i = s_i − mean of its group,  μ and σ over all responses

    Args:
        scores: reward of each response, `[G, n]`, or `[B]` with `group_ids`.
        group_ids: prompt of each response, integers `[B]`.
        moments: of the d of all ranks, `masked_moments(group_centred(...), mask)` summed, `[3]`; by default of this
            batch.

    Returns:
        The shape of `scores`; 0 everywhere if no group has a spread.

    Source: Hu et al. 2025, sec. 3.2 (arXiv:2501.03262).
    """
    deviation = group_centred(scores, group_ids)
    return masked_whiten(deviation, torch.ones_like(deviation, dtype=torch.bool), moments=moments)


class _Groups:
    """Scores in float64 next to what each response knows of its group, all `[B]`."""

    def __init__(self, scores: Tensor, group_ids: Tensor | None) -> None:
        expected = 2 if group_ids is None else 1
        if scores.ndim != expected or (group_ids is not None and group_ids.shape != scores.shape):
            shapes = f"{list(scores.shape)}" + ("" if group_ids is None else f" with group_ids {list(group_ids.shape)}")
            raise ValueError(f"scores must be [G, n], or [B] with group_ids [B]; got {shapes}")
        self.scores = scores
        if group_ids is None:
            group_ids = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
        _, self.index, sizes = torch.unique(group_ids.flatten(), return_inverse=True, return_counts=True)
        self.size = sizes[self.index]
        if len(sizes) and int(sizes.min()) < 2:
            raise ValueError(
                f"scores must have at least 2 responses in every group, got a group of {int(sizes.min())}; sample more "
                "responses per prompt, or use reinforce_plus_plus, which needs no group"
            )
        x = scores.flatten().double()
        best = x.new_zeros(len(sizes)).scatter_reduce(0, self.index, x, "amax", include_self=False)
        x = x - best[self.index]  # Equal scores are now exactly 0, and so is their mean.
        self.deviation = x - self.total(x) / self.size

    def total(self, x: Tensor) -> Tensor:
        """Sum of `x` `[B]` over the group of each response, `[B]`."""
        return x.new_zeros(len(x)).index_add(0, self.index, x)[self.index]

    def like_scores(self, x: Tensor) -> Tensor:
        """`x` `[B]` in the shape of the scores."""
        return x.view(self.scores.shape).to(accumulation_dtype(self.scores.dtype))
