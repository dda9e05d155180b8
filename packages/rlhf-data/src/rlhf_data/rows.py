"""Rows and the conversations in them: reading text and messages out of a row, or the reason why it has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
Message = dict[str, Any]
"""A chat message: `role` and `content` (text), and whatever else the template may use (`tool_calls`, `name`, …)."""


Rendered = Literal["text", "chat"]
"""How a prompt was written out: as text, so that the tokenizer's BOS still comes before it, or by a chat template, which
writes BOS itself where it wants one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A plain prompt and its response.

    Attributes:
        prompt: without one, the response is a whole text, of which nobody said where its own prompt ends.
        response: empty where only the prompt is known.
        system: comes before the prompt.
        rendered: how the prompt was written out already, so that no template is applied to it; "" if it was not.
        complete: the response is all there; one that was cut off gets no EOS.
        closing: the token with which a model ended the response, as text, if that is not the tokenizer's EOS.
    """

    prompt: str
    response: str
    system: str = ""
    rendered: Rendered | Literal[""] = ""
    complete: bool = True
    closing: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages of one conversation, the tools offered in it, and whether its last reply is complete (else: no EOS)."""

    messages: list[Message]
    tools: list[Any] | None = None
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Text:
    """One document, all of it to be trained."""

    text: str


Conversation = Pair | Chat | Text


def is_whole_text(conversation: Conversation) -> bool:
    """Whether it is a response of which nobody said what it answers."""
    return isinstance(conversation, Pair) and not conversation.prompt


class RowError(Exception):
    """One row cannot be used; the message is the reason, the same for all rows with the same fault."""


SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",  # the model wrote the call, so it is trained like any other reply
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` names as chat roles; a name that is not here is passed to the chat template as it is."""


WRITTEN_OUT = ("input", "prompt")
"""Columns that hold the prompt as it was written out, in rows marked so (`rendered`): those that generation and scoring
write."""

FINISH_REASONS = {"output": "finish_reason", "chosen": "chosen_finish_reason", "rejected": "rejected_finish_reason"}
"""Response columns of such rows, each with the column that says `length` where the response was cut off."""

LARGEST = 3.4e38
"""Numbers are stored in float32."""


def text_of(row: Row, key: str) -> str:
    """Text of a column that must have some."""
    value = value_of(row, key)
    if not isinstance(value, str):
        raise RowError(f"`{key}` is {_kind(value)}, not text")
    if not value.strip():
        raise RowError(f"`{key}` is empty")
    return encodable(value, f"`{key}`")


def optional_text_of(row: Row, key: str) -> str:
    """Text of a column that may be missing, null or empty."""
    return "" if not row.get(key) else text_of(row, key)


def marker_of(row: Row) -> Rendered | None:
    """How the prompt of a row is marked as written out: its `rendered`, if that is exactly `text` or `chat`."""
    marker = row.get("rendered")
    return marker if marker == "text" or marker == "chat" else None


def rendered_of(row: Row, prompt_key: str) -> Rendered | Literal[""]:
    """How a prompt column was written out already, "" if it was not."""
    return (marker_of(row) or "") if prompt_key in WRITTEN_OUT else ""


def is_complete(row: Row, response_key: str) -> bool:
    """Whether a response is all there: only a marked row can say that it was cut off."""
    return marker_of(row) is None or row.get(FINISH_REASONS.get(response_key, "")) != "length"


def closing_of(row: Row, response_key: str) -> str:
    """What a model ended a response with, of a marked row that says so."""
    name = FINISH_REASONS.get(response_key, "").replace("finish_reason", "stop_token")
    closing = row.get(name) if marker_of(row) is not None else None
    return closing if isinstance(closing, str) else ""


def messages_of(row: Row, key: str, needs_reply: bool = True) -> list[Message]:
    """Messages of a chat column, in either spelling: role and content, or ShareGPT's from and value."""
    value = value_of(row, key)
    if not isinstance(value, list):
        raise RowError(f"`{key}` is {_kind(value)}, not a list of messages")
    if not value:
        raise RowError(f"`{key}` is an empty list")
    messages = [message_of(item, key) for item in value]
    if needs_reply and not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"`{key}` has no assistant turn")
    return messages


def tools_of(row: Row) -> list[Any] | None:
    """Tools offered in a conversation: a list, or that list written as JSON; none of it is trained."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise RowError("`tools` is text that is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of tool descriptions")
    return tools


def message_of(item: Any, key: str) -> Message:
    """One message, in either spelling, with its content as text."""
    if not isinstance(item, dict):
        raise RowError(f"`{key}` has {_kind(item)} among its messages")
    if "from" in item and "role" not in item:
        speaker = item["from"] if isinstance(item["from"], str) else None
        item = {"role": SHAREGPT_ROLES.get(speaker, speaker) if speaker else None, "content": item.get("value")}
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not role:
        raise RowError(f"a message of `{key}` has no role")
    if isinstance(content, list):  # [{"type": "text", "text": …}, …]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowError(f"a message of `{key}` has content that is not text")
        content = "".join(part["text"] for part in content)
    if content is None and item.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"a message of `{key}` has {'no content' if content is None else 'content that is not text'}")
    if role == "assistant" and not content.strip() and not item.get("tool_calls"):
        raise RowError(f"an assistant turn of `{key}` is empty")
    kept = {name: value for name, value in item.items() if value is not None}  # parquet fills missing keys with null
    return kept | {"content": encodable(content, f"`{key}`")}


def value_of(row: Row, key: str) -> Any:
    """Value of a column that must have one."""
    if key not in row:
        raise RowError(f"no key `{key}`")
    if row[key] is None:
        raise RowError(f"`{key}` is null")
    return row[key]


def finite_number(value: Any) -> float | None:
    """A number, also one written as text (all a CSV file has); None for anything else, NaN and infinity."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None


def encodable(text: str, what: str) -> str:
    """The same text, if it can be written as UTF-8: no tokenizer takes it otherwise."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no text
        raise RowError(f"{what} has a broken character (half of a surrogate pair)") from None
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
