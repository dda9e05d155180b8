"""The models of a run, loaded the same way: attention, number format, ZeRO stage, start-up check."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_core.config import TrainConfig
from rlhf_core.method import Frozen, Method
from rlhf_core.models.attention import padded_implementation, ragged_implementation
from rlhf_core.models.backbone import Backbone
from rlhf_core.models.check import check_model
from rlhf_core.models.load import load_model, load_model_config
from rlhf_core.models.policy import Policy
from rlhf_core.models.reward import HEAD, RewardModel, forget_calibration
from rlhf_core.strategy import Strategy


class Models:
    """Loads models for a run.

    Args:
        config: the run's options.
        strategy: the ranks.
        method: what is trained, and how batches are laid out.
        ragged: whether samples are laid end to end.
    """

    def __init__(self, config: TrainConfig, strategy: Strategy, method: Method, *, ragged: bool) -> None:
        self.config, self.strategy, self.method, self.ragged = config, strategy, method, ragged
        self.dtype = torch.bfloat16 if config.model.bf16 else torch.float32

    def trained(self, model_config: Any) -> Backbone:
        """The model to train, not yet prepared."""
        config = self.config
        if self.ragged:
            self.strategy.say(f"attention: {self._ragged_implementation()[1]}")
        if self.method.head:
            found = self.method.head.found
            self.strategy.say(
                f"head: {f'`{found}` of {config.model.pretrain}' if found else 'a new one'}, saved as `{HEAD}`"
            )
        model = load_model(
            config.model,
            config.lora,
            attn_implementation=self._attention(model_config),
            deepspeed=self.strategy.deepspeed_config() if config.parallel.zero_stage == 3 else None,
            head=self.method.head,
        )
        kind = RewardModel if self.method.head else Policy
        trained = kind(model, ragged=self.ragged, balance=bool(config.model.aux_loss_coef))
        forget_calibration(trained.config)  # that of a reward model which is trained on is about other weights
        return trained

    def frozen(self, frozen: Frozen) -> Any:
        """A frozen policy, prepared and checked."""
        options, model_config = frozen.options(self.config.model), self.config_of(frozen)
        splits = self.config.parallel.zero_stage == 3 or frozen.offload
        model = load_model(
            options,
            None,
            attn_implementation=self._attention(model_config),
            deepspeed=self.strategy.frozen_config(frozen.offload) if splits else None,
            option=frozen.option,
        )
        prepared = self.strategy.prepare_frozen(Policy(model, ragged=self.ragged), offload=frozen.offload)
        self.check(prepared, model_config)
        return prepared

    def config_of(self, frozen: Frozen) -> Any:
        """The architecture of a frozen model."""
        return load_model_config(frozen.options(self.config.model), frozen.option)

    def check(self, model: Any, model_config: Any, verb: str = "token_logps") -> None:
        """The start-up check of a prepared model."""
        vocabulary = model_config.get_text_config().vocab_size
        share = self.ragged and self.method.share_prefix
        check_model(model, verb, vocabulary, self.strategy.device, self.dtype, share)

    def _attention(self, model_config: Any) -> str | None:
        if self.ragged:
            return self._ragged_implementation()[0]
        return padded_implementation(model_config.get_text_config())

    def _ragged_implementation(self) -> tuple[str, str]:
        return ragged_implementation(self.strategy.device, self.dtype, self.method.share_prefix)
