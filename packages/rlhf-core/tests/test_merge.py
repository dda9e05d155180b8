"""`rlhf merge`: an adapter and its base become one model that answers as the two did, reward models too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_core.config import MergeConfig
from rlhf_core.merge import merge
from rlhf_core.methods import rm
from rlhf_data.errors import InputError, RunError

IDS = torch.arange(5, 25)[None]


def merged(adapter: Path, folder: Path, **given) -> Path:
    merge(MergeConfig(adapter=str(adapter), save_path=str(folder), **given))
    return folder


@pytest.fixture
def adapter(train, tmp_path) -> Path:
    train(lora_rank=4, learning_rate=1e-2, save_path=str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def reward_adapter(options, folder: Path, **given) -> Path:
    rm.train(options("rm", lora_rank=4, learning_rate=1e-2, save_path=str(folder), **given))
    return folder


def test_a_merged_language_model_answers_as_base_and_adapter(adapter, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(merged(adapter, tmp_path / "whole"), dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(IDS).logits
        apart = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
        torch.testing.assert_close(whole(IDS).logits, apart, rtol=1e-4, atol=1e-4)
    assert (apart - plain).abs().max() > 0.01
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == whole.config.vocab_size


@pytest.mark.parametrize(
    "given", [{}, {"zero_stage": 3, "flash_attn": True}, {"load_in_4bit": True, "zero_stage": 0}], ids=str
)
def test_a_reward_models_adapter_holds_its_head_and_merges(options, tiny, tmp_path, given):
    """The head is trained and saved with the adapter; the merged model gives the same rewards, and keeps the calibration."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if given.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    adapter = reward_adapter(options, tmp_path / "adapter", **given)
    (head,) = [w for name, w in load_file(adapter / "adapter_model.safetensors").items() if ".score." in name]
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny, num_labels=1, dtype=torch.float32, pad_token_id=None
    )
    with torch.no_grad():
        apart = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    folder = merged(adapter, tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.score.weight, head) and whole.config.num_labels == 1
    calibration = json.loads((adapter / "calibration.json").read_text())
    assert whole.config.mean == calibration["mean"] and whole.config.std == calibration["std"] > 0
    assert whole.config.calibration["responses"] > 0


def test_a_merged_model_has_the_number_format_asked_for(adapter, tmp_path):
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(merged(adapter, tmp_path / "a")).dtype == torch.float32
    assert AutoConfig.from_pretrained(merged(adapter, tmp_path / "b", bf16=True)).dtype == torch.bfloat16


def test_another_base_can_be_named(adapter, tiny, tmp_path):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(InputError, match=r"the base model of --adapter .*gone: there is no such folder"):
        merged(adapter, tmp_path / "whole")
    assert (merged(adapter, tmp_path / "whole", pretrain=str(moved)) / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_neither_adapter_nor_base_is_written_over(adapter, tiny, where):
    with pytest.raises(InputError, match="save the merged model elsewhere"):
        merged(adapter, adapter if where == "adapter" else tiny)


def test_a_sum_that_answers_differently_is_not_written(adapter, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    plain = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 2 * plain(self, name))
    with pytest.raises(RunError, match="nothing was written"):
        merged(adapter, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_folders_that_are_no_adapter_are_refused(adapter, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, why in ((tiny, "is a whole model already"), (tmp_path / "empty", "has no adapter_config.json")):
        with pytest.raises(InputError, match=why):
            merged(folder, tmp_path / "whole")
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no adapter_model\.safetensors"):
        merged(adapter, tmp_path / "whole")
    save_file({name: w[:, :-1].contiguous() for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit its base model"):
        merged(adapter, tmp_path / "whole")


def test_a_language_model_is_no_reward_model(tiny):
    """At inference a missing head is an error, never a random one."""
    from rlhf_core.config import ModelConfig
    from rlhf_core.models.load import load_reward_model

    with pytest.raises(InputError, match=r"--reward_pretrain .* has no reward head"):
        load_reward_model(ModelConfig(pretrain=str(tiny)))


def test_normalising_needs_a_calibration(tiny):
    from transformers import AutoConfig

    from rlhf_core.models.reward import Calibration

    with pytest.raises(InputError, match="--normalize_reward"):
        Calibration.of(AutoConfig.from_pretrained(tiny), str(tiny))
    calibration = Calibration(2.0, 4.0, 10, "data")
    config = AutoConfig.from_pretrained(tiny)
    calibration.write(config)
    assert Calibration.of(config, "x") == calibration
    assert calibration.normalise(torch.tensor([2.0, 6.0])).tolist() == [0.0, 1.0]
