"""The critic: a rank of the model that says what is to be expected of a response that has come so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from rlhf_ray.cluster.group import Part
from rlhf_ray.config import PPOConfig, names
from rlhf_ray.workers.policy import layout, model_facts
from rlhf_ray.workers.rank import RankWorker
from rlhf_ray.workers.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.metrics import Meter

COLUMNS = ("mask", "values", "returns")
"""Columns of an `Experience` that the loss is made of."""


def critic_source(config: PPOConfig) -> tuple[str, str, bool]:
    """Where the critic starts: the option that says it, the model, and whether that must be a reward model."""
    from rlhf_infer.rewards.scorer import is_function

    if config.critic.critic_pretrain:
        return "--critic_pretrain", config.critic.critic_pretrain, False
    models = [name for name in names(config.rewards.reward_pretrain) if not is_function(name)]
    if models:
        return "--reward_pretrain", models[0], True
    return "--pretrain", config.model.pretrain, False


class CriticWorker(RankWorker):
    """One rank of the critic: a reward model that is read at every token."""

    def setup(self, config: PPOConfig, meeting: tuple[str, int] | None, total_steps: int) -> dict[str, Any]:
        """Meet the other ranks, load the model and prepare it for training.

        Args:
            config: the run's options.
            meeting: what `meet` of rank 0 returned; None for a single rank.
            total_steps: optimizer steps of the whole run, which the learning rate's schedule spans.

        Returns:
            Facts for the plan and the record, see `PolicyWorker.setup`.

        Raises:
            InputError: the model cannot be read, or an option does not fit it.
        """
        self.strategy = self.join_to_train(config, config.optim.of(config.optim.critic_learning_rate), meeting)
        from rlhf_core.export import check_export
        from rlhf_core.models.load import load_model_config
        from rlhf_core.models.loader import Models
        from rlhf_core.models.reward import Calibration, RewardHead, find_head, settle_padding
        from rlhf_core.offload import Offload
        from rlhf_data.tokenizer import load_tokenizer

        self.config = config
        self.ragged, self.share = layout(config)
        option, name, is_reward_model = critic_source(config)
        self.tokenizer = load_tokenizer(
            name, use_fast=not config.model.disable_fast_tokenizer, trust_remote_code=config.model.trust_remote_code
        )
        model = config.model.model_copy(update={"pretrain": name})
        model_config = load_model_config(model, option)
        found = find_head(name, config.rewards.value_head_prefix, option)
        scaled = config.rewards.normalize_reward and (is_reward_model or hasattr(model_config, "mean"))
        self.scale = Calibration.of(model_config, name) if scaled else None
        head = RewardHead(found, config.batch.seed, settle_padding(self.tokenizer))
        models = Models(model, self.strategy, ragged=self.ragged, share_prefix=self.share, head=head, lora=config.lora)
        self.model: Any = models.trained(model_config)
        if self.strategy.is_first:
            check_export(self.model, self.tokenizer)
        self.engine = self.strategy.prepare(self.model, total_steps)
        self.engine.eval()
        models.check(self.engine, model_config, "rewards")
        self.memory = Offload(self.engine)
        return model_facts(self.model, self.strategy.device, self.ragged, self.share) | {"head": found or "a new one"}

    def values(self, parts: list[Part]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Of some micro-batches, the value of the state in which each response token was chosen, `[M]`, and of the state
        after the last one, `[N]`.
        """
        import torch

        from rlhf_ray.collate import collate_part

        self.reload()
        self.engine.eval()
        found = []
        for part in parts:
            with torch.no_grad():
                values = self.values_of(collate_part(part, share=self.share).to(self.strategy.device))
            found.append(tuple(value.cpu().numpy() for value in values))
        return found

    def values_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Values on the scale of the rewards: a critic that starts as a reward model is normalised like it."""
        values, after = self.engine("values", batch)
        if self.scale is None:
            return values, after
        return self.scale.normalise(values), self.scale.normalise(after)

    def update(self, steps: list[Step]) -> list[dict[str, float]]:
        """Make optimizer steps; every rank is given as many, each with as many micro-batches.

        Returns:
            The figures of each step, the same on all ranks.

        Raises:
            NonFiniteLoss: a gradient is no number. Nothing has been saved of it.
        """
        self.reload()
        self.engine.train()
        figures = [self.optimizer_step(step) for step in steps]
        self.engine.eval()
        return figures

    def optimizer_step(self, step: Step) -> dict[str, float]:
        """One optimizer step."""
        from rlhf_core.metrics import Meter

        meter = Meter()
        for number, part in enumerate(step.parts, start=1):
            loss = self.value_loss(part, meter)
            self.strategy.backward(self.engine, loss, step.divisor, last=number == len(step.parts))
        learning_rate = self.strategy.learning_rate(self.engine)
        norm = self.strategy.step(self.engine)
        self.check(norm, step)
        return meter.means(self.strategy) | {"critic_grad_norm": norm, "critic_learning_rate": learning_rate}

    def value_loss(self, part: Part, meter: Meter) -> Tensor:
        """The summed loss of a micro-batch; its figures go to `meter`."""
        from rlhf_losses import clipped_value_loss, masked_sum, value_clip_fraction
        from rlhf_ray.collate import collate_part

        batch = collate_part(part, share=self.share, columns=COLUMNS).to(self.strategy.device)
        mask = batch.columns["mask"]
        old, returns = (batch.columns[name].where(mask, 0) for name in ("values", "returns"))  # 0 · NaN is NaN
        values, _ = self.values_of(batch)
        clip, tokens = self.config.ppo.value_clip, mask.sum()
        loss = masked_sum(clipped_value_loss(values, old, returns, clip), mask)
        meter.add({"value_loss": (loss, tokens)})
        if clip is not None:
            meter.add({"value_clip_fraction": (value_clip_fraction(values, old, returns, clip, mask) * tokens, tokens)})
        return loss

    def check(self, norm: float, step: Step) -> None:
        from rlhf_core.fit import NonFiniteLoss

        if not math.isfinite(norm):
            raise NonFiniteLoss(
                f"the gradient norm of optimizer step {step.number + 1} of the critic is {norm}; nothing of it was saved. Try "
                "a lower --critic_learning_rate or a smaller --reward_clip_range; --load_checkpoint continues from the newest "
                "checkpoint"
            )

    def save(self, folder: str) -> None:
        """Write what a resumed run needs of this rank into a folder that is there; on all ranks."""
        from rlhf_core.checkpoint import write_engine

        self.reload()
        write_engine(self.engine, Path(folder), self.rank)
        self.strategy.barrier()

    def load(self, folder: str) -> None:
        """Go to where `save` was called; on all ranks."""
        from rlhf_core.checkpoint import read_engine

        self.reload()
        read_engine(self.engine, Path(folder), self.rank)

    def export(self, folder: str) -> None:
        """Write the critic as a reward model in Hugging Face format, from which a critic can start again.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        from rlhf_core.export import export

        self.reload()
        if self.scale is not None:
            self.scale.write(self.model.config)  # on which its values are, also where it starts again
        export(self.model, self.tokenizer, Path(folder), self.strategy)

    def offload(self) -> None:
        """Make room on the device: weights, gradients and optimizer go to the host."""
        self.memory.put_away()

    def reload(self) -> None:
        """Take the device again; nothing to do if it was not left."""
        self.memory.take_back()
