"""The price of KL divergence: fixed, or steered so that the divergence stays where it is wanted."""

from __future__ import annotations

import math

LIMIT = 0.2
"""Most that the divergence counts as being off, as a share of the target: one odd rollout moves the price little."""


class KLController:
    """The coefficient of the KL penalty.

    With a target, e = clip(KL / target − 1, ±0.2) and c ← c exp(e n / horizon) after n samples, which stays positive for any n.

    Args:
        coef: at the start, in units of the reward per nat.
        target: nats per token to steer to; None leaves the coefficient as it is.
        horizon: samples in which the coefficient can change by a factor of e^0.2.

    Source: Ziegler et al. 2019, sec. 2.2 (arXiv:1909.08593).
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Take note of the divergence of some samples.

        Args:
            kl: nats per token.
            samples: how many there were.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1, -LIMIT), LIMIT)
            self.coef *= math.exp(error * samples / self.horizon)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"coef": self.coef}

    def restore(self, state: dict[str, float]) -> None:
        """Go to where `state` was called.

        Raises:
            ValueError: it holds no coefficient.
        """
        coef = float(state["coef"])
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"a KL coefficient of {coef} is none")
        self.coef = coef
