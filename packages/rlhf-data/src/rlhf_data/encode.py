"""Conversations to token ids, once: every piece is encoded on its own, so which ids are trained is exact.

Nothing is rendered to one text and cut again, so no merge can join a prompt's last characters with a response's first
ones, and targets follow from the lengths of pieces, never from the values of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from rlhf_data.config import DataConfig, ResponseDataConfig
from rlhf_data.continuation import backend_json, piece_encoders
from rlhf_data.errors import InputError
from rlhf_data.rows import Chat, Conversation, Pair, Rendered, RowError, Text, is_whole_text
from rlhf_data.templates import NO_PROMPT, ChatTemplate, Piece, as_chat, decode_escapes, plain_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt longer than --max_len"
NEEDS_TEMPLATE = "the rows hold chat messages: give --apply_chat_template to write them out"
NEEDS_PROMPT = (
    "the rows hold whole texts, and --apply_chat_template and --input_template write out a prompt: give its column with "
    "--prompt_key, or leave them out"
)
TEMPLATED_TWICE = (
    "the prompts were written out already (column `rendered`), and --apply_chat_template would write them out again: leave "
    "it out or, where the rows have `messages`, give --input_key messages (and for responses --output_key output)"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence of L tokens.

    Attributes:
        input_ids: int32 `[L]`.
        target_mask: bool `[L]`; True where the token is to be predicted, from those before it. Never at position 0.
        truncated: it was cut at `max_len` and so does not end in EOS.
    """

    input_ids: np.ndarray
    target_mask: np.ndarray
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked with.

    Attributes:
        text: as it was written out, without the tokenizer's BOS.
        ids: of the text, BOS included where there is one: what a sample without `multiturn` has before its response.
        rendered: how the text was written out; `Pair(text, response, rendered=rendered)` is encoded to the same ids.
    """

    text: str
    ids: list[int]
    rendered: Rendered


@dataclass(frozen=True)
class EncodeOptions:
    """What decides token ids besides tokenizer and row: the options of the same names on the data configs."""

    max_len: int
    input_template: str | None = None
    apply_chat_template: bool = False
    tokenizer_chat_template: str | None = None
    multiturn: bool = False


class Encoder:
    """Turns conversations into samples with one tokenizer and one set of options.

    Raises:
        InputError: the tokenizer has no EOS token, or no chat template where one is needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions):
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} has no EOS token, so the model could not learn to stop; "
                'name one of its tokens as "eos_token" in its tokenizer_config.json'
            )
        if options.max_len < 2:
            raise InputError(
                f"--max_len {options.max_len} leaves no room for a token and one before it; give at least 2"
            )
        eos_id: Any = tokenizer.eos_token_id
        self.eos_id = int(eos_id)
        self.prefix = special_prefix(tokenizer)
        self.max_len = options.max_len
        self.template = None if options.input_template is None else decode_escapes(options.input_template)
        override = options.tokenizer_chat_template
        self.chat = ChatTemplate.of(tokenizer, override, options.multiturn) if options.apply_chat_template else None
        self._tokenizer = tokenizer
        self._first, self._continuation = piece_encoders(tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Sample] | RowError]:
        """Encode a block of conversations, all texts at once.

        Returns:
            For each conversation its samples (one, except that a `Text` is cut into as many as it fills), or the
            reason why it has none.
        """
        written: list[list[Piece] | RowError] = [self._pieces(conversation) for conversation in conversations]
        ids = iter(self._encode_pieces([pieces for pieces in written if not isinstance(pieces, RowError)]))
        results: list[list[Sample] | RowError] = []
        for conversation, pieces in zip(conversations, written, strict=True):
            if isinstance(pieces, RowError):
                results.append(pieces)
                continue
            try:
                results.append(self._assemble(conversation, pieces, next(ids)))
            except RowError as reason:
                results.append(reason)
        return results

    def check(self, conversation: Conversation) -> None:
        """Make sure that the options suit the kind of conversation: if they do not for one row, they do for none.

        Raises:
            InputError: with the option to give or to leave out.
        """
        if isinstance(conversation, Chat) and self.chat is None:
            raise InputError(NEEDS_TEMPLATE)
        if isinstance(conversation, Pair) and conversation.rendered and self.chat is not None:
            raise InputError(TEMPLATED_TWICE)
        if is_whole_text(conversation) and (self.chat is not None or self.template is not None):
            raise InputError(NEEDS_PROMPT)

    def prompts(self, conversations: Sequence[Conversation]) -> list[Prompt | RowError]:
        """Write out and encode what comes before the responses of a block of conversations, all texts at once.

        Responses are ignored: they may be empty, and a chat may end before its reply.

        Returns:
            For each conversation its prompt, or the reason why it has none.
        """
        written = [self._prompt(conversation) for conversation in conversations]
        ids = iter(self._first([prompt[0] for prompt in written if not isinstance(prompt, RowError)]))
        prompts: list[Prompt | RowError] = []
        for prompt in written:
            if isinstance(prompt, RowError):
                prompts.append(prompt)
                continue
            text, rendered = prompt
            begun = next(ids)
            prompts.append(Prompt(text, begun if rendered == "chat" else self._with_prefix(begun), rendered))
        return prompts

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides ids and written-out texts, besides the options, as JSON; it changes when the tokenizer does."""
        tokenizer = self._tokenizer
        body = backend_json(tokenizer) if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        known = json.dumps([type(tokenizer).__name__, special, tokenizer.eos_token_id, body], sort_keys=True)
        return {
            "tokenizer": hashlib.blake2b(known.encode(), digest_size=16).hexdigest(),
            "prefix": self.prefix,
            "chat_template": self.chat.text if self.chat else None,
        }

    def unwritable(self, texts: Sequence[str]) -> set[str]:
        """Characters of some texts that do not come back from their ids: the model never sees them."""
        decoded = self._tokenizer.batch_decode(self._continuation(list(texts)), clean_up_tokenization_spaces=False)
        return set("".join(texts)) - set("".join(decoded))

    def _pieces(self, conversation: Conversation) -> list[Piece] | RowError:
        if isinstance(conversation, Text):
            return [Piece(conversation.text, True)]
        if self._is_plain(conversation):
            return self._plain_pieces(conversation)
        if self.chat is None:
            return RowError(NEEDS_TEMPLATE)
        try:
            return self.chat.pieces(as_chat(conversation) if isinstance(conversation, Pair) else conversation)
        except RowError as reason:
            return reason

    def _prompt(self, conversation: Conversation) -> tuple[str, Rendered] | RowError:
        """Text of a prompt, and how it was written out."""
        if isinstance(conversation, Text) or is_whole_text(conversation):
            return RowError(NO_PROMPT)
        if self._is_plain(conversation):
            return self._plain_pieces(conversation)[0].text, conversation.rendered or "text"
        if self.chat is None:
            return RowError(NEEDS_TEMPLATE)
        try:
            return self.chat.prompt(as_chat(conversation) if isinstance(conversation, Pair) else conversation), "chat"
        except RowError as reason:
            return reason

    def _is_plain(self, conversation: Conversation) -> TypeGuard[Pair]:
        """Whether the chat template has no part in it: there is none, or it (or another) was applied already."""
        return isinstance(conversation, Pair) and (self.chat is None or conversation.rendered != "")

    def _plain_pieces(self, pair: Pair) -> list[Piece]:
        return plain_pieces(pair, None if pair.rendered else self.template)

    def _encode_pieces(self, written: list[list[Piece]]) -> Iterable[list[list[int]]]:
        """Ids of every piece of every conversation, with two calls to the tokenizer in all."""
        firsts = self._first([pieces[0].text for pieces in written])
        rest = iter(self._continuation([piece.text for pieces in written for piece in pieces[1:]]))
        for first, pieces in zip(firsts, written, strict=True):
            yield [first, *(next(rest) for _ in pieces[1:])]

    def _assemble(self, conversation: Conversation, pieces: list[Piece], ids: list[list[int]]) -> list[Sample]:
        if isinstance(conversation, Text):
            if not ids[0]:
                raise RowError("the text has no token")
            return self._chunks(self._with_prefix(ids[0]))
        complete = conversation.complete
        if self._is_plain(conversation):
            begun = ids[0] if conversation.rendered == "chat" else self._with_prefix(ids[0])
            if len(ids) == 1:  # a whole text: only what the tokenizer puts before it is given
                start = len(self.prefix)
                return [self._sample([begun[:start], begun[start:]], [0, len(begun) - start], complete)]
            return [self._sample([begun, ids[1]], [0, len(ids[1])], complete)]
        # a chat template writes BOS itself where it wants one
        targets = [
            self._up_to_eos(piece_ids) if piece.target else 0 for piece, piece_ids in zip(pieces, ids, strict=True)
        ]
        return [self._sample([*ids[:-1], ids[-1][: targets[-1]]], targets, complete)]

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """Put the tokenizer's BOS first, once: an input template may have written it already."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _up_to_eos(self, ids: list[int]) -> int:
        """How many tokens of an assistant turn are targets: all up to its first EOS (a template may add a line end)."""
        return ids.index(self.eos_id) + 1 if self.eos_id in ids else len(ids)

    def _sample(self, parts: list[list[int]], targets: list[int], complete: bool) -> Sample:
        """Join parts, each with its first `targets` tokens trained, end in EOS if complete, and cut at `max_len`."""
        if targets[-1] == 0:
            raise RowError("the response has no token")
        if complete and parts[-1][-1] != self.eos_id:
            parts, targets = [*parts[:-1], [*parts[-1], self.eos_id]], [*targets[:-1], targets[-1] + 1]
        ids = np.array([token for part in parts for token in part], np.int32)
        mask = np.zeros(len(ids), np.bool_)
        start = 0
        for part, count in zip(parts, targets, strict=True):
            mask[start : start + count] = True
            start += len(part)
        mask[0] = False  # nothing comes before it to predict it from
        truncated = len(ids) > self.max_len
        targets_left = np.flatnonzero(mask[: self.max_len])
        if not len(targets_left):
            raise RowError(TOO_LONG)
        end = int(targets_left[-1]) + 1  # a cut may leave context that nothing follows
        return Sample(ids[:end], mask[:end], truncated)

    def _chunks(self, ids: list[int]) -> list[Sample]:
        """Cut a document into samples of at most `max_len` tokens, every token (but the first) a target exactly once.

        A following sample starts with the last token of the one before, as context for its own first token.
        """
        whole = np.array(ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id], np.int32)
        samples = []
        for start in range(0, len(whole) - 1, self.max_len - 1):
            chunk = whole[start : start + self.max_len]
            mask = np.ones(len(chunk), np.bool_)
            mask[0] = False
            samples.append(Sample(chunk, mask))
        return samples


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer itself puts before a text (its BOS policy): often `[bos]`, often nothing."""
    bare: list[int] = tokenizer.encode("x", add_special_tokens=False)
    full: list[int] = tokenizer.encode("x")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def encode_options_of(config: DataConfig | ResponseDataConfig, multiturn: bool = False) -> EncodeOptions:
    """The options that decide token ids."""
    return EncodeOptions(
        max_len=config.max_len,
        input_template=config.input_template,
        apply_chat_template=config.apply_chat_template,
        tokenizer_chat_template=config.tokenizer_chat_template,
        multiturn=multiturn,
    )
