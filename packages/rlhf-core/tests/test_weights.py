"""The weights that engines and exports get: a checkpoint's names, adapters added, nothing changed; and their moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.config import LoraConfig, ModelConfig
from rlhf_core.weights import weights
from rlhf_data.errors import RunError


def policy(folder: Path, **lora: Any) -> Any:
    """A trained policy, with an adapter that is not zero if there is one."""
    from rlhf_core.models.load import load_model
    from rlhf_core.models.policy import Policy

    model = load_model(ModelConfig(pretrain=str(folder)), LoraConfig(**lora), attn_implementation=None)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return Policy(model, ragged=False)


@pytest.fixture(scope="module")
def experts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a mixture of experts, whose weights transformers fuses when it loads them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("experts")
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiny", "experts"])
def test_weights_have_the_names_and_values_of_the_files_that_they_came_from(kind, request):
    from safetensors.torch import load_file

    folder = request.getfixturevalue(kind)
    found = {name: weight.clone() for name, weight in weights(policy(folder))}
    files = load_file(folder / "model.safetensors")
    assert found.keys() == files.keys()
    assert all(torch.equal(found[name], files[name]) for name in files)


def test_a_tied_weight_comes_once_or_under_both_names(tiny):
    model = policy(tiny)
    assert "lm_head.weight" not in dict(weights(model))
    both = dict(weights(model, tied=True))
    assert both["lm_head.weight"].data_ptr() == both["model.embed_tokens.weight"].data_ptr()


def test_a_rank_that_wants_none_gets_none(tiny):
    assert list(weights(policy(tiny), wanted=False)) == []


@pytest.mark.parametrize("modules", [["all-linear"], ["q_proj", "down_proj"]])
def test_adapters_are_added_as_peft_merges_them_and_the_model_stays_as_it_is(tiny, modules):
    model = policy(tiny, lora_rank=3, lora_alpha=5, target_modules=modules)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = {name: weight.clone() for name, weight in weights(model)}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    expected = model.model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all((found[name] - expected[name]).abs().max() < 1e-6 for name in found)


def test_in_bfloat16_an_adapter_is_added_in_float32_and_rounded_once(tiny):
    model = policy(tiny, lora_rank=3)
    exact = {name: weight.clone() for name, weight in weights(model)}
    model.bfloat16()
    rounded = {name: weight.float().clone() for name, weight in weights(model)}
    for name, weight in exact.items():
        assert (rounded[name] - weight).abs().max() < 0.02 * weight.abs().max()
    name = "model.layers.1.mlp.up_proj"
    layer = model.base.get_submodule(name)
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    expected = (layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)).bfloat16()
    assert torch.equal(rounded[f"{name}.weight"], expected.float())


def test_weights_in_four_bits_are_those_that_the_model_computes_with(tiny):
    pytest.importorskip("bitsandbytes")
    model = policy(tiny, lora_rank=3, load_in_4bit=True)
    found = {name: weight.float() for name, weight in weights(model)}
    assert found.keys() == dict(weights(policy(tiny))).keys()
    layer = model.base.get_submodule("model.layers.0.self_attn.k_proj").eval()
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = layer(x) - x @ found["model.layers.0.self_attn.k_proj.weight"].T
    assert difference.abs().max() < 1e-4


def test_an_adapter_of_an_embedding_that_the_head_is_tied_to_is_refused(tiny):
    with pytest.warns(UserWarning, match="tie"):
        model = policy(tiny, lora_rank=2, target_modules=["embed_tokens"])
    with pytest.raises(RunError, match=r"embed_tokens\.weight.*--target_modules"):
        list(weights(model))


def test_the_moving_average_is_shown_and_the_weights_come_back(tiny, tmp_path):
    from rlhf_core.ema import EMA

    model = policy(tiny)
    start = {name: weight.clone() for name, weight in weights(model)}
    average = EMA(model, 0.9, is_first=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    for name, weight in weights(model, average=average):
        assert (weight - (start[name] + 0.1)).abs().max() < 1e-6
    assert all(torch.equal(weight, start[name] + 1) for name, weight in weights(model))
    average.save(tmp_path / "average.safetensors")
    other = EMA(model, 0.9, is_first=True)
    other.load(tmp_path / "average.safetensors")
    assert all(torch.equal(other.averages[name], average.averages[name]) for name in average.averages)


def test_only_the_first_rank_keeps_the_average_of_whole_weights(tiny):
    from rlhf_core.ema import EMA

    model = policy(tiny)
    average = EMA(model, 0.9, is_first=False)
    average.update()
    assert average.averages == {}
    assert dict(weights(model, average=average)).keys() == dict(weights(model)).keys()
