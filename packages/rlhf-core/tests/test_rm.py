"""Reward models: what is measured on held-out pairs, what is saved, and how a head is found again."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_core.methods.rm import RM, held_out_figures
from rlhf_core.models.reward import find_head
from rlhf_data.errors import InputError


def figures(margin: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """What an evaluation says of pairs, by the plain formulas."""
    right, won = margin > 0, 1 / (1 + np.exp(-margin.astype(np.float64)))
    sure, longest = np.maximum(won, 1 - won), np.maximum(chosen, rejected)
    groups = {
        "accuracy_chosen_longer": chosen > rejected,
        "accuracy_chosen_shorter": chosen < rejected,
        "accuracy_up_to_64_tokens": longest <= 64,
        "accuracy_up_to_256_tokens": (longest > 64) & (longest <= 256),
        "accuracy_up_to_1024_tokens": (longest > 256) & (longest <= 1024),
        "accuracy_over_1024_tokens": longest > 1024,
    }
    edges = np.linspace(0.5, 1, 6)
    bins = [(sure >= low) & ((sure < high) | (high == 1)) for low, high in pairwise(edges)]
    gaps = [b.mean() * abs(right[b].mean() - sure[b].mean()) for b in bins if b.any()]
    return {"expected_accuracy": sure.mean(), "calibration_error": sum(gaps)} | {
        name: right[group].mean() for name, group in groups.items() if group.any()
    }


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_held_out_figures_are_the_plain_ones_however_they_are_added_up(spread):
    rng = np.random.default_rng(0)
    margin = rng.normal(0.3, spread, 200).astype(np.float32)
    lengths = rng.choice([3, 64, 65, 256, 257, 1024, 1025, 3000], (200, 2))
    sums: dict[str, list[float]] = {}
    for rows in np.array_split(np.arange(200), [0, 1, 50, 51]):  # the first has none
        batch = SimpleNamespace(targets_per_sample=torch.from_numpy(lengths[rows].reshape(-1)))
        for name, (total, count) in held_out_figures(torch.from_numpy(margin[rows]), batch).items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + float(total), entry[1] + float(count)
    means = {name: total / count for name, (total, count) in sums.items() if count}
    found = RM.report(object.__new__(RM), means)
    wanted = figures(margin, lengths[:, 0], lengths[:, 1])
    assert found.keys() == wanted.keys() and found == pytest.approx(wanted, rel=1e-9)


def rewards_of(folder: Path, samples: list, padded: bool = False) -> np.ndarray:
    """Rewards by transformers' own class, one by one or as a batch that is padded on the right."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.from_numpy(sample.input_ids).long() for sample in samples]
    with torch.no_grad():
        if not padded:
            return np.array([model(row[None]).logits.item() for row in rows])
        pad = model.config.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return model(ids, attention_mask=mask).logits[:, 0].numpy()


@pytest.fixture
def paddable(tiny, tmp_path) -> str:
    """The tiny model with a padding token that ends no sample."""
    from rlhf_data.tokenizer import load_tokenizer

    folder = shutil.copytree(tiny, tmp_path / "paddable")
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.pad_token = "<|system|>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_what_is_measured_is_what_is_saved(train, paddable, tmp_path, prepared):
    """The evaluation and the calibration, by the saved model's own rewards; and training goes on from its head."""
    given = {"pretrain": paddable, "eval_ratio": 0.4, "zero_stage": 0, "learning_rate": 1e-4, "packing_samples": True}
    last = train("rm", **given)[-1]
    held_out = prepared("rm", **given).method.evaluation
    pairs = [held_out[i] for i in range(len(held_out))]
    samples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    rewards = rewards_of(tmp_path / "out", samples)
    assert rewards_of(tmp_path / "out", samples, padded=True) == pytest.approx(rewards, rel=1e-5, abs=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mean"] == pytest.approx(rewards.mean(), rel=1e-5, abs=1e-6)
    assert config["std"] == pytest.approx(rewards.std(ddof=1), rel=1e-5)
    assert config["calibration"]["responses"] == len(samples) == 20
    chosen, rejected = rewards[::2], rewards[1::2]
    lengths = np.array([sample.target_mask.sum() for sample in samples])
    wanted = figures(chosen - rejected, lengths[::2], lengths[1::2]) | {
        "accuracy": (chosen > rejected).mean(),
        "reward_margin": (chosen - rejected).mean(),
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
        "loss": np.log1p(np.exp(rejected - chosen)).mean(),
    }
    found = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    assert found.keys() == wanted.keys() and found == pytest.approx(wanted, rel=1e-4, abs=1e-5)

    saved = load_file(tmp_path / "out/model.safetensors")
    for name in ("score", "value_head", "model.reward"):
        folder = shutil.copytree(tmp_path / "out", tmp_path / name, ignore=shutil.ignore_patterns("run"))
        renamed = {key.replace("score.", f"{name}."): tensor for key, tensor in saved.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        assert find_head(str(folder), None, "--pretrain") == name
        on = {"pretrain": str(folder), "eval_at_start": True, "save_path": str(tmp_path / "on")}
        first = train("rm", **(given | on))[0]
        assert first["step"] == 0
        assert {k: first[k] for k in last if k.startswith("eval_")} == pytest.approx(
            {k: v for k, v in last.items() if k.startswith("eval_")}, rel=1e-5, abs=1e-6
        )
        assert list(load_file(tmp_path / "on/model.safetensors")) == list(saved)


def with_heads(tiny: Path, folder: Path, **heads: int) -> str:
    """The tiny model with heads of so many outputs."""
    shutil.copytree(tiny, folder)
    weights = load_file(tiny / "model.safetensors")
    weights |= {f"{name}.weight": torch.ones(outputs, 64) for name, outputs in heads.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_heads_are_found_named_or_refused(tiny, tmp_path):
    assert find_head(str(tiny), None, "--pretrain") is None
    one = with_heads(tiny, tmp_path / "one", value_head=1)
    assert find_head(one, None, "--pretrain") == find_head(one, "value_head", "--pretrain") == "value_head"
    with pytest.raises(InputError, match=r"--value_head_prefix score: .* has another head: value_head"):
        find_head(one, "score", "--pretrain")
    two = with_heads(tiny, tmp_path / "two", value_head=1, rank_head=1)
    with pytest.raises(InputError, match=r"has these heads: .*value_head.*name the one"):
        find_head(two, None, "--pretrain")
    assert find_head(two, "rank_head", "--pretrain") == "rank_head"
    assert find_head(with_heads(tiny, tmp_path / "own", score=1, value_head=1), None, "--pretrain") == "score"


def test_a_classifier_of_two_labels_is_refused(train, tiny, tmp_path):
    folder = with_heads(tiny, tmp_path / "two", score=2)
    with pytest.raises(InputError, match="a classifier of 2 labels; a reward model has one"):
        train("rm", pretrain=folder)


def test_without_held_out_pairs_there_is_no_calibration_and_the_log_says_so(train, tmp_path, capsys):
    train("rm", eval_ratio=0, max_samples=8, zero_stage=0)
    assert "rewards are not calibrated" in capsys.readouterr().out
    assert "calibration" not in json.loads((tmp_path / "out/config.json").read_text())


def test_margins_of_the_data_are_used(step):
    plain, margin = step("rm"), step("rm", margin_loss=True)
    assert margin.loss > plain.loss and margin.metrics["accuracy"] == plain.metrics["accuracy"]
