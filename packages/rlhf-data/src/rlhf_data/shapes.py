"""Row shapes: which columns hold the conversation, decided once, on the first row of a source."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from rlhf_data.errors import InputError
from rlhf_data.rows import (
    Chat,
    Conversation,
    Pair,
    Row,
    Text,
    message_of,
    messages_of,
    optional_text_of,
    text_of,
    tools_of,
    value_of,
)

PAIR_KEYS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("input", "output"),
)
"""Column names of a prompt and its response, in the order in which they are looked for."""


@dataclass(frozen=True)
class RowOptions:
    """What the user said about the rows: `--row_format`, `--input_key`, `--output_key` and `--pretrain_mode`."""

    row_format: str = "auto"
    input_key: str | None = None
    output_key: str | None = None
    pretrain: bool = False


@dataclass(frozen=True)
class RowFormat:
    """How rows become conversations: `describe` says what was recognised, `read` raises `RowError` for a bad row."""

    describe: str
    read: Callable[[Row], Conversation]


def recognise(row: Row, options: RowOptions, where: str) -> RowFormat:
    """Decide from the first row how all rows of a source are read.

    Args:
        row: the first row.
        options: what the user forced.
        where: `file:row` of that row, for messages.

    Raises:
        InputError: a column is missing, or no known shape fits.
    """
    if options.pretrain:
        return _text_format(row, options, where)
    if options.input_key is not None or options.output_key is not None:
        return _forced_format(row, options, where)
    found = _recognisers()[options.row_format](row)
    if found is None:
        _refuse(row, options, where)
    return found


def _text_format(row: Row, options: RowOptions, where: str) -> RowFormat:
    if options.row_format not in ("auto", "text"):
        raise InputError(
            f"--pretrain_mode trains on plain text and cannot be used with --row_format {options.row_format}; "
            "give --row_format text (or none), and the column with --input_key"
        )
    key = options.input_key or "text"
    _require_key(row, key, "--input_key" if options.input_key else "--pretrain_mode", where)
    return RowFormat(f"text `{key}`", lambda row: Text(text_of(row, key)))


def _forced_format(row: Row, options: RowOptions, where: str) -> RowFormat:
    for option, key in (("--input_key", options.input_key), ("--output_key", options.output_key)):
        if key is not None:
            _require_key(row, key, option, where)
    return _keyed_format(row, options.input_key, options.output_key, where)


def _keyed_format(row: Row, prompt_key: str | None, response_key: str | None, where: str) -> RowFormat:
    if prompt_key is None or response_key is None:
        key = prompt_key or response_key
        assert key is not None
        if isinstance(row[key], str):
            given, wanted = ("--input_key", "--output_key") if prompt_key else ("--output_key", "--input_key")
            raise InputError(
                f"{where}: `{key}` is text, so {given} {key} needs {wanted} beside it; columns are {_columns(row)}. "
                "To train on whole texts, give --pretrain_mode"
            )
        return RowFormat(f"messages `{key}`", lambda row: Chat(messages_of(row, key), tools_of(row)))
    return RowFormat(
        f"prompt `{prompt_key}`, response `{response_key}`", lambda row: _read_pair(row, prompt_key, response_key)
    )


def _recognisers() -> dict[str, Callable[[Row], RowFormat | None]]:
    forms: dict[str, Callable[[Row], RowFormat | None]] = {
        "messages": lambda row: _as_messages(row, ("messages",)),
        "sharegpt": lambda row: _as_messages(row, ("conversations", "conversation")),
        "alpaca": _as_alpaca,
        "prompt_completion": _as_pair,
        "text": lambda row: None,
    }
    return {"auto": lambda row: next(filter(None, (form(row) for form in forms.values())), None), **forms}


def _as_messages(row: Row, keys: Sequence[str]) -> RowFormat | None:
    key = next((key for key in keys if key in row), None)
    if key is None:
        return None
    return RowFormat(f"messages `{key}`", lambda row: Chat(messages_of(row, key), tools_of(row)))


def _as_alpaca(row: Row) -> RowFormat | None:
    if "instruction" not in row or "output" not in row:
        return None
    extras = [f"`{key}`" for key in ("input", "system") if key in row]
    shown = f"prompt `instruction`{' with ' + ', '.join(extras) if extras else ''}, response `output`"
    return RowFormat(shown, _read_alpaca)


def _as_pair(row: Row) -> RowFormat | None:
    for prompt_key, response_key in PAIR_KEYS:
        if prompt_key in row and response_key in row:
            return _keyed_format(row, prompt_key, response_key, "")
    return None


def _read_alpaca(row: Row) -> Conversation:
    prompt, extra = text_of(row, "instruction"), optional_text_of(row, "input")
    return Pair(f"{prompt}\n{extra}" if extra else prompt, text_of(row, "output"), optional_text_of(row, "system"))


def _read_pair(row: Row, prompt_key: str, response_key: str) -> Conversation:
    """Read a prompt and a response, either of which may be text or chat messages (a response also a single one)."""
    prompt, response = value_of(row, prompt_key), value_of(row, response_key)
    if not isinstance(prompt, list) and not isinstance(response, list | dict):
        return Pair(text_of(row, prompt_key), text_of(row, response_key))
    if isinstance(prompt, list):
        before = messages_of(row, prompt_key, needs_reply=False)
    else:
        before = [{"role": "user", "content": text_of(row, prompt_key)}]
    if isinstance(response, list):
        after = messages_of(row, response_key)
    elif isinstance(response, dict):
        after = [message_of(response, response_key)]
    else:
        after = [{"role": "assistant", "content": text_of(row, response_key)}]
    if after[: len(before)] == before:  # the response column holds the whole conversation
        return Chat(after, tools_of(row))
    return Chat(before + after, tools_of(row))


def _columns(row: Row) -> str:
    return ", ".join(f"`{key}`" for key in row) or "none"


def _require_key(row: Row, key: str, option: str, where: str) -> None:
    if key in row:
        return
    close = difflib.get_close_matches(key, [str(name) for name in row], n=1)
    hint = f"did you mean `{close[0]}`?" if close else "name one of them"
    shown = option if option == "--pretrain_mode" else f"{option} {key}"
    more = " or give its name with --input_key" if option == "--pretrain_mode" else ""
    raise InputError(f"{where}: {shown}: no key `{key}` in the row; its keys are {_columns(row)}; {hint}{more}")


def _refuse(row: Row, options: RowOptions, where: str) -> NoReturn:
    if "chosen" in row:
        prompt = "--input_key prompt " if "prompt" in row else ""
        hint = f"they look like preference pairs: to train on the chosen responses give {prompt}--output_key chosen"
    elif "text" in row:
        hint = "`text` has no separate response: give --pretrain_mode to train on all of it"
    else:
        hint = "name the columns with --input_key and --output_key"
    form = "" if options.row_format == "auto" else f" as --row_format {options.row_format}"
    raise InputError(f"{where}: the rows cannot be read{form}; columns are {_columns(row)}; {hint}")
