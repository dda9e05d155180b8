"""Terms and figures that several methods have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_core.method import Frozen
from rlhf_core.metrics import Sums
from rlhf_core.vocabulary import shared_vocabulary
from rlhf_data.encode import Sample


def token_budget(config: Any, samples: int = 1) -> int | None:
    """Tokens of a packed row, or None to pad: what a micro-batch of the longest items would take.

    Args:
        config: the run's options.
        samples: samples that make one item (two for a pair).
    """
    if not config.data.packing_samples:
        return None
    return config.data.packing_tokens or samples * config.batch.micro_train_batch_size * config.data.max_len


def balanced(
    total: Tensor, sums: Sums, balance: Tensor | None, weights: Tensor, coefficient: float
) -> tuple[Tensor, Sums]:
    """Add the load balance of the experts to a loss.

    Args:
        total: the summed loss.
        sums: its metrics.
        balance: of each sample, `[N]`; None if experts are not balanced.
        weights: each sample's share of the step's divisor, `[N]`, so that one divisor serves both terms.
        coefficient: `--aux_loss_coef`.
    """
    if balance is None:
        return total, sums
    auxiliary = (balance * weights).sum()
    return total + coefficient * auxiliary, sums | {"aux_loss": (auxiliary, weights.sum())}


def perplexity(means: dict[str, float], name: str) -> dict[str, float]:
    """The exponential of a mean negative log-probability, if it was measured."""
    return {"perplexity": math.exp(min(means[name], 700.0))} if name in means else {}


def pair_groups(pairs: list[Any]) -> list[tuple[tuple[Any, Any], int]]:
    """Pairs as `Batch.from_groups` takes them: chosen, then rejected, and what they share."""
    return [((pair.chosen, pair.rejected), pair.shared) for pair in pairs]


def prompt_length(sample: Sample) -> int:
    """Tokens before the (last) response of a sample."""
    targets = np.flatnonzero(sample.target_mask)
    starts = np.flatnonzero(np.diff(targets, prepend=-2) > 1)
    return int(targets[starts[-1]])


def is_training(model: Any) -> bool:
    """Whether a model, or the engine around it, is in training mode (DeepSpeed tells only its module)."""
    return getattr(model, "module", model).training


def reference_model(config: Any, tokenizer: Any, *, cached: bool = False) -> Frozen:
    """The frozen reference that the options ask for.

    Raises:
        InputError: it does not have the trained model's vocabulary.
    """
    name, offload = config.reference.ref_pretrain, config.reference.ref_offload
    if name is None:
        return Frozen("reference", "--pretrain", config.model.pretrain, offload, cached)
    shared_vocabulary(config.model, tokenizer, name, "--ref_pretrain")
    return Frozen("reference", "--ref_pretrain", name, offload, cached)
