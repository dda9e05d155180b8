"""The protocol of everything that writes responses: prompts in as ids, responses out as ids, each with how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_infer.config import SamplingConfig


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer `best_of_n` times."""

    prompt_ids: Sequence[int]
    """The prompt, L tokens."""

    seed: int
    """Of the first response; response k is drawn with `seed + k`, whatever else is written at the same time."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One response."""

    token_ids: tuple[int, ...]
    """The response, with the token that ended it if one did."""

    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended it; `length`: it was cut off at `max_new_tokens` or at the end of the model's context."""

    logp: float
    """Log-probability of `token_ids` given the prompt, summed, in nats: the model's own, before temperature, `top_p` and
    `repetition_penalty`."""

    seed: int
    """What it was drawn with."""


class Engine(Protocol):
    """Something that writes responses."""

    def generate(
        self, requests: Iterable[Request], sampling: SamplingConfig
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Answer a stream of requests.

        Requests are taken from the stream as there is room for them, so it may be endless.

        Yields:
            The number of a request, counted from 0, and its `best_of_n` responses, as soon as all of them are written; in
            any order.
        """
        ...

    def close(self) -> None:
        """Give memory and devices back."""
        ...


def answer_all(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int = 0
) -> list[tuple[Completion, ...]]:
    """Answer every prompt, in order; response k of prompt n is drawn with `sample_seed(seed, n) + k`."""
    requests = [Request(prompt, sample_seed(seed, number)) for number, prompt in enumerate(prompts)]
    answers = dict(engine.generate(requests, sampling))
    return [answers[number] for number in range(len(prompts))]


def sample_seed(seed: int, row: int) -> int:
    """Seed of the first response to a row: the same in every run, far from those of other rows."""
    import numpy as np

    return int(np.random.SeedSequence([seed, row]).generate_state(1)[0] >> 1)
