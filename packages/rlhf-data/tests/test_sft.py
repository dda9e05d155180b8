from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from rlhf_data.errors import InputError
from rlhf_data.sft import prepare_sft

ROWS = [{"prompt": f"where is {number}?", "response": f"the mat {number}"} for number in range(40)]
CHATS = [
    {"messages": [{"role": "user", "content": f"where is {number}?"}, {"role": "assistant", "content": "the mat"}]}
    for number in range(10)
]


def texts(tokenizer, data) -> list[str]:
    return [tokenizer.decode(data[number].input_ids.tolist()) for number in range(len(data))]


def test_rows_become_samples_with_a_report(write, config, tokenizer):
    path = write(
        "a.jsonl", [*ROWS, {"prompt": "x", "response": None}, {"prompt": "x"}, {"prompt": "", "response": "y"}]
    )
    data = prepare_sft(config(path), tokenizer, seed=0)
    assert data.eval is not None
    assert len(data.train) == 39
    assert len(data.eval) == 1
    (source,) = data.report.sources
    assert (source.rows_read, source.rows_kept) == (43, 40)
    assert {reason: (drop.count, drop.first) for reason, drop in source.dropped.items()} == {
        "`response` is null": (1, f"{path}:41"),
        "no key `response`": (1, f"{path}:42"),
        "`prompt` is empty": (1, f"{path}:43"),
    }
    assert "no split `test`" in data.report.notes[0]
    assert "1 of 40 rows held out" in data.report.notes[0]
    shown = data.report.format()
    assert "prompt `prompt`, response `response`; 40 of 43 rows kept" in shown
    assert f"dropped 1: `response` is null (first: {path}:41)" in shown
    assert "⟦the mat" in shown
    assert json.loads(json.dumps(data.report.to_dict()))["train"]["samples"] == 39


def test_held_out_rows_are_not_trained_on(write, config, tokenizer):
    path = write("a.jsonl", ROWS)
    data = prepare_sft(config(path, eval_ratio=0.25), tokenizer, seed=3)
    assert data.eval is not None
    train, held = texts(tokenizer, data.train), texts(tokenizer, data.eval)
    assert len(held) == 10
    assert not set(train) & set(held)
    assert len(set(train) | set(held)) == 40
    again = prepare_sft(config(path, eval_ratio=0.25), tokenizer, seed=3)
    other = prepare_sft(config(path, eval_ratio=0.25), tokenizer, seed=4)
    assert again.train.fingerprint == data.train.fingerprint != other.train.fingerprint


def test_pieces_of_one_document_are_never_on_both_sides(write, config, make_tokenizer):
    tokenizer = make_tokenizer("words")
    words = ["the", "cat", "sat", "on", "dog", "and", "it", "is", "of", "time"]
    path = write("a.jsonl", [{"text": f"{word} " * 30} for word in words])
    data = prepare_sft(config(path, pretrain_mode=True, max_len=16, eval_ratio=0.2), tokenizer, seed=0)
    assert data.eval is not None

    def found(part):
        return {word for text in texts(tokenizer, part) for word in text.split() if word in words}

    assert len(found(data.train)) == 8
    assert len(found(data.eval)) == 2
    assert found(data.train) | found(data.eval) == set(words)
    assert len(data.train) == 8 * 3  # 32 tokens each, in pieces of 16 that overlap by one


def test_where_evaluation_comes_from(write, config, tokenizer, tmp_path):
    write("d/train.jsonl", ROWS)
    write("d/test.jsonl", ROWS[:5])
    single = write("single.jsonl", ROWS[:1])
    path = str(tmp_path / "d")

    def evaluation(dataset, **options):
        data = prepare_sft(config(dataset, **options), tokenizer, seed=0)
        return (len(data.train), data.eval and len(data.eval), " ".join(data.report.notes))

    assert evaluation(path) == (40, 5, "")
    assert evaluation(path, eval_ratio=0) == (40, 5, "")
    assert evaluation(path, eval_split="validation")[:2] == (39, 1)
    assert evaluation(path, eval_split="validation", eval_ratio=0)[:2] == (40, None)
    assert evaluation(path, eval_dataset=single)[:2] == (40, 1)
    assert evaluation(path, eval_dataset=path)[:2] == (40, 5)
    assert evaluation(path, eval_split="train")[:2] == (39, 1)
    assert evaluation(path, train_split="test")[:2] == (4, 1)
    train, held, note = evaluation(single)
    assert (train, held) == (1, None)
    assert "the only row is trained on" in note
    assert f"{single} has no split" in evaluation(f"{path},{single}")[2]


def test_limits_are_per_data_set_and_after_mixing(write, config, tokenizer):
    first, second = write("a.jsonl", ROWS), write("b.jsonl", ROWS[:20])
    joined = prepare_sft(config(f"{first},{second}", eval_ratio=0), tokenizer, seed=0)
    assert len(joined.train) == 60
    limited = prepare_sft(config(f"{first},{second}", max_samples=10, eval_ratio=0), tokenizer, seed=0)
    assert [source.rows_read for source in limited.report.sources] == [10, 10]
    assert len(limited.train) == 10
    mixed = prepare_sft(config(f"{first},{second}", dataset_probs="0.5,0.5", eval_ratio=0), tokenizer, seed=0)
    assert 20 < len(mixed.train) < 60
    assert "drawn by --dataset_probs" in mixed.report.notes[0]


def test_the_same_data_is_tokenised_once(write, config, tokenizer, chat_tokenizer, monkeypatch):
    path = write("a.jsonl", ROWS)
    first = prepare_sft(config(path), tokenizer, seed=0)
    again = prepare_sft(config(path), tokenizer, seed=0)
    assert not first.report.sources[0].cached
    assert again.report.sources[0].cached
    assert again.train.fingerprint == first.train.fingerprint
    assert "tokenised before" in again.report.format()
    for changed in (
        prepare_sft(config(path, max_len=100), tokenizer, seed=0),
        prepare_sft(config(path, input_template="{} "), tokenizer, seed=0),
        prepare_sft(config(path, input_key="response", output_key="prompt"), tokenizer, seed=0),
        prepare_sft(config(path), chat_tokenizer, seed=0),
        prepare_sft(config(write("a.jsonl", ROWS[:30])), tokenizer, seed=0),
    ):
        assert not changed.report.sources[0].cached


def test_chats_are_written_out_with_the_template(write, config, chat_tokenizer):
    data = prepare_sft(config(write("a.json", CHATS), apply_chat_template=True), chat_tokenizer, seed=0)
    assert "<|im_start|>assistant\n⟦the mat<|im_end|>⟧" in data.report.examples["first sample"]


def test_characters_the_tokenizer_loses_are_reported(write, config, make_tokenizer):
    path = write("a.jsonl", [{"prompt": "the", "response": "2 + 2 = 4"}] * 3)
    data = prepare_sft(config(path), make_tokenizer("words"), seed=0)
    assert "drops or changes: + 2 4 =" in data.report.format()


def refused(config, tokenizer) -> str:
    with pytest.raises(InputError) as error:
        prepare_sft(config, tokenizer, seed=0)
    return str(error.value)


def test_bad_data_is_refused_before_training_with_the_way_out(write, config, tokenizer, chat_tokenizer, tmp_path):
    path, chats = write("a.jsonl", ROWS), write("chats.jsonl", CHATS)
    empty = write("empty.jsonl", [{"prompt": "x", "response": ""}] * 3 + [{"prompt": "y", "response": None}])
    assert f"{chats}:1" in refused(config(chats), tokenizer)
    assert "--apply_chat_template" in refused(config(chats), tokenizer)
    assert "--tokenizer_chat_template" in refused(config(chats, apply_chat_template=True), tokenizer)
    message = refused(config(empty), tokenizer)
    assert "none of 4 rows can be used" in message
    assert f"dropped 3: `response` is empty (first: {empty}:1)" in message
    assert "dropped 1: `response` is null" in message
    assert "none of 40 rows" in refused(config(path, max_len=8), tokenizer)
    assert "longer than --max_len" in refused(config(path, max_len=8), tokenizer)
    assert "--dataset_probs" in refused(config(path, dataset_probs="0.5,0.5"), tokenizer)
    assert "its splits: train" in refused(config(path, train_split="dev"), tokenizer)
    assert "--eval_dataset" in refused(config(path, eval_dataset=f"{path},,"), tokenizer)
    blocked = write("blocked", "x")
    assert "--data_cache_dir" in refused(config(path, data_cache_dir=blocked), tokenizer)


def test_strict_data_stops_at_the_first_dropped_row(write, config, tokenizer):
    path = write("a.jsonl", [*ROWS[:3], {"prompt": "x", "response": 5}, *ROWS[3:]])
    wanted = f"{path}:4: `response` is a number, not text (--strict_data: no row may be dropped)"
    assert refused(config(path, strict_data=True), tokenizer) == wanted
    prepare_sft(config(path), tokenizer, seed=0)  # and the same from the cache
    assert refused(config(path, strict_data=True), tokenizer) == wanted
    long = write("b.jsonl", [*ROWS[:3], {"prompt": "x " * 300, "response": "y"}])
    assert f"{long}:4: prompt longer than --max_len" in refused(config(long, strict_data=True, max_len=64), tokenizer)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"input_template": "no slot"}, "--input_template must contain `{}` exactly once"),
        ({"pretrain_mode": True, "apply_chat_template": True}, "--pretrain_mode trains on plain text"),
        ({"multiturn": True}, "--multiturn is about chat rows"),
        ({"packing_tokens": 100}, "--packing_tokens 100 is less than --max_len 2048"),
        ({"eval_ratio": 1.0}, "less than 1"),
        ({"max_len": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(config, options, part):
    with pytest.raises(ValidationError) as error:
        config("a.jsonl", **options)
    assert part in str(error.value)


def test_many_rows_show_a_bar_on_stderr(write, config, tokenizer, capfd):
    path = write("a.jsonl", ROWS * 60)
    prepare_sft(config(path), tokenizer, seed=0)
    assert f"tokenising {path}" in capfd.readouterr().err
    prepare_sft(config(path, max_len=1000), tokenizer, seed=0, progress=False)
    assert capfd.readouterr().err == ""
