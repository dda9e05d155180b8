"""Distillation: the student's own responses, and teachers whose vocabulary is another one or another size."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_core.fit import Position
from rlhf_core.method import Window
from rlhf_data.errors import InputError

OWN = {"on_policy_fraction": 0.5, "generate_max_len": 6}


def step_of(fit, number: int = 1, samples: int = 8) -> list[tuple[np.ndarray, int, bool]]:
    """Ids of a step's samples, where responses start, and whether these are given (and not the student's)."""
    fit.position = Position(number)
    window = fit.method.begin_step(fit.engine, Window(fit.method.train, np.arange(samples)), fit)
    found = []
    for place in range(len(window)):
        sample, given = window[place]
        assert window.lengths[place] == len(sample) and window.num_targets[place] == sample.target_mask.sum()
        found.append((sample.input_ids, int(sample.target_mask.argmax()), given))
    return found


def same(one, other) -> bool:
    return all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(one, other, strict=True))


def test_own_responses_depend_on_seed_step_and_place_only(prepared):
    fit = prepared("kd", micro_train_batch_size=1, **OWN)
    found = step_of(fit)
    for micro, layout in ((2, {}), (4, {}), (4, {"flash_attn": True}), (1, {"packing_samples": True})):
        assert same(found, step_of(prepared("kd", micro_train_batch_size=micro, **layout, **OWN)))
    assert same(found, step_of(fit)) and not same(found, step_of(fit, number=2))
    assert not same(found, step_of(prepared("kd", seed=8, eval_ratio=0, **OWN)))
    assert fit.engine.module.training


@pytest.mark.parametrize(("fraction", "samples", "own"), [(0.5, 8, 4), (0.25, 8, 2), (1.0, 5, 5), (0.1, 3, 0)])
def test_the_share_of_own_responses(prepared, fraction, samples, own):
    fit = prepared("kd", on_policy_fraction=fraction, generate_max_len=3)
    fit.position = Position(1)
    before = Window(fit.method.train, np.arange(samples))
    after = fit.method.begin_step(fit.engine, before, fit)
    if not own:
        assert after is before
        return
    replaced = [place for place in range(samples) if not after[place][1]]
    assert len(replaced) == own
    for place in range(samples):
        sample, given = after[place]
        start = int(before[place].target_mask.argmax())
        assert np.array_equal(sample.input_ids[:start], before[place].input_ids[:start])
        assert sample.target_mask[start:].all() and not sample.target_mask[:start].any()
        assert given == (place not in replaced) and (not given or sample is after[place][0])
    fit.engine.eval()
    assert fit.method.begin_step(fit.engine, before, fit) is before  # evaluations are on the data


def test_responses_end_at_the_first_eos_or_at_the_limit(prepared):
    fit = prepared("kd", **(OWN | {"generate_max_len": 12}))
    without = [(ids[:start], ids[start:]) for ids, start, given in step_of(fit) if not given]
    assert all(len(answer) == 12 for _, answer in without)
    fit.method.eos_id = int(without[0][1][3])
    for (prompt, answer), (ids, start, _) in zip(without, [s for s in step_of(fit) if not s[2]], strict=True):
        end = [*answer, fit.method.eos_id].index(fit.method.eos_id) + 1
        assert np.array_equal(ids, np.concatenate([prompt, answer[:end]])) and start == len(prompt)


def test_responses_stay_within_the_longest_sample(prepared):
    fit = prepared("kd", on_policy_fraction=1.0, max_len=30)
    assert [len(ids) for ids, _, _ in step_of(fit)] == [30] * 8 and fit.method.longest == 30


def test_a_cold_student_says_what_is_likeliest(prepared):
    """Batched, with a cache and padding on the left, against one call per token."""
    fit = prepared("kd", on_policy_temperature=1e-4, micro_train_batch_size=4, **OWN)
    base = fit.engine.module.base
    lengths = set()
    for ids, start, given in step_of(fit):
        if given:
            continue
        lengths.add(start)
        with torch.no_grad():
            logits = base(torch.from_numpy(ids).long()[None]).logits[0, start - 1 : -1]
        assert logits.argmax(-1).tolist() == ids[start:].tolist()
    assert len(lengths) > 1


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_on_own_responses_alone(train, tmp_path, stage):
    options = {"kd_coef": 1.0, "on_policy_fraction": 1.0, "generate_max_len": 6, "kd_loss": "reverse_kl"}
    rows = train("kd", zero_stage=0, **options)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "ce_loss" not in rows[0] and rows[0]["loss"] == pytest.approx(rows[0]["kd_loss"], rel=1e-6)
    assert rows[0]["on_policy_length"] == 6 and "eval_ce_loss" in rows[-1] and "eval_on_policy_length" not in rows[-1]
    if stage:
        split = train("kd", zero_stage=stage, save_path=str(tmp_path / "split"), **options)
        losses = [[row["loss"] for row in run if "loss" in row] for run in (rows, split)]
        # a divergence of 0.02 nats is a difference of log-probs of 6 nats, which float32 holds to 5e-7
        assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-6, abs=5e-7)


def test_own_responses_have_no_labels(step, prepared):
    """Their cross-entropy is not in the loss: with them, the loss is the divergence at all places and labels at some."""
    fit = prepared("kd", kd_coef=0.3, **OWN)
    fit.position = Position(1)
    found = step("kd", fit=fit, samples=8)
    given = [start for start in step_of(fit) if start[2]]
    labels = sum(len(ids) - start for ids, start, _ in given)
    targets = sum(len(ids) - start for ids, start, _ in step_of(fit))
    ce, kd = found.metrics["ce_loss"], found.metrics["kd_loss"]
    assert 0 < labels < targets and found.loss == pytest.approx(0.7 * ce * labels / targets + 0.3 * kd, rel=1e-6)


def with_padded_head(source: Path, folder: Path, size: int) -> str:
    """A copy whose embeddings and head go on behind the vocabulary, with large numbers that must not count."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[known:] = 3.0 * torch.randn(size - known, model.config.hidden_size)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("distance", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_with_a_padded_head_says_the_same(step, other, tmp_path, distance):
    padded = with_padded_head(other, tmp_path / "padded", 384)
    plain = step("kd", kd_loss=distance)
    same = step("kd", kd_loss=distance, teacher_model=padded)
    assert same.loss == pytest.approx(plain.loss, rel=1e-6)
    assert same.metrics["kd_loss"] == pytest.approx(plain.metrics["kd_loss"], rel=1e-5)


def test_a_cached_teacher_with_a_padded_head_says_the_same(step, other, tmp_path):
    padded = with_padded_head(other, tmp_path / "padded", 384)
    whole = {"cache_teacher": True, "teacher_top_k": 320, "kd_temperature": 2.0}
    plain, cached = step("kd", kd_temperature=2.0), step("kd", teacher_model=padded, **whole)
    assert cached.loss == pytest.approx(plain.loss, rel=1e-6)


def test_a_student_with_a_padded_head_writes_tokens_that_there_are(prepared, tiny, tmp_path):
    padded = with_padded_head(tiny, tmp_path / "padded", 512)
    found = step_of(prepared("kd", pretrain=padded, **OWN))
    assert all(ids.max() < 320 for ids, _, _ in found)


def test_a_teacher_of_another_vocabulary_is_refused(train, tmp_path, tiny, other):
    from rlhf_core.tiny import make_model, make_tokenizer

    foreign = make_tokenizer(["quite other words are in here, " * 9], tmp_path / "foreign", vocab_size=300)
    make_model(foreign, tmp_path / "foreign", hidden_size=32, layers=1)
    with pytest.raises(InputError, match=r"has another vocabulary .* tokens differ"):
        train("kd", teacher_model=str(tmp_path / "foreign"))
    from rlhf_data.tokenizer import load_tokenizer

    more = load_tokenizer(str(tiny))
    more.add_tokens(["<new>"])
    folder = with_padded_head(tiny, tmp_path / "more", len(more))
    more.save_pretrained(folder)
    with pytest.raises(InputError, match=r"does not know 1 tokens of .*'<new>'"):
        train("kd", pretrain=folder)
    rows = train("kd", teacher_model=folder, zero_stage=0, max_samples=8)  # the other way round it can
    assert math.isfinite(rows[0]["loss"])
