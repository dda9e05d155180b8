from __future__ import annotations

import pytest

from rlhf_data.continuation import continuation_text, continuation_texts, piece_encoders

LOSSLESS = ["byte-level", "byte-level with prefix space", "prepend", "metaspace first", "metaspace always"]
PROMPTS = ["where is the cat?", "the cat ", "User: x\nAssistant:", "ünïcode 🐈", "🐈", " ", "x"]
RESPONSES = ["the cat sat", " the cat", "  the", "\nthe  cat ", "🐈 ünï", "猫", " ", ".", "the<|im_end|>cat"]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_of_a_continuation_is_encoded_to_its_ids_again(make_tokenizer, kind, prompt):
    tokenizer = make_tokenizer(kind)
    first, continuation = piece_encoders(tokenizer)
    (before,) = first([prompt])
    for response, ids in zip(RESPONSES, continuation(RESPONSES), strict=True):
        text = continuation_text(tokenizer, [tokenizer.bos_token_id, *before], ids)
        assert text == response
        assert continuation([text]) == [ids]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_any_start_of_a_response_is_cut_exactly_behind_the_prompt(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)
    first, continuation = piece_encoders(tokenizer)
    (before,) = first(["who? 🐈"])
    response = " the 🐈 sat"
    (ids,) = continuation([response])
    for count in range(1, len(ids) + 1):
        text = continuation_text(tokenizer, before, ids[:count])
        assert response.startswith(text.rstrip("\ufffd"))
        if "\ufffd" not in text:
            assert continuation([text]) == [ids[:count]]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_bytes_of_the_prompt_and_of_the_response_are_kept_apart(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)
    first, continuation = piece_encoders(tokenizer)
    (cat,) = continuation(["🐈"])
    assert len(cat) > 2
    for prompt in (cat, cat[2:], cat[:-1], cat * 6):  # whole, begun outside of what is decoded, unfinished, longer
        assert continuation_text(tokenizer, prompt, cat) == "🐈"
        unfinished = continuation_text(tokenizer, prompt, cat[:2])
        assert set(unfinished) == {"\ufffd"}
        assert unfinished == continuation_text(tokenizer, [], cat[:2])
    assert continuation_text(tokenizer, first(["the"])[0], cat) == "🐈"


@pytest.mark.parametrize("kind", LOSSLESS)
def test_many_continuations_at_once_have_the_texts_of_each_alone(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)
    first, continuation = piece_encoders(tokenizer)
    (cat,) = continuation(["🐈"])
    prompts = [*first(PROMPTS), cat[2:], []]
    responses = [*continuation(RESPONSES), cat[:2], []]
    pairs = [(prompt, response) for prompt in prompts for response in responses]
    texts = continuation_texts(tokenizer, *zip(*pairs, strict=True))
    assert texts == [continuation_text(tokenizer, *pair) for pair in pairs]


def test_nothing_adds_nothing_and_nothing_before_it_is_needed(make_tokenizer):
    tokenizer = make_tokenizer("metaspace first")
    _, continuation = piece_encoders(tokenizer)
    (ids,) = continuation([" the cat"])
    assert continuation_text(tokenizer, [tokenizer.bos_token_id], []) == ""
    assert continuation_text(tokenizer, [], ids) == " the cat"
    assert continuation_text(tokenizer, [tokenizer.bos_token_id], ids) == " the cat"


def test_words_without_spaces_of_their_own_are_set_apart_from_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer("words")
    first, continuation = piece_encoders(tokenizer)
    (ids,) = continuation(["sat on"])
    assert continuation_text(tokenizer, first(["the cat"])[0], ids) == " sat on"
    assert continuation([" sat on"]) == [ids]
