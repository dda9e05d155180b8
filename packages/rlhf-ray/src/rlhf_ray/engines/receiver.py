"""What takes weights from the policy inside vLLM, and says what it has got: registered there as weight-transfer engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_ray.engines.transfer import broadcast, buckets, checksum, described, join, numbers, read


class Summing:
    """A model that notes the checksum of every weight that it is given to load."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.checksums: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        weights = list(weights)
        self.checksums |= {name: checksum(weight) for name, weight in weights}
        return self.model.load_weights(weights)


class Checksums:
    """What vLLM's workers can be asked besides: an extension class."""

    weight_transfer_engine: Any

    def weight_checksums(self) -> dict[str, int]:
        """Those of the weights that the last update loaded, by name."""
        return self.weight_transfer_engine.checksums


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where to meet the policy; the fields that NCCL's engine has too mean the same."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout: float
    """Seconds that a broadcast may take."""


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What comes, in order: see `rlhf_ray.engines.transfer.update_info`."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives buckets of weights over gloo and has the model load them."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: Any = None
    model: Any
    checksums: dict[str, int]

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Meet the policy and the other engines; returns when all are there."""
        self.group = None
        store = TCPStore(init_info.master_address, init_info.master_port, is_master=False, wait_for_workers=False)
        rank = init_info.rank_offset + self.parallel_config.rank
        self.timeout = init_info.timeout
        self.group = join(store, rank, init_info.world_size)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load all buckets.

        Raises:
            RuntimeError: the policy or another engine is gone. The model then has weights of two updates, or none at all, and
                must not write before a whole update; the group is left, so that nobody waits for this engine.
        """
        if self.group is None:
            raise RuntimeError("this engine is not connected with the policy")
        manifest = described(update_info.names, update_info.dtype_names, update_info.shapes)
        model = Summing(self.model)
        try:
            with disable_mtp_completeness_check():
                for bucket in buckets([weight.size for weight in manifest]):
                    buffer = torch.empty(bucket.size, dtype=torch.uint8)
                    broadcast(self.group, buffer, self.timeout).wait()
                    # a layer is loaded when all its weights have come: they are kept till then, and so is their buffer
                    model.load_weights(read(buffer.to(self.device), bucket, manifest))
        except BaseException:
            self.group = None
            self.finish_weight_update()  # forgets the layers that have come in part: the next update brings them anew
            raise
        self.checksums = numbers(model.checksums)

    def shutdown(self) -> None:
        self.group = None


class NCCLReceiver(NCCLWeightTransferEngine):
    """vLLM's own over NCCL."""

    checksums: dict[str, int]

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load all weights."""
        model, self.model = self.model, Summing(self.model)
        try:
            super().receive_weights(update_info)
            self.checksums = numbers(self.model.checksums)
        finally:
            self.model = model
