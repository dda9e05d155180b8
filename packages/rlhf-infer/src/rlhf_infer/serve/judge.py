"""What the reward server's worker thread does with samples: read them as the scorer wants them, and score them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_data.encode import EncodeOptions, Encoder, Sample
from rlhf_data.errors import RunError
from rlhf_data.rows import RowError, encodable
from rlhf_infer.rewards.scorer import Answer, Scorer
from rlhf_infer.serve.protocol import Question

ANY_LENGTH = 2**31 - 1
"""What samples are cut at when a longer one than allowed is to be refused, not cut."""


class RefusedError(Exception):
    """Some samples of a request cannot be scored.

    Attributes:
        reasons: why, by number of the sample.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        number, reason = next(iter(reasons.items()))
        others = f" (and {len(reasons) - 1} more cannot be scored)" if len(reasons) > 1 else ""
        super().__init__(f"sample {number}: {reason}{others}")


@dataclass(frozen=True)
class Judge:
    """A scorer, with how samples are encoded for it.

    Attributes:
        scorer: what scores.
        encoder: writes samples as token ids; None for a scorer that reads texts.
        max_len: longest sample in tokens, for one that reads tokens.
    """

    scorer: Scorer
    encoder: Encoder | None = None
    max_len: int = ANY_LENGTH

    def read(self, questions: Sequence[Question]) -> list[Answer]:
        """Samples as the scorer wants them.

        Raises:
            RefusedError: some have no text or no token, or are too long.
        """
        if reasons := {i: reason for i, question in enumerate(questions) if (reason := fault(question))}:
            raise RefusedError(reasons)
        if self.encoder is None:
            return [Answer(question.prompt, question.response, question.label) for question in questions]
        found = [self.sample(encoded) for encoded in self.encoder.encode([question.pair for question in questions])]
        if reasons := {i: sample for i, sample in enumerate(found) if isinstance(sample, str)}:
            raise RefusedError(reasons)
        return [
            Answer(question.prompt, question.response, question.label, sample=sample)
            for question, sample in zip(questions, found, strict=True)
            if isinstance(sample, Sample)
        ]

    def sample(self, encoded: list[Sample] | RowError) -> Sample | str:
        """The only sample of what was encoded, or why it cannot be scored."""
        if isinstance(encoded, RowError):
            return str(encoded)
        (sample,) = encoded
        if len(sample) > self.max_len:
            return f"{len(sample)} tokens, and at most {self.max_len} are scored (--max_len)"
        return sample

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """A finite number for every sample.

        Raises:
            RunError: the scorer gave something else. What it raises itself is passed on.
        """
        rewards = self.scorer.score(answers)
        if len(rewards) != len(answers):
            raise RunError(f"{len(rewards)} rewards for {len(answers)} samples")
        if wrong := next((reward for reward in rewards if not math.isfinite(reward)), None):
            raise RunError(f"a reward is {wrong}")
        return rewards


def fault(question: Question) -> str | None:
    """Why a sample has nothing that could be scored."""
    if not question.pair.response:
        return "the text is empty"
    try:
        encodable(question.pair.prompt, "the prompt")
        encodable(question.pair.response, "the text")
    except RowError as reason:
        return str(reason)
    return None


def encode_options(max_len: int, truncate: bool) -> EncodeOptions:
    """How texts become ids: as they are, with no template, cut at `max_len` or not at all."""
    return EncodeOptions(max_len if truncate else ANY_LENGTH)
