"""How much memory a run will take, estimated from its architecture alone: no weights, no device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

from rlhf_core.config import ModelConfig, TrainConfig
from rlhf_core.deepspeed_config import grad_accum_dtype
from rlhf_data.errors import InputError


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one rank by component, in bytes. Activations are the roughest part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    frozen: float = 0.0
    """The reference model, or the teacher."""
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """What the device holds at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.frozen

    def format(self, available: float) -> str:
        """One line per component that matters, and a warning if it will not fit."""
        parts = ", ".join(
            f"{f.name} {size(getattr(self, f.name))}"
            for f in fields(self)
            if f.name != "offloaded" and (f.name != "frozen" or self.frozen)
        )
        host = f"; on the host {size(self.offloaded)}" if self.offloaded else ""
        short = f"\n              WARNING: more than the {size(available)} there are" if self.total > available else ""
        return f"about {size(self.total)} per rank ({parts}){host}{short}"


def size(count: float) -> str:
    """Bytes as people write them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def available_memory(ranks_here: int) -> float:
    """Memory that one rank may take, in bytes: of its GPU, or its share of the machine."""
    import os

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here


def count_parameters(config: TrainConfig, model_config: Any, reward_head: Any = None) -> tuple[int, int]:
    """All and trained parameters, from the architecture alone (no weights, no memory).

    Raises:
        InputError: the architecture has no causal language model (or, with a head, no reward model) in transformers, or
            modules to adapt do not exist.
    """
    import torch

    model = skeleton(config.model, model_config, reward_head)
    total = sum(p.numel() for p in model.parameters())
    lora = config.lora
    if not lora.lora_rank:
        return total, total
    names = None if lora.target_modules == ["all-linear"] else tuple(lora.target_modules)
    head = getattr(model, "score", None) if reward_head else model.get_output_embeddings()
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and (names is None or name.endswith(names))
    ]
    if not linear:
        raise InputError(
            f"--target_modules {' '.join(lora.target_modules)}: no module of {config.model.pretrain} has that name; "
            f"it has {', '.join(sorted({name.rsplit('.', 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}))}"
        )
    added = sum(lora.lora_rank * (module.in_features + module.out_features) for module in linear)
    return total + added, added + (head.weight.numel() if reward_head else 0)


def skeleton(options: ModelConfig, model_config: Any, reward_head: Any = None, option: str = "--pretrain") -> Any:
    """A model without weights.

    Raises:
        InputError: the architecture has no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind, what = AutoModelForCausalLM, "causal language model"
    if reward_head:
        kind, what = AutoModelForSequenceClassification, "sequence classification model, which a reward model is,"
        model_config = copy.deepcopy(model_config)
        model_config.num_labels = 1
    try:
        with torch.device("meta"):
            model = kind.from_config(model_config, trust_remote_code=options.trust_remote_code)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{option} {options.pretrain} ({model_config.model_type}) is no {what} in transformers: {reason}"
        ) from error
    if reward_head and type(getattr(model, "score", None)) is not torch.nn.Linear:
        raise InputError(
            f"{option} {options.pretrain} ({model_config.model_type}): transformers' {type(model).__name__} has no linear "
            "head called `score`, which reward models need here"
        )
    return model


def with_frozen(memory: Memory, config: TrainConfig, frozen_config: Any, world_size: int, frozen: Any) -> Memory:
    """The same with the weights of a frozen model."""
    model = skeleton(frozen.options(config.model), frozen_config, option=frozen.option)
    weights = sum(p.numel() for p in model.parameters()) * (2.0 if config.model.bf16 else 4.0)
    if frozen.offload:
        return replace(memory, offloaded=memory.offloaded + weights / world_size)
    return replace(memory, frozen=weights / (world_size if config.parallel.zero_stage == 3 else 1))


def estimate_memory(config: TrainConfig, text: Any, total: int, trained: int, tokens: int, world_size: int) -> Memory:
    """Memory of one rank, by the arithmetic of ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) and of a transformer layer.

    Activations: about 17 values per token, layer and hidden unit without stored attention scores (Korthikanti et al.
    2022, section 4.1, arXiv:2205.05198); with gradient checkpointing one per layer plus one layer in full.
    """
    stage, bf16 = config.parallel.zero_stage, config.model.bf16
    width = 2 if bf16 else 4
    shard = [1 / world_size if stage >= at else 1.0 for at in range(4)]
    bytes_per_weight = 0.55 if config.lora.load_in_4bit else width
    frozen = (total - trained) * bytes_per_weight
    optimizer = trained * (8 + (4 if bf16 else 0)) * shard[1]
    hidden, layers = text.hidden_size, text.num_hidden_layers
    per_layer = 17 * hidden * width
    kept = layers * hidden * width + per_layer if config.model.gradient_checkpointing else layers * per_layer
    return Memory(
        weights=(frozen + trained * width) * shard[3],
        gradients=trained * (2.0 if grad_accum_dtype(config.parallel, bf16) == "bf16" else 4.0) * shard[2],
        optimizer=0.0 if config.parallel.adam_offload else optimizer,
        activations=float(tokens * kept),
        head=64e6 + (0.0 if config.lora.lora_rank else 4.0 * text.vocab_size * hidden),
        offloaded=optimizer if config.parallel.adam_offload else 0.0,
    )
