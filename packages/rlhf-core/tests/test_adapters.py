"""LoRA and QLoRA train, save and reload; the merged model says the same as the adapted one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize(
    "given",
    [
        {"lora_rank": 4},
        {"lora_rank": 4, "zero_stage": 3, "gradient_checkpointing": True, "packing_samples": True},
        {"lora_rank": 4, "load_in_4bit": True},
        {"lora_rank": 4, "load_in_4bit": True, "bf16": True, "zero_stage": 0, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=str,
)
def test_an_adapter_trains_saves_reloads_and_merges(train, tiny, tmp_path, given):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if given.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    rows = train(learning_rate=1e-2, max_epochs=2, **given)
    assert rows[-1]["eval_loss"] < rows[0]["loss"] - 0.1
    folder = tmp_path / "out"
    weights = load_file(folder / "adapter_model.safetensors")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted = set(given.get("target_modules", every))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights} == wanted
    assert all(w.numel() for w in weights.values()) and any(
        w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name
    )
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)

    ids = torch.arange(5, 25)[None]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), folder).eval()
    with torch.no_grad():
        before = adapted(ids).logits
        merged = adapted.merge_and_unload().eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(before, merged, rtol=1e-4, atol=1e-4)
    assert (before - plain).abs().max() > 0.01


def test_only_the_adapter_is_trained(train, tmp_path):
    train(lora_rank=4)
    plan = json.loads((tmp_path / "out/run/plan.json").read_text())
    trained = sum(w.numel() for w in load_file(tmp_path / "out/adapter_model.safetensors").values())
    assert plan["trained_parameters"] == trained < plan["parameters"] / 4


def test_the_load_balance_of_experts_is_the_same_in_any_micro_batching(train, tiny, tmp_path):
    """A Mixtral-style model: the auxiliary loss is logged, counts, and does not depend on the division."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from rlhf_data.tokenizer import load_tokenizer

    folder = tmp_path / "mixtral"
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128, tie_word_embeddings=False,
    )).save_pretrained(folder)  # fmt: skip
    given = {"pretrain": str(folder), "aux_loss_coef": 0.5, "zero_stage": 0}
    runs = [
        train(**given, save_path=str(tmp_path / "a")),
        train(**given, micro_train_batch_size=1, save_path=str(tmp_path / "b")),
        train(**given, packing_samples=True, save_path=str(tmp_path / "c")),
    ]
    for rows in runs[1:]:
        for one, other in zip(runs[0], rows, strict=True):
            for key in {"loss", "aux_loss", "grad_norm", "eval_loss", "eval_aux_loss"} & one.keys():
                assert other[key] == pytest.approx(one[key], rel=1e-6), key
    assert 1.0 <= runs[0][0]["aux_loss"] < 4.0
    without = train(pretrain=str(folder), zero_stage=0, save_path=str(tmp_path / "d"))
    assert "aux_loss" not in without[0] and without[0]["grad_norm"] != pytest.approx(runs[0][0]["grad_norm"], rel=1e-3)
    exported = load_file(Path(tmp_path / "a/model.safetensors"))
    original = load_file(folder / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(exported[name].shape == original[name].shape for name in original)


def test_an_adapter_is_not_written_over_its_own_base(train, tiny):
    from rlhf_data.errors import InputError

    with pytest.raises(InputError, match="an adapter needs its base model"):
        train(lora_rank=4, save_path=str(tiny))
    assert (tiny / "model.safetensors").is_file()


def test_a_balance_without_gradient_is_refused(options):
    with pytest.raises(ValueError, match="gets no gradient"):
        options(aux_loss_coef=0.1, gradient_checkpointing=True, gradient_checkpointing_use_reentrant=True)
