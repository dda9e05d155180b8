"""The policy: a causal language model whose head and log-softmax are one chunked function.

Shapes: N samples, T tokens, M targets, H hidden size, V vocabulary. `[tokens, vocabulary]` logits are never whole, and
places that predict no target never reach the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.batch import Batch
from rlhf_losses import linear_cross_entropy_sum, linear_token_logps

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference in nats between two ways to compute log-probs of the same model: of any in float32, the mean in bfloat16."""


class Head(nn.Linear):
    """The model's own output layer, which can also run a function where its weight is.

    Under ZeRO-3 a weight exists only inside its module's call, so whoever needs the weight goes through that call.
    """

    def forward(self, hidden: Tensor, function: Callable[..., Any] | None = None) -> Any:
        if function is None:
            return super().forward(hidden)
        return function(hidden, self.weight, bias=self.bias)


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


class Policy(nn.Module):
    """A causal language model, seen as a distribution over responses.

    DeepSpeed prepares only the module's call, so every verb goes through it: `policy("token_logps", batch)`.

    Args:
        model: the language model (or a PEFT model around it).
        ragged: lay samples end to end in the model call; otherwise pad them to the longest.
        balance: also return the router's load balance (mixture-of-experts models).
    """

    def __init__(self, model: nn.Module, *, ragged: bool, balance: bool = False) -> None:
        super().__init__()
        self.model = model
        self.ragged = ragged
        self.balance = balance
        self.config = self.base.config
        self.logits = Logits.of(self.config.get_text_config())
        head = self.base.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(
                f"the output head must be a plain linear layer, got {type(head).__name__}: take it out of --target_modules"
            )
        head.__class__ = Head

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore

    @property
    def head(self) -> Head:
        return self.base.get_output_embeddings()  # type: ignore

    def forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, verb)(*args, **kwargs)

    def token_logps(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probability of every target token given what precedes it, in nats, `[M]` float32."""
        hidden, _ = self.hidden_states(batch)
        return self._at_targets(hidden, batch, linear_token_logps, temperature=temperature)

    def cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Negative log-probability of the targets: its sum, each target's `[M]` (detached), and the load balance `[N]`."""
        hidden, balance = self.hidden_states(batch)
        total, each = self._at_targets(hidden, batch, linear_cross_entropy_sum)
        return total, each, balance

    def full_logits(self, input_ids: Tensor) -> Tensor:
        """The model's own logits of one sample, `[L]` to `[L, V]`; only to check ours against."""
        return self.model(input_ids=input_ids[None], use_cache=False).logits[0]

    def _at_targets(self, hidden: Tensor, batch: Batch, function: Callable[..., Any], **kwargs: Any) -> Any:
        """Run a chunked head function on the places that predict a target.

        The head is always called, also without targets: ranks must make the same calls in the same order.
        """
        places, labels = batch.targets - 1, batch.labels
        if empty := not batch.num_targets:
            places, labels = batch.cu_seqlens[:1].long(), labels.new_full((1,), -100)
        out = self.head(
            hidden[places],
            lambda h, weight, bias: function(
                h, weight, labels, bias=bias, logit_scale=self.logits.logit_scale, softcap=self.logits.softcap, **kwargs
            ),
        )
        if not empty:
            return out
        return (out[0], out[1][:0]) if isinstance(out, tuple) else out[:0]

    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[T, H]`, and the load balance `[N]` if asked for."""
        extra = {"output_router_logits": True} if self.balance else {}
        if self.ragged:
            longest = max(batch.lengths)
            out = self.base.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                cu_seq_lens_q=batch.cu_seqlens,
                cu_seq_lens_k=batch.cu_seqlens,
                max_length_q=longest,
                max_length_k=longest,
                **extra,
            )
            hidden, place = out.last_hidden_state[0], slice(None)
        else:
            rows, columns = batch.sample_of_token, batch.position_ids
            shape = (batch.num_samples, max(batch.lengths))
            ids = batch.input_ids.new_zeros(shape)
            ids[rows, columns] = batch.input_ids
            attended = ids.new_zeros(shape)
            attended[rows, columns] = 1
            out = self.base.base_model(input_ids=ids, attention_mask=attended, use_cache=False, **extra)
            hidden, place = out.last_hidden_state[rows, columns], rows * shape[1] + columns
        if not self.balance:
            return hidden, None
        top_k = self.config.get_text_config().num_experts_per_tok
        return hidden, load_balance([router[place] for router in out.router_logits], batch, top_k)


def load_balance(router_logits: list[Tensor], batch: Batch, top_k: int) -> Tensor:
    """How unevenly each sample uses the experts: 1 when all are used alike, the number of experts at worst.

    Per layer E · Σ_e f_e · p_e, with f_e the share of the sample's routed slots that expert e got and p_e its mean
    router probability, averaged over layers. Taken per sample, as in DeepSeek-V3, not per batch: so it adds up the same
    under any micro-batching.

    Args:
        router_logits: `[T, E]` per layer.
        batch: the samples.
        top_k: experts per token.

    Returns:
        `[N]` float32.

    Source: Fedus et al. 2021, eq. 4-6 (arXiv:2101.03961); DeepSeek-AI 2024, eq. 17-20 (arXiv:2412.19437).
    """
    total = torch.zeros(batch.num_samples, device=batch.input_ids.device)
    lengths = batch.cu_seqlens.diff().float()[:, None]
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0 / top_k)
        used, wanted = (
            torch.zeros(batch.num_samples, logits.shape[1], device=logits.device).index_add(0, batch.sample_of_token, x)
            / lengths
            for x in (chosen, probabilities)
        )
        total = total + logits.shape[1] * (used * wanted).sum(1)
    return total / len(router_logits)


@torch.no_grad()
def check_policy(policy: Callable[..., Any], vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Assert on the loaded model what every number rests on: samples do not see each other, and the chunked head is the model's own.

    Two short random samples are run together through our call and apart through the model's own.

    Raises:
        ValueError: log-probs differ by more than the number format explains.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 5)
    ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    first, second = ids.split(lengths)
    places = torch.cat([torch.arange(n) for n in lengths])
    batch = Batch(ids, places, torch.tensor([0, 7, 12], dtype=torch.int32), places.nonzero()[:, 0], lengths).to(device)
    ours = policy("token_logps", batch)
    apart = [
        policy("full_logits", sample.to(device))[:-1]
        .float()
        .log_softmax(-1)
        .gather(1, sample[1:, None].to(device))[:, 0]
        for sample in (first, second)
    ]
    gaps = (ours - torch.cat(apart)).abs()
    difference = (
        gaps.max() if dtype == torch.float32 else gaps.mean()
    ).item()  # bfloat16 rounds single logits by up to 0.06
    if not difference <= PROBE_TOLERANCE[dtype]:
        raise ValueError(
            f"this model's log-probs differ by {difference:.3g} nats between its own forward pass and ours: either samples laid "
            "end to end see each other in it (try without --flash_attn and --packing_samples), or its head does more than the "
            "linear map, scale and soft cap that are handled"
        )
