"""Everything that a trained model has on its device, put on the host for a while: others then use the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Offload:
    """The memory of a DeepSpeed engine, put away and taken back.

    Whole storages are moved, and not tensors: DeepSpeed's weights, gradients and states are views of a few flat buffers,
    which stay views of them.

    Args:
        engine: what `Strategy.prepare` returned.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.away: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def put_away(self) -> None:
        """Move what is on an accelerator to the host; nothing to do where it is there already."""
        if not self.away:
            self.away = [
                (storage, emptied(storage)) for storage in storages(tensors_of(self.engine)) if leaves(storage)
            ]
            if self.away:
                torch.cuda.empty_cache()

    def take_back(self) -> None:
        """Move everything back to where it was; nothing to do if it is there."""
        while self.away:
            storage, host = self.away.pop()
            storage.resize_(host.nbytes())
            storage.copy_(host)


def leaves(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is on an accelerator."""
    return storage.device.type not in ("cpu", "meta")


def emptied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Give the memory of a storage back; returns a copy of it on the host."""
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda").untyped_storage()
    host.copy_(storage)
    storage.resize_(0)
    return host


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The memory of tensors, each once."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return [storage for storage in found.values() if storage.nbytes()]


def tensors_of(engine: Any) -> Iterator[Tensor]:
    """Weights, with ZeRO-3's shards, and all that the optimizer has: master weights, states, gradient buffers."""
    for parameter in engine.module.parameters():
        yield parameter
        yield from inside([parameter.grad, *(getattr(parameter, name, None) for name in ("ds_tensor", "grad_accum"))])
    yield from engine.module.buffers()
    optimizer = engine.optimizer
    while optimizer is not None:
        yield from inside(vars(optimizer))
        optimizer = vars(optimizer).get("optimizer")


def inside(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from inside(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from inside(each)
