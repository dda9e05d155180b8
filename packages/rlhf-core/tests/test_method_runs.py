"""Whole runs of every method give the same numbers at every ZeRO stage, and wherever the second model is."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXACT = ("loss", "grad_norm", "eval_loss", "learning_rate", "tokens", "epoch")
UNTOLD = ("tokens_per_second",)

REFERENCES: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.1}, "kto": {"beta": 0.1}}


def assert_same_rows(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    """Losses and norms to 1e-6; so are rewards and the like, which are differences of log-probs of some 20 nats."""
    assert len(one) == len(other) == 4
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - set(UNTOLD):
            slack = 0.0 if key in EXACT else 2e-5
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=slack), (a["step"], key)


@pytest.fixture
def given(other):
    """Options of a method, its reference being another model than the one where training starts."""
    return lambda method: REFERENCES[method] | {"ref_pretrain": str(other)} if method in REFERENCES else {}


OFFLOADED = {
    "dpo": {"ref_offload": True},
    "kto": {"ref_offload": True},
    "kd": {"teacher_offload": True},
}
CACHED = {"dpo": {"precompute_ref": True}, "kd": {"cache_teacher": True, "teacher_top_k": 320}}


@pytest.mark.parametrize("method", ["rm", "dpo", "kto", "kd"])
def test_stages_accumulation_and_where_the_second_model_is_change_nothing(train, tmp_path, given, method):
    # a reward model learns these pairs so fast that rounding would show
    options = given(method) | ({"learning_rate": 2e-4} if method in ("rm", "kto") else {})
    plain = train(method, zero_stage=0, micro_train_batch_size=1, **options)
    variants = [{"zero_stage": stage} for stage in (1, 2, 3)]
    variants += [{"zero_stage": stage} | OFFLOADED[method] for stage in (0, 2, 3) if method in OFFLOADED]
    variants += [{"zero_stage": 3} | CACHED[method]] if method in CACHED else []
    for number, variant in enumerate(variants):
        other = train(method, save_path=str(tmp_path / f"run{number}"), **options, **variant)
        assert_same_rows(plain, other)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_base_without_its_adapter_is_the_reference(train, tiny, tmp_path, method):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    options = REFERENCES[method] | {"lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 1e-2}
    whole = train(method, save_path=str(tmp_path / "whole"), zero_stage=0, ref_pretrain=str(copy), **options)
    assert abs(whole[2]["reward_margin"]) > 1e-3  # the adapter has moved
    for stage in (0, 3):
        adapter_off = train(method, save_path=str(tmp_path / f"stage{stage}"), zero_stage=stage, **options)
        assert_same_rows(whole, adapter_off)


@pytest.fixture
def no_frozen_model(monkeypatch):
    """From now on, loading a reference or a teacher is an error."""
    from rlhf_core.models.loader import Models

    def arm() -> None:
        def refuse(self, frozen):
            raise AssertionError(f"the {frozen.role} was loaded")

        monkeypatch.setattr(Models, "frozen", refuse)

    return arm


def test_precomputed_references_are_the_same_and_are_computed_once(train, tmp_path, other, no_frozen_model):
    options = {"ref_pretrain": str(other), "zero_stage": 0, "data_cache_dir": str(tmp_path / "cache")}
    plain = train("dpo", **options)
    cached = train("dpo", precompute_ref=True, save_path=str(tmp_path / "b"), **options)
    assert_same_rows(plain, cached)
    no_frozen_model()
    again = train("dpo", precompute_ref=True, save_path=str(tmp_path / "c"), **options)
    assert_same_rows(cached, again)
    with pytest.raises(AssertionError, match="the reference was loaded"):
        train("dpo", save_path=str(tmp_path / "d"), **options)


def test_a_cached_teacher_is_the_same_and_is_called_once(train, tmp_path, tiny, no_frozen_model):
    from rlhf_data.tokenizer import load_tokenizer

    options = {"zero_stage": 0, "kd_temperature": 2.0, "data_cache_dir": str(tmp_path / "cache")}
    everything = {"cache_teacher": True, "teacher_top_k": len(load_tokenizer(str(tiny)))}
    plain = train("kd", **options)
    cached = train("kd", save_path=str(tmp_path / "b"), **everything, **options)
    assert_same_rows(plain, cached)
    fewer = train("kd", save_path=str(tmp_path / "c"), cache_teacher=True, teacher_top_k=4, **options)
    assert 0 < fewer[0]["kd_loss"] < cached[0]["kd_loss"]
    no_frozen_model()
    assert_same_rows(cached, train("kd", save_path=str(tmp_path / "d"), **everything, **options))
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        train("kd", save_path=str(tmp_path / "e"), **(everything | {"teacher_top_k": 5}), **options)


@pytest.mark.parametrize("method", ["rm", "dpo", "kto", "kd"])
def test_bfloat16_with_adapters_learns_too(train, tmp_path, method):
    """Half precision, packed rows, recomputed activations, weights split: finite, and the loss goes down."""
    options = {"bf16": True, "zero_stage": 3, "packing_samples": True, "gradient_checkpointing": True, "lora_rank": 4}
    own = {
        "rm": {},
        "dpo": {"beta": 0.5},
        "kto": {"beta": 0.5},
        "kd": {"on_policy_fraction": 0.25, "generate_max_len": 4},
    }
    rows = train(method, max_epochs=2, learning_rate=1e-2, **options, **own[method])
    losses = [row["loss"] for row in rows if "loss" in row]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert len(losses) == 6 and losses[-1] < losses[0]
