"""Writing a model in Hugging Face format, shard by shard, at any ZeRO stage, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlhf_core.checkpoint import CheckpointError, sync
from rlhf_core.libraries import deepspeed
from rlhf_core.models.policy import Policy
from rlhf_core.strategy import Strategy

SHARD_BYTES = 4 * 10**9
"""Weights are gathered and written in files of about this size, so that the host never holds the whole model twice."""


def export(policy: Policy, tokenizer: Any, folder: Path, strategy: Strategy, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model (or, with LoRA, its adapter) and its tokenizer to `folder`, as `from_pretrained` and vLLM read them.

    The files are written beside and moved into place when complete, so that a model already in `folder` (which may be the
    one being trained) is there until its successor is.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    staging = folder / ".writing-model"
    try:
        if strategy.is_first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        if hasattr(policy.model, "peft_config"):
            write_adapter(policy, staging, strategy)
        else:
            write_model(policy, staging, strategy, shard_bytes)
        if strategy.is_first:
            tokenizer.save_pretrained(staging)
            move_into_place(staging, folder)
    except (OSError, SafetensorError) as error:
        if strategy.is_first:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"the model could not be written to {folder} ({error}); nothing there was changed"
        ) from error
    strategy.barrier()


def write_adapter(policy: Policy, folder: Path, strategy: Strategy) -> None:
    trained = [p for p in policy.parameters() if p.requires_grad]
    with gathered(trained):
        if strategy.is_first:
            policy.model.save_pretrained(folder, save_embedding_layers=False)


def write_model(policy: Policy, folder: Path, strategy: Strategy, shard_bytes: int) -> None:
    """Gather the weights a layer at a time and write them in shards on the first rank."""
    from transformers.core_model_loading import revert_weight_conversion

    base, shard, size = policy.base, {}, 0
    names: list[list[str]] = []
    total = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            save_file(shard, folder / f"part-{len(names)}.safetensors", metadata={"format": "pt"})
            names.append(list(shard))
            shard, size = {}, 0

    for parameters in layers(base):
        with gathered(list(parameters.values())):
            if not strategy.is_first:
                continue
            weights = {name: p.detach().cpu().clone() for name, p in parameters.items()}
        weights = {name: w.contiguous() for name, w in revert_weight_conversion(base, weights).items()}
        added = sum(w.nbytes for w in weights.values())
        if size and size + added > shard_bytes:
            flush()
        shard |= weights
        size, total = size + added, total + added
    if strategy.is_first:
        flush()
        name_shards(folder, names, total)
        write_configs(base, folder)


def layers(base: Any) -> Iterator[dict[str, Tensor]]:
    """Parameters and saved buffers by name, grouped by layer. Tied weights appear once, under the name that is kept."""
    tied = set(getattr(base, "all_tied_weights_keys", None) or {})
    groups: dict[str, dict[str, Tensor]] = {}
    saved = dict(base.named_parameters())
    saved |= {name: x for name, x in base.named_buffers() if name in base.state_dict() and name not in saved}
    for name, tensor in saved.items():
        if name not in tied:
            layer = re.match(r".*?\.\d+\.", name)
            groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    yield from groups.values()


def gathered(parameters: list[Tensor]) -> Any:
    """Whole parameters where ZeRO-3 has split them; nothing to do otherwise."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    return deepspeed().zero.GatheredParameters(parameters)


def name_shards(folder: Path, names: list[list[str]], total: int) -> None:
    """Give the shards their final names and write the index, as transformers does."""
    if len(names) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, tensors in enumerate(names):
        name = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_configs(base: Any, folder: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    config = base.config
    config.architectures = [type(base).__name__]
    config.dtype = base.dtype
    config.use_cache = True
    config.save_pretrained(folder)
    config.use_cache = False
    if base.can_generate():
        base.generation_config.save_pretrained(folder)
    if base.is_remote_code():
        custom_object_save(base, folder, config=config)


def move_into_place(staging: Path, folder: Path) -> None:
    """Move finished files over older ones, and remove shards that the older model had and this one has not."""
    os.umask(mask := os.umask(0o022))
    new = sorted(staging.iterdir(), key=lambda p: p.name == "config.json")
    for path in new:
        path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
        sync(path)
        path.replace(folder / path.name)
    written = {path.name for path in new}
    for stale in (
        *folder.glob("model*.safetensors"),
        *folder.glob("model.safetensors.index.json"),
        *folder.glob("adapter_*"),
    ):
        if stale.name not in written:
            stale.unlink()
    staging.rmdir()
    sync(folder)
