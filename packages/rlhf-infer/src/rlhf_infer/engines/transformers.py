"""Generation with transformers, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_infer.config import SamplingConfig
from rlhf_infer.engines.engine import Completion, Request, context_of, room

if TYPE_CHECKING:
    from rlhf_core.generate import Draft, Sampling

LOOK_AHEAD = 8
"""Batches of responses that wait to be started, so that prompts of similar length are found to start together."""


class TransformersEngine:
    """Writes responses with the loop of `rlhf_core.generate`, which keeps its batch full.

    Args:
        model: a causal language model in evaluation mode.
        stop_ids: tokens that end a response.
        micro_batch_size: most responses that are written at the same time.
    """

    def __init__(self, model: Any, stop_ids: Sequence[int], micro_batch_size: int = 16) -> None:
        self.model, self.stop_ids, self.micro_batch_size = model, tuple(stop_ids), micro_batch_size
        self.context = context_of(model.config)

    def generate(
        self, requests: Iterable[Request], sampling: SamplingConfig
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """See `Engine.generate`; a prompt that fills the model's context is an InputError."""
        from rlhf_core.generate import Writer

        writer = Writer(self.model, how(sampling), self.stop_ids, size=self.micro_batch_size, device=self.model.device)
        numbered = enumerate(requests)
        owner: dict[Draft, int] = {}
        answers: dict[int, list[Draft]] = {}
        while True:
            while len(writer.waiting) < LOOK_AHEAD * self.micro_batch_size:
                if (following := next(numbered, None)) is None:
                    break
                number, request = following
                answers[number] = self._drafts(request, sampling)
                for draft in answers[number]:
                    owner[draft] = number
                    writer.add(draft)
            if not writer.busy:
                return
            for draft in writer.step():
                if draft.finish_reason:
                    number = owner.pop(draft)
                    if number in answers and all(other.finish_reason for other in answers[number]):
                        yield number, tuple(map(completion, answers.pop(number)))

    def close(self) -> None:
        """Let the model go."""
        del self.model

    def _drafts(self, request: Request, sampling: SamplingConfig) -> list[Draft]:
        from rlhf_core.generate import Draft

        prompt, longest = tuple(request.prompt_ids), room(request.prompt_ids, sampling, self.context)
        return [Draft(prompt, request.seed + number, longest) for number in range(sampling.best_of_n)]


def completion(draft: Draft) -> Completion:
    """A finished draft, for those who asked."""
    assert draft.finish_reason is not None and isinstance(draft.seed, int)
    return Completion(tuple(draft.written), draft.finish_reason, sum(draft.logps), draft.seed)


def how(sampling: SamplingConfig) -> Sampling:
    """The options of sampling, for rlhf-core."""
    from rlhf_core.generate import Sampling

    return Sampling(sampling.greedy_sampling, sampling.temperature, sampling.top_p, sampling.repetition_penalty)


def load(pretrain: str, *, bf16: bool = False, trust_remote_code: bool = False) -> Any:
    """A causal language model that writes, on the GPU if there is one.

    Args:
        pretrain: folder or Hub id.
        bf16: compute in bfloat16 instead of float32.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    from rlhf_core.config import ModelConfig
    from rlhf_core.libraries import settle

    settle()
    import torch

    from rlhf_core.models.attention import padded_implementation
    from rlhf_core.models.load import load_model, load_model_config

    model = ModelConfig(pretrain=pretrain, bf16=bf16, trust_remote_code=trust_remote_code)
    attention = padded_implementation(load_model_config(model).get_text_config())
    loaded = load_model(model, None, attn_implementation=attention)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")
