"""Scoring through the command line: on two ranks, killed in the middle, with vLLM's reward runner."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DYING = """
import os, signal, sys
from rlhf_infer.rewards.model import ModelScorer

judge, asked = ModelScorer.judge, []

def dying(self, answers):
    asked.append(len(answers))
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(self, answers)

ModelScorer.judge = dying
from rlhf_cli.main import main
main()
"""
"""The program, which kills itself when it is to score its third window."""


WORDS = "red blue green cat dog bird sun moon star tree river stone".split()


def generated(count: int) -> list[dict[str, Any]]:
    """Rows as `rlhf generate` writes them, three responses to a prompt; every fourth was cut off."""
    return [
        {
            "row": n // 3,
            "sample": n % 3,
            "input": f"Say {WORDS[n // 3 % 12]} {'please ' * (n // 3 % 4)}{n // 3}",
            "output": " ".join(WORDS[(n * 5 + k) % 12] for k in range(1 + n * 7 % 6)),
            "rendered": "text",
            "finish_reason": "length" if n % 4 == 0 else "stop",
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def reward_model(tiny: Path, tmp_path_factory) -> Path:
    """Folder of a tiny random reward model, with a head that vLLM reads too."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    config = AutoConfig.from_pretrained(tiny)
    config.num_labels, config.problem_type = 1, "regression"
    config.mean, config.std = 0.1, 0.5
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def scoring(reward_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small scoring job."""
    data = tmp_path / "generated.jsonl"
    rows = generated(90)
    rows[40]["output"] = ""
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output: str, **options: Any) -> list[str]:
        given = {"pretrain": reward_model, "dataset": data, "output_path": tmp_path / output, "micro_batch_size": 1}
        return ["score", *(part for name, value in (given | options).items() for part in flag(name, value))]

    return make


def flag(name: str, value: Any) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def ended(answer: Any) -> str:
    """What a command that succeeded said."""
    assert answer.code == 0, answer.err
    return answer.out


def scored(path: Path) -> tuple[list[dict[str, Any]], list[float | None]]:
    """Rows without their rewards, and these."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows, [row.pop("reward") for row in rows]


def given(rewards: list[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]


def assert_same(one: Path, other: Path) -> None:
    (rows, rewards), (others, other_rewards) = scored(one), scored(other)
    assert rows == others and len(rows) == 90
    assert [reward is None for reward in rewards] == [n == 40 for n in range(90)]
    assert given(rewards) == pytest.approx(given(other_rewards), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_ranks_give_the_rewards_of_one(scoring, program, rlhf, tmp_path, zero_stage):
    ended(rlhf(scoring("one.jsonl", micro_batch_size=4)))
    said = ended(program(scoring("two.jsonl", micro_batch_size=4, num_procs=2, zero_stage=zero_stage)))
    assert said.count("89 of 90 responses scored") == 1 and "2 ranks" in said
    assert_same(tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    if zero_stage:  # nothing is left to do, which all ranks must hear of
        assert "nothing is left to do" in ended(
            program(scoring("two.jsonl", micro_batch_size=4, num_procs=2, zero_stage=zero_stage))
        )


def test_what_the_first_rank_refuses_ends_the_others(scoring, program):
    answer = program(scoring("two.jsonl", num_procs=2, max_len=100_000))
    assert answer.code == 2 and answer.err.count("give --max_len") == 1


def test_a_job_killed_in_the_middle_goes_on_to_equal_bytes(scoring, rlhf, start, finish, tmp_path):
    ended(rlhf(scoring("whole.jsonl", post_processor="iter_dpo")))
    command = scoring("out.jsonl", post_processor="iter_dpo")
    assert finish(start([sys.executable, "-c", DYING, *command]), 120).code == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.scored.jsonl").exists()
    assert len((tmp_path / "out.jsonl.scored.jsonl.partial").read_text().splitlines()) == 64
    assert "an earlier run scored 64 rows" in ended(rlhf(command))
    for name in ("jsonl", "jsonl.scored.jsonl"):
        assert (tmp_path / f"out.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    assert not list(tmp_path.glob("*partial*"))


def test_infer_scores_too(scoring, rlhf, tmp_path):
    command = scoring("infer.jsonl", normalize_reward=True, post_processor="rs")
    assert "--post_processor rs: 30 rows" in ended(rlhf(["infer", "--eval_task", "rm", *command[1:]]))
    rows, rewards = scored(tmp_path / "infer.jsonl.scored.jsonl")
    raw = [row.pop("raw_reward", None) for row in rows]
    assert rewards[40] is None and given(rewards) == pytest.approx([(reward - 0.1) / 0.5 for reward in given(raw)])


def test_vllms_reward_runner_gives_the_same_rewards(scoring, rlhf, program, tmp_path):
    pytest.importorskip("vllm")
    ended(rlhf(scoring("one.jsonl", normalize_reward=True)))
    ended(program(scoring("vllm.jsonl", normalize_reward=True, reward_engine="vllm"), seconds=240))
    (rows, rewards), (others, other_rewards) = scored(tmp_path / "one.jsonl"), scored(tmp_path / "vllm.jsonl")
    assert given(rewards) == pytest.approx(given(other_rewards), abs=1e-4)
    raw, other_raw = ([row.pop("raw_reward", None) for row in made] for made in (rows, others))
    assert given(raw) == pytest.approx(given(other_raw), abs=1e-4) and rows == others


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problem_type": None}, "problem_type None, so that vLLM would squash its rewards"),
        ({"architectures": ["LlamaModel"]}, "it is a LlamaModel, no sequence classification"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}, "attention heads have 16 dimensions"),
    ],
)
def test_models_that_vllm_cannot_score_with_are_refused(reward_model, scoring, rlhf, tmp_path, changes, reason):
    import shutil

    folder = shutil.copytree(reward_model, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    answer = rlhf(scoring("out.jsonl", pretrain=folder, reward_engine="vllm"))
    assert answer.code == 2 and reason in " ".join(answer.err.split())
    assert "--reward_engine transformers" in answer.err


def test_a_function_needs_no_model(scoring, program, tmp_path):
    (tmp_path / "rules.py").write_text("def animals(responses):\n    return [float('cat' in r) for r in responses]\n")
    ended(program(scoring("out.jsonl", pretrain="rules.py:animals")))
    rows, rewards = scored(tmp_path / "out.jsonl")
    assert rewards == [None if n == 40 else float("cat" in row["output"]) for n, row in enumerate(rows)]
