"""The reference model: what the policy is kept close to. Never trained."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.cluster.group import Part
from rlhf_ray.config import PPOConfig
from rlhf_ray.workers.policy import layout, model_facts, token_logps
from rlhf_ray.workers.rank import RankWorker


class ReferenceWorker(RankWorker):
    """One rank of the reference model."""

    def setup(self, config: PPOConfig, meeting: tuple[str, int] | None) -> dict[str, Any]:
        """Meet the other ranks, load the model and check it.

        Args:
            config: the run's options.
            meeting: what `meet` of rank 0 returned; None for a single rank.

        Returns:
            Facts for the plan and the record, see `PolicyWorker.setup`.

        Raises:
            InputError: the model cannot be read, or an option does not fit it.
        """
        self.ranks = self.join(config, meeting)
        from rlhf_core.method import Frozen
        from rlhf_core.models.loader import Models

        self.config = config
        ragged, self.share = layout(config)
        models = Models(config.model, self.ranks, ragged=ragged, share_prefix=self.share)
        option, name = "--ref_pretrain", config.model.ref_pretrain
        if name is None:
            option, name = "--pretrain", config.model.pretrain
        self.model = models.frozen(Frozen("reference", option, name, config.cluster.ref_reward_offload))
        return model_facts(self.model, self.ranks.device, ragged, self.share)

    def token_logps(self, parts: list[Part]) -> list[tuple[NDArray[np.float32]]]:
        """Log-probs of the response tokens of some micro-batches, at the sampling temperature, `[M]` each."""
        return list(token_logps(self.model, parts, self.config, self.share, self.ranks.device))
