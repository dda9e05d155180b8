"""Engines: prompts in as ids, responses out as ids, with the reason why each one ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rlhf_infer.config import SamplingConfig


@dataclass(frozen=True)
class Completion:
    """One response to one prompt."""

    prompt: int
    """Which prompt it answers, counted from 0."""

    token_ids: tuple[int, ...]
    """The response, with the EOS that ended it if one did."""

    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended it; `length`: it was cut off at `max_new_tokens`."""


class Engine(Protocol):
    """Something that writes responses."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Completion]:
        """Answer every prompt `best_of_n` times; completions come in the order of the prompts."""
        ...


class TransformersEngine:
    """Generation with transformers, for machines without vLLM: prompts are batched by length.

    Args:
        model: a causal language model in evaluation mode.
        eos_token_ids: tokens that end a response.
        micro_batch_size: responses written at the same time.
    """

    def __init__(self, model: Any, eos_token_ids: Sequence[int], micro_batch_size: int = 16) -> None:
        self.model = model
        self.eos = frozenset(eos_token_ids)
        self.micro_batch_size = micro_batch_size

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Completion]:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            return self._generate(prompts, sampling)

    def _generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Completion]:
        requests = [i for i in range(len(prompts)) for _ in range(sampling.best_of_n)]
        by_length = sorted(range(len(requests)), key=lambda r: len(prompts[requests[r]]))
        written: dict[int, Completion] = {}
        for start in range(0, len(by_length), self.micro_batch_size):
            chunk = by_length[start : start + self.micro_batch_size]
            rows = self._write([prompts[requests[r]] for r in chunk], sampling)
            written |= {r: self._cut(requests[r], row) for r, row in zip(chunk, rows, strict=True)}
        return [written[r] for r in range(len(requests))]

    def _write(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[list[int]]:
        """New tokens of each prompt, `max_new_tokens` or fewer, with whatever follows an EOS still there."""
        import torch

        longest, pad = max(map(len, prompts)), min(self.eos)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        attended = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        choice = {"do_sample": False} if sampling.greedy_sampling else {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0,
        }  # fmt: skip
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=attended.to(self.model.device),
                max_new_tokens=sampling.max_new_tokens,
                repetition_penalty=sampling.repetition_penalty,
                eos_token_id=sorted(self.eos),
                pad_token_id=pad,
                use_cache=True,
                **choice,
            )
        return out[:, longest:].tolist()

    def _cut(self, prompt: int, tokens: list[int]) -> Completion:
        """End a response at its first EOS."""
        for length, token in enumerate(tokens, start=1):
            if token in self.eos:
                return Completion(prompt, tuple(tokens[:length]), "stop")
        return Completion(prompt, tuple(tokens), "length")
