"""Prompts of a run: every usable row once, as the policy is asked, with all that rewards want to know of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_core.tiny import make_tokenizer
from rlhf_data.errors import InputError
from rlhf_data.options import build
from rlhf_ray.config import PPOConfig
from rlhf_ray.prompts import PromptData, read_prompts
from rlhf_ray.rollout import Rollout

STORIES = [f"Once upon a time there was a {animal}." for animal in ("cat", "dog", "fox", "bear", "duck", "hen", "owl")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    return make_tokenizer(STORIES, tmp_path_factory.mktemp("tokenizer"), 320)


def config_of(prompt_data: object, **options: Any) -> PPOConfig:
    needed = {"pretrain": "none", "reward_pretrain": "reward.py", "prompt_max_len": 64, "generate_max_len": 8}
    return build(PPOConfig, needed | {"prompt_data": str(prompt_data)} | options)


def read(
    tokenizer: Any, rows: list[dict[str, Any]], folder: Path, context: int | None = None, **options: Any
) -> PromptData:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(config_of(path, **options), tokenizer, context)


def rows_of(stories: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": story, "label": number, "notes": {"kind": [number]}} for number, story in enumerate(stories)]


def test_every_prompt_has_its_ids_text_label_and_row(tokenizer, tmp_path):
    rows = rows_of(STORIES)
    data = read(tokenizer, rows, tmp_path)
    assert len(data.train) == len(STORIES)
    for number, story in enumerate(STORIES):
        ids = data.train.ids(number)
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(story)
        assert data.train.text(number) == story
        assert data.train.rendered(number) == "text"
        assert data.train.label(number) == number
        assert data.train.row(number) == rows[number]
    assert data.train.lengths.tolist() == [len(tokenizer.encode(story)) for story in STORIES]


def test_templates_write_prompts_out_and_chats_are_read_as_chats(tokenizer, tmp_path):
    plain = read(tokenizer, [{"question": "why?"}], tmp_path, input_template=r"Q: {}\nA:")
    assert plain.train.text(0) == "Q: why?\nA:"
    assert plain.train.ids(0)[0] == tokenizer.bos_token_id
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "left out"}]
    row = {"context_messages": chat}
    written = read(tokenizer, [row], tmp_path, apply_chat_template=True, input_key="context_messages")
    assert written.train.text(0) == "<|user|>why?<|assistant|>"
    assert written.train.rendered(0) == "chat"
    assert written.train.row(0) == row
    assert written.train.label(0) is None


def test_chats_without_a_template_are_refused_with_the_option(tokenizer, tmp_path):
    with pytest.raises(InputError, match="--apply_chat_template"):
        read(tokenizer, [{"messages": [{"role": "user", "content": "why?"}]}], tmp_path)


def test_labels_come_from_the_column_that_was_named_or_from_the_row_that_was_answered(tokenizer, tmp_path):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "source": {"answer": "d"}}, {"prompt": "e"}]
    data = read(tokenizer, rows, tmp_path, label_key="answer")
    assert [data.train.label(number) for number in range(3)] == ["b", "d", None]


def test_rows_that_cannot_be_used_are_counted_by_reason_with_the_first_place(tokenizer, tmp_path):
    rows = [{"prompt": "a cat"}, {"prompt": ""}, {"prompt": "word " * 90}, {"other": 1}, {"prompt": "and so " * 90}]
    data = read(tokenizer, rows, tmp_path)
    assert len(data.train) == 1
    (source,) = data.report.sources
    assert (source.rows_read, source.rows_kept) == (5, 1)
    assert {reason: drop.count for reason, drop in source.dropped.items()} == {
        "`prompt` is empty": 1,
        "no key `prompt`": 1,
        "prompt longer than --prompt_max_len 64": 2,
    }
    assert "prompts.jsonl:3" in source.dropped["prompt longer than --prompt_max_len 64"].first
    said = data.report.format()
    assert "1 of 5 prompts kept" in said
    assert "dropped 2: prompt longer than --prompt_max_len 64" in said
    assert json.loads(json.dumps(data.report.to_dict()))["train"]["prompts"] == 1


def test_prompts_that_fill_the_models_context_are_left_out(tokenizer, tmp_path):
    data = read(tokenizer, [{"prompt": "cat"}, {"prompt": "a b c d e f g h i j k l"}], tmp_path, context=12)
    assert len(data.train) == 1
    assert "context of 12 tokens" in data.report.format()


def test_strict_data_makes_an_unusable_row_an_error_with_its_place(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: prompt longer than .*--strict_data"):
        read(tokenizer, [{"prompt": "a cat"}, {"prompt": "word " * 90}], tmp_path, strict_data=True)


def test_data_without_any_usable_prompt_is_an_error_with_the_reasons(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"--prompt_data: no prompt can be used: .*--prompt_max_len 1 \(2, the first"):
        read(tokenizer, rows_of(STORIES[:2]), tmp_path, prompt_max_len=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_data_probs": "0.5,0.5"}, "--prompt_data_probs 0.5,0.5 gives 2"),
        ({"prompt_split": "nosuch"}, "has no split `nosuch`"),
    ],
)
def test_wrong_options_are_named_as_the_user_knows_them(tokenizer, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        read(tokenizer, rows_of(STORIES), tmp_path, **options)


def test_the_evaluation_split_is_used_if_there_is_one(tokenizer, tmp_path):
    for split, stories in (("train", STORIES), ("test", STORIES[:2])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(stories)))
    data = read_prompts(config_of(tmp_path, max_samples=3, eval_ratio=0.5), tokenizer, None)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (3, 2)
    assert [data.evaluation.text(number) for number in range(2)] == STORIES[:2]


def test_evaluation_data_of_its_own_comes_first(tokenizer, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "held"}) + "\n")
    data = read(tokenizer, rows_of(STORIES), tmp_path, eval_prompt_data=str(tmp_path / "held.jsonl"), eval_ratio=0.5)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), data.evaluation.text(0)) == (7, 1, "held")


def test_held_out_prompts_are_drawn_by_the_seed_and_leave_training(tokenizer, tmp_path):
    data = read(tokenizer, rows_of(STORIES), tmp_path, eval_ratio=0.3)
    assert data.evaluation is not None
    train, held = ({p.text(n) for n in range(len(p))} for p in (data.train, data.evaluation))
    assert len(held) == 2
    assert train | held == set(STORIES)
    assert not train & held
    again = read(tokenizer, rows_of(STORIES), tmp_path, eval_ratio=0.3)
    assert again.train.fingerprint == data.train.fingerprint
    other = read(tokenizer, rows_of(STORIES), tmp_path, eval_ratio=0.3, seed=1)
    assert other.train.fingerprint != data.train.fingerprint
    assert "2 of 7 prompts held out" in data.report.format()


def test_without_evaluation_the_report_says_why(tokenizer, tmp_path):
    data = read(tokenizer, rows_of(STORIES), tmp_path)
    assert data.evaluation is None
    assert "no evaluation: no split `test`" in data.report.format()


def test_the_fingerprint_changes_with_tokens_and_with_rows_and_with_nothing_else(tokenizer, tmp_path):
    rows = rows_of(STORIES)
    first = read(tokenizer, rows, tmp_path).train.fingerprint
    assert read(tokenizer, rows, tmp_path).train.fingerprint == first
    assert read(tokenizer, rows, tmp_path, input_template="{}!").train.fingerprint != first
    rows[3]["label"] = "another"
    assert read(tokenizer, rows, tmp_path).train.fingerprint != first


def test_responses_are_read_as_text_without_the_token_that_ended_them(tokenizer, tmp_path):
    data = read(tokenizer, rows_of(STORIES[:2]), tmp_path)
    prompts = [data.train.ids(number) for number in (0, 0, 1)]
    said = [tokenizer.encode(text, add_special_tokens=False) for text in (" A cat.", " A c", "")]
    responses = [[*said[0], tokenizer.eos_token_id], said[1], [tokenizer.eos_token_id]]
    rollout = rollout_of(prompts, responses, truncated=[False, True, False], numbers=[0, 0, 1])
    assert data.train.responses(rollout) == [" A cat.", " A c", ""]


def rollout_of(prompts: list[Any], responses: list[list[int]], truncated: list[bool], numbers: list[int]) -> Rollout:
    lengths = np.array([len(response) for response in responses], np.int64)
    count = len(responses)
    return Rollout(
        input_ids=np.concatenate([part for pair in zip(prompts, responses, strict=True) for part in pair]).astype(
            np.int32
        ),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int64),
        response_lengths=lengths,
        truncated=np.array(truncated),
        rollout_logps=np.zeros(int(lengths.sum()), np.float32),
        prompts=np.array(numbers, np.int64),
        groups=np.array(numbers, np.int64),
        seeds=np.arange(count),
        versions=np.zeros(count, np.int64),
    )
