"""The one training loop. Every method runs in it; a method is its data and its step loss (see `Method`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.checkpoint import Checkpoints, exported
from rlhf_core.config import TrainConfig
from rlhf_core.metrics import Meter, Record, Sums
from rlhf_core.plan import Plan
from rlhf_core.progress import Display
from rlhf_core.strategy import Strategy
from rlhf_data.batching import plan_micro_batches
from rlhf_data.errors import InputError
from rlhf_data.sampler import Order, Progress


class Method(Protocol):
    """What a training method brings to the loop."""

    name: str
    train: Any
    """Training samples: `len`, `lengths [N]`, `[i] -> Sample`, `fingerprint`."""
    evaluation: Any
    """Held-out samples, or None."""
    token_budget: int | None
    """Tokens of a packed row, or None to pad."""

    def weights(self, dataset: Any) -> np.ndarray:
        """What each sample adds to the divisor of a step, `[N]`: its targets for a per-token loss, 1 for a per-sample one."""
        ...

    def collate(self, samples: list[Any]) -> Batch:
        """Samples to a batch."""
        ...

    def loss(self, policy: Any, batch: Batch) -> tuple[Tensor, Sums]:
        """The summed loss of a micro-batch, and metrics as (sum, count). Must be linear in samples."""
        ...

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics as they are logged, from their means: what is not linear (a perplexity) is computed here."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a run is: optimizer steps done, samples seen (which says which come next), tokens seen."""

    step: int = 0
    data: Progress = field(default_factory=Progress)
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Position:
        return cls(state["step"], Progress.from_dict(state["data"]), state["tokens"])


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite; the run is ended before anything of it is saved."""


def fit(
    method: Method,
    engine: Any,
    policy: Any,
    tokenizer: Any,
    strategy: Strategy,
    config: TrainConfig,
    plan: Plan,
    report: Any,
) -> None:
    """Train until `max_epochs`, from where a checkpoint stopped if asked to, evaluating, logging and saving on the way.

    Args:
        method: the data and the loss.
        engine: the model as `Strategy.prepare` returned it.
        policy: the module inside, for exports.
        tokenizer: exported beside the model.
        strategy: the ranks.
        config: the run's options.
        plan: the checked plan.
        report: the data report, kept in the record.

    Raises:
        NonFiniteLoss: naming the step.
        CheckpointError: a checkpoint could not be written.
        InputError: the checkpoint to continue from belongs to another run.
    """
    checkpoints = Checkpoints(config.checkpoint, strategy)
    identity = identify(method, config, strategy)
    start, offset = resume(checkpoints, engine, identity, strategy, config)
    record = None
    if strategy.is_first:
        record = Record(Path(config.checkpoint.save_path) / "run", config, method.name, offset)
        record.write("data.json", report.to_dict())
        record.write("plan.json", plan.to_dict())
    display = Display(plan.total_steps, start.step, strategy.is_first)

    def log(row: dict[str, Any]) -> None:
        if record:
            record.row(row)
        display.row(row)

    meter, clock, tokens = Meter(), time.perf_counter(), start.tokens
    weights = method.weights(method.train)
    try:
        if config.logging.eval_at_start and start.step == 0:
            log({"step": 0, "epoch": 0.0} | evaluate(method, engine, strategy, config))
        for window, position in windows(start, method.train, config):
            engine.train()
            norm = train_step(method, engine, strategy, config, window, weights, meter)
            display.advance(position.step)
            if due(position.step, config.logging.logging_steps):
                means, now = meter.means(strategy), time.perf_counter()
                row = method.report(means) | {
                    "learning_rate": strategy.learning_rate(engine),
                    "grad_norm": norm,
                    "tokens": position.tokens,
                    "tokens_per_second": (position.tokens - tokens) / (now - clock),
                }
                log({"step": position.step, "epoch": epochs(position, method.train)} | row)
                meter, clock, tokens = Meter(), now, position.tokens
            if evaluation_due(position, plan, config):
                log(
                    {"step": position.step, "epoch": epochs(position, method.train)}
                    | evaluate(method, engine, strategy, config)
                )
                clock = time.perf_counter()
            if due(position.step, config.checkpoint.save_steps):
                save(checkpoints, engine, policy, tokenizer, position, identity, record, strategy, config)
                clock = time.perf_counter()
    finally:
        display.close()
        if record:
            record.close()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_due(position: Position, plan: Plan, config: TrainConfig) -> bool:
    if config.logging.eval_steps == -1:
        return position.step % plan.steps_per_epoch == 0
    return due(position.step, config.logging.eval_steps) or position.step == plan.total_steps


def epochs(position: Position, train: Any) -> float:
    """Passes over the data so far."""
    return round(position.data.epoch + position.data.consumed / len(train), 6)


def windows(start: Position, train: Any, config: TrainConfig) -> Iterator[tuple[np.ndarray, Position]]:
    """The samples of each optimizer step that is left, and the position after it."""
    step, tokens = start.step, start.tokens
    if start.data.epoch >= config.batch.max_epochs:
        return
    for window, data in Order(len(train), config.batch.seed).windows(config.batch.train_batch_size, start.data):
        step, tokens = step + 1, tokens + int(train.lengths[window].sum())
        yield window, Position(step, data, tokens)
        if data.epoch >= config.batch.max_epochs:
            return


def train_step(
    method: Method,
    engine: Any,
    strategy: Strategy,
    config: TrainConfig,
    window: np.ndarray,
    weights: np.ndarray,
    meter: Meter,
) -> float:
    """One optimizer step over the samples of `window`; returns the gradient norm.

    The loss is a sum divided by the step's global count, so micro-batches, packing and ranks do not change it.
    """
    count = float(weights[window].sum())
    micro_batches = list(rank_batches(method, method.train, window, strategy, config))
    for number, batch in enumerate(micro_batches, start=1):
        loss, sums = method.loss(engine, batch.to(strategy.device))
        strategy.backward(engine, loss, count, last=number == len(micro_batches))
        meter.add(sums)
    norm = strategy.step(engine)
    if not math.isfinite(norm):
        raise NonFiniteLoss(
            f"the gradient norm of optimizer step {engine.global_steps} is {norm}: the learning rate may be too high, or a sample "
            f"breaks the model; the step's samples are {window[:8].tolist()}{'…' if len(window) > 8 else ''}"
        )
    return norm


def rank_batches(
    method: Method, dataset: Any, window: np.ndarray, strategy: Strategy, config: TrainConfig
) -> Iterator[Batch]:
    """This rank's micro-batches of a window; every rank has as many."""
    plan = plan_micro_batches(
        dataset.lengths[window], strategy.world_size, config.batch.micro_train_batch_size, method.token_budget
    )
    for places in plan[strategy.rank]:
        if len(places):
            yield method.collate([dataset[int(i)] for i in window[places]])
        else:
            yield method.collate([dataset[int(window[0])]]).without_targets()


@torch.no_grad()
def evaluate(method: Method, engine: Any, strategy: Strategy, config: TrainConfig) -> dict[str, float]:
    """Metrics over every held-out sample exactly once, with `eval_` before their names."""
    if method.evaluation is None:
        return {}
    engine.eval()
    meter, size = Meter(), config.batch.train_batch_size
    for start in range(0, len(method.evaluation), size):
        window = np.arange(start, min(start + size, len(method.evaluation)))
        for batch in rank_batches(method, method.evaluation, window, strategy, config):
            meter.add(method.loss(engine, batch.to(strategy.device))[1])
    return {f"eval_{name}": value for name, value in method.report(meter.means(strategy)).items()}


def identify(method: Method, config: TrainConfig, strategy: Strategy) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {
        "method": method.name,
        "data": method.train.fingerprint,
        "ranks": strategy.world_size,
        "zero_stage": config.parallel.zero_stage,
        "train_batch_size": config.batch.train_batch_size,
        "seed": config.batch.seed,
        "bf16": config.model.bf16,
        "lora_rank": config.lora.lora_rank,
    }


def resume(
    checkpoints: Checkpoints, engine: Any, identity: dict[str, Any], strategy: Strategy, config: TrainConfig
) -> tuple[Position, int | None]:
    """Where to start: the position and the size of `metrics.jsonl` there."""
    if not config.checkpoint.load_checkpoint:
        return Position(), None
    found = checkpoints.newest()
    if found is None:
        strategy.say(f"no checkpoint in {checkpoints.folder}: starting from the beginning")
        return Position(), None
    path, state = found
    different = [
        f"{key} was {state['identity'].get(key)} and is {value}"
        for key, value in identity.items()
        if state["identity"].get(key) != value
    ]
    if different:
        raise InputError(f"--load_checkpoint: {path} belongs to another run: {'; '.join(different)}")
    checkpoints.load(engine, path)
    strategy.say(f"continuing from {path}")
    return Position.from_dict(state["position"]), state["metrics_bytes"]


def save(
    checkpoints: Checkpoints, engine: Any, policy: Any, tokenizer: Any, position: Position, identity: dict[str, Any],
    record: Record | None, strategy: Strategy, config: TrainConfig,
) -> None:  # fmt: skip
    """Write a checkpoint, and beside it a Hugging Face export if asked for."""
    state = {"identity": identity, "position": position.to_dict(), "metrics_bytes": record.position() if record else 0}
    path = checkpoints.save(engine, position.step, state)
    if config.checkpoint.save_hf_ckpt:
        from rlhf_core.export import export

        export(policy, tokenizer, exported(path), strategy)
