"""Encoding a text as the start of a sequence, and as the continuation of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_data.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncodeTexts = Callable[[list[str]], list[list[int]]]

CONTEXT = 8
"""Tokens of a prompt that are decoded with what follows, for decoders that treat the start of a text differently."""

BROKEN = "\ufffd"
"""What decoders write for bytes that are no character."""


def piece_encoders(tokenizer: PreTrainedTokenizerBase) -> tuple[EncodeTexts, EncodeTexts]:
    """Functions that encode texts, without special tokens, as the start of a sequence and as its continuation.

    They differ for tokenizers that write a space before every text they are given (`▁` or `Ġ`): in a continuation that
    would be a space nobody wrote.
    """
    if not tokenizer.is_fast:
        return _slow_encoders(tokenizer)
    from tokenizers import Tokenizer

    description = json.loads(backend_json(tokenizer))
    description |= {"truncation": None, "padding": None}
    first = Tokenizer.from_str(json.dumps(description))
    description |= {
        "normalizer": without_added_space(description["normalizer"]),
        "pre_tokenizer": without_added_space(description["pre_tokenizer"]),
    }
    continuation = Tokenizer.from_str(json.dumps(description))
    _check_continuation(tokenizer, first, continuation)
    return _batch_encoder(first), _batch_encoder(continuation)


def backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Rust tokenizer inside a fast tokenizer, as in tokenizer.json."""
    backend: Any = tokenizer.backend_tokenizer
    return backend.to_str()


def _batch_encoder(backend: Any) -> EncodeTexts:
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def without_added_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer (as in tokenizer.json) that adds no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [inner for inner in map(without_added_space, part[name]) if inner is not None]
        return part | {name: kept}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part


def _check_continuation(tokenizer: PreTrainedTokenizerBase, first: Any, continuation: Any) -> None:
    """Make sure by round trip that ids of a text and ids of its continuation decode to the joined text."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for start, rest in (("one two", "one two"), ("one ", "two"), ("one", " two")):
        whole = first.encode(start + rest, add_special_tokens=False).ids
        ids = [
            first.encode(start, add_special_tokens=False).ids,
            continuation.encode(rest, add_special_tokens=False).ids,
        ]
        lossless = decode(whole) == start + rest and decode(ids[0]) == start
        if lossless and decode(ids[0] + ids[1]) != start + rest:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} cannot continue a text: {start!r} and {rest!r} come back as "
                f"{decode(ids[0] + ids[1])!r}; use another tokenizer with this model's vocabulary"
            )


def _slow_encoders(tokenizer: PreTrainedTokenizerBase) -> tuple[EncodeTexts, EncodeTexts]:
    """As `piece_encoders`, for tokenizers written in Python: a continuation is encoded behind a line end."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    anchor = encode("\n")

    def continue_(text: str) -> list[int]:
        ids = encode("\n" + text)
        return ids[len(anchor) :] if anchor and ids[: len(anchor)] == anchor else encode(text)

    return lambda texts: [encode(text) for text in texts], lambda texts: [continue_(text) for text in texts]


def continuation_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add after a prompt: encoded as its continuation, it is these ids again.

    That holds for ids as the tokenizer itself would write them; a model may spell the same text in others.

    Args:
        tokenizer: a tokenizer with an EOS token.
        prompt_ids: what comes before.
        ids: of a response, without the token that ended it. Where they end inside a character, the text ends in U+FFFD.
    """
    if not ids:
        return ""

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before = list(prompt_ids[-CONTEXT:])
    start, through = decode(before), decode([*before, *ids])
    if not start or BROKEN in start or not through.startswith(start):
        # bytes of characters meet at a border: a token that is whole in itself keeps them apart
        eos_id: Any = tokenizer.eos_token_id
        before = [int(eos_id)]
        start, through = decode(before), decode([*before, *ids])
    return through[len(start) :]


def continuation_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[str]:
    """`continuation_text` of many responses, all in two calls of a fast tokenizer.

    Args:
        tokenizer: a tokenizer with an EOS token.
        prompts: what comes before each, token ids.
        continuations: of as many responses, each without the token that ended it.
    """
    pairs = list(zip(prompts, continuations, strict=True))
    if not tokenizer.is_fast:
        return [continuation_text(tokenizer, prompt, ids) for prompt, ids in pairs]
    backend: Any = tokenizer.backend_tokenizer
    contexts = [tuple(prompt[-CONTEXT:]) for prompt in prompts]
    different = list(dict.fromkeys(contexts))
    starts = dict(zip(different, backend.decode_batch(different, skip_special_tokens=False), strict=True))
    wholes = [[*context, *ids] for context, ids in zip(contexts, continuations, strict=True)]
    texts = []
    for (prompt, ids), context, through in zip(
        pairs, contexts, backend.decode_batch(wholes, skip_special_tokens=False), strict=True
    ):
        start = starts[context]
        plain = bool(ids and start and BROKEN not in start and through.startswith(start))
        texts.append(through[len(start) :] if plain else continuation_text(tokenizer, prompt, ids))
    return texts
