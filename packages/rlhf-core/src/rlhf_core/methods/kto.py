"""KTO: learn from single responses that are desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.config import KTOConfig
from rlhf_core.method import InMemory, Method, Window
from rlhf_core.methods.terms import balanced, is_training, prompt_length, reference_model, token_budget
from rlhf_core.metrics import Sums
from rlhf_core.run import run
from rlhf_data.dataset import LabelledSample
from rlhf_data.encode import Sample
from rlhf_data.preferences import prepare_labelled
from rlhf_losses import kto_kl, kto_loss


class KTO(Method):
    """The prospect-theoretic loss, mean over all samples of a step.

    Its reference point is a KL estimate over the whole step: every prompt with another sample's response. So it is computed
    before the first micro-batch, by all ranks together and without gradient, and micro-batches cannot change it.
    """

    name = "kto"

    def __init__(self, config: KTOConfig, tokenizer: Any) -> None:
        data = prepare_labelled(config.data, tokenizer, seed=config.batch.seed)
        self.train, self.evaluation, self.data_report = data.train, data.eval, data.report
        self.config, self.options = config, config.kto
        self.token_budget = token_budget(config)
        # the reference model sees each prompt with two responses, its own and an unrelated one
        self.share_prefix = (config.model.flash_attn or config.data.packing_samples) and not config.model.aux_loss_coef
        self.adapter_off = bool(config.lora.lora_rank) and config.reference.ref_pretrain is None
        if not self.adapter_off:
            self.frozen = reference_model(config, tokenizer)
        self.kl = torch.zeros(())

    @property
    def longest(self) -> int:
        """With prompts and responses of different samples, what they can come to."""
        parts = [(data.lengths - data.num_targets, data.num_targets) for data in (self.train, self.evaluation) if data]
        mixed = max(int(prompts.max()) for prompts, _ in parts) + max(int(responses.max()) for _, responses in parts)
        return max(super().longest, min(mixed, self.config.data.max_len))

    def begin_step(self, engine: Any, window: Window, run: Any) -> Window:
        """The reference's log-probs of all samples, and the reference point."""
        samples = [window[place] for place in range(len(window))]
        others = unrelated([example.sample for example in samples], self.config.data.max_len)
        reference, policy_other, reference_other = self.no_gradient_logps(engine, samples, others, run)
        there = torch.tensor([other is not None for other in others], device=reference.device)
        self.kl = kto_kl(policy_other[there], reference_other[there]) if there.any() else reference.new_zeros(())
        with_reference = list(zip(samples, reference.tolist(), strict=True))
        return InMemory(with_reference, window.lengths, window.num_targets).window()

    def no_gradient_logps(
        self, engine: Any, samples: list[LabelledSample], others: list[Sample | None], run: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs over all ranks: of the samples' responses by the reference, and of unrelated ones by policy and reference.

        Each `[N]` float32; 0 where there is no unrelated response.
        """
        groups = [(example.sample, *([other] if other else [])) for example, other in zip(samples, others, strict=True)]
        # without gradients a row may hold two samples for one
        lengths = np.array([-(-sum(map(len, group)) // len(group)) for group in groups])
        logps = np.zeros((3, len(samples)))
        training = is_training(engine)
        engine.eval()
        with torch.no_grad():
            together = InMemory(groups, lengths, lengths).window()
            for places, batch in run.micro_batches(together, self.lay_out):
                sums = self.reference_logps(engine, batch).tolist()
                for place in places:
                    logps[0, place] = sums.pop(0)
                    logps[2, place] = sums.pop(0) if others[place] else 0.0
            rows = [place for place, other in enumerate(others) if other]
            if rows:
                alone = [others[row] for row in rows]
                lengths = np.array([len(other) for other in alone if other])
                for places, batch in run.micro_batches(InMemory(alone, lengths, lengths).window(), Batch.from_samples):
                    sums = batch.sum_by_sample(engine("token_logps", batch)[0]).tolist()
                    logps[1, [rows[place] for place in places]] = sums
        engine.train(training)
        everywhere = torch.tensor(run.strategy.sum(torch.from_numpy(logps).reshape(-1)), dtype=torch.float32)
        reference, policy_other, reference_other = everywhere.view(3, -1).to(run.strategy.device)
        return reference, policy_other, reference_other

    def lay_out(self, groups: list[tuple[Sample, ...]]) -> Batch:
        """Prompts with their responses, the prompt once where that is possible."""
        shared = [prompt_length(group[0]) if self.share_prefix and len(group) > 1 else 0 for group in groups]
        return Batch.from_groups(list(zip(groups, shared, strict=True)))

    def reference_logps(self, engine: Any, batch: Batch) -> Tensor:
        if self.adapter_off:
            return batch.sum_by_sample(engine("without_adapter", "token_logps", batch)[0])
        return batch.sum_by_sample(self.frozen_model("token_logps", batch)[0])

    def collate(self, samples: list[Any]) -> Batch:
        return Batch.from_samples(
            [example.sample for example, _ in samples],
            desirable=torch.tensor([bool(example.label) for example, _ in samples]),
            reference_logps=torch.tensor([reference for _, reference in samples]),
        )

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Sums]:
        token_logps, balance = model("token_logps", batch)
        policy = batch.sum_by_sample(token_logps)
        reference, desirable = batch.columns["reference_logps"], batch.columns["desirable"]
        options = self.options
        losses = kto_loss(
            policy,
            reference,
            desirable,
            self.kl,
            options.beta,
            options.desirable_loss_weight,
            options.undesirable_loss_weight,
        )
        total, count = losses.sum(), len(losses)
        ratios = (policy - reference).detach()
        sums: Sums = {
            "loss": (total, count),
            "kl": (self.kl * count, count),
            "desirable_share": (desirable.sum(), count),
        }
        for name, group in (("desirable", desirable), ("undesirable", ~desirable)):
            number = group.sum()
            sums[f"{name}_reward"] = ((options.beta * ratios * group).sum(), number)
            sums[f"{name}_logps"] = ((policy.detach() * group).sum(), number)
            sums[f"{name}_length"] = ((batch.targets_per_sample * group).sum(), number)
        ones = torch.ones_like(policy)
        return balanced(total, sums, balance, ones, self.config.model.aux_loss_coef)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        if {"desirable_reward", "undesirable_reward"} <= means.keys():
            return means | {"reward_margin": means["desirable_reward"] - means["undesirable_reward"]}
        return means

    def identity(self) -> dict[str, Any]:
        return {"kto": self.options.model_dump(), "ref_pretrain": self.config.reference.ref_pretrain}


def unrelated(samples: Sequence[Sample], max_len: int) -> list[Sample | None]:
    """Every prompt with the response of another sample.

    The next sample in the step whose response is another text (once cut) and, if there is one, whose prompt is another too.
    A sample that has no such partner gets none.

    Args:
        samples: of one step.
        max_len: longest sample; a response is cut there.
    """
    starts = [prompt_length(sample) for sample in samples]
    prompts = [sample.input_ids[:start].tobytes() for sample, start in zip(samples, starts, strict=True)]
    responses = [sample.input_ids[start:] for sample, start in zip(samples, starts, strict=True)]
    found: list[Sample | None] = []
    for i, sample in enumerate(samples):
        following = [(i + step) % len(samples) for step in range(1, len(samples))]
        own, room = responses[i].tobytes(), max_len - starts[i]
        candidates = (j for j in following if responses[j][:room].tobytes() != own)
        partner = next(candidates, None)
        if partner is not None and prompts[partner] == prompts[i]:
            partner = next((j for j in candidates if prompts[j] != prompts[i]), partner)
        found.append(None if partner is None else answered(sample, samples[partner], max_len))
    return found


def answered(asked: Sample, answering: Sample, max_len: int) -> Sample:
    """The prompt of one sample with the response of another."""
    prompt, response = prompt_length(asked), prompt_length(answering)
    ids = np.concatenate([asked.input_ids[:prompt], answering.input_ids[response:]])
    mask = np.concatenate([asked.target_mask[:prompt], answering.target_mask[response:]])
    return Sample(ids[:max_len], mask[:max_len], len(ids) > max_len)


def train(config: KTOConfig, *, dry_run: bool = False, world_size: int = 1) -> None:
    """Train `config.model.pretrain` on labelled responses and write the result to `config.checkpoint.save_path`."""
    run(config, KTO, dry_run=dry_run, world_size=world_size)
