"""The processes of a run: who each of them is, where it computes, and how they speak with each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core.deepspeed_config import frozen_config
from rlhf_core.libraries import deepspeed

T = TypeVar("T")


class Meeting(NamedTuple):
    """Where ranks meet that no launcher has told: at a store which the first one keeps open (see `open_meeting`)."""

    address: str
    """Of the first rank's node."""

    port: int
    """Of the store."""

    rank: int
    """The rank that goes there."""

    world_size: int
    """How many are expected."""


def open_meeting(address: str, world_size: int) -> dist.TCPStore:
    """A store for ranks to meet at, on a port (`.port`) that the system chooses. It must be kept while they need each other.

    It listens at the address alone: who reaches a store can join its ranks.
    """
    family, *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.bind((address, 0))
    listening.listen()
    port = listening.getsockname()[1]
    return dist.TCPStore(
        address, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


class Patience(Protocol):
    """Options that say how long ranks wait for each other."""

    @property
    def dist_timeout(self) -> float:
        """Minutes."""
        ...


class Ranks:
    """One rank's view of all ranks.

    Args:
        config: how long ranks wait for each other.
        seed: of torch's generator, the same on every rank.
        bf16: whether models compute in bfloat16.
        zero_stage: 3 for frozen models that are split over the ranks.
        meeting: where they meet; by default where the launcher's environment variables say, or nowhere for a single rank.
    """

    def __init__(
        self, config: Patience, *, seed: int, bf16: bool, zero_stage: int, meeting: Meeting | None = None
    ) -> None:
        self.bf16, self.zero_stage = bf16, zero_stage
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.timeout = timedelta(minutes=config.dist_timeout)
        self._join(cuda, meeting)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)

    def _join(self, cuda: bool, meeting: Meeting | None) -> None:
        """Meet the other ranks. A single rank needs no address and no port."""
        # Imported first: what it imports takes the process group, if there is one, as a default argument and keeps it for
        # ever. A group that is not destroyed has threads, and one that is still busy when Python ends aborts the process.
        library = deepspeed()
        if not dist.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=self.timeout, **self._rendezvous(meeting))
        library.init_distributed(dist_backend="nccl" if cuda else "gloo", dist_init_required=False)

    def _rendezvous(self, meeting: Meeting | None) -> dict[str, Any]:
        """What torch is told of where ranks meet; nothing where the environment says it."""
        if meeting:
            store = dist.TCPStore(
                meeting.address,
                meeting.port,
                meeting.world_size,
                is_master=False,
                timeout=self.timeout,
                wait_for_workers=False,
            )
            return {"store": store, "rank": meeting.rank, "world_size": meeting.world_size}
        return {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def prepare_frozen(self, model: nn.Module, *, offload: bool) -> Any:
        """Put a model that is not trained where it computes: whole on the device, or split over the ranks under ZeRO-3.

        Args:
            model: without gradients.
            offload: keep its weights on the CPU; each layer is brought to the device when it is used.

        Returns:
            Something to call like the module.
        """
        if not (offload or self.zero_stage == 3):
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
        return frozen_config(bf16=self.bf16, world_size=self.world_size, offload=offload)

    def sum(self, values: list[float] | Tensor) -> list[float]:
        """Add `values` up over ranks, in float64."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def max(self, values: list[float] | Tensor) -> list[float]:
        """The largest of each of `values` over ranks."""
        largest = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

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
