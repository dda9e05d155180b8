"""The record of a run, and what else it can be told to write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.config import SFTConfig


def test_the_record_says_what_was_run_on_what_and_how_it_went(train, tmp_path):
    rows = train(save_steps=2)
    folder = tmp_path / "out" / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "data.json", "environment.json", "metrics.jsonl", "plan.json",
    ]  # fmt: skip
    config = SFTConfig.model_validate_json((folder / "config.json").read_text())
    assert config.batch.train_batch_size == 8 and config.checkpoint.save_steps == 2
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5]
    assert rows[-1].keys() == {"step", "epoch", "eval_loss", "eval_perplexity"}
    assert (
        rows[0]["learning_rate"] <= 1e-3
        and rows[-2]["tokens"] == json.loads((folder / "plan.json").read_text())["tokens"]
    )
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]
    assert str(Path.home()) not in (folder / "environment.json").read_text()


def test_rows_are_means_over_the_steps_since_the_last(train, tmp_path):
    every = train(save_path=str(tmp_path / "every"))
    second = train(save_path=str(tmp_path / "second"), logging_steps=2)
    targets = [row["loss"] for row in every if "loss" in row]
    logged = [row["loss"] for row in second if "loss" in row]
    assert len(targets) == 5 and len(logged) == 3  # the last step is logged, due or not
    for i, loss in enumerate(logged):
        assert min(targets[2 * i : 2 * i + 2]) <= loss <= max(targets[2 * i : 2 * i + 2])


def test_evaluation_on_demand(train, tmp_path):
    rows = train(eval_steps=2, eval_at_start=True)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 5]
    assert not [
        row for row in train(eval_ratio=0, eval_at_start=True, save_path=str(tmp_path / "b")) if "loss" not in row
    ]


def test_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard")
    train(use_tensorboard=str(tmp_path / "board"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert len(events.Scalars("eval_loss")) == 1


def test_a_key_of_a_tracker_is_on_no_disk_and_in_no_output(train, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "tracker"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "tracker").mkdir()
    train(use_wandb=key)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if key.encode() in path.read_bytes()]
    out, err = capfd.readouterr()
    assert key not in out + err


def test_a_model_is_written_in_shards_and_replaces_the_one_that_was_there(tiny, options, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_core.export import export
    from rlhf_core.models.load import load_model
    from rlhf_core.models.policy import Policy
    from rlhf_core.strategy import Strategy
    from rlhf_data.tokenizer import load_tokenizer

    config, folder = options(), tmp_path / "model"
    policy = Policy(load_model(config.model, config.lora, attn_implementation="sdpa"), ragged=False)
    strategy, tokenizer = Strategy.of(config), load_tokenizer(str(tiny))
    export(policy, tokenizer, folder, strategy, shard_bytes=50_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    sharded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    export(policy, tokenizer, folder, strategy)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    original = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    for name, weight in original.items():
        assert torch.equal(weight, whole[name]) and torch.equal(weight, sharded[name])
    assert oct((folder / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_rows_after_the_checkpoint_go_and_a_shorter_file_is_not_filled_up(options, tmp_path):
    from rlhf_core.metrics import Record

    config = options()
    first = Record(tmp_path / "run", config, "sft", None)
    first.row({"step": 1})
    size = first.position()
    first.row({"step": 2})
    first.close()
    second = Record(tmp_path / "run", config, "sft", size)
    assert second.position() == size
    second.row({"step": 3})
    second.close()
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    other = Record(tmp_path / "elsewhere", config, "sft", size)
    other.row({"step": 3})
    other.close()
    assert (tmp_path / "elsewhere/metrics.jsonl").read_text() == '{"step": 3}\n'


def test_a_generation_config_that_transformers_would_not_save_is_kept_as_it_is(train, tiny, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    odd = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    train(pretrain=str(folder))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert {key: written[key] for key in odd} == odd


def test_an_export_leaves_alone_what_is_not_its_own(tiny, train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model_old.safetensors", "notes.txt", "model-00001-of-00002.safetensors", "adapter_config.json"):
        (out / name).write_text("old")
    train()
    assert (out / "model_old.safetensors").is_file() and (out / "notes.txt").is_file()
    assert not (out / "model-00001-of-00002.safetensors").exists() and not (out / "adapter_config.json").exists()
