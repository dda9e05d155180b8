"""DeepSpeed: everything an optimizer step needs that is not the method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.config import OptimConfig, TrainConfig, ZeroConfig
from rlhf_core.deepspeed_config import clips_gradients, deepspeed_config
from rlhf_core.libraries import deepspeed
from rlhf_core.ranks import Meeting, Patience, Ranks

T = TypeVar("T")


class Strategy(Ranks):
    """One rank's view of a training run: how gradients become a step.

    Args:
        parallel: what DeepSpeed splits.
        optim: of the optimizer and its schedule.
        bf16: whether the model computes in bfloat16.
        seed: of torch's generator.
        patience: how long ranks wait for each other.
        meeting: where they meet (see `Ranks`).
    """

    def __init__(
        self,
        parallel: ZeroConfig,
        optim: OptimConfig,
        *,
        bf16: bool,
        seed: int,
        patience: Patience,
        meeting: Meeting | None = None,
    ) -> None:
        self.parallel, self.optim, self.seed = parallel, optim, seed
        super().__init__(patience, seed=seed, bf16=bf16, zero_stage=parallel.zero_stage, meeting=meeting)

    @classmethod
    def of(cls, config: TrainConfig) -> Strategy:
        """That of a run in which every rank trains one model."""
        parallel = config.parallel
        return cls(parallel, config.optim, bf16=config.model.bf16, seed=config.batch.seed, patience=parallel)

    def deepspeed_config(self) -> dict[str, Any]:
        return deepspeed_config(self.parallel, self.optim, bf16=self.bf16, world_size=self.world_size)

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
        if self.world_size == 1 and self.parallel.zero_stage == 0:
            engine.enable_backward_allreduce = False  # with nobody: it would copy all gradients to and fro
        torch.manual_seed(self.seed + self.rank)  # dropout differs between ranks, weights did not
        return engine

    def _optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """AdamW; norms and biases (everything with fewer than two dimensions) do not decay."""
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
        vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
        optim = self.optim
        groups = [{"params": matrices, "weight_decay": optim.l2}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=optim.learning_rate, betas=optim.adam_betas, fused=True
        )

    def _schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        from transformers import get_scheduler

        optim = self.optim
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
        norm = None
        if not clips_gradients(self.parallel, self.bf16):
            trained = [p for p in engine.module.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, self.optim.max_norm or float("inf"))
        engine.step()
        return float(norm if norm is not None else engine.get_global_grad_norm())

    def learning_rate(self, engine: Any) -> float:
        return engine.get_lr()[0]


class Alone:
    """What files are written with where there is but one process: it writes for all, and waits for nobody."""

    is_first, rank, world_size = True, 0, 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def share(self, compute: Callable[[], T]) -> T:
        """What `compute` returns."""
        return compute()

    def sum(self, values: list[float]) -> list[float]:
        """The values: there is nothing to add."""
        return list(values)

    def say(self, text: str) -> None:
        """Print."""
        print(text, flush=True)
