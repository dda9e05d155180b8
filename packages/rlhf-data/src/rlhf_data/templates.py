"""Writing a conversation out as pieces of text, each either trained or not.

A piece is the unit of tokenisation: the next module encodes pieces one by one, so what is trained is known exactly, by
construction, and never has to be found again in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_data.errors import InputError
from rlhf_data.rows import Chat, Message, Pair, RowError, encodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_PROMPT = "nothing comes before the response"
UNMARKED = "the chat template marks no assistant text ({% generation %})"

PROBE: Message = {"role": "assistant", "content": "x"}
"""A reply, to see what a template writes before one."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}


class Piece(NamedTuple):
    """A stretch of text and whether its tokens are targets."""

    text: str
    target: bool


def decode_escapes(text: str) -> str:
    r"""Decode the escapes people type in shells (\n \t \r \\ \" \'), leaving all other text, unicode included, alone.

    >>> decode_escapes(r"Q: {}\nA: ")
    'Q: {}\nA: '
    """
    return re.sub(r"\\([ntr\\\"'])", lambda match: ESCAPES[match[1]], text)


def plain_pieces(pair: Pair, template: str | None) -> list[Piece]:
    """Write a plain prompt through `--input_template` (decoded, with one `{}`); the response follows as it is."""
    response = Piece(pair.response + pair.closing, True)
    if not pair.prompt:
        return [response]
    prompt = f"{pair.system}\n\n{pair.prompt}" if pair.system else pair.prompt
    # not str.format: a template may hold other braces, and so may the prompt
    return [Piece(prompt if template is None else template.replace("{}", prompt), False), response]


def read_chat_template(value: str) -> str:
    """Text of a chat template given as Jinja text or as the path of a file with it."""
    if "{{" in value or "{%" in value:
        return value
    path = Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tokenizer_chat_template {value!r} is neither Jinja text (with `{{{{` or `{{%`) nor a readable file: "
            f"{error}"
        ) from None


def as_chat(pair: Pair) -> Chat:
    """A plain prompt and its response, if it has one, as chat messages."""
    turns = [("system", pair.system), ("user", pair.prompt), ("assistant", pair.response)]
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns if content]
    return Chat(messages, complete=pair.complete)


class ChatTemplate:
    """Writes chats out with a Jinja chat template, cut exactly where assistant text begins and ends.

    Args:
        text: the template.
        special_tokens: names the template may use, such as `bos_token`.
        multiturn: all assistant turns are targets, not only the last one.
    """

    def __init__(self, text: str, special_tokens: dict[str, Any], multiturn: bool = False):
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        self.text = text
        self._multiturn = multiturn
        self._special_tokens = special_tokens
        self._render_jinja: Callable[..., Any] = render_jinja_template
        self._has_prompt = "add_generation_prompt" in text
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        try:
            render_jinja_template([], chat_template=text)  # compiles it, and renders nothing
        except TemplateSyntaxError as error:
            raise InputError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, override: str | None, multiturn: bool = False) -> ChatTemplate:
        """The template of a tokenizer, or `override` (`--tokenizer_chat_template`) in its place."""
        own = tokenizer.chat_template
        text = read_chat_template(override) if override else own.get("default") if isinstance(own, dict) else own
        if not text:
            raise InputError(
                f"--apply_chat_template: the tokenizer {tokenizer.name_or_path} has no chat template; "
                "give one with --tokenizer_chat_template"
            )
        return cls(text, dict(tokenizer.special_tokens_map), multiturn)

    def pieces(self, chat: Chat) -> list[Piece]:
        """Write out a chat up to its last assistant turn; pieces alternate between context and assistant text.

        What the template writes after a reply that is not complete is left out.

        Raises:
            RowError: the template refuses the messages, or they cannot be cut.
        """
        replies = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not replies:
            raise RowError("no assistant turn")
        chat = replace(chat, messages=chat.messages[: replies[-1] + 1])
        text, marked = self._render(chat, len(chat.messages))
        spans = self._marked_spans(chat, marked) if self._has_marks else self._spans_by_growing(chat, text, replies)
        pieces = _cut(text, spans)
        return pieces if chat.complete else [*pieces[:-1], _unfinished(pieces[-1], chat.messages[-1])]

    def prompt(self, chat: Chat) -> str:
        """Write out what a reply is asked for with: all messages (but a reply at their end), and the reply's beginning.

        Raises:
            RowError: there is no message before the reply, or the template refuses the messages.
        """
        answered = bool(chat.messages) and chat.messages[-1]["role"] == "assistant"
        count = len(chat.messages) - answered
        if not count:
            raise RowError(NO_PROMPT)
        if self._has_marks and not self._has_prompt:
            return self._before_marks(replace(chat, messages=[*chat.messages[:count], PROBE]))
        return self._render(chat, count, add_generation_prompt=True)[0]

    def _before_marks(self, chat: Chat) -> str:
        """What comes before the marked text of the last message."""
        text, marked = self._render(chat, len(chat.messages))
        spans = self._last_spans(chat, marked)
        return text[: spans[0][0]]

    def _marked_spans(self, chat: Chat, marked: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Character spans of the template's `{% generation %}` blocks."""
        if not self._multiturn:
            return self._last_spans(chat, marked)
        if not marked:
            raise RowError(UNMARKED)
        return marked

    def _last_spans(self, chat: Chat, marked: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the last message, which may hold several blocks: they are the ones that its rendering adds."""
        earlier = self._render(chat, len(chat.messages) - 1)[1] if len(chat.messages) > 1 else []
        if len(marked) <= len(earlier):
            raise RowError(UNMARKED)
        return marked[len(earlier) :]

    def _spans_by_growing(self, chat: Chat, text: str, replies: list[int]) -> list[tuple[int, int]]:
        """Character spans found by rendering up to each reply: without it (its prompt), and with it."""
        spans = []
        for reply in replies if self._multiturn else replies[-1:]:
            prompt, _ = self._render(chat, reply, add_generation_prompt=True)
            through = text if reply == replies[-1] else self._render(chat, reply + 1)[0]
            if not (text.startswith(prompt) and text.startswith(through) and len(prompt) <= len(through)):
                raise RowError(
                    "the chat template writes earlier turns differently once a reply follows, so replies cannot be "
                    "located; mark them with {% generation %} in --tokenizer_chat_template"
                )
            spans.append((len(prompt), len(through)))
        return spans

    def _render(self, chat: Chat, count: int, add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Render the first `count` messages; also the character spans of generation blocks."""
        from jinja2 import TemplateError

        try:
            texts, spans = self._render_jinja(
                [chat.messages[:count]],
                tools=chat.tools,
                chat_template=self.text,
                return_assistant_tokens_mask=self._has_marks,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowError(f"the chat template refuses the messages ({error})") from None
        return encodable(texts[0], "the rendered chat"), spans[0] if spans else []


def _unfinished(piece: Piece, reply: Message) -> Piece:
    """A reply up to its last character, without what the template closes it with."""
    content = reply["content"] if reply["content"] in piece.text else reply["content"].strip()  # templates may strip it
    start = piece.text.find(content)
    if start < 0:
        raise RowError("the chat template rewrites a reply that was cut off, so its end cannot be located")
    return Piece(piece.text[: start + len(content)], piece.target)


def _cut(text: str, spans: list[tuple[int, int]]) -> list[Piece]:
    """Cut text into pieces at `spans`; what follows the last span is no part of the conversation's last reply."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [Piece(text[end:start], False), Piece(text[start:stop], True)]
        end = stop
    return pieces
