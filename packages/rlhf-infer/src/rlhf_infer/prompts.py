"""The prompts of a generation job: rows of its data, written out, conditioned, and checked against the model's context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from rlhf_data.encode import Encoder, Prompt
from rlhf_data.errors import InputError, strict_error
from rlhf_data.rows import Pair, RowError
from rlhf_data.stream import RowStream, StreamedRow
from rlhf_infer.config import GenerateConfig
from rlhf_infer.processors import condition

BLOCK = 256
"""Rows that are read and encoded together."""


@dataclass(frozen=True, slots=True)
class Item:
    """A row of the data, and its prompt or the reason why it has none."""

    row: StreamedRow
    prompt: Prompt | RowError
    plain: str
    """The prompt's text without the reward that is asked for."""


class Prompts:
    """The prompts of a job; read from the data anew each time, a block of rows at a time.

    Args:
        stream: the rows.
        encoder: writes them out.
        config: the job's options.
        context: longest sequence of the model, in tokens, if it has one.
    """

    def __init__(self, stream: RowStream, encoder: Encoder, config: GenerateConfig, context: int | None) -> None:
        self.stream, self.encoder, self.context = stream, encoder, context
        self.data, self.conditioning = config.data, config.conditioning
        size = config.data.rollout_batch_size
        number = config.data.iter
        self.start, self.stop = (0, None) if number is None else (number * size, (number + 1) * size)

    def items(self, done: int = 0) -> Iterator[Item]:
        """Rows of the slice behind the first `done` ones, in order."""
        rows = self.stream.read(self.start + done, self.stop)
        while block := list(islice(rows, BLOCK)):
            readable = [row.conversation for row in block if not isinstance(row.conversation, RowError)]
            plain = self.encoder.prompts(readable)
            prompts = iter(zip(self._written(plain), plain, strict=True))
            for row in block:
                reason = row.conversation
                prompt, before = (reason, reason) if isinstance(reason, RowError) else next(prompts)
                yield Item(
                    row,
                    fitting(prompt, self.data.prompt_max_len, self.context),
                    before.text if isinstance(before, Prompt) else "",
                )

    def count(self) -> int:
        """Rows of the slice; a pass over the data."""
        total = self.stream.count()
        return max(0, min(total, total if self.stop is None else self.stop) - self.start)

    def check(self, done: int) -> bool:
        """Make sure that there is something to answer.

        Args:
            done: rows that an earlier run has finished.

        Returns:
            Whether a prompt is left behind those.

        Raises:
            InputError: the slice is behind the end of the data, no row of it can be used, or (`--strict_data`) some
                cannot.
        """
        dropped: dict[str, tuple[int, str]] = {}
        left = False
        for item in self.items(done):
            if isinstance(item.prompt, RowError):
                if self.data.strict_data:
                    raise strict_error(str(item.row.place), str(item.prompt)) from None
                count, first = dropped.get(str(item.prompt), (0, str(item.row.place)))
                dropped[str(item.prompt)] = (count + 1, first)
            else:
                left = True
                if not self.data.strict_data:
                    break
        if not left and not done:
            raise InputError(self._nothing(dropped))
        return left

    def _written(self, prompts: list[Prompt | RowError]) -> list[Prompt | RowError]:
        """Prompts as they are asked: with the reward that responses should have, if one is asked for."""
        reward = self.conditioning.csft_reward
        if reward is None:
            return prompts
        template = self.conditioning.reward_template
        asked = iter(
            self.encoder.prompts(
                [
                    Pair(condition(prompt.text, reward, template), "", rendered=prompt.rendered)
                    for prompt in prompts
                    if isinstance(prompt, Prompt)
                ]
            )
        )
        return [next(asked) if isinstance(prompt, Prompt) else prompt for prompt in prompts]

    def _nothing(self, dropped: dict[str, tuple[int, str]]) -> str:
        if dropped:
            reasons = "; ".join(
                f"{reason} ({count:,}, the first: {first})" for reason, (count, first) in dropped.items()
            )
            return f"--dataset {self.data.dataset}: no row can be used: {reasons}"
        total, size = self.stream.count(), self.data.rollout_batch_size
        slices = -(-total // size)
        return (
            f"--iter {self.data.iter} is past the end of the data: {self.data.dataset} has {total:,} prompts, which are "
            f"{slices} iteration{'s' * (slices != 1)} of --rollout_batch_size {size} "
            f"({'only --iter 0' if slices == 1 else f'--iter 0 to {slices - 1}'})"
        )


def fitting(prompt: Prompt | RowError, longest: int, context: int | None) -> Prompt | RowError:
    """A prompt, if a model can be asked with it; else the reason why not.

    Args:
        prompt: as it was written out.
        longest: `--prompt_max_len`.
        context: longest sequence of the model, in tokens, if it has one.
    """
    if isinstance(prompt, RowError):
        return prompt
    if not prompt.ids:
        return RowError("the prompt has no token")
    if len(prompt.ids) > longest:
        return RowError(f"prompt longer than --prompt_max_len {longest}")
    if context and len(prompt.ids) >= context:
        return RowError(f"prompt leaves no room for a response in the model's context of {context} tokens")
    return prompt
