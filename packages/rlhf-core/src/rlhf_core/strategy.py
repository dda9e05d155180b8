"""Ranks, devices and DeepSpeed: everything an optimizer step needs that is not the method."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core.config import TrainConfig
from rlhf_core.deepspeed_config import clips_gradients, deepspeed_config, frozen_config
from rlhf_core.libraries import deepspeed

T = TypeVar("T")


class Strategy:
    """One rank's view of the run: who it is, where it computes, and how gradients become a step.

    Args:
        config: the run's options.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.timeout = timedelta(minutes=config.parallel.dist_timeout)
        self._join(cuda)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.batch.seed)

    def _join(self, cuda: bool) -> None:
        """Meet the other ranks. A single rank needs no address and no port."""
        if not dist.is_initialized():
            alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=self.timeout, **alone)
        deepspeed().init_distributed(dist_backend="nccl" if cuda else "gloo", dist_init_required=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

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

    def prepare_frozen(self, model: nn.Module, *, offload: bool) -> Any:
        """Put a model that is not trained where it computes: whole on the device, or split over the ranks under ZeRO-3.

        Args:
            model: without gradients.
            offload: keep its weights on the CPU; each layer is brought to the device when it is used.

        Returns:
            Something to call like the module.
        """
        if not (offload or self.config.parallel.zero_stage == 3):
            return model.to(self.device)
        with redirect_stdout(None):
            engine, *_ = deepspeed().initialize(
                model=model, config=self.frozen_config(offload), dist_init_required=False
            )
        engine.eval()
        # Not the engine: it would watch what its call returns for a backward pass, and a teacher's call returns the
        # student's loss (see `KD.objective`). What gathers the weights is in the module's own hooks.
        return engine.module

    def frozen_config(self, offload: bool) -> dict[str, Any]:
        return frozen_config(bf16=self.config.model.bf16, world_size=self.world_size, offload=offload)

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

    def sum(self, values: list[float] | Tensor) -> list[float]:
        """Add `values` up over ranks, in float64."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on the first rank; nothing on the others."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.gather_object(value, box if self.is_first else None)
        return box if self.is_first else []

    def share(self, compute: Callable[[], T]) -> T:
        """Run `compute` on the first rank and give its (small) result to every rank."""
        box = [compute() if self.is_first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        """Print once for all ranks."""
        if self.is_first:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the process group, if other processes are in it: a single rank may run again in this process."""
        if self.world_size > 1:
            dist.destroy_process_group()


class Alone:
    """What writing a model needs of a `Strategy`, where there is but one process and nothing is trained."""

    is_first = True

    def barrier(self) -> None:
        """Nobody to wait for."""
