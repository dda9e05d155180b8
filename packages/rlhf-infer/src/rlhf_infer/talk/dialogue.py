"""A conversation between a person and a model: what was said, what of it still fits, and text out of token ids.

Knows no model, engine or terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf_data.continuation import BROKEN, CONTEXT, continuation_text
from rlhf_data.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_data.encode import Prompt
    from rlhf_data.rows import Message

Ending = Literal["stop", "length", "interrupted"]
"""How an answer ended: the model ended it, it was cut off at a limit, or the person stopped it."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its answer."""

    prompt: str
    answer: str
    ending: Ending
    tries: int = 0
    """How many answers to the prompt were thrown away before this one."""


@dataclass
class Dialogue:
    """What was said so far."""

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """All of it as chat messages."""
        return messages_of(self.system, self.exchanges)

    def undo(self) -> Exchange:
        """Take the last exchange back.

        Raises:
            InputError: there is none.
        """
        if not self.exchanges:
            raise InputError("nothing was said yet")
        return self.exchanges.pop()

    def save(self, path: Path) -> None:
        """Append the conversation to a JSON lines file, as a row that `rlhf train sft --apply_chat_template` reads.

        A last answer that was cut or stopped is marked (`finish_reason`), for people: training ends every answer of such rows.

        Raises:
            InputError: nothing was said, or the file cannot be written.
        """
        if not self.exchanges:
            raise InputError("nothing was said yet, so there is nothing to save")
        ending = "stop" if self.exchanges[-1].ending == "stop" else "length"
        row = {"messages": self.messages(), "finish_reason": ending}
        try:
            with path.expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"cannot save to {path}: {error.strerror}") from None


def messages_of(system: str, exchanges: Sequence[Exchange], prompt: str | None = None) -> list[Message]:
    """Exchanges as chat messages, and a prompt that is still to be answered."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages += [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": exchange.answer}]
    return [*messages, {"role": "user", "content": prompt}] if prompt is not None else messages


WriteOut = Callable[[Sequence[Exchange], str], "Prompt"]
"""Writes exchanges and a prompt out for a model."""


def latest_that_fit(
    exchanges: Sequence[Exchange], prompt: str, write_out: WriteOut, limit: int, reserve: int
) -> tuple[Prompt, int]:
    """What the model is asked with: as much of the conversation as fits, oldest exchanges left out first.

    Args:
        exchanges: what was said.
        prompt: what is to be answered.
        write_out: see `WriteOut`.
        limit: longest conversation with the answer, in tokens.
        reserve: tokens to keep free for the answer, if leaving exchanges out can do it.

    Returns:
        The conversation, written out, and how many exchanges were left out.

    Raises:
        InputError: the prompt alone leaves no room for an answer.
    """
    left_out, written = 0, write_out(exchanges, prompt)
    while len(written.ids) + reserve > limit and left_out < len(exchanges):
        left_out += 1
        written = write_out(exchanges[left_out:], prompt)
    if len(written.ids) >= limit:
        raise InputError(
            f"the prompt has {len(written.ids)} tokens, and prompt and answer together may have {limit}: shorten it"
        )
    return written, left_out


class Detokeniser:
    """Text of token ids that come one by one, as soon as it is certain: never half a character.

    Args:
        tokenizer: of the model.
        before: ids that the text follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.before, self.held = list(before[-CONTEXT:]), list[int]()

    def add(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self.held.append(token)
        text = continuation_text(self.tokenizer, self.before, self.held)
        return "" if text.endswith(BROKEN) else self._told(text)

    def rest(self) -> str:
        """What was held back, when nothing follows any more."""
        return self._told(continuation_text(self.tokenizer, self.before, self.held))

    def _told(self, text: str) -> str:
        self.before, self.held = [*self.before, *self.held][-CONTEXT:], []
        return text


def printable(text: str) -> str:
    """Text without the control characters that could drive a terminal; line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
