"""What a training method is: its data, its step loss, and what it needs beside the trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.config import ModelConfig
from rlhf_core.metrics import Sums

if TYPE_CHECKING:
    from rlhf_core.models.reward import RewardHead


@dataclass(frozen=True)
class Frozen:
    """A model that is called and never trained: a reference, a teacher."""

    role: str
    """What people call it: `reference`, `teacher`."""
    option: str
    """The option that names it."""
    name: str
    """Folder or Hub id."""
    offload: bool = False
    cached: bool = False
    """Whether it is called once for every sample before training, and not held after that."""

    def options(self, trained: ModelConfig) -> ModelConfig:
        """How it is loaded: as the trained model, without what is about training."""
        return trained.model_copy(update={"pretrain": self.name, "aux_loss_coef": 0.0})


@dataclass(frozen=True)
class Window:
    """Some samples of a data set, by number: those of one optimizer step, or of a part of an evaluation."""

    dataset: Any
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Any:
        return self.dataset[int(self.numbers[place])]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample as they are laid out, int64 `[N]`."""
        return self.dataset.lengths[self.numbers]

    @property
    def num_targets(self) -> np.ndarray:
        """Trained tokens of each sample, int64 `[N]`."""
        return self.dataset.num_targets[self.numbers]


@dataclass(frozen=True)
class InMemory:
    """A data set of samples made on the way."""

    samples: Sequence[Any]
    lengths: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return self.samples[number]

    def window(self) -> Window:
        return Window(self, np.arange(len(self.samples)))


class Method(ABC):
    """A training method. The loop (`Fit`) is the same for all; a method overrides what is its own."""

    name: ClassVar[str]

    unit: ClassVar[str] = "samples"
    """What its data sets and batches are counted in."""

    train: Any
    """Training samples: `len`, `[i]`, `lengths [N]` (tokens as they are laid out), `longest`, `num_targets [N]`,
    `fingerprint`."""

    evaluation: Any
    """Held-out samples, or None."""

    data_report: Any
    """What the validation of the data found, kept in the record."""

    token_budget: int | None
    """Tokens of a packed row, or None to pad."""

    share_prefix: bool = False
    """Whether batches lay shared prefixes once."""

    head: RewardHead | None = None
    """Of the reward model to train; None for a policy."""

    frozen: Frozen | None = None
    """The model that is needed beside the trained one, if any."""

    frozen_model: Any = None
    """It, once the run has loaded it."""

    @property
    def cache_bytes(self) -> int:
        """What the rows of a cached frozen model take on disk."""
        return 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that a model will see."""
        return max(data.longest for data in (self.train, self.evaluation) if data is not None)

    def prepare(self, models: Any) -> None:  # noqa: B027  not every method has to
        """Compute what is computed once, before the trained model is loaded. May drop `frozen` if it then is not needed.

        Args:
            models: loads models, see `rlhf_core.models.loader.Models`.
        """

    def begin_step(self, engine: Any, window: Window, run: Any) -> Window:
        """What must be known of a whole step before its first micro-batch; also called for each part of an evaluation.

        Args:
            engine: the trained model.
            window: the samples of the step.
            run: the `Fit`: ranks, micro-batches, position.

        Returns:
            The samples to use; usually the same.
        """
        return window

    def divisor(self, window: Window) -> float:
        """What the summed loss of a step is divided by, over all ranks: its targets for a per-token loss, else its samples."""
        return float(len(window))

    @abstractmethod
    def collate(self, samples: list[Any]) -> Batch:
        """Samples to a batch."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Sums]:
        """The summed loss of a micro-batch, and metrics as (sum, count). Must be linear in samples, and 0 without any."""

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics as they are logged, from their means: what is not linear (a perplexity) is computed here."""
        return means

    def finish(self, run: Any) -> None:  # noqa: B027  not every method has to
        """After the last step, before the model is written."""

    def identity(self) -> dict[str, Any]:
        """What else must be the same for a checkpoint to be continued."""
        return {}
