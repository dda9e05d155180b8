"""Samples that are written out: spread over the rewards, one line each, and none that never happened."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rlhf_core.tiny import make_tokenizer
from rlhf_data.options import build
from rlhf_ray.config import PPOConfig
from rlhf_ray.prompts import Prompts, read_prompts
from rlhf_ray.rollout import Experience
from rlhf_ray.samples import SampleLog, spread, table

PROMPTS = ["Once upon a time", "There was a cat"]


def config_of(folder: Any, count: int = 3) -> PPOConfig:
    return build(
        PPOConfig,
        {
            "pretrain": "none",
            "prompt_data": str(folder / "prompts.jsonl"),
            "reward_pretrain": "reward.py",
            "logged_samples": count,
        },
    )


@pytest.fixture
def prompts(tmp_path) -> Prompts:
    rows = [{"prompt": PROMPTS[0], "label": "a"}, {"prompt": PROMPTS[1]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(PROMPTS, tmp_path / "tokenizer", 300)
    return read_prompts(config_of(tmp_path), tokenizer, None).train


def experience_of(prompts: Prompts, scores: list[float]) -> Experience:
    """Responses `0 ends`, `1 ends`, … to the two prompts in turn; every third is cut off."""
    numbers = [n % 2 for n in range(len(scores))]
    eos: Any = prompts.tokenizer.eos_token_id
    bodies = [prompts.tokenizer.encode(f" {n} ends", add_special_tokens=False) for n in range(len(scores))]
    cut = [n % 3 == 2 for n in range(len(scores))]
    responses = [body if short else [*body, eos] for body, short in zip(bodies, cut, strict=True)]
    asked = [prompts.ids(number) for number in numbers]
    pieces = [np.asarray(part) for pair in zip(asked, responses, strict=True) for part in pair]
    lengths = np.array([len(response) for response in responses], np.int64)
    tokens = int(lengths.sum())
    return Experience(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.array([len(ids) for ids in asked], np.int64),
        response_lengths=lengths,
        truncated=np.array(cut),
        rollout_logps=np.zeros(tokens, np.float32),
        prompts=np.array(numbers, np.int64),
        groups=np.array(numbers, np.int64),
        seeds=np.arange(len(scores)),
        versions=np.full(len(scores), 4),
        scores=np.array(scores, np.float32),
        mask=np.ones(tokens, np.bool_),
        advantages=np.zeros(tokens, np.float32),
    )


def test_samples_are_spread_evenly_from_the_lowest_reward_to_the_highest():
    scores = np.array([3.0, 0.0, 4.0, 1.0, 2.0], np.float32)
    assert scores[spread(scores, 3)].tolist() == [0, 2, 4]
    assert scores[spread(scores, 1)].tolist() == [4]
    assert scores[spread(scores, 9)].tolist() == [0, 1, 2, 3, 4]
    assert len(spread(scores, 0)) == 0


def test_every_sample_is_a_line_with_texts_rewards_and_their_parts(prompts, tmp_path):
    log = SampleLog(tmp_path, config_of(tmp_path), prompts, None)
    parts = {"rule": np.array([1, 2, np.nan], np.float32)}
    rows = log.write(7, experience_of(prompts, [0.5, 1.5, 2.5]), parts)
    log.close()
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == rows
    length = len(prompts.tokenizer.encode(" 0 ends", add_special_tokens=False))
    assert rows == [
        {"step": 7, "prompt": PROMPTS[0], "response": " 0 ends", "reward": 0.5, "parts": {"rule": 1.0},
         "length": length + 1, "truncated": False, "version": 4, "label": "a"},
        {"step": 7, "prompt": PROMPTS[1], "response": " 1 ends", "reward": 1.5, "parts": {"rule": 2.0},
         "length": length + 1, "truncated": False, "version": 4},
        {"step": 7, "prompt": PROMPTS[0], "response": " 2 ends", "reward": 2.5, "parts": {"rule": None},
         "length": length, "truncated": True, "version": 4, "label": "a"},
    ]  # fmt: skip
    columns, data = table(rows)
    assert columns == ["step", "prompt", "response", "reward", "length", "truncated", "version", "rule"]
    assert data[1] == [7, PROMPTS[1], " 1 ends", 1.5, length + 1, False, 4, 2.0]


def test_a_resumed_run_forgets_the_samples_behind_its_checkpoint(prompts, tmp_path):
    config = config_of(tmp_path, count=1)
    log = SampleLog(tmp_path, config, prompts, None)
    log.write(1, experience_of(prompts, [1.0]))
    place = log.position()
    log.write(2, experience_of(prompts, [2.0]))
    log.close()
    again = SampleLog(tmp_path, config, prompts, place)
    again.write(3, experience_of(prompts, [3.0]))
    again.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [1, 3]
    SampleLog(tmp_path, config, prompts, None).close()
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_no_sample_is_written_where_none_is_wanted(prompts, tmp_path):
    log = SampleLog(tmp_path, config_of(tmp_path, count=0), prompts, None)
    assert log.write(1, experience_of(prompts, [1.0, 2.0])) == []
    log.close()
    assert table([])[1] == []
