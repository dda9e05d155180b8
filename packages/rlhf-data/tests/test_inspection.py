from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlhf_data.config import LabelledDataConfig, RewardDataConfig, SFTDataConfig
from rlhf_data.inspection import InspectConfig, inspect

PAIRS = [{"question": f"the cat {number}", "chosen": "sat", "rejected": "on", "gap": 1} for number in range(9)]
LABELLED = [{"prompt": f"the cat {number}", "response": "sat", "stars": number % 5} for number in range(9)]


@pytest.fixture
def look(tokenizer, tmp_path, monkeypatch):
    """Makes an inspection of a file, with options by group."""
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(path: str, kind: str = "sft", data: dict | None = None, **groups) -> InspectConfig:
        options = {
            "pretrain": str(tmp_path / "model"),
            "kind": kind,
            "data": {"dataset": path, **(data or {})},
            **groups,
        }
        return InspectConfig.model_validate(options)

    return make


def test_every_kind_of_rows_can_be_looked_at(write, look):
    pairs, labelled = write("a.jsonl", PAIRS), write("b.jsonl", LABELLED)
    margins = {"prompt_key": "question", "margin_loss": True, "margin_key": "gap"}
    assert "pairs: 8; " in inspect(look(pairs, "pairs", pairs=margins)).format()
    labels = {"label_key": "stars", "label_threshold": 3}
    assert "labels: " in inspect(look(labelled, "kto", labels=labels)).format()
    assert "8 samples" in inspect(look(labelled)).format()


def test_defaults_are_those_of_the_kind(look):
    pairs = look("a.jsonl", "pairs", pairs={"prompt_key": "q"}, labels={}).data_of_kind()
    assert pairs == RewardDataConfig(dataset="a.jsonl", prompt_key="q")
    assert look("a.jsonl", "kto", {"max_len": 9}).data_of_kind() == LabelledDataConfig(dataset="a.jsonl", max_len=9)
    packing = {"packing_samples": True, "packing_tokens": 4096}
    assert look("a.jsonl", "pairs", packing | {"max_len": 4000}).data_of_kind().max_len == 4000
    assert look("a.jsonl", "sft", packing).data_of_kind() == SFTDataConfig(dataset="a.jsonl")


@pytest.mark.parametrize(
    ("kind", "groups", "part"),
    [
        (
            "sft",
            {"pairs": {"prompt_key": "q"}},
            "--prompt_key is no option of --kind sft; leave it out, or give --kind pairs",
        ),
        ("sft", {"labels": {"label_threshold": 1}}, "--label_threshold is no option of --kind sft"),
        ("pairs", {"data": {"input_key": "q"}}, "--input_key is no option of --kind pairs; .* --kind sft or kto"),
        ("pairs", {"labels": {"label_key": "q"}}, "--label_key is no option of --kind pairs"),
        ("kto", {"pairs": {"chosen_key": "q"}}, "--chosen_key is no option of --kind kto"),
        ("kto", {"data": {"pretrain_mode": True}}, "--pretrain_mode is no option of --kind kto"),
    ],
)
def test_options_of_another_kind_are_refused(look, kind, groups, part):
    with pytest.raises(ValidationError, match=part):
        look("a.jsonl", kind, **groups)
