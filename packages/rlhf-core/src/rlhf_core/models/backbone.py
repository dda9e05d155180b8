"""What policies and reward models share: hidden states of ragged batches, and a head that runs functions on its weight.

Shapes: N samples, T tokens, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.batch import Batch


class Head(nn.Linear):
    """The model's own output layer, which can also run a function where its weight is.

    Under ZeRO-3 a weight exists only inside its module's call, so whoever needs the weight goes through that call.
    """

    def forward(self, hidden: Tensor, function: Callable[..., Any] | None = None) -> Any:
        if function is None:
            return super().forward(hidden)
        return function(hidden, self.weight, bias=self.bias)

    @classmethod
    def take(cls, layer: nn.Module) -> None:
        """Give a model's output layer (also one that PEFT trains a copy of) this class.

        Raises:
            ValueError: it is something else than a plain linear layer.
        """
        copies = getattr(layer, "modules_to_save", None)
        for linear in [layer] if copies is None else [layer.original_module, *copies.children()]:
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"the output head must be a plain linear layer, got {type(linear).__name__}: "
                    "take it out of --target_modules"
                )
            linear.__class__ = cls


class Backbone(nn.Module, ABC):
    """A transformer and its head.

    DeepSpeed prepares only the module's call, so every verb goes through it: `policy("token_logps", batch)`.

    Args:
        model: the transformers model (or a PEFT model around it).
        ragged: lay samples end to end in the model call; otherwise pad them to the longest.
        balance: also compute the router's load balance (mixture-of-experts models).
    """

    def __init__(self, model: nn.Module, *, ragged: bool, balance: bool = False) -> None:
        super().__init__()
        self.model = model
        self.ragged = ragged
        self.balance = balance
        self.config = self.base.config
        Head.take(self.head)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore

    @property
    @abstractmethod
    def head(self) -> Head:
        """The output layer."""

    def forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, verb)(*args, **kwargs)

    def without_adapter(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Run a verb of the base model under an adapter, without gradient and dropout: of the reference model, if the base
        is where training started.
        """
        training = self.training
        self.eval()
        with torch.no_grad(), self.model.disable_adapter():  # type: ignore[operator]
            out = getattr(self, verb)(*args, **kwargs)
        self.train(training)
        return out

    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[T, H]`, and the load balance `[N]` if asked for."""
        extra: dict[str, Any] = {"output_router_logits": True} if self.balance else {}
        if self.ragged:
            out = self.base.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                **self.limits(batch),
                **extra,
            )
            hidden, place = out.last_hidden_state[0], slice(None)
        else:
            assert batch.prefixes is None, "a padded call cannot lay prefixes once"
            rows, columns = batch.segment_of_token, batch.position_ids
            shape = (len(batch.lengths), max(batch.lengths))
            ids = batch.input_ids.new_zeros(shape)
            ids[rows, columns] = batch.input_ids
            attended = ids.new_zeros(shape)
            attended[rows, columns] = 1
            out = self.base.base_model(input_ids=ids, attention_mask=attended, use_cache=False, **extra)
            hidden, place = out.last_hidden_state[rows, columns], rows * shape[1] + columns
        if not self.balance:
            return hidden, None
        assert batch.prefixes is None, "experts are balanced by sample: samples must be whole"
        top_k = self.config.get_text_config().num_experts_per_tok
        balance = load_balance([router[place] for router in out.router_logits], batch, top_k)
        return hidden, balance[: batch.num_samples]

    def limits(self, batch: Batch) -> dict[str, Any]:
        """What attention is told of a ragged batch: where segments start, and which continue which."""
        longest = max(batch.lengths)
        limits: dict[str, Any] = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens,
                                  "max_length_q": longest, "max_length_k": longest}  # fmt: skip
        if batch.prefixes is not None:
            limits |= {"prefixes": batch.prefixes} | batch.keys
        return limits


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
        `[S]` float32, segments being samples.

    Source: Fedus et al. 2021, eq. 4-6 (arXiv:2101.03961); DeepSeek-AI 2024, eq. 17-20 (arXiv:2412.19437).
    """
    total = torch.zeros(len(batch.lengths), device=batch.input_ids.device)
    lengths = batch.cu_seqlens.diff().float()[:, None]
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0 / top_k)
        used, wanted = (
            torch.zeros(len(lengths), logits.shape[1], device=logits.device).index_add(0, batch.segment_of_token, x)
            / lengths
            for x in (chosen, probabilities)
        )
        total = total + logits.shape[1] * (used * wanted).sum(1)
    return total / len(router_logits)
