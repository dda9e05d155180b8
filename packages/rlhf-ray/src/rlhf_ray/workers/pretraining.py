"""The text whose language-model loss is added to the policy's (`--pretrain_data`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_data.config import SFTDataConfig
from rlhf_data.errors import InputError
from rlhf_data.sampler import Order
from rlhf_data.sft import prepare_sft
from rlhf_ray.batches import token_budget
from rlhf_ray.config import PPOConfig
from rlhf_ray.rewards import longest_sample

if TYPE_CHECKING:
    from rlhf_core.batch import Batch
    from rlhf_core.method import Window
    from rlhf_core.ranks import Ranks


class Pretraining:
    """Text, as many samples of it for every optimizer step as that has responses.

    What a step gets depends on its number alone, so a resumed run goes on with the same text.

    Args:
        config: the run's options.
        tokenizer: of the policy.

    Raises:
        InputError: the text cannot be read.
    """

    def __init__(self, config: PPOConfig, tokenizer: Any) -> None:
        self.size = config.batch.train_batch_size
        self.micro_size = config.batch.micro_train_batch_size
        self.longest = longest_sample(config)
        self.token_budget = token_budget(config, self.longest)
        try:
            data = prepare_sft(self.options(config), tokenizer, seed=config.batch.seed)
        except InputError as error:
            raise InputError(f"--pretrain_data: {error}") from error
        self.data, self.report = data.train, data.report
        self.order = Order(len(self.data), config.batch.seed)

    def options(self, config: PPOConfig) -> SFTDataConfig:
        """The options of reading it: every token is trained, and nothing held out."""
        data = config.data
        assert data.pretrain_data is not None
        return SFTDataConfig(
            dataset=data.pretrain_data,
            dataset_probs=data.pretrain_data_probs,
            train_split=data.pretrain_split,
            eval_split=data.pretrain_split,
            eval_ratio=0,
            input_key=data.pretrain_key,
            pretrain_mode=True,
            max_len=self.longest,
            strict_data=data.strict_data,
            data_cache_dir=data.data_cache_dir,
        )

    def window(self, step: int) -> Window:
        """The samples of an optimizer step, counted from 0; an epoch's last step has what is left of it."""
        from rlhf_core.method import Window

        epoch, place = divmod(step, self.order.steps_per_epoch(self.size))
        return Window(self.data, self.order.epoch(epoch)[place * self.size : (place + 1) * self.size])

    def micro_batches(self, window: Window, ranks: Ranks) -> Iterator[Batch]:
        """This rank's micro-batches of these samples."""
        from rlhf_core.batch import Batch
        from rlhf_core.micro_batches import micro_batches

        for _, batch in micro_batches(window, Batch.from_samples, ranks, self.micro_size, self.token_budget):
            yield batch

    def targets(self, window: Window) -> float:
        """Trained tokens of these samples, over all ranks."""
        return float(np.sum(window.num_targets))
