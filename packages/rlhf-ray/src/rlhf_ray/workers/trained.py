"""A rank of a role whose model is trained: what the policy and the critic have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.workers.rank import RankWorker
from rlhf_ray.workers.step import Step

if TYPE_CHECKING:
    from rlhf_core.config import OptimConfig
    from rlhf_core.ema import EMA
    from rlhf_core.models.loader import Models
    from rlhf_core.strategy import Strategy


class TrainedWorker(RankWorker, ABC):
    """One rank of a model that is trained, saved, and makes room where it shares its device.

    Subclasses call `join_to_train` and `prepare` in their `setup`, and say what an `optimizer_step` is.
    """

    role: str
    """What errors call it."""

    learning_rate_option: str
    """The option that sets the peak of its learning rate."""

    ways_out: str
    """What else to try when a gradient is no number."""

    average: EMA | None = None
    """The moving average of its weights, if there is one: it is what is exported."""

    def join_to_train(self, config: PPOConfig, optim: OptimConfig, meeting: tuple[str, int] | None) -> Strategy:
        """Meet the other ranks of a role whose model is trained.

        Args:
            config: the run's options.
            optim: of the role's optimizer, see `PPOOptimConfig.of`.
            meeting: what `meet` of the first rank returned; None for a single rank.
        """
        from rlhf_core.libraries import settle

        settle()
        from rlhf_core.strategy import Strategy

        return Strategy(
            config.parallel,
            optim,
            bf16=config.model.bf16,
            seed=config.batch.seed,
            patience=config.parallel,
            meeting=self.meeting_of(meeting),
        )

    def prepare(self, models: Models, model_config: Any, total_steps: int, verb: str = "token_logps") -> None:
        """Load the model, make its optimizer, and check its attention.

        Args:
            models: how it is loaded.
            model_config: its config, as transformers reads it.
            total_steps: optimizer steps of the whole run, which the learning rate's schedule spans.
            verb: what of the model the check calls.

        Raises:
            InputError: the model cannot be read, or an option does not fit it.
        """
        from rlhf_core.export import check_export
        from rlhf_core.offload import Offload

        self.model: Any = models.trained(model_config)
        if self.strategy.is_first:
            check_export(self.model, self.tokenizer)
        self.engine = self.strategy.prepare(self.model, total_steps)
        self.engine.eval()
        models.check(self.engine, model_config, verb)
        self.memory = Offload(self.engine)

    def update(self, steps: list[Step]) -> list[dict[str, float]]:
        """Make optimizer steps; every rank is given as many, each with as many micro-batches.

        Returns:
            The figures of each step, the same on all ranks.

        Raises:
            NonFiniteLoss: a gradient is no number. Nothing has been saved of it.
        """
        self.reload()
        self.engine.train()
        figures = [self.optimizer_step(step) for step in steps]
        self.engine.eval()
        return figures

    @abstractmethod
    def optimizer_step(self, step: Step) -> dict[str, float]:
        """One optimizer step; its figures, the same on all ranks."""

    def step(self, number: int) -> dict[str, float]:
        """Apply the gradients that were accumulated; the norm and the learning rate of the step.

        Raises:
            NonFiniteLoss: a gradient is no number.
        """
        from rlhf_core.fit import NonFiniteLoss

        learning_rate = self.strategy.learning_rate(self.engine)
        norm = self.strategy.step(self.engine)
        if not math.isfinite(norm):
            raise NonFiniteLoss(
                f"the gradient norm of optimizer step {number + 1} of the {self.role} is {norm}; nothing of it was saved. Try "
                f"a lower {self.learning_rate_option}{self.ways_out}; --load_checkpoint continues from the newest checkpoint"
            )
        return {"grad_norm": norm, "learning_rate": learning_rate}

    def save(self, folder: str) -> None:
        """Write what a resumed run needs of this rank into a folder that is there; on all ranks."""
        from rlhf_core.checkpoint import write_engine

        self.reload()
        write_engine(self.engine, Path(folder), self.rank)
        self.strategy.barrier()

    def load(self, folder: str) -> None:
        """Go to where `save` was called; on all ranks."""
        from rlhf_core.checkpoint import read_engine

        self.reload()
        read_engine(self.engine, Path(folder), self.rank)

    def export(self, folder: str) -> None:
        """Write the model (with LoRA, the adapter) and its tokenizer in Hugging Face format: the moving average, if there is one.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        from rlhf_core.export import export

        self.reload()
        export(self.model, self.tokenizer, Path(folder), self.strategy, average=self.average)

    def offload(self) -> None:
        """Make room on the device: weights, gradients and optimizer go to the host."""
        self.memory.put_away()

    def reload(self) -> None:
        """Take the device again; nothing to do if it was not left."""
        self.memory.take_back()
