"""Supervised fine-tuning: raise the probability of the responses, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.config import SFTConfig
from rlhf_core.metrics import Sums
from rlhf_core.run import run
from rlhf_data.sft import prepare_sft


class SFT:
    """Cross-entropy of the target tokens; with `aux_loss_coef` plus the load balance of the experts.

    The loss of a step is the mean over all its target tokens, over micro-batches and ranks.
    """

    name = "sft"

    def __init__(self, config: SFTConfig, tokenizer: Any) -> None:
        data = prepare_sft(config.data, tokenizer, seed=config.batch.seed)
        self.train, self.evaluation, self.data_report = data.train, data.eval, data.report
        self.aux_loss_coef = config.model.aux_loss_coef
        row = config.data.packing_tokens or config.batch.micro_train_batch_size * config.data.max_len
        self.token_budget = row if config.data.packing_samples else None

    def weights(self, dataset: Any) -> np.ndarray:
        return dataset.num_targets

    def collate(self, samples: list[Any]) -> Batch:
        return Batch.from_samples(samples)

    def loss(self, policy: Any, batch: Batch) -> tuple[Tensor, Sums]:
        total, _, balance = policy("cross_entropy", batch)
        sums: Sums = {"loss": (total, batch.num_targets)}
        if balance is not None:
            targets = batch.targets.new_zeros(batch.num_samples).index_add_(
                0, batch.sample_of_token[batch.targets], batch.targets.new_ones(batch.num_targets)
            )
            auxiliary = (balance * targets).sum()  # weighted by targets, so that one divisor serves both terms
            sums["aux_loss"] = (auxiliary, batch.num_targets)
            total = total + self.aux_loss_coef * auxiliary
        return total, sums

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": math.exp(min(means["loss"], 700.0))} if "loss" in means else means


def train(config: SFTConfig, *, dry_run: bool = False, world_size: int = 1) -> None:
    """Fine-tune `config.model.pretrain` on `config.data.dataset` and write the result to `config.checkpoint.save_path`."""
    run(config, SFT, dry_run=dry_run, world_size=world_size)
