"""Options of generation and scoring: what they refuse by themselves, and that every one of them is an option of one name."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_data.errors import InputError
from rlhf_data.options import build, options
from rlhf_infer.config import GenerateConfig, ScoreConfig

NEEDED = {"pretrain": "model", "dataset": "data.jsonl", "output_path": "out.jsonl"}


@pytest.mark.parametrize("config", [GenerateConfig, ScoreConfig])
def test_every_option_has_one_name_and_a_help_text(config):
    named = list(options(config))
    names = [name for name, _, _ in named]
    assert len(set(names)) == len(names)
    assert [name for name, field, _ in named if not field.description] == []
    assert build(config, NEEDED).given() == NEEDED


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"greedy_sampling": True, "temperature": 0.7}, "--greedy_sampling draws nothing, so --temperature"),
        ({"greedy_sampling": True, "top_p": 0.9, "temperature": 0.7}, "--temperature and --top_p"),
        ({"greedy_sampling": True, "best_of_n": 2}, "--best_of_n 2 would write the same response"),
        ({"temperature": 0}, "--temperature: it should be greater than 0"),
        ({"top_p": 0}, "--top_p: it should be greater than 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens: it should be greater than or equal to 1"),
        ({"engine": "transformers", "tp_size": 2}, "--tp_size is for vLLM"),
        ({"engine": "transformers", "enable_prefix_caching": True}, "--enable_prefix_caching is for vLLM"),
        ({"gpu_memory_utilization": 1.5}, "--gpu_memory_utilization"),
        ({"rollout_batch_size": 4}, "--rollout_batch_size 4 is the size of an --iter slice"),
        ({"iter": -1}, "--iter"),
        ({"reward_template": "{input}{reward}"}, "--csft_reward"),
        ({"reward_template": "{reward}", "csft_reward": 1}, "{input} exactly once"),
        ({"input_template": "no place"}, "--input_template must contain"),
        ({"reward_pretrain": "x"}, "unknown option `reward_pretrain`"),
    ],
)
def test_generation_options_that_contradict_each_other_are_refused(given, says):
    with pytest.raises(InputError) as refused:
        build(GenerateConfig, NEEDED | given)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"calibrate": True}, "--calibrate is where --normalize_reward takes its statistics from"),
        ({"post_processor": "rs", "top_fraction": 0.1}, "--top_fraction is for --post_processor raft"),
        (
            {"post_processor": "rs", "reward_template": "{input}{reward}"},
            "--reward_template is for --post_processor csft",
        ),
        ({"min_margin": 1}, "--min_margin is for --post_processor iter_dpo or dpo_pairs"),
        ({"post_processor": "raft"}, "--post_processor raft needs --top_fraction"),
        ({"post_processor": "filter"}, "--post_processor filter needs --reward_threshold"),
        ({"post_processor": "dpo_pairs"}, "--post_processor dpo_pairs needs --min_margin"),
        ({"post_processor": "raft", "top_fraction": 0}, "--top_fraction: it should be greater than 0"),
        ({"zero_stage": 4}, "--zero_stage: it should be less than or equal to 3"),
    ],
)
def test_scoring_options_that_contradict_each_other_are_refused(given, says):
    with pytest.raises(InputError) as refused:
        build(ScoreConfig, NEEDED | given)
    assert says in str(refused.value)


@pytest.mark.parametrize("written", ["None", "none", "null", ""])
def test_no_post_processor_may_be_written_out(written: Any):
    assert build(ScoreConfig, NEEDED | {"post_processor": written}).processor.post_processor is None


def test_large_numbers_may_be_written_as_people_write_them():
    config = build(GenerateConfig, NEEDED | {"max_samples": "1e6", "iter": 0, "rollout_batch_size": 1e4})
    assert (config.data.max_samples, config.data.rollout_batch_size) == (1_000_000, 10_000)


def test_greedy_sampling_may_be_given_with_one_response():
    assert build(GenerateConfig, NEEDED | {"greedy_sampling": True, "best_of_n": 1}).sampling.greedy_sampling
