"""The policy: a causal language model whose head and log-softmax are one chunked function.

Shapes: N samples, T tokens, M targets, H hidden size, V vocabulary. `[tokens, vocabulary]` logits are never whole, and
places that predict no target never reach the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.models.backbone import Backbone, Head
from rlhf_losses import linear_cross_entropy_sum, linear_token_logps
from rlhf_losses.linear import Slope


@dataclass(frozen=True)
class Logits:
    """What a model does between its head and its logits: `softcap * tanh(scale * head(h) / softcap)`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Logits:
        """Read it from a model's config: Gemma's soft cap, Cohere's scale, Granite's divisor."""
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(scale / divisor, getattr(config, "final_logit_softcapping", None))


class Policy(Backbone):
    """A causal language model, seen as a distribution over responses. Trained or frozen (a reference, a teacher)."""

    def __init__(self, model: Any, *, ragged: bool, balance: bool = False) -> None:
        super().__init__(model, ragged=ragged, balance=balance)
        self.logits = Logits.of(self.config.get_text_config())

    @property
    def head(self) -> Head:
        return self.base.get_output_embeddings()  # type: ignore

    def token_logps(
        self, batch: Batch, temperature: float = 1.0, *, with_entropy: bool = False, slope: Slope | None = None
    ) -> tuple[Any, Tensor | None]:
        """Log-probability of every target token given what precedes it.

        Args:
            batch: the samples.
            temperature: divides the logits: the one that responses were drawn at.
            with_entropy: also give the entropy of the distribution that each target was drawn from.
            slope: what the derivative of the loss by each log-prob will be, see `rlhf_losses.linear_token_logps`.

        Returns:
            Nats, `[M]` float32, or a pair of them with the entropies; and the load balance `[N]`.
        """

        def logps(hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any) -> Any:
            return linear_token_logps(
                hidden, weight, labels, temperature=temperature, with_entropy=with_entropy, slope=slope, **head
            )

        return self.at_targets(batch, logps)

    def cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Negative log-probability of the targets: its sum, each target's `[M]` (detached), and the load balance `[N]`."""
        (total, each), balance = self.at_targets(batch, linear_cross_entropy_sum)
        return total, each, balance

    def at_targets(self, batch: Batch, function: Callable[..., Any]) -> tuple[Any, Tensor | None]:
        """Run a chunked head function on the hidden states that predict targets; also returns the load balance `[N]`.

        The head is always called, also without targets: ranks must make the same calls in the same order. The function
        then sees one state with the label -100, and its results are cut to no target.

        Args:
            batch: the samples.
            function: takes hidden states `[M, H]`, the head's weight `[V, H]`, labels `[M]`, and as keywords `bias`,
                `logit_scale` and `softcap`; returns one or several values per target, or sums.
        """
        hidden, balance = self.hidden_states(batch)
        places, labels = batch.predictors, batch.labels
        if empty := not batch.num_targets:
            places, labels = batch.cu_seqlens[:1].long(), labels.new_full((1,), -100)
        out = self.head(
            hidden[places],
            lambda h, weight, bias: function(
                h, weight, labels, bias=bias, logit_scale=self.logits.logit_scale, softcap=self.logits.softcap
            ),
        )
        return (_cut(out) if empty else out), balance

    def continued(self, **inputs: Any) -> Any:
        """The model's own call, for writing responses (`rlhf_core.generate`)."""
        return self.base(**inputs)

    def full_logits(self, input_ids: Tensor) -> Tensor:
        """The model's own logits of one sample, `[L]` to `[L, V]`; only to check ours against."""
        return self.model(input_ids=input_ids[None], use_cache=False).logits[0]


def _cut(out: Any) -> Any:
    """Nothing per target is left; sums stay."""
    if isinstance(out, tuple):
        return tuple(_cut(x) for x in out)
    return out[:0] if out.dim() else out
