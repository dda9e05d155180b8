"""Writing a model in Hugging Face format, shard by shard, at any ZeRO stage; a failed write changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlhf_core.checkpoint import CheckpointError, sync
from rlhf_core.ema import EMA
from rlhf_core.libraries import gathered
from rlhf_core.models.backbone import Backbone
from rlhf_core.ranks import Ranks
from rlhf_core.strategy import Alone
from rlhf_core.weights import weights

SHARD_BYTES = 4 * 10**9
"""Weights are gathered and written in files of about this size, so that the host never holds the whole model twice."""


CALIBRATION = "calibration.json"
"""Beside the adapter of a reward model: what a whole reward model has in its config."""

CONFIGS = ("config.json", "adapter_config.json")
"""What makes a folder a model, or an adapter."""

STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors")
"""Weights that an export of a whole model replaces."""


def export(
    policy: Backbone,
    tokenizer: Any,
    folder: Path,
    strategy: Ranks | Alone,
    shard_bytes: int = SHARD_BYTES,
    average: EMA | None = None,
) -> None:
    """Write the model (or, with LoRA, its adapter) and its tokenizer to `folder`, as `from_pretrained` and vLLM read them.

    All files are written beside, and moved into place when they are complete: a model already in `folder` (which may be the
    one being trained) is untouched until its successor is on disk.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        folder: where it goes; made if it is not there.
        strategy: the ranks, all of which must call this.
        shard_bytes: about the size of a file of weights.
        average: the moving average to write in place of the weights that it averages, if any.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    staging = folder / ".writing-model"
    try:
        if strategy.is_first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        if hasattr(policy.model, "peft_config"):
            write_adapter(policy, staging, strategy, average)
        else:
            write_model(policy, staging, strategy, shard_bytes, average)
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


def write_adapter(policy: Backbone, folder: Path, strategy: Ranks | Alone, average: EMA | None = None) -> None:
    trained = {name: p for name, p in policy.base.named_parameters() if p.requires_grad}
    with average.shown(trained) if average else nullcontext(), gathered(list(trained.values())):
        if strategy.is_first:
            policy.model.save_pretrained(folder, save_embedding_layers=False)
            if hasattr(policy.config, "calibration"):
                kept = {name: getattr(policy.config, name) for name in ("mean", "std", "calibration")}
                (folder / CALIBRATION).write_text(json.dumps(kept, indent=2))


def write_model(
    policy: Backbone, folder: Path, strategy: Ranks | Alone, shard_bytes: int, average: EMA | None = None
) -> None:
    """Gather the weights a layer at a time and write them in shards on the first rank."""
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, folder / f"part-{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(shard))
        shard, size = {}, 0

    for name, weight in weights(policy, wanted=strategy.is_first, average=average):
        if size and size + weight.nbytes > shard_bytes:
            flush()
        shard[name] = weight.cpu().clone(memory_format=torch.contiguous_format)
        size, total = size + weight.nbytes, total + weight.nbytes
    if strategy.is_first:
        flush()
        name_shards(folder, names, total)
        write_configs(policy.base, folder)


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


def check_export(policy: Backbone, tokenizer: Any) -> None:
    """Write everything but the weights to nowhere, before training: what cannot be written is found out now."""
    with tempfile.TemporaryDirectory() as folder:
        write_configs(policy.base, Path(folder))
        tokenizer.save_pretrained(folder)


def write_configs(base: Any, folder: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    config = base.config
    config.architectures = [type(base).__name__]
    config.dtype = base.dtype
    config.use_cache = True
    config.save_pretrained(folder)
    config.use_cache = False
    if base.can_generate():
        base.generation_config.to_json_file(folder / "generation_config.json")  # as it is: saving checks it strictly
    if base.is_remote_code():
        custom_object_save(base, folder, config=config)


def move_into_place(staging: Path, folder: Path) -> None:
    """Move finished files over older ones, the config last: in between, the folder is no model rather than a mixed one."""
    os.umask(mask := os.umask(0o022))
    new = sorted(staging.iterdir(), key=lambda path: path.name in CONFIGS)
    written = {path.name for path in new}
    for name in CONFIGS if "config.json" in written else written.intersection(CONFIGS):
        (folder / name).unlink(missing_ok=True)
    for path in new:
        path.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
        sync(path)
        path.replace(folder / path.name)
    if "config.json" in written:
        for stale in folder.iterdir():
            if STALE.fullmatch(stale.name) and stale.name not in written:
                stale.unlink()
    staging.rmdir()
    sync(folder)
