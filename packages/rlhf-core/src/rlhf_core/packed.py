"""Linear layers in the layout in which a CPU multiplies a few rows fastest, while their weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.models.backbone import Head

LEAST = 2**17
"""Weights of a layer from which on it is packed: oneDNN takes a hundredth of a millisecond to begin."""


@contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, float32 linear layers on the CPU use a packed copy of their weights, by oneDNN; without gradients.

    A response's next token is a product of a few rows with every weight of the model. The usual kernel rearranges the weights
    in each call; here it is done once. Writing 32 responses, a head of 288 x 32,000 takes a third of the time, layers of
    2,048 x 2,048 half, of 288 x 768 three quarters (two cores with AVX-512).

    Layers that are small or of other kinds, number formats and devices, and those that ZeRO-3 has split, are left alone. The copies take as much
    memory as the weights and go away at the end. A head is called for logits only.

    Args:
        model: whose layers; their weights must not change inside.
        rows: how many rows (tokens) a call usually has.
    """
    layers = (
        [module for module in model.modules() if can_be_packed(module)] if torch.backends.mkldnn.is_available() else []
    )
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = partial(linear, weight, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def can_be_packed(module: nn.Module) -> bool:
    """Whether it is a plain linear layer (or a head), not small, whose whole weight is here, in float32 on the CPU, and not
    wrapped.
    """
    if type(module) not in (nn.Linear, Head) or "forward" in module.__dict__ or hasattr(module.weight, "ds_id"):
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST


def linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Any:
    """`x Wᵀ + b` with a packed `weight`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
