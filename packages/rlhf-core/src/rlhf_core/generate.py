"""Writing responses with a transformers model: the one loop of distillation, batch inference, chat and rollouts.

A `Writer` keeps a batch of responses that grow by one token per model call. One that has ended leaves the batch at once,
and waiting ones of similar prompt length take the free places, so the batch stays full and padding small.

The cache holds every token of the growing responses but the newest, aligned to the right: a row of L tokens ends in the
last column, and what is to its left is padding that nothing attends to. So rows enter by padding or cutting columns on the
left, and leave by index.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from rlhf_core.models.attention import padded_implementation
from rlhf_core.models.policy import Policy
from rlhf_core.packed import packed
from rlhf_core.ranks import Ranks
from rlhf_data.errors import RunError

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers whose state is one key and one value per token, so that rows can be padded, cut and put together."""

BLOCK = 256
"""Tokens whose probabilities are added up together when one is drawn."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from the model's logits: penalty first, then temperature, then `top_p`."""

    greedy: bool = False
    """Take the most probable token; temperature and `top_p` do nothing then."""

    temperature: float = 1.0
    """Divides the logits."""

    top_p: float = 1.0
    """Draw from the smallest set of tokens that has this probability."""

    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that prompt or response already have, and multiplies negative ones. Source:
    Keskar et al. 2019, section 4.1 (arXiv:1909.05858)."""

    logps_at_temperature: bool = False
    """Whether the log-probs of a response are those that training has: at the temperature, of all tokens of the head."""

    @property
    def scale(self) -> float:
        """What the logits are divided by before the log-probs of a response are read off them."""
        return self.temperature if self.logps_at_temperature and not self.greedy else 1.0


@dataclass(eq=False, slots=True)
class Draft:
    """A response that is being written."""

    prompt: tuple[int, ...]
    """Ids of the prompt, at least one."""

    seed: int | Sequence[int]
    """What its tokens are drawn with, whoever else is in the batch."""

    room: int
    """Longest response, in tokens, at least 1."""

    written: list[int] = field(default_factory=list)
    """Ids so far, with the one that ended it."""

    logps: list[float] = field(default_factory=list)
    """Log-probability of each of them in nats: the model's own, before penalty, temperature and `top_p` (or after temperature
    alone, see `Sampling.logps_at_temperature`)."""

    finish_reason: Literal["stop", "length"] | None = None
    """Why it ended: a stop token, or no room; None while it is being written."""

    uniforms: Any = field(init=False, repr=False)
    """Its random numbers in [0, 1), one per token."""

    seen: Tensor | None = field(init=False, repr=False, default=None)
    """Whether each token of the vocabulary is in prompt or response, `[V]`; only kept for a repetition penalty."""

    def __post_init__(self) -> None:
        if not self.prompt or self.room < 1:
            raise ValueError(f"a prompt of {len(self.prompt)} tokens with room for {self.room} cannot be answered")
        self.uniforms = np.random.default_rng(self.seed)

    def __len__(self) -> int:
        """Tokens of prompt and response so far."""
        return len(self.prompt) + len(self.written)


class Writer:
    """Writes responses with a model, token by token.

    Args:
        model: a causal language model of transformers in evaluation mode, with attention for padded rows.
        sampling: how tokens are chosen.
        stop_ids: tokens that end a response.
        size: most responses in a model call. Models with layers that keep a running state (Mamba, linear attention) do not
            take padded rows and write one response at a time.
        device: where inputs go.
        vocabulary: how many first tokens there are to choose from, by default all; heads are padded to more than a tokenizer
            has.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        stop_ids: Iterable[int],
        *,
        size: int,
        device: torch.device,
        vocabulary: int | None = None,
    ) -> None:
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self.device, self.vocabulary = device, vocabulary
        self.takes_rows = takes_padded_rows(model.config)
        self.size = size if self.takes_rows else 1
        self.accepted = inspect.signature(model.forward).parameters
        self.waiting: list[Draft] = []
        self.growing: list[Draft] = []
        self.cache: Any = None

    def add(self, draft: Draft) -> None:
        """Have a response written. It starts when there is room in the batch, after those that wait already or with them."""
        self.waiting.append(draft)

    @property
    def busy(self) -> bool:
        """Whether anything is left to write."""
        return bool(self.waiting or self.growing)

    @torch.no_grad()
    def step(self) -> list[Draft]:
        """One model call: it starts waiting responses if a quarter of the batch is free, and else goes on with those there.

        Returns:
            The responses that have one more token; those with a `finish_reason` are finished.

        Raises:
            RunError: the model's logits are not numbers.
        """
        free = self.size - len(self.growing)
        if self.waiting and 4 * free >= self.size:
            drafts = self._next(free)
            logits, cache = self._begin(drafts)
        else:
            drafts, cache, self.growing, self.cache = self.growing, self.cache, [], None
            logits, cache = self._call(
                [draft.written[-1:] for draft in drafts], [len(draft) for draft in drafts], cache
            )
        self._append(drafts, logits)
        self._keep(drafts, cache)
        return drafts

    @torch.no_grad()
    def idle(self) -> None:
        """A model call without a result, for the sake of other ranks."""
        self._call([[0]], [1], None)

    def _next(self, count: int) -> list[Draft]:
        """Take the response that waits longest, and those with prompts of the most similar length."""
        length = len(self.waiting[0].prompt)
        chosen = sorted(self.waiting, key=lambda draft: abs(len(draft.prompt) - length))[:count]
        taken = set(chosen)
        self.waiting = [draft for draft in self.waiting if draft not in taken]
        return chosen

    def _begin(self, drafts: list[Draft]) -> tuple[Tensor, Any]:
        """Logits for first tokens, `[N, V]`, and the prompts' cache; a prompt that several share is computed once."""
        prompts = list(dict.fromkeys(draft.prompt for draft in drafts))
        logits, cache = self._call(prompts, [len(prompt) for prompt in prompts], None)
        if len(prompts) < len(drafts):
            copies = torch.tensor([prompts.index(draft.prompt) for draft in drafts], device=self.device)
            logits = logits[copies]
            cache.batch_select_indices(copies)
        if self.sampling.repetition_penalty != 1:
            width = min(logits.shape[1], self.vocabulary or logits.shape[1])
            for draft in drafts:
                draft.seen = torch.zeros(width, dtype=torch.bool, device=self.device)
                draft.seen[[token for token in draft.prompt if token < width]] = True
        return logits, cache

    def _call(self, new: Sequence[Sequence[int]], lengths: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        """Logits for what follows rows of `lengths` tokens, `[N, V]`, whose last tokens are `new` and the others in the cache."""
        width, fresh = max(lengths), max(map(len, new))
        ids = torch.tensor([[0] * (fresh - len(tokens)) + list(tokens) for tokens in new], device=self.device)
        places = torch.arange(width, device=self.device) - (width - torch.tensor(lengths, device=self.device))[:, None]
        optional = {"position_ids": places[:, -fresh:].clamp(min=0), "logits_to_keep": 1}
        out = self.model(
            input_ids=ids,
            attention_mask=(places >= 0).long(),
            past_key_values=DynamicCache() if cache is None and self.takes_rows else cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepted},
        )
        return out.logits[:, -1], out.past_key_values

    def _append(self, drafts: list[Draft], logits: Tensor) -> None:
        """Choose a token for each of N responses from logits `[N, V]`."""
        logits, how = logits.float(), self.sampling
        own = logits[:, : self.vocabulary]
        scored = (logits / how.scale if how.scale != 1 else logits) if how.logps_at_temperature else own
        scored = scored.log_softmax(1)
        if scored[:, 0].isnan().any():  # one such number makes its whole row so
            raise RunError(
                "the model's logits are not numbers (NaN or infinite): its weights are damaged, or overflow in this dtype"
            )
        if how.repetition_penalty != 1:
            own = penalised(own, torch.stack([draft.seen for draft in drafts]), how.repetition_penalty)  # type: ignore[misc]
        if how.greedy:
            tokens = own.argmax(1)
        else:
            if how.scale == how.temperature and how.repetition_penalty == 1 and how.top_p == 1:
                probabilities = scored[:, : self.vocabulary].exp()
            else:
                probabilities = nucleus(own / how.temperature, how.top_p).softmax(1)
            uniforms = torch.tensor([draft.uniforms.random() for draft in drafts], dtype=torch.float64)
            tokens = drawn(probabilities, uniforms.to(self.device))
        logps = scored.gather(1, tokens[:, None])[:, 0]
        for draft, token, logp in zip(drafts, tokens.tolist(), logps.tolist(), strict=True):
            draft.written.append(token)
            draft.logps.append(logp)
            if draft.seen is not None:
                draft.seen[token] = True
            if token in self.stop_ids:
                draft.finish_reason = "stop"
            elif len(draft.written) == draft.room:
                draft.finish_reason = "length"

    def _keep(self, drafts: list[Draft], cache: Any) -> None:
        """Let those that have not ended grow, with their rows of the cache beside the rows already there."""
        rows = [row for row, draft in enumerate(drafts) if draft.finish_reason is None]
        if not rows and not self.growing:
            return
        self.growing += [drafts[row] for row in rows]
        if not self.takes_rows:
            self.cache = cache
            return
        if len(rows) < len(drafts):
            cache.batch_select_indices(torch.tensor(rows, dtype=torch.int64, device=self.device))
        width = max(map(len, self.growing)) - 1
        self.cache = joined([part for part in (self.cache, cache) if part is not None], width)


def takes_padded_rows(config: Any) -> bool:
    """Whether several rows of different length can go through a model together, with a cache."""
    return set(getattr(config.get_text_config(), "layer_types", None) or ATTENTION) <= ATTENTION


def joined(caches: list[Any], width: int) -> Any:
    """One cache with the rows of all, each padded or cut on the left to `width` columns."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            parts = [pad(x, (0, 0, width - x.shape[2], 0)) if x.shape[2] != width else x for x in parts]
            setattr(layers[0], name, torch.cat(parts) if len(parts) > 1 else parts[0])
    return caches[0]


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of tokens that were `seen` made smaller (for a penalty above 1); all `[N, V]`."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with -inf outside the smallest set of tokens whose probability reaches `top_p`, `[N, V]`.

    Source: Holtzman et al. 2020, section 3.1 (arXiv:1904.09751); the same set as vLLM's and transformers'.
    """
    if top_p >= 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)


def drawn(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `[N]`: where the cumulative `probabilities` `[N, V]`, which need not add up to 1, pass `uniforms`, `[N]` in [0, 1).

    The cumulative sums, in float64, are of blocks of tokens and then of one block.
    """
    blocks = pad(probabilities, (0, -probabilities.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(2).double().cumsum(1)
    block, rest = passed(sums, uniforms * sums[:, -1])
    inside = blocks[torch.arange(len(block), device=block.device), block].double().cumsum(1)
    place, _ = passed(inside, rest)
    return block * BLOCK + place


def passed(cumulative: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row of `[N, C]` passes its amount of `[N]`, and what the amount is above the sum before that place."""
    total = cumulative[:, -1]
    # what rounds up to the total would fall behind the last place
    amounts = torch.minimum(amounts, total.nextafter(torch.zeros_like(total)))[:, None]
    place = torch.searchsorted(cumulative, amounts, right=True)
    before = pad(cumulative, (1, 0)).gather(1, place)
    return place[:, 0], (amounts - before)[:, 0]


def write_with_policy(
    policy: Policy,
    drafts: Iterable[Draft],
    sampling: Sampling,
    ranks: Ranks,
    *,
    stop_ids: Iterable[int],
    size: int,
    vocabulary: int,
) -> None:
    """Write responses with a policy that is being trained, and is in evaluation mode now.

    Under ZeRO-3 every layer's call is a collective one: every rank must call this, and ranks that are done make empty model
    calls until all are.

    Args:
        policy: the model.
        drafts: the responses, of this rank.
        sampling: how tokens are chosen.
        ranks: the ranks.
        stop_ids: tokens that end a response.
        size: most responses in a model call.
        vocabulary: how many first tokens there are to choose from.
    """
    with batched_attention(policy), packed(policy, size):
        writer = Writer(Called(policy), sampling, stop_ids, size=size, device=ranks.device, vocabulary=vocabulary)
        for draft in drafts:
            writer.add(draft)
        split = policy_is_split(policy)
        while ranks.sum([writer.busy])[0] if split else writer.busy:
            writer.step() if writer.busy else writer.idle()


class Called:
    """The model inside a policy, called through the policy.

    ZeRO-3 takes the call of the outermost module for the beginning of a pass: without it, it would take all model calls for one
    that goes on, and remember ever more.

    Args:
        policy: what DeepSpeed prepared.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.config, self.forward = policy, policy.base.config, policy.base.forward

    def __call__(self, **inputs: Any) -> Any:
        return self.policy("continued", **inputs)


def policy_is_split(policy: Policy) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in policy.parameters())


@contextmanager
def batched_attention(policy: Policy) -> Iterator[None]:
    """Attention that takes several padded rows, as ragged attention does not."""
    base: Any = policy.base
    before = base.config._attn_implementation
    base.set_attn_implementation(padded_implementation(policy.config.get_text_config()) or "sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)
