"""Supervised fine-tuning: raise the probability of the responses, token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.config import SFTConfig
from rlhf_core.method import Method, Window
from rlhf_core.methods.terms import balanced, perplexity, token_budget
from rlhf_core.metrics import Sums
from rlhf_core.run import run
from rlhf_data.sft import prepare_sft


class SFT(Method):
    """Cross-entropy of the target tokens; with `aux_loss_coef` plus the load balance of the experts.

    The loss of a step is the mean over all its target tokens, over micro-batches and ranks.
    """

    name = "sft"

    def __init__(self, config: SFTConfig, tokenizer: Any) -> None:
        data = prepare_sft(config.data, tokenizer, seed=config.batch.seed)
        self.train, self.evaluation, self.data_report = data.train, data.eval, data.report
        self.aux_loss_coef = config.model.aux_loss_coef
        self.token_budget = token_budget(config)

    def divisor(self, window: Window) -> float:
        return float(window.num_targets.sum())

    def collate(self, samples: list[Any]) -> Batch:
        return Batch.from_samples(samples)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Sums]:
        total, _, balance = model("cross_entropy", batch)
        sums: Sums = {"loss": (total, batch.num_targets)}
        return balanced(total, sums, balance, batch.targets_per_sample, self.aux_loss_coef)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means | perplexity(means, "loss")


def train(config: SFTConfig, *, dry_run: bool = False, world_size: int = 1) -> None:
    """Fine-tune `config.model.pretrain` on `config.data.dataset` and write the result to `config.checkpoint.save_path`."""
    run(config, SFT, dry_run=dry_run, world_size=world_size)
