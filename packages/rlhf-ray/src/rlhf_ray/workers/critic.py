"""The critic: a rank of the model that says what is to be expected of a response that has come so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from rlhf_ray.cluster.group import Part
from rlhf_ray.config import PPOConfig, names
from rlhf_ray.workers.policy import layout, model_facts
from rlhf_ray.workers.step import Step
from rlhf_ray.workers.trained import TrainedWorker

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


class CriticWorker(TrainedWorker):
    """One rank of the critic: a reward model that is read at every token."""

    role, learning_rate_option = "critic", "--critic_learning_rate"
    ways_out = " or a smaller --reward_clip_range"

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
        from rlhf_core.models.load import load_model_config
        from rlhf_core.models.loader import Models
        from rlhf_core.models.reward import Calibration, RewardHead, find_head, settle_padding
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
        self.prepare(models, model_config, total_steps, "rewards")
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

    def optimizer_step(self, step: Step) -> dict[str, float]:
        """One optimizer step; see `TrainedWorker.optimizer_step`."""
        from rlhf_core.metrics import Meter

        meter = Meter()
        for number, part in enumerate(step.parts, start=1):
            loss = self.value_loss(part, meter)
            self.strategy.backward(self.engine, loss, step.divisor, last=number == len(step.parts))
        stepped = {f"critic_{name}": value for name, value in self.step(step.number).items()}
        return meter.means(self.strategy) | stepped

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

    def export(self, folder: str) -> None:
        """See `TrainedWorker.export`: a reward model, from which a critic can start again."""
        if self.scale is not None:
            self.scale.write(self.model.config)  # on which its values are, also where it starts again
        super().export(folder)
