"""What a rank is told of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.cluster.group import Part


@dataclass(frozen=True)
class Step:
    """One optimizer step, as one rank sees it."""

    parts: list[Part]
    """Its micro-batches; every rank has as many. The batches are `Experience`."""

    divisor: float
    """What the loss, summed over all micro-batches and ranks, is divided by."""

    kl_coef: float
    """Price of a nat of KL divergence, where it is in the loss."""

    number: int
    """Optimizer steps of the run before this one."""
