"""Preference optimisation on pairs: DPO, cDPO, robust DPO, IPO, SLiC's hinge, and SimPO and ORPO without a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.cache import Cached, Rows, precompute
from rlhf_core.config import REFERENCE_FREE, DPOConfig, shares_prefix
from rlhf_core.method import Method
from rlhf_core.methods.terms import balanced, pair_groups, reference_model, token_budget
from rlhf_core.metrics import Sums
from rlhf_core.run import run
from rlhf_data.preferences import prepare_pairs
from rlhf_losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    nll_regulariser,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)


class DPO(Method):
    """A preference loss on the log-probs of both responses, mean over all pairs of a step.

    Reference log-probs come from the first of these that applies: a cache (`--precompute_ref`), the base model with the
    adapter off (LoRA), a frozen model.
    """

    name, unit = "dpo", "pairs"

    def __init__(self, config: DPOConfig, tokenizer: Any) -> None:
        self.share_prefix = shares_prefix(config.model, config.data, config.preference)
        data = prepare_pairs(
            config.data, tokenizer, seed=config.batch.seed, same_prompt=True, share_prefix=self.share_prefix
        )
        self.train, self.evaluation, self.data_report = data.train, data.eval, data.report
        self.config, self.options = config, config.preference
        self.token_budget = token_budget(config, samples=2)
        self.needs_reference = self.options.kind not in REFERENCE_FREE
        self.adapter_off = bool(config.lora.lora_rank) and config.reference.ref_pretrain is None
        if self.needs_reference and (config.reference.precompute_ref or not self.adapter_off):
            self.frozen = reference_model(config, tokenizer, cached=config.reference.precompute_ref)

    def prepare(self, models: Any) -> None:
        """With `--precompute_ref`, the reference log-probs of all pairs, from the cache or computed now."""
        if self.frozen and self.frozen.cached:
            counts, columns = lambda dataset: np.full(len(dataset), 2), {"logps": (np.dtype("f4"), 0)}
            precompute(self.config, self, models, self.reference_rows, self.lay_out, counts, columns)

    def reference_rows(self, reference: Any, batch: Batch) -> Iterator[Rows]:
        """The reference's log-probs of both responses of every pair."""
        logps = batch.sum_by_sample(reference("token_logps", batch)[0]).view(-1, 2).cpu().numpy()
        yield from ({"logps": row} for row in logps)

    def lay_out(self, pairs: list[Any]) -> Batch:
        return Batch.from_groups(pair_groups(pairs))

    def collate(self, samples: list[Any]) -> Batch:
        if not isinstance(self.train, Cached):
            return self.lay_out(samples)
        reference = torch.from_numpy(np.concatenate([rows["logps"] for _, rows in samples]))
        return Batch.from_groups(pair_groups([pair for pair, _ in samples]), reference_logps=reference)

    def reference_logps(self, model: Any, batch: Batch) -> Tensor:
        """The reference's log-prob of every response, `[N]`, without gradient."""
        if "reference_logps" in batch.columns:
            return batch.columns["reference_logps"]
        with torch.no_grad():
            if self.adapter_off:
                return batch.sum_by_sample(model("without_adapter", "token_logps", batch)[0])
            return batch.sum_by_sample(self.frozen_model("token_logps", batch)[0])

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Sums]:
        reference = self.reference_logps(model, batch) if self.needs_reference else None
        token_logps, balance = model("token_logps", batch)
        policy, lengths = batch.sum_by_sample(token_logps), batch.targets_per_sample
        losses = self.preference_losses(policy, reference, lengths)
        chosen = policy.view(-1, 2)[:, 0]
        count = len(chosen)
        nll = nll_regulariser(chosen, lengths.view(-1, 2)[:, 0])
        sums = self.figures(policy.detach(), reference, lengths) | {"nll_loss": (nll.sum(), count)}
        total = losses.sum()
        if self.options.kind == "orpo":
            total = nll.sum() + self.options.strength * total
        elif self.options.nll_loss_coef:
            total = total + self.options.nll_loss_coef * nll.sum()
        sums["loss"] = (total, count)
        halves = torch.full_like(policy, 0.5)
        return balanced(total, sums, balance, halves, self.config.model.aux_loss_coef)

    def preference_losses(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> Tensor:
        """The loss of every pair, `[B]`, from the log-probs of chosen and rejected responses in turn, `[2B]`."""
        options, kind = self.options, self.options.kind
        if reference is None:
            chosen, rejected = (policy / lengths).view(-1, 2).unbind(1)
            if kind == "simpo":
                gamma = 1.0 if options.simpo_gamma is None else options.simpo_gamma
                return simpo_loss(chosen, rejected, options.strength, gamma)
            return orpo_loss(chosen, rejected)
        ratios = policy - reference
        if kind == "ipo_avg":
            ratios = ratios / lengths
        chosen, rejected = ratios.view(-1, 2).unbind(1)
        margin = chosen - rejected
        if kind in ("ipo", "ipo_avg"):
            return ipo_loss(margin, options.strength)
        if kind == "robust":
            return robust_dpo_loss(margin, options.strength, options.label_smoothing)
        if kind == "hinge":
            return hinge_loss(margin, options.strength)
        return dpo_loss(margin, options.strength, options.label_smoothing)

    def figures(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> Sums:
        """Metrics of the pairs: rewards, accuracy, log-probs, lengths, and how far the policy is from the reference."""
        ratios = policy if reference is None else policy - reference
        counted = ratios / lengths if reference is None or self.options.kind == "ipo_avg" else ratios
        chosen, rejected = (self.options.strength * counted).view(-1, 2).unbind(1)
        count = len(chosen)
        logps, tokens = policy.view(-1, 2), lengths.view(-1, 2)
        sums: Sums = {
            "accuracy": ((chosen > rejected).sum(), count),
            "chosen_reward": (chosen.sum(), count),
            "rejected_reward": (rejected.sum(), count),
            "reward_margin": ((chosen - rejected).sum(), count),
            "chosen_logps": (logps[:, 0].sum(), count),
            "rejected_logps": (logps[:, 1].sum(), count),
            "chosen_length": (tokens[:, 0].sum(), count),
            "rejected_length": (tokens[:, 1].sum(), count),
        }
        if reference is not None:
            sums["kl"] = (ratios.sum(), 2 * count)
        return sums

    @property
    def cache_bytes(self) -> int:
        return 8 * sum(len(dataset) for dataset in (self.train, self.evaluation) if dataset is not None)

    def identity(self) -> dict[str, Any]:
        return {
            "preference": self.options.model_dump(exclude={"share_prefix"}),
            "ref_pretrain": self.config.reference.ref_pretrain,
        }


def train(config: DPOConfig, *, dry_run: bool = False, world_size: int = 1) -> None:
    """Train `config.model.pretrain` on preference pairs and write the result to `config.checkpoint.save_path`."""
    run(config, DPO, dry_run=dry_run, world_size=world_size)
