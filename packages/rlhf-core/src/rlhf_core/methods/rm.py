"""Reward models: give the better of two responses the higher number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.config import RMConfig, shares_prefix
from rlhf_core.method import Method
from rlhf_core.methods.terms import balanced, is_training, pair_groups, token_budget
from rlhf_core.metrics import Sums
from rlhf_core.models.reward import Calibration, RewardHead, find_head, settle_padding
from rlhf_core.run import run
from rlhf_data.preferences import prepare_pairs
from rlhf_losses import pairwise_logexp_loss, pairwise_sigmoid_loss

LOSSES = {"sigmoid": pairwise_sigmoid_loss, "logexp": pairwise_logexp_loss}

BUCKETS = (64, 256, 1024)
"""Limits, in tokens, of the buckets by which held-out accuracy is shown: of the longer response of a pair."""

CONFIDENCES = 5
"""Bins of the calibration error, between probabilities of one half and one."""

ENOUGH = 100
"""Held-out responses from which on a mean and a deviation say something."""


class RM(Method):
    """The Bradley-Terry likelihood of the preferences, mean over all pairs of a step.

    Rewards are read at the last token of prompt and response. After training, the rewards of all held-out responses give
    the model's calibration.
    """

    name, unit = "rm", "pairs"

    def __init__(self, config: RMConfig, tokenizer: Any) -> None:
        found = find_head(config.model.pretrain, config.reward.value_head_prefix, "--pretrain")
        self.head = RewardHead(found, config.batch.seed, settle_padding(tokenizer))
        self.share_prefix = shares_prefix(config.model, config.data, config.reward)
        data = prepare_pairs(
            config.data, tokenizer, seed=config.batch.seed, same_prompt=False, share_prefix=self.share_prefix
        )
        self.train, self.evaluation, self.data_report = data.train, data.eval, data.report
        self.config, self.tokenizer = config, tokenizer
        self.token_budget = token_budget(config, samples=2)

    def collate(self, samples: list[Any]) -> Batch:
        margins = torch.tensor([pair.margin for pair in samples])
        return Batch.from_groups(pair_groups(samples), margins=margins)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Sums]:
        rewards, balance = model("rewards", batch)
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        count = len(chosen)
        margin = batch.columns["margins"] if self.config.data.margin_loss else None
        total = LOSSES[self.config.reward.loss](chosen, rejected, margin).sum()
        sums: Sums = {
            "loss": (total, count),
            "accuracy": ((chosen > rejected).sum(), count),
            "chosen_reward": (chosen.sum(), count),
            "rejected_reward": (rejected.sum(), count),
            "reward_margin": ((chosen - rejected).sum(), count),
        }
        if not is_training(model):
            sums |= held_out_figures((chosen - rejected).detach(), batch)
        halves = torch.full_like(rewards, 0.5)
        return balanced(total, sums, balance, halves, self.config.model.aux_loss_coef)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        bins = [n for n in range(CONFIDENCES) if means.get(f"bin_{n}_share")]
        if not bins:
            return means
        error = sum(means[f"bin_{n}_share"] * abs(means[f"bin_{n}_right"] - means[f"bin_{n}_sure"]) for n in bins)
        return {name: mean for name, mean in means.items() if not name.startswith("bin_")} | {
            "calibration_error": error
        }

    def finish(self, run: Any) -> None:
        """The calibration pass: rewards of all held-out responses, each once."""
        if self.evaluation is None:
            run.strategy.say("no held-out pairs, so rewards are not calibrated: --normalize_reward will not work")
            return
        sums = [0.0, 0.0, 0.0]
        run.engine.eval()
        with torch.no_grad():
            for window in run.parts(self.evaluation):
                for _, batch in run.micro_batches(window):
                    rewards = run.engine("rewards", batch)[0].double()
                    sums = [sums[0] + rewards.sum(), sums[1] + rewards.square().sum(), sums[2] + len(rewards)]
        total, squares, count = run.strategy.sum([float(x) for x in sums])
        std = math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1))
        if not std:
            run.strategy.say(
                "all held-out rewards are equal, so they are not calibrated: --normalize_reward will not work"
            )
            return
        data = self.config.data
        origin = data.eval_dataset or f"{data.dataset} (held out)"
        Calibration(total / count, std, int(count), origin).write(run.engine.module.base.config)
        few = f"; too few to trust (fewer than {ENOUGH})" if count < ENOUGH else ""
        run.strategy.say(
            f"rewards of {int(count):,} held-out responses: mean {total / count:.4g}, deviation {std:.4g}{few}"
        )

    def identity(self) -> dict[str, Any]:
        return {"reward": self.config.reward.model_dump(include={"loss"}), "margin_loss": self.config.data.margin_loss}


def held_out_figures(margin: Tensor, batch: Batch) -> Sums:
    """How right and how sure the model is, and whether length is what it likes.

    Args:
        margin: reward of the chosen response minus that of the rejected one, `[B]`.
        batch: the pairs.
    """
    right = (margin > 0).double()
    won = torch.sigmoid(margin.double())
    chosen, rejected = batch.targets_per_sample.view(-1, 2).unbind(1)
    longest = torch.maximum(chosen, rejected)
    sums: Sums = {"expected_accuracy": (torch.maximum(won, 1 - won).sum(), len(margin))}
    groups = {"accuracy_chosen_longer": chosen > rejected, "accuracy_chosen_shorter": chosen < rejected}
    low = 0
    for high in (*BUCKETS, None):
        name = f"accuracy_up_to_{high}_tokens" if high else f"accuracy_over_{low}_tokens"
        groups[name] = (longest > low) & (longest <= high if high else longest > low)
        low = high or low
    for name, group in groups.items():
        sums[name] = ((right * group).sum(), group.sum())
    sure = torch.maximum(won, 1 - won)
    bins = ((sure - 0.5) * 2 * CONFIDENCES).long().clamp(max=CONFIDENCES - 1)
    for n in range(CONFIDENCES):
        group, count = bins == n, (bins == n).sum()
        sums[f"bin_{n}_sure"] = ((sure * group).sum(), count)
        sums[f"bin_{n}_right"] = ((right * group).sum(), count)
        sums[f"bin_{n}_share"] = (count, len(margin))
    return sums


def train(config: RMConfig, *, dry_run: bool = False, world_size: int = 1) -> None:
    """Train a reward model from `config.model.pretrain` and write it to `config.checkpoint.save_path`."""
    run(config, RM, dry_run=dry_run, world_size=world_size)
