"""The policy writing responses while it is trained: for on-policy distillation.

Small on purpose: engines for rollouts and batch inference are in rlhf-infer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.models.attention import padded_implementation
from rlhf_core.models.policy import Policy
from rlhf_core.strategy import Strategy


@torch.no_grad()
def sample_responses(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[Sequence[int]],
    room: Sequence[int],
    strategy: Strategy,
    *,
    eos_id: int,
    vocabulary: int,
    temperature: float,
) -> list[np.ndarray]:
    """One response to each prompt, each drawn with a seed of its own: who else is in the batch does not matter.

    Under ZeRO-3 every layer's call is a collective one, so every rank must call this with as many prompts.

    Args:
        policy: the model, in evaluation mode.
        prompts: ids of each prompt.
        seeds: of each response.
        room: longest response to each prompt, in tokens.
        strategy: the ranks.
        eos_id: the token that ends a response.
        vocabulary: how many first tokens there are to choose from; heads are padded to more than a tokenizer has.
        temperature: divides the logits.

    Returns:
        Ids of each response, with the EOS that ended it if one did, int32.
    """
    generators = [
        torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0])) for seed in seeds
    ]
    written: list[list[int]] = [[] for _ in prompts]
    with batched_attention(policy):
        for logits in Decoding(policy, prompts, written, room, eos_id, strategy.device):
            probabilities = (logits[:, :vocabulary].float() / temperature).softmax(-1).cpu()
            for row, response in enumerate(written):
                if not ended(response, room[row], eos_id):
                    response.append(int(torch.multinomial(probabilities[row], 1, generator=generators[row])))
            left = sum(not ended(response, room[row], eos_id) for row, response in enumerate(written))
            if not (strategy.sum([left])[0] if policy_is_split(policy) else left):
                break
    return [np.array(response, np.int32) for response in written]


def ended(response: list[int], room: int, eos_id: int) -> bool:
    return len(response) >= room or response[-1:] == [eos_id]


def policy_is_split(policy: Policy) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in policy.parameters())


class Decoding:
    """The model's logits `[N, V]` for the next token of every row, again and again; rows that have ended are carried along."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[np.ndarray],
        written: list[list[int]],
        room: Sequence[int],
        eos_id: int,
        device: torch.device,
    ) -> None:
        self.model, self.written, self.room, self.eos_id, self.device = policy.base, written, room, eos_id, device
        longest = max(map(len, prompts))
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self.attended = torch.zeros_like(self.ids)
        for row, prompt in enumerate(prompts):
            self.ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            self.attended[row, longest - len(prompt) :] = 1

    def __iter__(self) -> Iterator[Tensor]:
        ids, attended, cache = self.ids.to(self.device), self.attended.to(self.device), None
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        while True:
            out = self.model(
                input_ids=ids,
                attention_mask=attended,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            yield out.logits[:, -1]
            cache = out.past_key_values
            ids = torch.tensor([[response[-1]] for response in self.written], device=self.device)
            attended = torch.cat([attended, attended.new_ones(len(ids), 1)], dim=1)
            going = [not ended(response, self.room[row], self.eos_id) for row, response in enumerate(self.written)]
            # a row that has ended stays where it is, within the model's context
            positions = positions[:, -1:] + torch.tensor(going, device=self.device)[:, None]


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
