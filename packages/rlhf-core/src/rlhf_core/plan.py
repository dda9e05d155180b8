"""The plan of a run, derived and checked before any weight is loaded: batches, steps, memory, what is written where."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core.config import TrainConfig
from rlhf_data.batching import plan_micro_batches
from rlhf_data.errors import InputError

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one rank by component, in bytes. Activations are the roughest part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class Plan:
    """What a run will do. Counts are over all ranks unless they say otherwise."""

    world_size: int
    samples: int
    eval_samples: int
    tokens: int
    targets: int
    steps_per_epoch: int
    total_steps: int
    micro_batches_per_step: int
    largest_micro_batch: int
    utilisation: float
    parameters: int
    trained_parameters: int
    memory: Memory
    writes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _layout(self, config: TrainConfig) -> str:
        if getattr(config.data, "packing_samples", False):
            return f", rows filled to {self.utilisation:.0%}"
        return (
            ", nothing padded"
            if config.model.flash_attn
            else f", {self.utilisation:.0%} of them real, the rest padding"
        )

    def format(self, config: TrainConfig) -> str:
        """The plan as a person reads it."""
        batch, parallel, memory = config.batch, config.parallel, self.memory
        parts = ("weights", "gradients", "optimizer", "activations", "head")
        offloaded = f", and {memory.offloaded / GB:.2f} GB on the host" if memory.offloaded else ""
        return "\n".join(
            (
                "Plan",
                f"  data        {self.samples} samples, {self.tokens} tokens, {self.targets} trained; {self.eval_samples} samples held out",
                f"  step        {batch.train_batch_size} samples = {self.world_size} rank(s) x {self.micro_batches_per_step} micro-batch(es), "
                f"at most {self.largest_micro_batch} tokens each{self._layout(config)}",
                f"  run         {batch.max_epochs} epoch(s) x {self.steps_per_epoch} steps = {self.total_steps} optimizer steps",
                f"  model       {self.parameters / 1e6:.2f} M parameters, {self.trained_parameters / 1e6:.2f} M trained, "
                f"{'bfloat16' if config.model.bf16 else 'float32'}, ZeRO stage {parallel.zero_stage}",
                f"  memory      about {memory.total / GB:.2f} GB per rank ("
                + ", ".join(f"{name} {getattr(memory, name) / GB:.2f}" for name in parts)
                + f"){offloaded}",
                "  writes      " + "\n              ".join(self.writes),
            )
        )


def make_plan(
    config: TrainConfig, model_config: Any, train: Any, evaluation: Any, world_size: int, budget: int | None
) -> Plan:
    """Derive the plan and refuse what cannot work.

    Args:
        config: the run's options.
        model_config: the model's architecture (a transformers config).
        train: the training samples, with `lengths` and `num_targets`.
        evaluation: the held-out samples, or None.
        world_size: number of ranks.
        budget: tokens of a packed row, or None for padding.

    Raises:
        InputError: batch sizes do not divide, a folder cannot be written, or a sample is longer than the model's context.
    """
    check_batches(config, world_size)
    check_context(config, model_config, int(train.lengths.max()))
    check_writable(config)
    batch = config.batch
    steps = math.ceil(len(train) / batch.train_batch_size)
    window = np.asarray(train.lengths[: batch.train_batch_size])
    rows = plan_micro_batches(window, world_size, batch.micro_train_batch_size, budget)
    ragged = budget is not None or config.model.flash_attn
    sizes = [window[row].sum() if ragged else len(row) * window[row].max() for rank in rows for row in rank if len(row)]
    room = (
        budget * len(sizes)
        if budget
        else sum(len(row) * window[row].max() for rank in rows for row in rank if len(row))
    )
    total, trained = count_parameters(config, model_config)
    largest = int(max(sizes))
    return Plan(
        world_size=world_size,
        samples=len(train),
        eval_samples=len(evaluation) if evaluation is not None else 0,
        tokens=int(train.lengths.sum()),
        targets=int(train.num_targets.sum()),
        steps_per_epoch=steps,
        total_steps=steps * batch.max_epochs,
        micro_batches_per_step=max(len(rank) for rank in rows),
        largest_micro_batch=largest,
        utilisation=float(window.sum() / room),
        parameters=total,
        trained_parameters=trained,
        memory=estimate_memory(config, model_config.get_text_config(), total, trained, largest, world_size),
        writes=writes(config),
    )


def check_batches(config: TrainConfig, world_size: int) -> None:
    """A step must be a whole number of micro-batches on every rank."""
    batch = config.batch
    unit = batch.micro_train_batch_size * world_size
    if batch.train_batch_size % unit:
        below, above = batch.train_batch_size // unit * unit, -(-batch.train_batch_size // unit) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"--train_batch_size {batch.train_batch_size} is not a multiple of --micro_train_batch_size "
            f"{batch.micro_train_batch_size} x {world_size} rank(s) = {unit}; the nearest that is: {nearest}"
        )


def check_context(config: TrainConfig, model_config: Any, longest: int) -> None:
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"the longest sample has {longest} tokens and {config.model.pretrain} takes {limit}: set --max_len {limit} or less"
        )


def check_writable(config: TrainConfig) -> None:
    """Find out now whether the run's folders can be written, not after it."""
    saving = config.checkpoint
    for option, name in (
        ("--save_path", saving.save_path),
        ("--ckpt_path", saving.ckpt_path),
        ("--use_tensorboard", config.logging.use_tensorboard),
    ):
        if name is None:
            continue
        path = Path(name)
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise InputError(f"{option} {name}: {there} is a file, not a folder")
        probe = there / f".rlhf-can-write-{os.getpid()}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"{option} {name}: cannot write to {there} ({error.strerror})") from error


def count_parameters(config: TrainConfig, model_config: Any) -> tuple[int, int]:
    """All and trained parameters, from the architecture alone (no weights, no memory)."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--pretrain {config.model.pretrain} ({model_config.model_type}) is no causal language model: {reason}"
        ) from error
    total = sum(p.numel() for p in model.parameters())
    lora = config.lora
    if not lora.lora_rank:
        return total, total
    names = None if lora.target_modules == ["all-linear"] else tuple(lora.target_modules)
    head = model.get_output_embeddings()
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
    return total + added, added


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
        gradients=trained * 4.0 * shard[2],
        optimizer=0.0 if config.parallel.adam_offload else optimizer,
        activations=float(tokens * kept),
        head=32e6 + (0.0 if config.lora.lora_rank else 4.0 * text.vocab_size * hidden),
        offloaded=optimizer if config.parallel.adam_offload else 0.0,
    )


def writes(config: TrainConfig) -> tuple[str, ...]:
    saving = config.checkpoint
    lines = [
        f"{saving.save_path}: the final {'adapter' if config.lora.lora_rank else 'model'}, its tokenizer, and run/ (options, metrics, data report)"
    ]
    if saving.save_steps > 0:
        folder = saving.ckpt_path or f"{saving.save_path}/checkpoints"
        export = " with a Hugging Face export each" if saving.save_hf_ckpt else ""
        lines.append(f"{folder}: a checkpoint every {saving.save_steps} steps{export}, at most {saving.max_ckpt_num}")
    if config.logging.use_tensorboard:
        lines.append(f"{config.logging.use_tensorboard}: TensorBoard logs")
    return tuple(lines)
