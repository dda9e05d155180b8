"""A policy and a critic of two ranks are those of one: the same rollout, log-probs, values, update and weights, at any ZeRO stage."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("ppo_ranks.py")


def options(tiny: Path, stage: int) -> dict[str, Any]:
    """Options of a run on the tiny model, in their groups."""
    return {
        "model": {"pretrain": str(tiny)},
        "data": {"prompt_data": "unread.jsonl", "prompt_max_len": 16},
        "rewards": {"reward_pretrain": "unread.py"},
        "rollout": {
            "rollout_batch_size": 8, "n_samples_per_prompt": 4, "temperature": 0.7, "generate_max_len": 12,
        },
        "ppo": {"enable_ema": True, "ema_beta": 0.5},
        "batch": {"train_batch_size": 8, "seed": 7},
        "optim": {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "lr_warmup_ratio": 0.0},
        "cluster": {"actor_num_gpus_per_node": 2, "critic_num_gpus_per_node": 2},
        "parallel": {"zero_stage": stage},
    }  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two ranks found at ZeRO stages 0 and 3."""
    job = tmp_path_factory.mktemp("ranks") / "job.json"
    job.write_text(json.dumps({str(stage): options(tiny, stage) for stage in (0, 3)}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(job)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return job.parent


@pytest.fixture(scope="module")
def one_rank(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a single rank finds of each role, and the folder it exported to."""
    spec = importlib.util.spec_from_file_location("ppo_ranks", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("alone")
    return module.go_through(0, 1, options(tiny, 0), None, folder) | {"folder": folder}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["0", "3"])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_two_ranks_make_the_update_that_one_makes(role, stage, two_ranks, one_rank):
    from safetensors.torch import load_file

    found, alone = json.loads((two_ranks / f"{stage}-{role}.json").read_text()), one_rank[role]
    assert found.get("written") == alone.get("written")
    for mine, expected in zip(found["told"], alone["told"], strict=False):
        assert mine == pytest.approx(expected, abs=1e-5)
    for figures, expected in zip(found["figures"], alone["figures"], strict=True):
        assert figures == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in expected.items()}
    weights = load_file(two_ranks / f"{stage}-{role}.safetensors")
    assert weights.keys() == alone["weights"].keys()
    for name, weight in weights.items():
        assert (weight - alone["weights"][name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("stage", ["0", "3"])
def test_two_ranks_export_the_average_that_one_exports(stage, two_ranks, one_rank):
    from safetensors.torch import load_file

    average = load_file(two_ranks / stage / "policy" / "model.safetensors")
    alone = load_file(one_rank["folder"] / "policy" / "model.safetensors")
    assert all((average[name] - alone[name]).abs().max() < 1e-4 for name in alone)
    weights = one_rank["policy"]["weights"]
    assert max((average[name] - weights[name]).abs().max() for name in average) > 3e-4
