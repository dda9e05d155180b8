"""Row shapes: which columns hold the conversation, decided once, on the first row of a source."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from rlhf_data.errors import InputError
from rlhf_data.rows import (
    Chat,
    Conversation,
    Pair,
    Row,
    RowError,
    Text,
    closing_of,
    is_complete,
    marker_of,
    message_of,
    messages_of,
    optional_text_of,
    rendered_of,
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
class RowFormat:
    """How the rows of a source are read.

    Attributes:
        describe: what was recognised, for people.
        readers: for each conversation of a row (one; of a pair chosen and rejected) what reads it; raises `RowError` for
            a row that cannot be used.
        value: reads the number that comes with a row, a margin or a label; raises `InputError` where it should be
            there and is not.
        same_prompt: the conversations of a row must answer the same prompt.
    """

    describe: str
    readers: tuple[Callable[[Row], Conversation], ...]
    value: Callable[[Row], float] = lambda row: 0.0
    same_prompt: bool = False


@dataclass(frozen=True)
class RowOptions:
    """What the user said about the rows: `--row_format`, `--input_key`, `--output_key` and `--pretrain_mode`."""

    row_format: str = "auto"
    input_key: str | None = None
    output_key: str | None = None
    pretrain: bool = False

    whole_texts: ClassVar[bool] = True
    """Whether messages may say that `--pretrain_mode` trains on whole texts."""

    def recognise(self, row: Row, where: str) -> RowFormat:
        """Decide from the first row how all rows of a source are read.

        Args:
            row: the first row.
            where: `file:row` of that row, for messages.

        Raises:
            InputError: a column is missing, or no known shape fits.
        """
        if self.pretrain:
            return _text_format(row, self, where)
        if self.input_key is not None or self.output_key is not None:
            return _forced_format(row, self, where)
        found = _recognisers()[self.row_format](row)
        if found is None:
            _refuse(row, self, where)
        return found


def _text_format(row: Row, options: RowOptions, where: str) -> RowFormat:
    if options.row_format not in ("auto", "text"):
        raise InputError(
            f"--pretrain_mode trains on plain text and cannot be used with --row_format {options.row_format}; "
            "give --row_format text (or none), and the column with --input_key"
        )
    key = options.input_key or "text"
    require_key(row, key, "--input_key" if options.input_key else "--pretrain_mode", where)
    return RowFormat(f"text `{key}`", (lambda row: Text(text_of(row, key)),))


def _forced_format(row: Row, options: RowOptions, where: str) -> RowFormat:
    for option, key in (("--input_key", options.input_key), ("--output_key", options.output_key)):
        if key is not None:
            require_key(row, key, option, where)
    return _keyed_format(row, options.input_key, options.output_key, where, options.whole_texts)


def _keyed_format(
    row: Row, prompt_key: str | None, response_key: str | None, where: str, whole_texts: bool
) -> RowFormat:
    if prompt_key is None or response_key is None:
        key = prompt_key or response_key
        assert key is not None
        if isinstance(row[key], str):
            given, wanted = ("--input_key", "--output_key") if prompt_key else ("--output_key", "--input_key")
            raise InputError(
                f"{where}: `{key}` is text, so {given} {key} needs {wanted} beside it; columns are {columns_of(row)}"
                + (". To train on whole texts, give --pretrain_mode" if whole_texts else "")
            )
        return RowFormat(f"messages `{key}`", (lambda row: read_chat(row, key),))
    shown = f"{describe_prompt(row, prompt_key)}, response `{response_key}`"
    return RowFormat(shown, (lambda row: read_pair(row, prompt_key, response_key),))


def _recognisers() -> dict[str, Callable[[Row], RowFormat | None]]:
    forms: dict[str, Callable[[Row], RowFormat | None]] = {
        "messages": lambda row: _as_messages(row, ("messages",)),
        "sharegpt": lambda row: _as_messages(row, ("conversations", "conversation")),
        "alpaca": _as_alpaca,
        "prompt_completion": _as_pair,
        "text": lambda row: None,
    }
    tried = (_as_written_out, *forms.values())
    return {"auto": lambda row: next(filter(None, (form(row) for form in tried)), None), **forms}


def _as_written_out(row: Row) -> RowFormat | None:
    """Rows that generation or scoring wrote: what `messages` they have is the prompt alone."""
    if marker_of(row) is None or "input" not in row or "output" not in row:
        return None
    return _keyed_format(row, "input", "output", "", whole_texts=False)


def _as_messages(row: Row, keys: Sequence[str]) -> RowFormat | None:
    key = next((key for key in keys if key in row), None)
    if key is None:
        return None
    return RowFormat(f"messages `{key}`", (lambda row: read_chat(row, key),))


def _as_alpaca(row: Row) -> RowFormat | None:
    if "instruction" not in row or "output" not in row:
        return None
    extras = [f"`{key}`" for key in ("input", "system") if key in row]
    shown = f"prompt `instruction`{' with ' + ', '.join(extras) if extras else ''}, response `output`"
    return RowFormat(shown, (_read_alpaca,))


def _as_pair(row: Row) -> RowFormat | None:
    for prompt_key, response_key in PAIR_KEYS:
        if prompt_key in row and response_key in row:
            return _keyed_format(row, prompt_key, response_key, "", whole_texts=False)
    return None


def _read_alpaca(row: Row) -> Conversation:
    prompt, extra = text_of(row, "instruction"), optional_text_of(row, "input")
    return Pair(f"{prompt}\n{extra}" if extra else prompt, text_of(row, "output"), optional_text_of(row, "system"))


def read_chat(row: Row, key: str) -> Chat:
    """Read a whole conversation from one column."""
    if key == "messages" and marker_of(row) is not None:
        raise RowError("`messages` is the prompt of a generated row alone: give --output_key output beside it")
    return Chat(messages_of(row, key), tools_of(row), is_complete(row, key))


def read_pair(row: Row, prompt_key: str, response_key: str) -> Conversation:
    """Read a prompt and a response, either of which may be text or chat messages (a response also a single one).

    A marked row says whether its prompt was written out already, and whether its response is complete.
    """
    complete = is_complete(row, response_key)
    prompt, response = value_of(row, prompt_key), value_of(row, response_key)
    if not isinstance(prompt, list) and not isinstance(response, list | dict):
        texts = text_of(row, prompt_key), text_of(row, response_key)
        return Pair(
            *texts, rendered=rendered_of(row, prompt_key), complete=complete, closing=closing_of(row, response_key)
        )
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
    places = [0] if after[0]["role"] == "assistant" else range(len(after))  # a system turn may come first
    if any(after[place : place + len(before)] == before for place in places):
        return Chat(after, tools_of(row), complete)  # the response column holds the whole conversation
    if before[-1]["role"] == "user" == after[0]["role"]:
        raise RowError(f"`{response_key}` begins with a user turn that is not `{prompt_key}`")
    return Chat(before + after, tools_of(row), complete)


def describe_prompt(row: Row, key: str) -> str:
    """A prompt column, for people."""
    return f"prompt `{key}`{' (written out already)' if rendered_of(row, key) else ''}"


def read_prompt(row: Row, key: str) -> Conversation:
    """Read a prompt without its response: text, or chat messages (which may end in a reply)."""
    if isinstance(value_of(row, key), list):
        return Chat(messages_of(row, key, needs_reply=False), tools_of(row))
    return Pair(text_of(row, key), "", rendered=rendered_of(row, key))


def columns_of(row: Row) -> str:
    """Names of a row's columns, for messages."""
    return ", ".join(f"`{key}`" for key in row) or "none"


def require_key(row: Row, key: str, option: str, where: str) -> None:
    """Make sure that the first row has the column an option names."""
    if key in row:
        return
    close = difflib.get_close_matches(key, [str(name) for name in row], n=1)
    hint = f"did you mean `{close[0]}`?" if close else "name one of them"
    shown = option if option == "--pretrain_mode" else f"{option} {key}"
    more = " or give its name with --input_key" if option == "--pretrain_mode" else ""
    raise InputError(f"{where}: {shown}: no key `{key}` in the row; its keys are {columns_of(row)}; {hint}{more}")


def _refuse(row: Row, options: RowOptions, where: str) -> NoReturn:
    if "chosen" in row:
        prompt = "--input_key prompt " if "prompt" in row else ""
        hint = f"they look like preference pairs: to train on the chosen responses give {prompt}--output_key chosen"
    elif "text" in row and options.whole_texts:
        hint = "`text` has no separate response: give --pretrain_mode to train on all of it"
    else:
        hint = "name the columns with --input_key and --output_key"
    form = "" if options.row_format == "auto" else f" as --row_format {options.row_format}"
    raise InputError(f"{where}: the rows cannot be read{form}; columns are {columns_of(row)}; {hint}")
