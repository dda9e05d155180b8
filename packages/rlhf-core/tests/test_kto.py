"""KTO's reference point: unrelated pairs over a whole step, and data that are all of one kind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf_core.methods.kto import unrelated
from rlhf_data.encode import Sample


def sample(prompt: list[int], response: list[int]) -> Sample:
    ids = np.array(prompt + response, np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt))


def split(pair: Sample) -> tuple[list[int], list[int]]:
    start = int(pair.target_mask.argmax())
    assert pair.target_mask[start:].all() and not pair.target_mask[:start].any()
    return pair.input_ids[:start].tolist(), pair.input_ids[start:].tolist()


def test_a_response_is_another_text_to_another_prompt_where_there_is_one():
    a, b, c = [1, 2], [1, 3, 4], [5]
    samples = [sample(a, [7, 9]), sample(a, [8, 9]), sample(b, [7, 9]), sample(b, [8, 8, 9]), sample(c, [7, 9])]
    found = [split(other) for other in unrelated(samples, 99) if other]
    # each with the next that differs in both: 0 skips 1 (its prompt) and 2 (its text)
    assert found == [(a, [8, 8, 9]), (a, [7, 9]), (b, [8, 9]), (b, [7, 9]), (c, [8, 9])]


def test_with_one_prompt_another_text_to_it_will_do():
    samples = [sample([1, 2], [7, 9]), sample([1, 2], [7, 9]), sample([1, 2], [8, 9])]
    assert [split(other)[1] for other in unrelated(samples, 99) if other] == [[8, 9], [8, 9], [7, 9]]


@pytest.mark.parametrize("count", [1, 3])
def test_without_another_text_there_is_no_pair(count):
    assert unrelated([sample([n + 1], [7, 9]) for n in range(count)], 99) == [None] * count


def test_random_steps_keep_the_rules():
    rng = np.random.default_rng(0)
    for _ in range(50):
        samples = []
        for _ in range(rng.integers(1, 7)):
            prompt, response = (rng.integers(low, low + 3, rng.integers(1, 4)).tolist() for low in (1, 4))
            samples.append(sample(prompt, [*response, 9][: 5 - len(prompt)]))
        parts = [split(one) for one in samples]
        for (prompt, response), other in zip(parts, unrelated(samples, 5), strict=True):
            if other is None:
                assert all(answer[: 5 - len(prompt)] == response for _, answer in parts)
                continue
            asked, answered = split(other)
            givers = [p for p, r in parts if r[: 5 - len(prompt)] == answered]
            assert len(other) <= 5 and asked == prompt and givers and answered != response
            if any(p != prompt and r[: 5 - len(prompt)] != response for p, r in parts):
                assert any(p != prompt for p in givers)


def test_the_reference_point_does_not_depend_on_micro_batches(step, other):
    options = {"ref_pretrain": str(other), "beta": 0.1}
    eight = step("kto", micro_train_batch_size=8, **options)
    assert abs(eight.metrics["kl"]) > 0.01
    for micro, layout in ((1, {}), (2, {"flash_attn": True}), (4, {"packing_samples": True})):
        found = step("kto", micro_train_batch_size=micro, **layout, **options)
        assert found.metrics["kl"] == pytest.approx(eight.metrics["kl"], rel=1e-5)


def test_weights_of_both_kinds_act(step, other):
    options = {"ref_pretrain": str(other), "beta": 0.1}
    both, good, bad = (
        step("kto", desirable_loss_weight=d, undesirable_loss_weight=u, **options).loss
        for d, u in ((1.0, 1.0), (3.0, 1.0), (1.0, 3.0))
    )
    assert both < good and both < bad
    assert (good - both) + (bad - both) == pytest.approx(2 * both, rel=1e-6)


@pytest.mark.parametrize("kind", ["desirable", "undesirable", "all equal", "one left"])
def test_data_of_one_kind_are_finite(train, tmp_path, kind):
    """No label of one kind, no unrelated response at all, or a last step (and an evaluation) of a single sample."""
    count = 9 if kind == "one left" else 8
    rows = [
        {"question": f"Say {n} ", "answer": "yes" if kind == "all equal" else f"{n} {n}",
         "label": {"desirable": True, "undesirable": False}.get(kind, n % 2 == 0)}
        for n in range(count + 1)
    ]  # fmt: skip
    path, held_out = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    held_out.write_text(json.dumps(rows[-1]) + "\n")
    found = train("kto", dataset=str(path), eval_dataset=str(held_out), eval_ratio=0, train_split="train",
                  eval_split="train", train_batch_size=4, max_epochs=2, zero_stage=0)  # fmt: skip
    assert len([row for row in found if "loss" in row]) == 2 * math.ceil(count / 4)
    assert all(math.isfinite(value) for row in found for value in row.values())
    first = found[0]
    assert (
        first["loss"] == pytest.approx(0.5, rel=1e-6) and first["grad_norm"] > 0
    )  # policy and reference are one model
    assert found[-1]["eval_kl"] == 0
    if kind in ("desirable", "undesirable"):
        other = "undesirable" if kind == "desirable" else "desirable"
        assert f"{kind}_reward" in first and f"{other}_reward" not in first and "reward_margin" not in first
        assert (first["desirable_share"], found[-2][f"{kind}_reward"] > 0) == (
            float(kind == "desirable"),
            kind == "desirable",
        )


def test_the_data_of_these_tests_have_texts_more_than_once(preferences: dict[str, Path]):
    rows = [json.loads(line) for line in preferences["labelled"].read_text().splitlines()]
    assert len({row["answer"] for row in rows}) < len(rows) and len({row["question"] for row in rows}) < len(rows)
