"""Rows of which only the prompt is read: their columns, decided once, on the first row of a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from rlhf_data.errors import InputError
from rlhf_data.rows import Conversation, Pair, Row, marker_of, optional_text_of, text_of
from rlhf_data.shapes import RowFormat, columns_of, describe_prompt, read_prompt, require_key

PROMPT_KEYS = (
    "messages",
    "conversations",
    "conversation",
    "context_messages",
    "prompt",
    "question",
    "instruction",
    "input",
)
"""Column names of a prompt, in the order in which they are looked for."""


@dataclass(frozen=True)
class PromptOptions:
    """What the user said about rows of prompts: `--input_key`."""

    input_key: str | None = None

    def recognise(self, row: Row, where: str) -> RowFormat:
        """Decide from the first row how all rows of a source are read, as `RowOptions.recognise` does.

        What is read has no response: text is a `Pair` with an empty one, and of a `Chat` a reply at the end is ignored.
        """
        if self.input_key is not None:
            require_key(row, self.input_key, "--input_key", where)
            return _prompt_format(row, self.input_key)
        if marker_of(row) is not None and "input" in row:
            return _prompt_format(row, "input")
        key = next((key for key in PROMPT_KEYS if key in row), None)
        if key is None:
            _refuse(row, where)
        return _alpaca_format(row) if key == "instruction" else _prompt_format(row, key)


def _prompt_format(row: Row, key: str) -> RowFormat:
    messages = isinstance(row[key], list)
    return RowFormat(
        f"messages `{key}`" if messages else describe_prompt(row, key), (lambda row: read_prompt(row, key),)
    )


def _alpaca_format(row: Row) -> RowFormat:
    extras = [f"`{key}`" for key in ("input", "system") if key in row]
    return RowFormat(f"prompt `instruction`{' with ' + ', '.join(extras) if extras else ''}", (_read_alpaca,))


def _read_alpaca(row: Row) -> Conversation:
    prompt, extra = text_of(row, "instruction"), optional_text_of(row, "input")
    return Pair(f"{prompt}\n{extra}" if extra else prompt, "", optional_text_of(row, "system"))


def _refuse(row: Row, where: str) -> NoReturn:
    if "chosen" in row:
        hint = (
            "they look like preference pairs: give --input_key chosen if those are chats, whose last reply is left out"
        )
    else:
        hint = "name the column of the prompt with --input_key"
    raise InputError(f"{where}: no prompt is found in the rows; columns are {columns_of(row)}; {hint}")
