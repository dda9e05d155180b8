"""The models of a run, loaded the same way: attention, number format, ZeRO stage, start-up check."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_core.config import LoraConfig, ModelConfig
from rlhf_core.method import Frozen
from rlhf_core.models.attention import padded_implementation, ragged_implementation
from rlhf_core.models.backbone import Backbone
from rlhf_core.models.check import check_model
from rlhf_core.models.load import load_model, load_model_config
from rlhf_core.models.policy import Policy
from rlhf_core.models.reward import HEAD, RewardHead, RewardModel, forget_calibration
from rlhf_core.ranks import Ranks
from rlhf_core.strategy import Strategy


class Models:
    """Loads models for a run.

    Args:
        model: the trained model, and how all of them are loaded.
        ranks: the ranks; a `Strategy` where a model is trained.
        ragged: whether samples are laid end to end.
        share_prefix: whether batches then lay prefixes that samples share once.
        head: of the reward model to train; None for a policy.
        lora: adapters of the trained model.
    """

    def __init__(
        self,
        model: ModelConfig,
        ranks: Ranks,
        *,
        ragged: bool,
        share_prefix: bool = False,
        head: RewardHead | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        self.model, self.ranks, self.head, self.lora = model, ranks, head, lora or LoraConfig()
        self.ragged, self.share_prefix = ragged, ragged and share_prefix
        self.dtype = torch.bfloat16 if model.bf16 else torch.float32

    def trained(self, model_config: Any) -> Backbone:
        """The model to train, not yet prepared."""
        assert isinstance(self.ranks, Strategy), "only those train who have a strategy"
        if self.ragged:
            self.ranks.say(f"attention: {self._ragged_implementation()[1]}")
        if self.head:
            found = self.head.found
            self.ranks.say(
                f"head: {f'`{found}` of {self.model.pretrain}' if found else 'a new one'}, saved as `{HEAD}`"
            )
        model = load_model(
            self.model,
            self.lora,
            attn_implementation=self._attention(model_config),
            deepspeed=self.ranks.deepspeed_config() if self.ranks.zero_stage == 3 else None,
            head=self.head,
        )
        kind = RewardModel if self.head else Policy
        trained = kind(model, ragged=self.ragged, balance=bool(self.model.aux_loss_coef))
        forget_calibration(trained.config)  # that of a reward model which is trained on is about other weights
        return trained

    def frozen(self, frozen: Frozen) -> Any:
        """A frozen policy, prepared and checked."""
        options, model_config = frozen.options(self.model), self.config_of(frozen)
        splits = self.ranks.zero_stage == 3 or frozen.offload
        model = load_model(
            options,
            None,
            attn_implementation=self._attention(model_config),
            deepspeed=self.ranks.frozen_config(frozen.offload) if splits else None,
            option=frozen.option,
        )
        prepared = self.ranks.prepare_frozen(Policy(model, ragged=self.ragged), offload=frozen.offload)
        self.check(prepared, model_config)
        return prepared

    def config_of(self, frozen: Frozen) -> Any:
        """The architecture of a frozen model."""
        return load_model_config(frozen.options(self.model), frozen.option)

    def check(self, model: Any, model_config: Any, verb: str = "token_logps") -> None:
        """The start-up check of a prepared model."""
        vocabulary = model_config.get_text_config().vocab_size
        check_model(model, verb, vocabulary, self.ranks.device, self.dtype, self.share_prefix)

    def _attention(self, model_config: Any) -> str | None:
        if self.ragged:
            return self._ragged_implementation()[0]
        return padded_implementation(model_config.get_text_config())

    def _ragged_implementation(self) -> tuple[str, str]:
        return ragged_implementation(self.ranks.device, self.dtype, self.share_prefix)
