"""The plan of a run, derived and checked before any weight is loaded: batches, steps, memory, what is written where."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core.checkpoint import Checkpoints, nearest_existing
from rlhf_core.config import CheckpointConfig, TrainConfig
from rlhf_core.memory import Memory, available_memory, count_parameters, estimate_memory, size, with_frozen
from rlhf_core.method import Method
from rlhf_data.batching import plan_micro_batches
from rlhf_data.errors import InputError
from rlhf_data.sampler import Order
from rlhf_data.store import cache_dir

GB = 1e9
SURVEYED = 20
"""Optimizer steps whose micro-batches are laid out to say how full they are."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. Counts are over all ranks unless they say otherwise."""

    world_size: int
    unit: str
    """What samples and batches are counted in: `samples` or `pairs`."""
    samples: int
    eval_samples: int
    tokens: int
    targets: int
    steps_per_epoch: int
    total_steps: int
    layout: str
    """How the model call lays samples out: `packed`, `ragged` (nothing padded) or `padded`."""
    micro_batches_per_step: int
    """Of one rank, at most, in the first steps."""
    largest_micro_batch: int
    """Tokens of the largest micro-batch there can be."""
    utilisation: float
    """Share of real tokens in the room of padded or packed rows, over the first steps."""
    parameters: int
    trained_parameters: int
    memory: Memory
    available_memory: float
    writes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def format(self, config: TrainConfig) -> str:
        """The plan as a person reads it."""
        batch = config.batch
        filled = {"packed": f"rows filled to {self.utilisation:.0%}", "ragged": "nothing padded"}
        lines = {
            "data": f"{self.samples:,} {self.unit}, {self.tokens:,} tokens, {self.targets:,} trained; "
            f"{self.eval_samples:,} {self.unit} held out",
            "step": f"{batch.train_batch_size} {self.unit} = {self.world_size} rank(s) x {self.micro_batches_per_step} "
            f"micro-batch(es) of at most {self.largest_micro_batch:,} tokens, "
            + filled.get(self.layout, f"{self.utilisation:.0%} of them real, the rest padding"),
            "run": f"{batch.max_epochs} epoch(s) x {self.steps_per_epoch:,} steps = {self.total_steps:,} optimizer steps",
            "model": f"{self.parameters / 1e6:.2f} M parameters, {self.trained_parameters / 1e6:.2f} M trained, "
            f"{'bfloat16' if config.model.bf16 else 'float32'}, ZeRO stage {config.parallel.zero_stage}",
            "memory": self.memory.format(self.available_memory),
            "writes": "\n              ".join(self.writes),
        }
        return "\n".join(["Plan", *(f"  {name:12}{text}" for name, text in lines.items())])


def make_plan(
    config: TrainConfig, model_config: Any, method: Method, world_size: int, frozen_config: Any = None
) -> Plan:
    """Derive the plan and refuse what cannot work.

    Args:
        config: the run's options.
        model_config: the model's architecture (a transformers config).
        method: the samples and how they are laid out.
        world_size: number of ranks.
        frozen_config: architecture of the frozen model, if there is one.

    Raises:
        InputError: modules to adapt do not exist.
    """
    train, evaluation, budget = method.train, method.evaluation, method.token_budget
    steps = math.ceil(len(train) / config.batch.train_batch_size)
    layout = "packed" if budget else "ragged" if config.model.flash_attn else "padded"
    micro_batches, utilisation = survey(config, train, world_size, budget)
    largest = largest_micro_batch(train.lengths, config.batch.micro_train_batch_size, layout, budget)
    total, trained = count_parameters(config, model_config, method.head)
    memory = estimate_memory(config, model_config.get_text_config(), total, trained, largest, world_size)
    if method.frozen and not method.frozen.cached:
        memory = with_frozen(memory, config, frozen_config, world_size, method.frozen)
    return Plan(
        world_size=world_size,
        unit=method.unit,
        samples=len(train),
        eval_samples=0 if evaluation is None else len(evaluation),
        tokens=int(train.lengths.sum()),
        targets=int(train.num_targets.sum()),
        steps_per_epoch=steps,
        total_steps=steps * config.batch.max_epochs,
        layout=layout,
        micro_batches_per_step=micro_batches,
        largest_micro_batch=largest,
        utilisation=utilisation,
        parameters=total,
        trained_parameters=trained,
        memory=memory,
        available_memory=available_memory(world_size // config.parallel.num_nodes),
        writes=writes(config, method),
    )


def survey(config: TrainConfig, train: Any, world_size: int, budget: int | None) -> tuple[int, float]:
    """Lay out the first steps: the most micro-batches of a rank, and the share of real tokens in the rows' room."""
    batch, most, tokens, room = config.batch, 0, 0, 0
    for window, _ in islice(Order(len(train), batch.seed).windows(batch.train_batch_size), SURVEYED):
        lengths = np.asarray(train.lengths[window])
        ranks = plan_micro_batches(lengths, world_size, batch.micro_train_batch_size, budget)
        most = max(most, len(ranks[0]))
        tokens += int(lengths.sum())
        room += sum(budget or len(row) * int(lengths[row].max()) for rank in ranks for row in rank if len(row))
    return most, tokens / room


def largest_micro_batch(lengths: np.ndarray, micro_batch_size: int, layout: str, budget: int | None) -> int:
    """Tokens of the worst micro-batch that the data allows, padding included."""
    longest = np.sort(lengths)[-micro_batch_size:]
    return (
        min(budget, int(lengths.sum()))
        if budget
        else int(longest.sum() if layout == "ragged" else len(longest) * longest[-1])
    )


def check_run(config: TrainConfig, world_size: int) -> None:
    """Check what needs neither data nor model: batch sizes, ranks, folders.

    Raises:
        InputError: naming the option, the value and the way out.
    """
    check_batches(config, world_size)
    check_writable(config)
    if config.lora.lora_rank and Path(config.checkpoint.save_path).resolve() == Path(config.model.pretrain).resolve():
        raise InputError(
            f"--save_path {config.checkpoint.save_path} is --pretrain: an adapter needs its base model, save it elsewhere"
        )
    zpg = config.parallel.zpg
    if world_size % zpg:
        raise InputError(
            f"--zpg {zpg} does not divide the {world_size} rank(s) of the run; usually it is the GPUs of a node"
        )
    check_no_checkpoints(config.checkpoint)


def check_no_checkpoints(saving: CheckpointConfig) -> None:
    """Refuse to mix a run's checkpoints with those of an earlier run that it does not continue."""
    old = Checkpoints.find(Checkpoints.folder_of(saving))
    if saving.save_steps > 0 and not saving.load_checkpoint and old:
        raise InputError(
            f"{old[0].parent} holds checkpoints of an earlier run ({old[0].name}): continue it with --load_checkpoint, "
            "remove them, or choose another --ckpt_path"
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


def check_context(option: str, name: str, model_config: Any, longest: int) -> None:
    """Refuse samples that are longer than a model's context."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"the longest sample has {longest} tokens and {option} {name} takes {limit}: set --max_len {limit} or less"
        )


def check_writable(config: TrainConfig) -> None:
    """Find out now whether the run's folders can be written, not after it."""
    saving = config.checkpoint
    for option, name in (
        ("--save_path", saving.save_path),
        ("--ckpt_path", saving.ckpt_path),
        ("--use_tensorboard", config.logging.use_tensorboard),
    ):
        if name is not None:
            check_can_write(option, name)


def check_can_write(option: str, name: str) -> None:
    """Refuse a folder that cannot be written."""
    there = nearest_existing(Path(name))
    if not there.is_dir():
        raise InputError(f"{option} {name}: {there} is a file, not a folder")
    probe = there / f".rlhf-can-write-{secrets.token_hex(8)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{option} {name}: cannot write to {there} ({error.strerror})") from error


def writes(config: TrainConfig, method: Method) -> tuple[str, ...]:
    saving = config.checkpoint
    lines = [
        f"{saving.save_path}: the final {'adapter' if config.lora.lora_rank else 'model'}, its tokenizer, and run/ (options, metrics, data report)"
    ]
    if saving.save_steps > 0:
        folder = saving.ckpt_path or f"{saving.save_path}/checkpoints"
        export = " with a Hugging Face export each" if saving.save_hf_ckpt else ""
        lines.append(f"{folder}: a checkpoint every {saving.save_steps} steps{export}, at most {saving.max_ckpt_num}")
    if method.frozen and method.frozen.cached:
        role, taken = method.frozen.role, size(method.cache_bytes)
        lines.append(f"{cache_dir(config.data.data_cache_dir)}: what the {role} says of every sample, {taken}")
    if config.logging.use_tensorboard:
        lines.append(f"{config.logging.use_tensorboard}: TensorBoard logs")
    return tuple(lines)
