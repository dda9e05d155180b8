"""Reading the responses of a data set for scoring, each with its prompt as it is written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

from rlhf_data.config import ResponseDataConfig
from rlhf_data.encode import Encoder, Prompt, Sample
from rlhf_data.errors import InputError, strict_error
from rlhf_data.rows import Chat, Conversation, Pair, Row, RowError, Text, marker_of
from rlhf_data.shapes import PAIR_KEYS, RowOptions
from rlhf_data.stream import RowStream, StreamedRow
from rlhf_data.templates import as_chat, decode_escapes, plain_pieces
from rlhf_infer.generate import as_json
from rlhf_infer.rewards.scorer import Answer

KEPT = ("input", "plain_input", "asked_reward", "output", "rendered", "messages", "finish_reason", "source")
"""What is kept of a generated row that cannot be scored, so that the rows of a file are alike."""

CHECKED = 64
"""Rows that are read at a time to see whether any can be scored."""


class ResponseOptions(RowOptions):
    """How rows with a prompt and a response are read."""

    whole_texts: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Item:
    """A row of the data with what is scored, or the reason why that cannot be."""

    row: StreamedRow
    answer: Answer | RowError
    rendered: str = ""


class Responses:
    """The responses of a job; read from the data anew each time, some rows at a time.

    Args:
        stream: the rows.
        data: how they are read.
        encoder: writes them out for a reward model; None for a function.
    """

    def __init__(self, stream: RowStream, data: ResponseDataConfig, encoder: Encoder | None) -> None:
        self.stream, self.encoder, self.strict = stream, encoder, data.strict_data
        template = data.input_template
        self.template = None if template is None else decode_escapes(template)

    def windows(self, size: int, done: int = 0) -> Iterator[list[Item]]:
        """All rows behind the first `done` ones, in order, `size` at a time."""
        rows = self.stream.read(done)
        while block := list(islice(rows, size)):
            yield self._items(block)

    def check(self, done: int) -> bool:
        """Make sure that there is something to score.

        Args:
            done: rows that an earlier run has finished.

        Returns:
            Whether a response is left behind those.

        Raises:
            InputError: no row can be used, or (`--strict_data`) some cannot.
        """
        reasons: dict[str, tuple[int, str]] = {}
        left = False
        for item in (item for window in self.windows(CHECKED, done) for item in window):
            if not isinstance(item.answer, RowError):
                left = True
                if not self.strict:
                    break
                continue
            reason, place = str(item.answer), str(item.row.place)
            if self.strict:
                raise strict_error(place, reason) from None
            count, first = reasons.get(reason, (0, place))
            reasons[reason] = (count + 1, first)
        if not left and not done:
            said = "; ".join(f"{reason} ({count:,}, the first: {first})" for reason, (count, first) in reasons.items())
            raise InputError(f"--dataset: no row can be scored: {said}")
        return left

    def _items(self, block: list[StreamedRow]) -> list[Item]:
        read: list[Pair | Chat | RowError] = [self._read(row) for row in block]
        readable = [conversation for conversation in read if not isinstance(conversation, RowError)]
        written = iter(self._written(readable))
        return [
            Item(row, found) if isinstance(found, RowError) else self._item(row, found, *next(written))
            for row, found in zip(block, read, strict=True)
        ]

    def _read(self, row: StreamedRow) -> Pair | Chat | RowError:
        """The conversation up to its reply; without the reward that its prompt asked for."""
        conversation: Conversation | RowError = row.conversation
        if isinstance(conversation, RowError):
            return conversation
        assert not isinstance(conversation, Text)
        if isinstance(conversation, Pair):
            return (
                replace(conversation, prompt=plain_input(row.row, conversation.prompt))
                if conversation.rendered
                else conversation
            )
        if self.encoder is None:
            return RowError(
                "the row holds chat messages, which a Python function has no template for: give it what `rlhf generate` wrote"
            )
        last = reply_place(conversation)
        if not conversation.messages[last]["content"].strip():
            return RowError("the reply has no text")
        return Chat(conversation.messages[: last + 1], conversation.tools, conversation.complete)

    def _written(self, read: list[Pair | Chat]) -> Iterator[tuple[str, str, Sample | RowError | None]]:
        """Prompt as it is written out, how that is done, and token ids, of every conversation."""
        if self.encoder is None:
            yield from ((*self._plain(pair), None) for pair in read if isinstance(pair, Pair))
            return
        open_ones = [one for one in read if isinstance(one, Chat) or not one.rendered]
        prompts = iter(self.encoder.prompts(open_ones))
        for conversation, encoded in zip(read, self.encoder.encode(read), strict=True):
            sample = encoded if isinstance(encoded, RowError) else encoded[0]
            if isinstance(conversation, Pair) and conversation.rendered:
                yield conversation.prompt, conversation.rendered, sample
                continue
            prompt = next(prompts)
            if isinstance(prompt, Prompt):
                yield prompt.text, prompt.rendered, sample
            else:
                yield "", "", sample if isinstance(sample, RowError) else prompt

    def _plain(self, pair: Pair) -> tuple[str, str]:
        """A prompt without a tokenizer."""
        return (pair.prompt, pair.rendered) if pair.rendered else (plain_pieces(pair, self.template)[0].text, "text")

    def _item(
        self, row: StreamedRow, conversation: Pair | Chat, prompt: str, rendered: str, sample: Sample | RowError | None
    ) -> Item:
        if isinstance(sample, RowError):
            return Item(row, sample)
        response = conversation.response if isinstance(conversation, Pair) else conversation.messages[-1]["content"]
        return Item(row, Answer(prompt, response, label_of(row.row), row.row, sample), rendered)


def reply_place(chat: Chat) -> int:
    """The number of the last reply among the messages."""
    return max(number for number, message in enumerate(chat.messages) if message["role"] == "assistant")


def identity_of(row: StreamedRow) -> dict[str, Any]:
    """Which row, and which sample of it: of a generated row, as generation numbered them."""
    given = row.row if marker_of(row.row) is not None or row.row.get("reward", 0) is None else {}
    number = given.get("row", row.number)
    return {"row": as_json(number)} | ({"sample": as_json(given["sample"])} if "sample" in given else {})


def plain_input(row: Row, written: str) -> str:
    """The prompt of a row that is `written` out, without the reward that it asked for."""
    plain = row.get("plain_input")
    return plain if isinstance(plain, str) else written


def unscored(row: StreamedRow, reason: str) -> dict[str, Any]:
    """The line of a row that has no reward; of a generated one with what identifies it as such."""
    given = row.row if marker_of(row.row) is not None else {}
    kept = {name: as_json(given[name]) for name in KEPT if name in given}
    return identity_of(row) | kept | {"reward": None, "dropped": reason}


def label_of(row: Row) -> Any:
    """The `label` column of a row, or of the row that a generated one answers."""
    source = row.get("source")
    return row["label"] if "label" in row else source.get("label") if isinstance(source, dict) else None


def source_columns(row: Row, data: ResponseDataConfig) -> dict[str, Any]:
    """Columns of a row besides its prompt and response, as JSON."""
    if data.input_key is not None or data.output_key is not None:
        used = {data.input_key, data.output_key}
    elif data.row_format in ("auto", "messages", "sharegpt") and (
        chat := next((key for key in ("messages", "conversations", "conversation") if key in row), None)
    ):
        used = {chat}
    elif "instruction" in row and "output" in row:
        used = {"instruction", "input", "system", "output"}
    else:
        used = set(next((keys for keys in PAIR_KEYS if keys[0] in row and keys[1] in row), ()))
    return {name: as_json(value) for name, value in row.items() if name not in used | {"tools"}}


def prompt_messages(conversation: Pair | Chat, has_chat_template: bool) -> dict[str, Any]:
    """The messages (and tools) of the prompt, of a conversation that a chat template writes out."""
    if isinstance(conversation, Pair) and has_chat_template and not conversation.rendered:
        conversation = as_chat(conversation)
    if not isinstance(conversation, Chat):
        return {}
    asked = {"messages": as_json(conversation.messages[: reply_place(conversation)])}
    return asked | ({"tools": as_json(conversation.tools)} if conversation.tools else {})


def tokens_of(item: Item) -> int:
    """Tokens of a sample, if it has any."""
    return len(item.answer.sample) if isinstance(item.answer, Answer) and item.answer.sample is not None else 0
