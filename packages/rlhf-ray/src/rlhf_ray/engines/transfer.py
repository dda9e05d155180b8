"""How the policy's weights reach vLLM engines: in buckets of bytes, broadcast from its first rank to all engines at once.

Engines are told names, formats and shapes with the call that has them listen, so an update is one call of each engine and one
of the policy, whatever the size of the model. The first rank of the policy is rank 0 of the group, and the devices of the
engines follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from rlhf_data.errors import RunError
from rlhf_ray.config import PPOConfig

SyncBackend = Literal["gloo", "nccl"]

JOIN_SECONDS = 120
"""How long members of a group, all of which have been told to come, wait for each other."""

BUCKET = 256 * 2**20
"""Bytes at which a bucket is full."""

ALIGNMENT = 16
"""Bytes; where a weight starts in a bucket is a multiple of it, so that it can be read in place in any number format."""


RECEIVERS: dict[SyncBackend, str] = {"gloo": "GlooReceiver", "nccl": "NCCLReceiver"}
"""What takes weights inside vLLM, in `rlhf_ray.engines.receiver`."""


def sync_backend(config: PPOConfig, *, on_gpu: bool) -> SyncBackend:
    """What carries weights: `--vllm_sync_backend`, but gloo without GPUs, and where engines share theirs with the policy
    (`--colocate_all`): NCCL takes no two members on one device.
    """
    return config.engines.vllm_sync_backend if on_gpu and not config.cluster.colocate_all else "gloo"


@dataclass(frozen=True)
class Described:
    """What engines are told of a weight."""

    name: str
    """As a Hugging Face checkpoint has it."""

    dtype: str
    """Number format by torch's name, such as `bfloat16`."""

    shape: tuple[int, ...]
    """Of the whole weight."""

    @classmethod
    def of(cls, name: str, weight: Tensor) -> Described:
        """That of a weight."""
        return cls(name, str(weight.dtype).removeprefix("torch."), tuple(weight.shape))

    @property
    def format(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.format.itemsize * math.prod(self.shape)


def update_info(manifest: Sequence[Described]) -> dict[str, Any]:
    """What vLLM's own engines want to be told of an update; the opposite of `described`."""
    return {
        "names": [weight.name for weight in manifest],
        "dtype_names": [weight.dtype for weight in manifest],
        "shapes": [list(weight.shape) for weight in manifest],
    }


def described(names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> list[Described]:
    """The weights of an update, in order."""
    return [Described(name, dtype, tuple(shape)) for name, dtype, shape in zip(names, dtype_names, shapes, strict=True)]


class Bucket(NamedTuple):
    """Weights that travel together."""

    first: int
    """Number of the first weight."""

    starts: list[int]
    """Where each weight starts, in bytes."""

    size: int
    """Bytes of all, with the gaps between them."""


def buckets(sizes: Sequence[int], full: int = BUCKET) -> Iterator[Bucket]:
    """Divide weights of some sizes into buckets: neighbours go together until there are `full` bytes of them.

    With `full` 32, weights of 10, 20, 30 and 8 bytes are two buckets: `(0, [0, 16], 36)` and `(2, [0, 32], 40)`.
    """
    first, starts, end = 0, [], 0
    for number, size in enumerate(sizes):
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + size
        if end >= full:
            yield Bucket(first, starts, end)
            first, starts, end = number + 1, [], 0
    if starts:
        yield Bucket(first, starts, end)


def fill(buffer: Tensor, start: int, weight: Tensor) -> None:
    """Copy a weight into a buffer of bytes, from any device."""
    flat = weight.detach().reshape(-1)
    buffer[start : start + flat.nbytes].view(weight.dtype).copy_(flat)


def read(buffer: Tensor, bucket: Bucket, manifest: Sequence[Described]) -> list[tuple[str, Tensor]]:
    """The weights of a bucket, in place."""
    weights = manifest[bucket.first : bucket.first + len(bucket.starts)]
    return [
        (weight.name, buffer[start : start + weight.size].view(weight.format).view(weight.shape))
        for start, weight in zip(bucket.starts, weights, strict=True)
    ]


def checksum(weight: Tensor) -> Tensor:
    """The sum of a weight's bytes, in words of eight and modulo 2^64, as a number on its device. Equal bits have equal sums,
    wherever they are; one bit that differs shows, elements that have changed places do not.
    """
    flat = weight.detach().reshape(-1)
    if flat.storage_offset() % 8:  # words start where a word can
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    return flat[:whole].view(torch.int64).sum() + flat[whole:].view(torch.uint8).sum()


def numbers(checksums: Mapping[str, Tensor]) -> dict[str, int]:
    """Checksums as numbers of Python, by weight; fetched from their device at once."""
    values = torch.stack(list(checksums.values())).tolist() if checksums else []
    return dict(zip(checksums, values, strict=True))


def join(store: Any, rank: int, world_size: int) -> dist.ProcessGroupGloo:
    """Meet the other members of a gloo group, which is no part of `torch.distributed`'s own; returns when all are there.

    Args:
        store: where they meet.
        rank: of this member.
        world_size: how many there are.
    """
    return dist.ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timedelta(seconds=JOIN_SECONDS))


class WeightSender:
    """The policy's side of the group. It is rebuilt whenever an engine is started anew: groups cannot change a member.

    Args:
        backend: what carries the weights.
        timeout: seconds that a broadcast may take.
    """

    def __init__(self, backend: SyncBackend, timeout: float) -> None:
        self.backend, self.timeout = backend, timeout
        self.store: Any = None
        self.group: Any = None
        self.manifest: list[Described] = []

    def open(self, address: str, world_size: int) -> int:
        """Open a place for the group to meet at, and leave the old group.

        Args:
            address: of this node.
            world_size: this process and all devices of the engines.

        Returns:
            Its port, which the system chooses and which stays open.
        """
        from rlhf_core.ranks import open_meeting

        self.group = None
        self.store, self.world_size = open_meeting(address, world_size), world_size
        return self.store.port

    def connect(self) -> None:
        """Meet the engines; returns when all are there.

        Raises:
            RuntimeError: some did not come in time.
        """
        if self.backend == "gloo":
            self.group = join(self.store, 0, self.world_size)
            return
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        meeting = StatelessProcessGroup(rank=0, world_size=self.world_size, store=self.store)
        self.group = PyNcclCommunicator(meeting, device=torch.cuda.current_device())

    def describe(self, weights: Iterable[tuple[str, Tensor]]) -> list[Described]:
        """Remember what an update consists of; every update consists of the same."""
        self.manifest = [Described.of(name, weight) for name, weight in weights]
        return self.manifest

    def send(self, weights: Iterator[tuple[str, Tensor]]) -> dict[str, int]:
        """Broadcast weights to the engines, which must have been told to listen.

        Args:
            weights: those that `describe` saw, in the same order. They are run through to the end also when engines are
                gone, for other ranks of the policy may take part in gathering them.

        Returns:
            The checksum of every weight, by name.

        Raises:
            RunError: the weights are not those that were described.
            RuntimeError: an engine is gone.
        """
        if self.group is None or not self.manifest:
            raise RunError("the policy is not connected with the engines: `connect` and `describe` come before `send`")
        checksums: dict[str, Tensor] = {}
        checked = self._checked(weights, checksums)
        try:
            self._send_gloo(checked) if self.backend == "gloo" else self._send_nccl(checked)
        except BaseException:
            self.group = None  # what is left of it would hold back the engines that are still there
            for _ in weights:
                pass
            raise
        return numbers(checksums)

    def _send_gloo(self, weights: Iterator[Tensor]) -> None:
        """One bucket is filled while the one before it is under way."""
        sent: tuple[Any, Tensor] | None = None
        for bucket in buckets([weight.size for weight in self.manifest]):
            buffer = torch.empty(bucket.size, dtype=torch.uint8)
            for start in bucket.starts:
                fill(buffer, start, next(weights))
            if sent:
                sent[0].wait()
            sent = broadcast(self.group, buffer, self.timeout), buffer
        if sent:
            sent[0].wait()
        next(weights, None)  # has it noticed if there are more

    def _send_nccl(self, weights: Iterator[Tensor]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=(("", weight) for weight in weights),
            group=self.group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=BUCKET,
        )
        torch.cuda.current_stream().synchronize()

    def _checked(self, weights: Iterable[tuple[str, Tensor]], checksums: dict[str, Tensor]) -> Iterator[Tensor]:
        """The weights, each compared with what engines expect: one out of place would be loaded as another. Their checksums go
        to `checksums`.
        """
        expected = iter(self.manifest)
        for name, weight in weights:
            own, wanted = Described.of(name, weight), next(expected, None)
            if own != wanted:
                raise RunError(f"the policy's weights have changed: {own} comes where engines expect {wanted}")
            checksums[name] = checksum(weight)
            yield weight
        if (missing := next(expected, None)) is not None:
            raise RunError(f"the policy's weights have changed: nothing comes where engines expect {missing}")


def broadcast(group: Any, buffer: Tensor, timeout: float) -> Any:
    """Start sending a buffer from rank 0 to all, or receiving it; `.wait()` returns when it is through.

    Args:
        group: what `join` returned.
        buffer: to send, or to fill.
        timeout: seconds that it may take.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.timeout = 0, timedelta(seconds=timeout)
    return group.broadcast([buffer], options)


def register() -> None:
    """Tell vLLM of what receives weights; in every process of it, where its entry point `vllm.general_plugins` calls this."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, receiver in RECEIVERS.items():
        if (name := receiver_name(backend)) not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "rlhf_ray.engines.receiver", receiver)


def receiver_name(backend: SyncBackend) -> str:
    """What vLLM knows a receiver of ours by; it has an `nccl` of its own."""
    return f"rlhf_{backend}"
