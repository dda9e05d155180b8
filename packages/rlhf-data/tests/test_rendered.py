"""Rows whose prompt was written out already, and responses that were cut off."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_data.config import LabelledDataConfig, PairDataConfig, SFTDataConfig
from rlhf_data.encode import EncodeOptions, Encoder, Sample
from rlhf_data.errors import InputError
from rlhf_data.inspection import InspectConfig, inspect
from rlhf_data.labels import LabelledOptions
from rlhf_data.pairs import PairOptions
from rlhf_data.preferences import prepare_labelled, prepare_pairs
from rlhf_data.rows import Chat, Pair, RowError
from rlhf_data.sft import prepare_sft
from rlhf_data.shapes import RowOptions

USER = {"role": "user", "content": "where is the cat?"}
REPLY = {"role": "assistant", "content": "the cat sat"}
GENERATED = {
    "row": 3,
    "sample": 0,
    "input": "User: where?\nAssistant: ",
    "output": "the cat sat",
    "rendered": "text",
    "finish_reason": "stop",
    "reward": 1.5,
}
WRITTEN_CHAT = "<|im_start|>user\nwhere is the cat?<|im_end|>\n<|im_start|>assistant\n"
CHAT_ROW = GENERATED | {"input": WRITTEN_CHAT, "rendered": "chat", "messages": [USER]}
CUT = {"finish_reason": "length"}
PAIR_ROW = {
    "prompt": "User: where?\nAssistant: ",
    "chosen": "the cat sat",
    "rejected": "the dog sat on the mat",
    "rendered": "text",
    "rejected_finish_reason": "length",
}


def read(row, options=None):
    return [reader(row) for reader in (options or RowOptions()).recognise(row, "f:1").readers]


def one(tokenizer, conversation, **options) -> Sample:
    (result,) = Encoder(tokenizer, EncodeOptions(**{"max_len": 512, **options})).encode([conversation])
    assert not isinstance(result, RowError), result
    (sample,) = result
    return sample


def test_generated_rows_are_read_by_their_marker():
    assert read(GENERATED) == [Pair(GENERATED["input"], "the cat sat", rendered="text")]
    assert read(GENERATED | CUT) == [Pair(GENERATED["input"], "the cat sat", rendered="text", complete=False)]
    assert read(CHAT_ROW) == [Pair(WRITTEN_CHAT, "the cat sat", rendered="chat")]
    forced = RowOptions(input_key="input", output_key="output")
    assert read(CHAT_ROW | CUT, forced) == [Pair(WRITTEN_CHAT, "the cat sat", rendered="chat", complete=False)]
    describe = "prompt `input` (written out already), response `output`"
    assert RowOptions().recognise(CHAT_ROW, "f:1").describe == describe
    assert forced.recognise(GENERATED, "f:1").describe == describe


def test_the_messages_of_generated_rows_are_read_with_the_response():
    options = RowOptions(input_key="messages", output_key="output")
    assert read(CHAT_ROW, options) == [Chat([USER, REPLY])]
    assert read(CHAT_ROW | CUT, options) == [Chat([USER, REPLY], complete=False)]
    with pytest.raises(RowError, match="--output_key output"):
        read(CHAT_ROW | {"messages": [USER, REPLY, USER]}, RowOptions(input_key="messages"))


@pytest.mark.parametrize("marker", ["", "Text", "both", None, True, ["text"], 1])
def test_a_row_with_another_marker_is_like_any_other(marker):
    row = {"input": "q", "output": "a", "rendered": marker, **CUT}
    assert read(row) == [Pair("q", "a")]
    assert RowOptions().recognise(row, "f:1").describe == "prompt `input`, response `output`"


def test_the_marker_is_about_the_columns_input_and_prompt():
    row = {"question": "q", "answer": "a", "rendered": "text", **CUT}
    assert read(row) == [Pair("q", "a")]  # nor does its finish reason tell of another column than `output`


def test_rows_without_a_marker_have_no_finish_reason():
    assert read({"input": "q", "output": "a", **CUT}) == [Pair("q", "a")]


def test_pairs_and_labels_follow_the_marker():
    chosen, rejected = read(PAIR_ROW, PairOptions())
    assert chosen == Pair(PAIR_ROW["prompt"], "the cat sat", rendered="text")
    assert rejected == Pair(PAIR_ROW["prompt"], "the dog sat on the mat", rendered="text", complete=False)
    assert "prompt `prompt` (written out already), chosen" in PairOptions().recognise(PAIR_ROW, "f:1").describe
    row = GENERATED | CUT | {"label": True}
    assert read(row, LabelledOptions()) == [Pair(GENERATED["input"], "the cat sat", rendered="text", complete=False)]


def test_a_response_ends_with_the_token_that_the_model_ended_it_with(tokenizer):
    """Models that end turns with another token than the tokenizer's EOS never draw that one."""
    assert read(GENERATED | {"stop_token": "<|im_end|>"}) == [
        Pair(GENERATED["input"], "the cat sat", rendered="text", closing="<|im_end|>")
    ]
    chosen, rejected = read(PAIR_ROW | {"chosen_stop_token": "<|im_end|>"}, PairOptions())
    assert (chosen.closing, rejected.closing) == ("<|im_end|>", "")
    assert read({"input": "q", "output": "a", "stop_token": "<|im_end|>"}) == [Pair("q", "a")]
    plain, ended = (one(tokenizer, Pair("where?", "the cat", closing=end)) for end in ("", "<|im_end|>"))
    added = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert ended.input_ids.tolist() == [*plain.input_ids[:-1], *added, tokenizer.eos_token_id]
    assert ended.target_mask.sum() == plain.target_mask.sum() + len(added)


def test_an_input_template_is_not_applied_to_what_was_written_out(tokenizer):
    plain = one(tokenizer, Pair("where?", "the cat"), input_template="User: {}\\nAssistant: ")
    written = Pair("User: where?\nAssistant: ", "the cat", rendered="text")
    for template in ("User: {}\\nAssistant: ", "Q: {}", None):
        sample = one(tokenizer, written, input_template=template)
        assert sample.input_ids.tolist() == plain.input_ids.tolist()
        assert sample.target_mask.tolist() == plain.target_mask.tolist()


def test_only_text_gets_the_bos_of_the_tokenizer(tokenizer):
    bos = tokenizer.bos_token_id
    assert one(tokenizer, Pair("the cat", "sat", rendered="text")).input_ids.tolist().count(bos) == 1
    assert one(tokenizer, Pair("<s>the cat", "sat", rendered="text")).input_ids.tolist().count(bos) == 1
    assert bos not in one(tokenizer, Pair("the cat", "sat", rendered="chat")).input_ids
    assert one(tokenizer, Pair("<s>the cat", "sat", rendered="chat")).input_ids.tolist().count(bos) == 1


def test_a_chat_written_out_before_is_encoded_as_its_messages_are(chat_tokenizer):
    chat = one(chat_tokenizer, Chat([USER, REPLY]), apply_chat_template=True)
    written = one(chat_tokenizer, Pair(WRITTEN_CHAT, "the cat sat", rendered="chat"))
    assert written.input_ids.tolist() == chat.input_ids.tolist()
    assert written.target_mask.tolist() == chat.target_mask.tolist()


@pytest.mark.parametrize("rendered", ["text", "chat"])
def test_a_template_is_never_applied_twice(chat_tokenizer, rendered):
    encoder = Encoder(chat_tokenizer, EncodeOptions(64, apply_chat_template=True))
    pair = Pair("the cat", "sat", rendered=rendered)
    with pytest.raises(
        InputError, match=r"`rendered`.*--apply_chat_template.*--input_key messages.*--output_key output"
    ):
        encoder.check(pair)
    (prompt,) = encoder.prompts([pair])
    assert not isinstance(prompt, RowError)
    assert prompt.text == "the cat"
    encoder.check(Pair("the cat", "sat"))
    Encoder(chat_tokenizer, EncodeOptions(64)).check(pair)


@pytest.mark.parametrize("pair", [Pair("the cat", "sat on"), Pair("<s>the", "cat", rendered="chat"), Pair("", "cat")])
def test_a_response_that_was_cut_off_ends_in_its_last_token(tokenizer, pair):
    whole = one(tokenizer, pair)
    cut = one(tokenizer, Pair(pair.prompt, pair.response, rendered=pair.rendered, complete=False))
    assert whole.input_ids[-1] == tokenizer.eos_token_id
    assert cut.input_ids.tolist() == whole.input_ids[:-1].tolist()
    assert cut.target_mask.tolist() == whole.target_mask[:-1].tolist()
    assert cut.target_mask[-1]
    assert not cut.truncated  # that is about max_len, which cuts it once more
    assert one(tokenizer, Pair("the cat", "sat on", complete=False), max_len=4).truncated


TRIMMED = "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '</s>\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("name", ["chatml", "marked", "trimmed", "foreign end"])
@pytest.mark.parametrize("multiturn", [False, True])
def test_a_reply_that_was_cut_off_is_not_closed_by_the_template(make_tokenizer, chat_templates, name, multiturn):
    """Also where what closes it is not the tokenizer's EOS."""
    template = {**chat_templates, "trimmed": TRIMMED, "foreign end": chat_templates["chatml"]}[name]
    eos = "</s>" if name in ("trimmed", "foreign end") else "<|im_end|>"
    tokenizer = make_tokenizer(eos=eos, chat_template=template)
    options = {"apply_chat_template": True, "multiturn": multiturn}
    turns = [USER, REPLY, USER, {"role": "assistant", "content": "the cat sat on the "}]
    whole, cut = (one(tokenizer, Chat(turns, complete=complete), **options) for complete in (True, False))
    length = len(cut)
    assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert cut.target_mask.tolist() == whole.target_mask[:length].tolist()
    assert tokenizer.decode(whole.input_ids[length:].tolist()) in (eos, "<|im_end|>\n</s>")
    response = one(tokenizer, Pair("x", "the cat sat on the" + " " * (name != "trimmed")), input_template=None)
    ids = response.input_ids[response.target_mask][:-1].tolist()
    assert cut.input_ids[-len(ids) :].tolist() == ids
    assert cut.target_mask[-len(ids) :].all()
    assert cut.target_mask[: -len(ids)].any() == multiturn


def test_a_template_that_rewrites_a_reply_cannot_leave_it_unfinished(make_tokenizer):
    template = "{% for m in messages %}{{ '\n' + m.content | upper + '</s>' }}{% endfor %}"
    encoder = Encoder(make_tokenizer(chat_template=template), EncodeOptions(64, apply_chat_template=True))
    whole, cut = encoder.encode([Chat([USER, REPLY]), Chat([USER, REPLY], complete=False)])
    assert not isinstance(whole, RowError)
    assert "its end cannot be located" in str(cut)


def test_a_pair_as_chat_messages_stays_cut_off(chat_tokenizer):
    pair = Pair("where is the cat?", "the cat sat", complete=False)
    sample = one(chat_tokenizer, pair, apply_chat_template=True)
    expected = one(chat_tokenizer, Chat([USER, REPLY], complete=False), apply_chat_template=True)
    assert sample.input_ids.tolist() == expected.input_ids.tolist()
    assert sample.input_ids[-1] != chat_tokenizer.eos_token_id


def ends(samples, eos_id: int) -> list[bool]:
    return [bool(sample.input_ids[-1] == eos_id) for sample in samples]


def test_generated_rows_train_as_they_were_written(config, tokenizer, write):
    rows = [GENERATED, GENERATED | CUT, GENERATED | {"output": " "}]
    data = prepare_sft(config(write("rs.jsonl", rows), eval_ratio=0), tokenizer, seed=0)
    assert ends((data.train[0], data.train[1]), tokenizer.eos_token_id) == [True, False]
    expected = one(tokenizer, Pair("where?", "the cat sat"), input_template="User: {}\\nAssistant: ")
    assert np.array_equal(data.train[0].input_ids, expected.input_ids)
    shown = data.report.format()
    assert "prompt `input` (written out already), response `output`; 2 of 3 rows kept" in shown
    assert "cut off when they were generated: 1 (they do not end in EOS)" in shown
    assert "dropped 1: `output` is empty" in shown


def test_pairs_and_labelled_rows_train_as_they_were_written(config, tokenizer, write):
    path = write("pairs.jsonl", [PAIR_ROW] * 2)
    pairs = prepare_pairs(
        config(path, PairDataConfig, eval_ratio=0, input_template="Q: {}"),
        tokenizer,
        seed=0,
        same_prompt=True,
        share_prefix=True,
    )
    assert ends((pairs.train[0].chosen, pairs.train[0].rejected), tokenizer.eos_token_id) == [True, False]
    assert "cut off when they were generated: 2" in pairs.report.format()
    labelled_rows = write("labelled.jsonl", [GENERATED | {"label": 1}, GENERATED | CUT | {"label": 0}])
    labelled = prepare_labelled(config(labelled_rows, LabelledDataConfig, eval_ratio=0), tokenizer, seed=0)
    assert ends((labelled.train[0].sample, labelled.train[1].sample), tokenizer.eos_token_id) == [True, False]
    for sample in (pairs.train[0].chosen, labelled.train[0].sample):
        assert tokenizer.decode(sample.input_ids.tolist()) == "<s>User: where?\nAssistant: the cat sat</s>"


def test_templating_twice_stops_a_run_before_it_begins(config, chat_tokenizer, write):
    path = write("rs.jsonl", [CHAT_ROW])
    with pytest.raises(InputError, match=r"rs\.jsonl:1: the prompts were written out already"):
        prepare_sft(config(path, apply_chat_template=True, eval_ratio=0), chat_tokenizer, seed=0)
    keys = {"input_key": "messages", "output_key": "output"}
    again = prepare_sft(config(path, apply_chat_template=True, eval_ratio=0, **keys), chat_tokenizer, seed=0)
    plain = prepare_sft(config(path, eval_ratio=0), chat_tokenizer, seed=0)
    assert again.train[0].input_ids.tolist() == plain.train[0].input_ids.tolist()


def test_inspection_shows_rows_that_were_written_out(chat_tokenizer, write, tmp_path):
    chat_tokenizer.save_pretrained(tmp_path / "model")
    data = SFTDataConfig(dataset=write("rs.jsonl", [CHAT_ROW] * 2), data_cache_dir=str(tmp_path / "cache"))
    shown = inspect(InspectConfig(pretrain=str(tmp_path / "model"), data=data)).format()
    assert "(written out already)" in shown
    assert "⟦the cat sat<|im_end|>⟧" in shown
    assert "User: <|im_start|>" not in shown
