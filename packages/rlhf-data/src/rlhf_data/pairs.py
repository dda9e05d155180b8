"""Preference pairs: their columns, their two sides compared, and the reasons why a pair is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlhf_data.encode import Sample
from rlhf_data.errors import InputError
from rlhf_data.rows import (
    Chat,
    Conversation,
    Pair,
    Row,
    RowError,
    finite_number,
    is_complete,
    message_of,
    text_of,
    value_of,
)
from rlhf_data.shapes import RowFormat, columns_of, describe_prompt, read_chat, read_pair, require_key

SAME = "chosen and rejected are the same"
SAME_ONCE_CUT = "chosen and rejected are the same once cut at --max_len"
OTHER_PROMPTS = "chosen and rejected answer different prompts"


class NoPrompt(RowError):
    """A side has nothing before its response."""


@dataclass(frozen=True)
class PairOptions:
    """What the user said about rows of pairs: `--prompt_key`, `--chosen_key`, `--rejected_key`, `--margin_key`.

    Attributes:
        margin_key: column of the margin, None for a margin of 0.
        same_prompt: both sides must answer the same prompt.
    """

    prompt_key: str | None = None
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    margin_key: str | None = None
    same_prompt: bool = False

    def recognise(self, row: Row, where: str) -> RowFormat:
        """Decide from the first row how all rows of a source are read, as `RowOptions.recognise` does."""
        for option, key in (
            ("--prompt_key", self.prompt_key),
            ("--chosen_key", self.chosen_key),
            ("--rejected_key", self.rejected_key),
            ("--margin_key", self.margin_key),
        ):
            if key is not None:
                require_key(row, key, option, where)
        prompt_key = self.prompt_key or ("prompt" if "prompt" in row else None)
        if prompt_key is None:
            self._check_prompts(row, where)
        shown = [
            describe_prompt(row, prompt_key) if prompt_key else "no prompt column",
            f"chosen `{self.chosen_key}`",
            f"rejected `{self.rejected_key}`",
            *([f"margin `{self.margin_key}`"] if self.margin_key else []),
        ]
        readers = (self._reader(prompt_key, self.chosen_key), self._reader(prompt_key, self.rejected_key))
        return RowFormat(", ".join(shown), readers, self._margin, self.same_prompt)

    def _check_prompts(self, row: Row, where: str) -> None:
        for key in (self.chosen_key, self.rejected_key):
            try:
                self._read_side(row, key)
            except NoPrompt as reason:
                raise InputError(
                    f"{where}: {reason}, so where the response begins is unknown; give the column of the prompt with "
                    f"--prompt_key; columns are {columns_of(row)}"
                ) from None
            except RowError:  # of this row alone
                continue

    def _reader(self, prompt_key: str | None, key: str) -> Callable[[Row], Conversation]:
        if prompt_key is not None:
            return lambda row: read_pair(row, prompt_key, key)
        return lambda row: self._read_side(row, key)

    def _read_side(self, row: Row, key: str) -> Conversation:
        """Read a side that carries its prompt itself (text: a whole text)."""
        value = value_of(row, key)
        if isinstance(value, list):
            side = read_chat(row, key)
        elif isinstance(value, dict):
            side = Chat([message_of(value, key)], complete=is_complete(row, key))
        else:
            side = Pair("", text_of(row, key), complete=is_complete(row, key))
        if self.same_prompt and not _has_prompt(side):
            raise NoPrompt(f"`{key}` holds no prompt before the response")
        return side

    def _margin(self, row: Row) -> float:
        if self.margin_key is None:
            return 0.0
        value = row.get(self.margin_key)
        if (number := finite_number(value)) is None:
            raise InputError(
                f"`{self.margin_key}` is {value!r}; with --margin_loss every row needs a finite number in it: correct the "
                "row, name another column with --margin_key, or train without --margin_loss"
            )
        return number


def _has_prompt(side: Chat | Pair) -> bool:
    """Whether anything comes before the response, the last assistant turn."""
    if isinstance(side, Pair):
        return bool(side.prompt)
    replies = [number for number, message in enumerate(side.messages) if message["role"] == "assistant"]
    return replies[-1:] > [0]


def compare(chosen: Sample, rejected: Sample) -> tuple[int, bool]:
    """Compare the two sides of a pair.

    Returns:
        How many prompt tokens both begin with (at most up to the first target of either), and whether that is all of
        both prompts.

    Raises:
        RowError: there is nothing to prefer.
    """
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        raise RowError(SAME_ONCE_CUT if chosen.truncated or rejected.truncated else SAME)
    prompts = [int(side.target_mask.argmax()) for side in (chosen, rejected)]
    most = min(prompts)
    differs = chosen.input_ids[:most] != rejected.input_ids[:most]
    shared = int(differs.argmax()) if differs.any() else most
    return shared, shared == prompts[0] == prompts[1]
