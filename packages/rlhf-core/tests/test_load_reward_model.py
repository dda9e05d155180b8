"""A reward model that is loaded to score gives the same rewards padded, end to end, and split by ZeRO-3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_core.batch import Batch
from rlhf_core.config import ModelConfig, RanksConfig
from rlhf_core.models.load import load_reward_model
from rlhf_core.ranks import Ranks
from rlhf_data.encode import Sample


def pairs() -> list[tuple[list[Sample], int]]:
    """Three prompts with two responses each; how many tokens a pair has in common."""
    ids = torch.randint(300, (3, 2, 12), generator=torch.Generator().manual_seed(0)).numpy().astype(np.int32)
    ids[:, 1, :5] = ids[:, 0, :5]
    return [([Sample(row[: 12 - 2 * n], np.zeros(12 - 2 * n, bool)) for row in two], 5) for n, two in enumerate(ids)]


@pytest.fixture(scope="module", params=["score", "value_head"])
def folder(request, tiny, tmp_path_factory) -> str:
    """A random reward model whose head has this name."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    LlamaForSequenceClassification(AutoConfig.from_pretrained(tiny, num_labels=1)).save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    weights[f"{request.param}.weight"] = weights.pop("score.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@torch.no_grad()
def test_rewards_do_not_depend_on_layout_or_sharing_or_splitting(folder):
    whole = Batch.from_samples([sample for two, _ in pairs() for sample in two])
    padded, _ = load_reward_model(ModelConfig(pretrain=folder))("rewards", whole)
    options = ModelConfig(pretrain=folder, flash_attn=True)
    ranks = Ranks(RanksConfig(), seed=0, bf16=False, zero_stage=3)
    split = load_reward_model(options, device=ranks.device, deepspeed=ranks.frozen_config(offload=False))
    assert all(hasattr(parameter, "ds_id") for parameter in split.parameters())
    for model in (load_reward_model(options), ranks.prepare_frozen(split, offload=False)):
        for batch in (whole, Batch.from_groups(pairs())):
            assert model("rewards", batch)[0].tolist() == pytest.approx(padded.tolist(), rel=1e-5, abs=1e-5)
