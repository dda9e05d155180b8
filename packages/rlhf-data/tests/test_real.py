"""The real files and tokenizers of ../shared, where they are present."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_data.config import InferenceDataConfig, LabelledDataConfig, PairDataConfig
from rlhf_data.continuation import continuation_text
from rlhf_data.encode import EncodeOptions, Encoder
from rlhf_data.errors import InputError
from rlhf_data.preferences import prepare_labelled, prepare_pairs
from rlhf_data.prompts import PromptOptions
from rlhf_data.rows import Pair, RowError
from rlhf_data.sft import prepare_sft
from rlhf_data.stream import RowStream
from rlhf_data.tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not SHARED.is_dir(), reason="there is no ../shared")]

CHAT = {"apply_chat_template": True}
FILES = {
    "gsm8k_train.jsonl": {},
    "gsm8k_pairs.jsonl": {"input_key": "prompt", "output_key": "chosen"},
    "gsm8k_unpaired.jsonl": {"input_key": "instruction", "output_key": "response"},
    "llmbar_natural.json": {"input_key": "input", "output_key": "output_1"},
    "stories.jsonl": {"pretrain_mode": True},
    "story_pairs.jsonl": {"input_key": "prompt", "output_key": "chosen"},
    "chat_sft.jsonl": CHAT,
    "chat_pairs.jsonl": CHAT | {"output_key": "chosen", "multiturn": True},
    "kto_en_demo.json": CHAT,
    "glaive_toolcall_en_demo.json": CHAT | {"multiturn": True},
}
HINTS = {
    "gsm8k_pairs.jsonl": "--input_key prompt --output_key chosen",
    "stories.jsonl": "--pretrain_mode",
    "story_prompts.jsonl": "--input_key",
    "oasst_en_100_tree.jsonl": "--input_key",
    "self_instruct_seed_tasks.jsonl": "--input_key",
    "vicuna_bench_question.jsonl": "--input_key",
    "ifeval_input_data.jsonl": "--input_key",
}


@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
@pytest.mark.parametrize("file", FILES)
def test_real_files_load(config, chat_templates, file, model):
    tokenizer = load_tokenizer(str(SHARED / "models" / model))
    options = dict(FILES[file])
    if "apply_chat_template" in options and model == "TinyStories-656K":
        options["tokenizer_chat_template"] = chat_templates["marked"]
    data = prepare_sft(config(str(SHARED / "data" / file), max_samples=200, **options), tokenizer, seed=0)
    assert data.eval is not None
    assert len(data.train) + len(data.eval) >= 90
    for number in range(0, len(data.train), 7):
        sample = data.train[number]
        assert not sample.target_mask[0]
        assert (sample.input_ids[-1] == tokenizer.eos_token_id) or sample.truncated or "pretrain_mode" in options
    assert len(data.report.format().split("\n")) <= 40


@pytest.mark.parametrize("file", HINTS)
def test_real_files_that_need_options_say_which(config, file):
    tokenizer = load_tokenizer(str(SHARED / "models" / "stories260K"))
    with pytest.raises(InputError) as error:
        prepare_sft(config(str(SHARED / "data" / file)), tokenizer, seed=0)
    assert HINTS[file] in str(error.value)


PAIRS = {
    "story_pairs.jsonl": ({}, 978, {}),
    "gsm8k_pairs.jsonl": ({}, 2426, {}),
    "chat_pairs.jsonl": (CHAT, 149, {"prompt longer than --max_len": 150}),
}


@pytest.mark.parametrize("file", PAIRS)
def test_real_pairs_load(config, file):
    options, kept, dropped = PAIRS[file]
    tokenizer = load_tokenizer(str(SHARED / "models" / "stories260K"))
    given = config(str(SHARED / "data" / file), PairDataConfig, **options)
    data = prepare_pairs(given, tokenizer, seed=0, same_prompt=True, share_prefix=True, progress=False)
    (source,) = data.report.sources
    assert source.rows_kept == kept
    assert {reason: drop.count for reason, drop in source.dropped.items()} == dropped
    assert data.eval is not None
    assert len(data.train) + len(data.eval) == kept
    for number in range(0, len(data.train), 7):
        pair = data.train[number]
        for side in (pair.chosen, pair.rejected):
            assert not side.target_mask[: pair.shared].any()
            assert side.target_mask[pair.shared :].all()  # one prompt, and all that follows is the response
            assert side.input_ids[-1] == tokenizer.eos_token_id or side.truncated
        assert data.train.lengths[number] == len(pair.chosen) + len(pair.rejected) - pair.shared
    assert len(data.report.format().split("\n")) <= 40


LABELLED = {
    "gsm8k_unpaired.jsonl": (
        {"input_key": "instruction", "output_key": "response", "label_key": "score"},
        (2001, 3275),
        {},
    ),
    "kto_en_demo.json": (CHAT, (127, 133), {"prompt longer than --max_len": 40}),
}


@pytest.mark.parametrize("file", LABELLED)
def test_real_labelled_rows_load(config, file):
    options, (desirable, undesirable), dropped = LABELLED[file]
    tokenizer = load_tokenizer(str(SHARED / "models" / "stories260K"))
    given = config(str(SHARED / "data" / file), LabelledDataConfig, eval_ratio=0, **options)
    data = prepare_labelled(given, tokenizer, seed=0, progress=False)
    assert int(data.train.labels.sum()) == desirable
    assert len(data.train) == desirable + undesirable
    assert {reason: drop.count for reason, drop in data.report.sources[0].dropped.items()} == dropped
    assert "to balance them, give --desirable_loss_weight" in data.report.format()
    assert len(data.report.format().split("\n")) <= 40


PROMPTS = {
    "story_prompts.jsonl": ("prompt `prompt`", 853, {}),
    "gsm8k_train.jsonl": ("prompt `question`", 7473, {}),
    "ifeval_input_data.jsonl": ("prompt `prompt`", 541, {}),
    "llmbar_natural.json": ("prompt `input`", 100, {}),
    "chat_sft.jsonl": ("messages `messages`", 999, CHAT),
    "glaive_toolcall_en_demo.json": ("messages `conversations`", 300, CHAT),
}


@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
@pytest.mark.parametrize("file", PROMPTS)
def test_real_prompts_stream_as_training_puts_them_before_a_response(chat_templates, file, model):
    tokenizer = load_tokenizer(str(SHARED / "models" / model))
    describe, count, options = PROMPTS[file]
    template = {"tokenizer_chat_template": chat_templates["marked"]} if options and model != "stories260K" else {}
    stream = RowStream(InferenceDataConfig(dataset=str(SHARED / "data" / file)), PromptOptions(), 0)
    assert stream.describe.endswith(describe)
    assert stream.count() == count
    rows = [row.conversation for row in stream.read(stop=200)]
    conversations = [row for row in rows if not isinstance(row, RowError)]
    assert len(conversations) == min(count, 200)
    trained = [row if options else Pair(row.prompt, "yes") for row in conversations]
    encoder = Encoder(tokenizer, EncodeOptions(100_000, **options, **template))
    again = Encoder(tokenizer, EncodeOptions(100_000))
    for prompt, result in zip(encoder.prompts(conversations), encoder.encode(trained), strict=True):
        assert not isinstance(prompt, RowError)
        assert not isinstance(result, RowError)
        (samples,) = again.encode([Pair(prompt.text, "yes", rendered=prompt.rendered)])
        assert not isinstance(samples, RowError)
        for sample in (result[0], samples[0]):
            assert sample.input_ids[: int(sample.target_mask.argmax())].tolist() == prompt.ids


@pytest.mark.parametrize("model", ["stories260K", "TinyStories-656K"])
def test_real_responses_come_back_from_their_ids(model):
    tokenizer = load_tokenizer(str(SHARED / "models" / model))
    encoder = Encoder(tokenizer, EncodeOptions(100_000))
    rows = RowStream(InferenceDataConfig(dataset=str(SHARED / "data" / "story_pairs.jsonl")), PromptOptions(), 0)
    pairs = [Pair(row.row["prompt"], row.row["chosen"]) for row in rows.read(stop=200)]
    same = 0
    for pair, samples in zip(pairs, encoder.encode(pairs), strict=True):
        assert not isinstance(samples, RowError)
        sample, start = samples[0], int(samples[0].target_mask.argmax())
        ids = sample.input_ids.tolist()
        text = continuation_text(tokenizer, ids[:start], ids[start:-1])
        (again,) = encoder.encode([Pair(pair.prompt, text)])
        assert not isinstance(again, RowError)
        assert again[0].input_ids.tolist() == ids
        same += text == pair.response
    assert same > 180  # the tokenizer of TinyStories-656K cannot write every character
