"""The protocol of everything that writes responses: prompts in as ids, responses out as ids, each with how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rlhf_data.errors import InputError
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


def room(prompt_ids: Sequence[int], sampling: SamplingConfig, context: int | None) -> int:
    """Longest response to a prompt, in tokens: `max_new_tokens`, or less where the model's context ends.

    Raises:
        InputError: the prompt is empty, or fills the context.
    """
    length = len(prompt_ids)
    if not length:
        raise InputError("a prompt has no token, and a model cannot answer nothing: leave empty prompts out")
    if context is None:
        return sampling.max_new_tokens
    if length >= context:
        raise InputError(
            f"a prompt of {length:,} tokens leaves no room for a response in the context of {context:,} tokens: leave longer "
            f"prompts out with --prompt_max_len {context - 1}"
        )
    return min(sampling.max_new_tokens, context - length)


def context_of(model_config: Any) -> int | None:
    """Longest sequence of a model, in tokens; None if its config names none."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def stop_ids(pretrain: str, model_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's EOS, and those of `generation_config.json` (without it, of `config.json`).

    Args:
        pretrain: the model's folder or Hub id.
        model_config: its architecture.
        tokenizer: its tokenizer.

    Raises:
        InputError: there is a `generation_config.json` that cannot be read.
    """
    from transformers import GenerationConfig
    from transformers.utils.hub import cached_file

    found = cached_file(pretrain, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    try:
        options = GenerationConfig.from_pretrained(pretrain) if found else model_config.get_text_config()
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrain {pretrain}: generation_config.json cannot be read ({error})") from error
    named = options.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return tuple(sorted(ids - {None}))
