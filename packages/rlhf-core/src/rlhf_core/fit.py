"""The one training loop. Every method runs in it (see `Method`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_core.batch import Batch
from rlhf_core.checkpoint import Checkpoints, exported, read_engine, write_engine
from rlhf_core.config import TrainConfig
from rlhf_core.export import export
from rlhf_core.method import Method, Window
from rlhf_core.metrics import Meter, Record
from rlhf_core.micro_batches import micro_batches
from rlhf_core.plan import Plan
from rlhf_core.progress import Display
from rlhf_core.strategy import Strategy
from rlhf_data.errors import InputError, RunError
from rlhf_data.sampler import Order, Progress


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


class NonFiniteLoss(RunError):
    """The loss or the gradient is NaN or infinite; the run is ended before anything of it is saved."""


class Fit:
    """A run of a method: trains until `max_epochs`, evaluating, logging and saving on the way.

    Args:
        method: the data and the loss.
        engine: the model as `Strategy.prepare` returned it.
        tokenizer: exported beside the model.
        strategy: the ranks.
        config: the run's options.
        plan: the checked plan.
    """

    def __init__(
        self, method: Method, engine: Any, tokenizer: Any, strategy: Strategy, config: TrainConfig, plan: Plan
    ) -> None:
        self.method, self.engine, self.tokenizer = method, engine, tokenizer
        self.strategy, self.config, self.plan = strategy, config, plan
        self.checkpoints = Checkpoints(config.checkpoint, strategy)
        self.meter = Meter()
        self.position = Position()
        self.record: Record | None = None
        self.display: Display | None = None

    def run(self) -> None:
        """Train, from where a checkpoint stopped if asked to.

        Raises:
            NonFiniteLoss: naming the step.
            CheckpointError: a checkpoint could not be written.
            InputError: the checkpoint to continue from belongs to another run.
        """
        logging = self.config.logging
        if self.config.checkpoint.save_steps > 0:
            self.checkpoints.check_shared()
        metrics_bytes = self.resume()
        self.display = Display(self.plan.total_steps, self.position.step, self.strategy.is_first)
        if self.strategy.is_first:
            self.record = self.open_record(metrics_bytes)
        try:
            if logging.eval_at_start and self.method.evaluation is not None and self.position.step == 0:
                self.log(self.evaluate())
            speed = Speedometer(self.position.tokens)
            self.engine.train()
            for window, position in self.windows():
                self.position = position
                learning_rate = self.strategy.learning_rate(self.engine)
                norm = self.step(window)
                self.display.advance(self.position.step)
                if due(position.step, logging.logging_steps) or position.step == self.plan.total_steps:
                    row = self.training_row() | {"learning_rate": learning_rate, "grad_norm": norm}
                    self.log(row | {"tokens": position.tokens, "tokens_per_second": speed.read(position.tokens)})
                if self.evaluation_due():
                    with speed.paused():
                        self.log(self.evaluate())
                if due(self.position.step, self.config.checkpoint.save_steps):
                    with speed.paused():
                        self.save()
        finally:
            self.display.close()
            if self.record:
                self.record.close()

    def windows(self) -> Iterator[tuple[np.ndarray, Position]]:
        """The samples of each optimizer step that is left, and the position after it."""
        train, batch, position = self.method.train, self.config.batch, self.position
        order = Order(len(train), batch.seed).windows(batch.train_batch_size, position.data)
        while position.data.epoch < batch.max_epochs:
            window, data = next(order)
            position = Position(position.step + 1, data, position.tokens + int(train.lengths[window].sum()))
            yield window, position

    def step(self, window: np.ndarray) -> float:
        """One optimizer step over the samples of `window`; returns the gradient norm.

        The loss is a sum divided by the step's global count, so micro-batches, packing and ranks do not change it.
        """
        samples = self.method.begin_step(self.engine, Window(self.method.train, window), self)
        count = self.method.divisor(samples)
        batches = [batch for _, batch in self.micro_batches(samples)]
        for number, batch in enumerate(batches, start=1):
            loss, sums = self.method.loss(self.engine, batch)
            self.strategy.backward(self.engine, loss, count, last=number == len(batches))
            self.meter.add(sums)
        norm = self.strategy.step(self.engine)
        if not math.isfinite(norm):
            raise NonFiniteLoss(
                f"the gradient norm of optimizer step {self.position.step} is {norm}: the learning rate may be too high, or "
                f"a sample breaks the model (samples {', '.join(map(str, window[:8]))}{', …' if len(window) > 8 else ''})"
            )
        return norm

    def micro_batches(self, window: Window, collate: Any = None) -> Iterator[tuple[np.ndarray, Batch]]:
        """This rank's micro-batches of a window, and where in it their samples are."""
        size = self.config.batch.micro_train_batch_size
        return micro_batches(window, collate or self.method.collate, self.strategy, size, self.method.token_budget)

    def parts(self, dataset: Any) -> Iterator[Window]:
        """A data set in order, as many samples at a time as an optimizer step has."""
        size = self.config.batch.train_batch_size
        for start in range(0, len(dataset), size):
            yield Window(dataset, np.arange(start, min(start + size, len(dataset))))

    def training_row(self) -> dict[str, float]:
        """The method's metrics since the last such row."""
        means, self.meter = self.meter.means(self.strategy), Meter()
        return self.method.report(means)

    def evaluation_due(self) -> bool:
        if self.method.evaluation is None:
            return False
        if self.config.logging.eval_steps == -1:
            return self.position.data.consumed == 0
        last = self.position.step == self.plan.total_steps
        return last or due(self.position.step, self.config.logging.eval_steps)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics over every held-out sample exactly once, with `eval_` before their names."""
        meter = Meter()
        self.engine.eval()
        for part in self.parts(self.method.evaluation):
            for _, batch in self.micro_batches(self.method.begin_step(self.engine, part, self)):
                meter.add(self.method.loss(self.engine, batch)[1])
        self.engine.train()
        return {f"eval_{name}": value for name, value in self.method.report(meter.means(self.strategy)).items()}

    def log(self, metrics: dict[str, float]) -> None:
        """Write a row to the record and show it."""
        data = self.position.data
        epoch = round(data.epoch + data.consumed / len(self.method.train), 6)
        row = {"step": self.position.step, "epoch": epoch} | metrics
        if self.record:
            self.record.row(row)
        if self.display:
            self.display.row(row)

    def open_record(self, metrics_bytes: int | None) -> Record:
        record = Record(Path(self.config.checkpoint.save_path) / "run", self.config, self.method.name, metrics_bytes)
        record.write("data.json", self.method.data_report.to_dict())
        record.write("plan.json", self.plan.to_dict())
        return record

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        config = self.config
        return {
            "method": self.method.name,
            "pretrain": config.model.pretrain,
            "data": self.method.train.fingerprint,
            "ranks": self.strategy.world_size,
            "zero_stage": config.parallel.zero_stage,
            "train_batch_size": config.batch.train_batch_size,
            "seed": config.batch.seed,
            "bf16": config.model.bf16,
            "lora": config.lora.model_dump(),
            **self.method.identity(),
        }

    def save(self) -> None:
        """Write a checkpoint, and beside it a Hugging Face export if asked for."""
        state = {
            "identity": self.identity(),
            "position": self.position.to_dict(),
            "metrics_bytes": self.record.position() if self.record else 0,
            "meter": self.meter.settle(self.strategy),
        }
        write = partial(write_engine, self.engine, rank=self.strategy.rank)
        path = self.checkpoints.save(write, self.position.step, state)
        if self.config.checkpoint.save_hf_ckpt:
            export(self.engine.module, self.tokenizer, exported(path), self.strategy)

    def resume(self) -> int | None:
        """Go to where the newest checkpoint is, if asked to; returns the size of `metrics.jsonl` there."""
        if not self.config.checkpoint.load_checkpoint:
            return None
        found = self.checkpoints.newest()
        if found is None:
            self.strategy.say(f"no checkpoint in {self.checkpoints.folder}: starting from the beginning")
            return None
        path, state = found
        then, now = state["identity"], self.identity()
        if different := [f"{key} was {then.get(key)} and is {now[key]}" for key in now if then.get(key) != now[key]]:
            raise InputError(f"--load_checkpoint: {path} belongs to another run: {'; '.join(different)}")
        read_engine(self.engine, path, self.strategy.rank)
        self.strategy.say(f"continuing from {path}")
        self.position = Position.from_dict(state["position"])
        self.meter = Meter.unsettle(state["meter"], self.strategy)
        return state["metrics_bytes"]


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Speedometer:
    """Tokens per second since the last reading, pauses left out."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._since = tokens, time.perf_counter()

    def read(self, tokens: int) -> float:
        now = time.perf_counter()
        speed = (tokens - self._tokens) / (now - self._since)
        self._tokens, self._since = tokens, now
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start
