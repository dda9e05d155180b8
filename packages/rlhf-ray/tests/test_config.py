"""The options of placement and rollouts: documented, bounded, and light to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from rlhf_ray.config import ClusterConfig, RolloutConfig


@pytest.mark.parametrize("config", [ClusterConfig, RolloutConfig])
def test_every_option_says_what_it_is(config):
    assert all(field.description for field in config.model_fields.values())


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (ClusterConfig, {"actor_num_nodes": 0}),
        (ClusterConfig, {"actor_num_gpu_per_node": 1}),
        (RolloutConfig, {"vllm_num_engines": -1}),
        (RolloutConfig, {"vllm_sync_backend": "mpi"}),
    ],
)
def test_impossible_values_and_unknown_names_are_refused(config, given):
    with pytest.raises(ValidationError, match=next(iter(given))):
        config(**given)


def test_large_numbers_may_be_written_as_people_write_them():
    assert RolloutConfig(rollout_batch_size="1e3").rollout_batch_size == 1000


def test_importing_the_package_does_not_start_ray():
    code = "import rlhf_ray.config, sys; print([m for m in ('ray', 'torch', 'vllm') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
    )
