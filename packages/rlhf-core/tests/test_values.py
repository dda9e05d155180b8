"""A reward model read at every token: values are the rewards of what has been written so far."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_core.batch import Batch
from rlhf_core.config import ModelConfig, RanksConfig
from rlhf_core.models.load import load_reward_model
from rlhf_core.ranks import Ranks
from rlhf_data.encode import Sample


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random reward model."""
    from transformers import AutoConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    LlamaForSequenceClassification(AutoConfig.from_pretrained(tiny, num_labels=1)).save_pretrained(path)
    return str(path)


def groups() -> list[tuple[list[Sample], int]]:
    """Two prompts of 9 tokens with two responses each, which are the targets."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(300, size=(2, 9))
    ids = [[np.concatenate([p, rng.integers(300, size=length)]).astype(np.int32) for length in (5, 1)] for p in prompts]
    return [([Sample(row, np.arange(len(row)) >= 9) for row in two], 9) for two in ids]


@torch.no_grad()
def test_the_value_of_a_state_is_the_reward_of_what_led_to_it(folder):
    options = ModelConfig(pretrain=folder, flash_attn=True)
    ranks = Ranks(RanksConfig(), seed=0, bf16=False, zero_stage=3)
    split = load_reward_model(options, device=ranks.device, deepspeed=ranks.frozen_config(offload=False))
    samples = [sample for two, _ in groups() for sample in two]
    starts = [Sample(s.input_ids[:end], np.zeros(end, bool)) for s in samples for end in range(9, len(s.input_ids))]
    plain = load_reward_model(ModelConfig(pretrain=folder))
    states, ends = (plain("rewards", Batch.from_samples(each))[0].tolist() for each in (starts, samples))
    models = plain, load_reward_model(options), ranks.prepare_frozen(split, offload=False)
    laid = [(model, Batch.from_samples(samples)) for model in models]
    for model, batch in laid + [(model, Batch.from_groups(groups())) for model in models[1:]]:
        values, after = model("values", batch)
        assert values.dtype == after.dtype == torch.float32
        assert values.tolist() == pytest.approx(states, rel=1e-5, abs=1e-5)
        assert after.tolist() == pytest.approx(ends, rel=1e-5, abs=1e-5)


def test_a_batch_without_targets_has_no_values_and_calls_the_head_all_the_same(folder):
    """So that ranks which have nothing left to do make the same calls as the others."""
    model = load_reward_model(ModelConfig(pretrain=folder, flash_attn=True)).requires_grad_(True)
    values, after = model("values", Batch.from_groups(groups()).without_targets())
    assert (values.shape, after.shape) == ((0,), (0,))
    (values.sum() + after.sum()).backward()
    gradient = model.head.weight.grad
    assert gradient is not None and not gradient.any()
