from __future__ import annotations

from itertools import pairwise

import pytest

from rlhf_data.continuation import piece_encoders, without_added_space
from rlhf_data.encode import TOO_LONG, EncodeOptions, Encoder, Sample, special_prefix
from rlhf_data.errors import InputError
from rlhf_data.rows import Chat, Pair, RowError, Text

LOSSLESS = ["byte-level", "byte-level with prefix space", "prepend", "metaspace first", "metaspace always"]
TEMPLATE = "User: {}\\nAssistant: "


def one(tokenizer, conversation, **options) -> Sample:
    (result,) = Encoder(tokenizer, EncodeOptions(**{"max_len": 512, **options})).encode([conversation])
    assert not isinstance(result, RowError), result
    (sample,) = result
    return sample


def reason(tokenizer, conversation, **options) -> str:
    (result,) = Encoder(tokenizer, EncodeOptions(**{"max_len": 512, **options})).encode([conversation])
    assert isinstance(result, RowError)
    return str(result)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("template", [TEMPLATE, "User: {}\\nAssistant:", "{}", None])
@pytest.mark.parametrize("response", ["the cat sat", " the cat", "\nthe  cat ", "ünïcode 🐈"])
def test_the_trained_tokens_are_the_response_and_one_eos(make_tokenizer, kind, template, response):
    tokenizer = make_tokenizer(kind)
    sample = one(tokenizer, Pair("where is the cat?", response), input_template=template)
    prompt = (template or "{}").replace("\\n", "\n").replace("{}", "where is the cat?")
    untrained = sample.input_ids[~sample.target_mask]
    trained = sample.input_ids[sample.target_mask]
    assert untrained[0] == tokenizer.bos_token_id
    assert decode(tokenizer, untrained[1:]).removeprefix(" ") == prompt
    assert trained[-1] == tokenizer.eos_token_id
    assert (trained == tokenizer.eos_token_id).sum() == 1
    whole = decode(tokenizer, sample.input_ids[1:-1]).removeprefix(" ")
    assert whole == prompt + response
    assert not sample.truncated


def test_a_merge_cannot_take_the_first_token_of_the_response(tokenizer):
    # together, " the" is one token that spans the boundary: the prompt ends in a space
    joined = tokenizer.encode("Assistant: the", add_special_tokens=False)
    alone = tokenizer.encode("Assistant: ", add_special_tokens=False)
    assert joined[: len(alone)] != alone
    sample = one(tokenizer, Pair("x", "the"), input_template="Assistant: {}: ".replace("{}: ", "{} "))
    assert decode(tokenizer, sample.input_ids[sample.target_mask]) == "the</s>"


def test_bos_follows_the_tokenizer_and_comes_once(make_tokenizer):
    with_bos, without = make_tokenizer(), make_tokenizer(bos=False)
    assert special_prefix(with_bos) == [with_bos.bos_token_id]
    assert special_prefix(without) == []
    assert one(without, Pair("the", "cat")).input_ids[0] != without.bos_token_id
    sample = one(with_bos, Pair("the", "cat"), input_template="<s>{} ")
    assert (sample.input_ids == with_bos.bos_token_id).sum() == 1


def test_a_response_that_already_ends_in_eos_gets_no_second_one(tokenizer):
    plain = one(tokenizer, Pair("the", "cat"))
    ended = one(tokenizer, Pair("the", "cat</s>"))
    assert plain.input_ids.tolist() == ended.input_ids.tolist()
    assert ended.target_mask[-1]


def test_a_response_that_does_not_fit_is_cut_and_marked_and_has_no_eos(tokenizer):
    full = one(tokenizer, Pair("the cat", "the cat sat on the mat"))
    cut = one(tokenizer, Pair("the cat", "the cat sat on the mat"), max_len=len(full) - 1)
    assert cut.truncated
    assert cut.input_ids.tolist() == full.input_ids[:-1].tolist()  # all but EOS: complete, but not known to be
    assert tokenizer.eos_token_id not in cut.input_ids
    exact = one(tokenizer, Pair("the cat", "the cat sat on the mat"), max_len=len(full))
    assert not exact.truncated
    assert exact.input_ids.tolist() == full.input_ids.tolist()


def test_a_prompt_that_leaves_no_room_drops_the_row(tokenizer):
    prompt = len(one(tokenizer, Pair("the cat", "x"))) - 2
    assert reason(tokenizer, Pair("the cat", "x"), max_len=prompt) == TOO_LONG
    assert one(tokenizer, Pair("the cat", "x"), max_len=prompt + 1).target_mask.sum() == 1


def test_position_zero_is_never_a_target(make_tokenizer):
    tokenizer = make_tokenizer(bos=False)
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    chat = {"apply_chat_template": True, "tokenizer_chat_template": template}
    for sample in (
        one(tokenizer, Text("the cat")),
        one(tokenizer, Chat([{"role": "assistant", "content": "the"}]), **chat),
    ):
        assert not sample.target_mask[0]
        assert sample.target_mask[1:].all()


@pytest.mark.parametrize("max_len", [2, 3, 7, 11, 100])
def test_long_documents_are_cut_so_that_each_token_is_trained_once(tokenizer, max_len):
    text = "the cat sat on the mat. " * 5
    (samples,) = Encoder(tokenizer, EncodeOptions(max_len)).encode([Text(text)])
    assert not isinstance(samples, RowError)
    trained = [token for sample in samples for token in sample.input_ids[sample.target_mask].tolist()]
    assert trained == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert all(2 <= len(sample) <= max_len for sample in samples)
    for before, after in pairwise(samples):
        assert after.input_ids[0] == before.input_ids[-1]


def test_a_tokenizer_without_eos_is_refused(make_tokenizer):
    with pytest.raises(InputError, match=r"no EOS token.*eos_token.*tokenizer_config.json"):
        Encoder(make_tokenizer(eos=None), EncodeOptions(64))


def test_a_length_of_one_is_refused(tokenizer):
    with pytest.raises(InputError, match="--max_len 1"):
        Encoder(tokenizer, EncodeOptions(1))


def test_a_batch_gives_what_single_conversations_give(tokenizer):
    pairs = [Pair("the cat", "sat"), Pair("the " * 300, "x"), Pair("a", "b" * 50)]
    encoder = Encoder(tokenizer, EncodeOptions(64))
    together = encoder.encode(pairs)
    assert isinstance(together[1], RowError)
    for pair, result in zip(pairs, together, strict=True):
        (alone,) = encoder.encode([pair])
        assert type(alone) is type(result)
        if not isinstance(result, RowError) and not isinstance(alone, RowError):
            assert alone[0].input_ids.tolist() == result[0].input_ids.tolist()


def test_every_way_of_adding_a_space_is_taken_out_of_a_tokenizer():
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    nested = {"type": "Sequence", "pretokenizers": [metaspace, {"type": "ByteLevel", "add_prefix_space": True}]}
    assert without_added_space(None) is None
    assert without_added_space({"type": "Prepend", "prepend": "▁"}) is None
    assert without_added_space({"type": "NFC"}) == {"type": "NFC"}
    assert without_added_space({"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "NFC"}]}) == {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}],
    }
    assert without_added_space(nested) == {
        "type": "Sequence",
        "pretokenizers": [metaspace | {"prepend_scheme": "never"}, {"type": "ByteLevel", "add_prefix_space": False}],
    }


def test_the_first_piece_is_encoded_as_the_tokenizer_itself_does(make_tokenizer):
    for kind in LOSSLESS:
        tokenizer = make_tokenizer(kind)
        first, _ = piece_encoders(tokenizer)
        texts = ["the cat", " the cat", "User: x\nAssistant: "]
        assert first(texts) == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_a_tokenizer_that_loses_spaces_anyway_is_accepted(make_tokenizer):
    sample = one(make_tokenizer("words"), Pair("the cat", "sat on"))
    assert sample.target_mask.tolist() == [False, False, False, True, True, True]


def test_characters_that_do_not_survive_are_found(make_tokenizer):
    encoder = Encoder(make_tokenizer("byte-level"), EncodeOptions(64))
    assert encoder.unwritable(["the 猫"]) == set()
    encoder = Encoder(make_tokenizer("words"), EncodeOptions(64))
    assert encoder.unwritable(["the zebra", "q"]) >= {"z", "q"}
