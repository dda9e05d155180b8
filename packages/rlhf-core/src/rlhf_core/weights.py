"""The weights of a model as a Hugging Face checkpoint names them: gathered a layer at a time, adapters added on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from rlhf_core.ema import EMA
from rlhf_core.libraries import gathered
from rlhf_core.models.backbone import Backbone
from rlhf_data.errors import RunError

ADAPTER = "default"
"""PEFT's name of the only adapter of a model."""

BESIDE = re.compile(r"\.(lora_[A-Za-z_]+|original_module)\.")
"""In the names of what PEFT keeps beside the weights that a checkpoint has."""


def weights(
    policy: Backbone, *, tied: bool = False, wanted: bool = True, average: EMA | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, whole and under the names that its checkpoint has, in the same order every time.

    Under ZeRO-3 they are gathered a layer at a time, so every rank must run through all of them. With LoRA, what an adapter
    adds is computed in float32 from the weights as they are; the model itself is not changed.

    Args:
        policy: the model.
        tied: also give weights that are another one under a second name: some engines keep a copy of a tied head.
        wanted: whether this rank wants them; one that does not only takes part in gathering, and gets none.
        average: the moving average whose values the weights have meanwhile, if any.

    Yields:
        A name and a weight on its device, in the model's number format. It may be the model's own memory, and holds until the
        next one is asked for.

    Raises:
        RunError: an adapter changes an embedding that the head is tied to, which no checkpoint can say.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = policy.base
    copies: Mapping[str, str] = (getattr(base, "all_tied_weights_keys", None) or {}) if tied else {}
    for parameters in layers(base):
        with average.shown(parameters) if average else nullcontext(), gathered(list(parameters.values())):
            if wanted:
                whole = merged(base, parameters)
                whole |= {copy: whole[source] for copy, source in copies.items() if source in whole}
                yield from revert_weight_conversion(base, whole).items()


def layers(base: Any) -> Iterator[dict[str, Tensor]]:
    """Parameters and saved buffers by name, grouped by layer. Tied weights appear once, under the name that is kept."""
    tied, saved = set(getattr(base, "all_tied_weights_keys", None) or {}), base.state_dict().keys()
    tensors = dict(base.named_parameters()) | {name: x for name, x in base.named_buffers() if name in saved}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in tied:
            layer = re.match(r".*?\.\d+\.", name)
            groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    yield from groups.values()


def merged(base: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole parameters as the model has them to the weights that it computes with, under names without PEFT's."""
    tied = set((getattr(base, "all_tied_weights_keys", None) or {}).values())
    whole = {}
    for name, parameter in parameters.items():
        if BESIDE.search(name):
            continue
        own = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        weight = plain(parameter)
        if name.endswith(".base_layer.weight"):
            if own in tied:
                raise RunError(
                    f"the adapter changes {own}, which other weights of the model are tied to, and no checkpoint can say "
                    "that: take it out of --target_modules"
                )
            layer = base.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = (weight.float() + added(layer)).to(weight.dtype)
        whole[own] = weight
    return whole


def plain(parameter: Tensor) -> Tensor:
    """A weight without its 4 bits, if it is kept in them."""
    if not hasattr(parameter, "quant_state"):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]


def added(layer: Any) -> Tensor:
    """What a layer's adapter adds to its weight, in float32. Source: Hu et al. 2021, eq. 3 (arXiv:2106.09685)."""
    if ADAPTER in layer.lora_embedding_A:
        a, b, transposed = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER], True
    else:
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        transposed = getattr(layer, "fan_in_fan_out", False)
    product = layer.scaling[ADAPTER] * (b.detach().float() @ a.detach().float())
    return product.T if transposed else product
