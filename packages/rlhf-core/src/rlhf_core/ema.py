"""A moving average of the weights that are trained, and a model that has it for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core.models.backbone import Backbone


class EMA:
    """average ← β · average + (1 - β) · weight, from the weights that training starts with, in float32 on the CPU.

    Under ZeRO-3 every rank averages its own shards, otherwise the first rank the whole weights.

    Args:
        policy: the model as it is trained.
        beta: what is kept of the average at every update.
        is_first: whether this is the first rank.
    """

    def __init__(self, policy: Backbone, beta: float, *, is_first: bool) -> None:
        self.beta = beta
        self.trained: dict[str, Any] = {
            name: parameter
            for name, parameter in policy.base.named_parameters()
            if parameter.requires_grad and (is_first or is_split(parameter))
        }
        self.averages = {name: held(parameter).float().cpu().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, after an optimizer step."""
        for name, parameter in self.trained.items():
            self.averages[name].lerp_(held(parameter).float().cpu(), 1 - self.beta)

    @contextmanager
    def shown(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Some parameters, by their names in the base model, have the average as their value while the context lasts.

        Every rank must enter it, and gather weights inside; weights that were whole before are whole again after it.
        """
        shown = {name: parameter for name, parameter in parameters.items() if name in self.averages}
        kept = {name: held(parameter).clone() for name, parameter in shown.items()}
        whole = {name for name, parameter in shown.items() if is_split(parameter) and is_whole(parameter)}
        for name, parameter in shown.items():
            put(parameter, self.averages[name])
        try:
            yield
        finally:
            for name, parameter in shown.items():
                put(parameter, kept[name])
                if name in whole:
                    parameter.all_gather([parameter])  # type: ignore[attr-defined]

    def save(self, path: Path) -> None:
        """Write this rank's averages."""
        save_file(self.averages, path)

    def load(self, path: Path) -> None:
        """Take the averages that `save` wrote."""
        for name, average in load_file(path).items():
            self.averages[name].copy_(average)


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 splits a parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def is_whole(parameter: Any) -> bool:
    """Whether a split parameter is whole at the moment, as ZeRO-3 leaves small ones."""
    return parameter.ds_status.name == "AVAILABLE"


def held(parameter: Any) -> Tensor:
    """What this rank has of a parameter: its shard, or all of it."""
    return parameter.ds_tensor.detach() if is_split(parameter) else parameter.detach()


@torch.no_grad()
def put(parameter: Any, value: Tensor) -> None:
    """Give what this rank has of a parameter another value; a split one is then not whole, whatever it was."""
    if is_split(parameter):
        parameter.ds_secondary_tensor = None  # ZeRO++'s second copy would be gathered in its place
        if is_whole(parameter):
            parameter.partition()
    held(parameter).copy_(value)
