"""DeepSpeed: everything an optimizer step needs that is not the method."""

from __future__ import annotations

from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.config import TrainConfig
from rlhf_core.deepspeed_config import clips_gradients, deepspeed_config
from rlhf_core.libraries import deepspeed
from rlhf_core.ranks import Ranks


class Strategy(Ranks):
    """One rank's view of a training run: how gradients become a step.

    Args:
        config: the run's options.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        super().__init__(
            config.parallel, seed=config.batch.seed, bf16=config.model.bf16, zero_stage=config.parallel.zero_stage
        )

    def deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        return deepspeed_config(config.parallel, config.optim, bf16=config.model.bf16, world_size=self.world_size)

    def prepare(self, policy: nn.Module, total_steps: int) -> Any:
        """Hand the model, its optimizer and its schedule to DeepSpeed.

        Args:
            policy: the module to train.
            total_steps: optimizer steps of the whole run, which the schedule spans.

        Returns:
            A DeepSpeed engine: call it like the module; `backward` and `step` go through this strategy.
        """
        optimizer = self._optimizer(policy)
        with redirect_stdout(None):  # its bfloat16 optimizer prints a dozen lines of memory readings
            engine, *_ = deepspeed().initialize(
                model=policy,
                optimizer=optimizer,
                lr_scheduler=self._schedule(optimizer, total_steps),
                config=self.deepspeed_config(),
                dist_init_required=False,
            )
        torch.manual_seed(self.config.batch.seed + self.rank)  # dropout differs between ranks, weights did not
        return engine

    def _optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """AdamW; norms and biases (everything with fewer than two dimensions) do not decay."""
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
        vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
        optim = self.config.optim
        groups = [{"params": matrices, "weight_decay": optim.l2}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=optim.learning_rate, betas=optim.adam_betas, fused=True
        )

    def _schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        from transformers import get_scheduler

        optim = self.config.optim
        extra = {"min_lr_rate": optim.min_lr_ratio} if optim.lr_scheduler == "cosine_with_min_lr" else None
        warmup = round(optim.lr_warmup_ratio * total_steps)
        return get_scheduler(optim.lr_scheduler, optimizer, warmup, total_steps, scheduler_specific_kwargs=extra)

    def backward(self, engine: Any, loss_sum: Tensor, count: float, *, last: bool) -> None:
        """Add the gradient of `loss_sum / count`. This is the one place that divides, and that knows DeepSpeed averages.

        Args:
            engine: what `prepare` returned.
            loss_sum: this micro-batch's loss, summed.
            count: what the whole optimizer step is divided by, over all micro-batches and ranks.
            last: whether this micro-batch completes the optimizer step.
        """
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss_sum * (self.world_size / count))

    def step(self, engine: Any) -> float:
        """Clip, update the weights, advance the schedule; returns the gradient norm before clipping."""
        parallel, model, optim = self.config.parallel, self.config.model, self.config.optim
        norm = None
        if not clips_gradients(parallel, model.bf16):
            trained = [p for p in engine.module.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, optim.max_norm or float("inf"))
        engine.step()
        return float(norm if norm is not None else engine.get_global_grad_norm())

    def learning_rate(self, engine: Any) -> float:
        return engine.get_lr()[0]


class Alone:
    """What writing a model needs of a `Strategy`, where there is but one process and nothing is trained."""

    is_first = True

    def barrier(self) -> None:
        """Nobody to wait for."""
