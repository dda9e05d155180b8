"""The same data gives the same loss and gradient, however it is laid out, divided, recomputed or sharded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf_core.batch import Batch
from rlhf_core.models.attention import ragged_implementation
from rlhf_core.models.check import check_model
from rlhf_core.models.load import load_model
from rlhf_core.models.policy import Policy
from rlhf_data.batching import plan_micro_batches
from rlhf_data.sft import prepare_sft
from rlhf_data.tokenizer import load_tokenizer

TIGHT = {"rtol": 1e-6, "atol": 1e-8}


@pytest.fixture
def samples(options, tiny):
    dataset = prepare_sft(options().data, load_tokenizer(str(tiny)), seed=7).train
    return [dataset[i] for i in range(16)]


def loss_and_gradient(
    options, samples, *, ragged: bool, micro: int = 16, budget: int | None = None, dtype=torch.float32, **given
):
    """Mean loss over all targets and its gradient, by the loop's own division into micro-batches."""
    config = options(**given)
    attention = ragged_implementation(torch.device("cpu"), torch.float32)[0] if ragged else "sdpa"
    policy = Policy(load_model(config.model, config.lora, attn_implementation=attention), ragged=ragged).to(dtype)
    policy.train()
    count = sum(int(sample.target_mask.sum()) for sample in samples)
    loss = 0.0
    import numpy as np

    (rows,) = plan_micro_batches(np.array([len(s.input_ids) for s in samples]), 1, micro, budget)
    for row in rows:
        total, _, _ = policy("cross_entropy", Batch.from_samples([samples[i] for i in row]))
        (total / count).backward()
        loss += total.item() / count
    return torch.tensor(loss), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, len(rows)


def assert_same(one, other) -> None:
    torch.testing.assert_close(one[0], other[0], **TIGHT)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            gradient / scale, other[1][name] / scale, rtol=0, atol=1e-6, msg=f"gradient of {name} differs"
        )


@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("ragged", [True, False])
def test_layout_and_micro_batches_change_nothing(options, samples, ragged, micro):
    whole = loss_and_gradient(options, samples, ragged=False)
    divided = loss_and_gradient(options, samples, ragged=ragged, micro=micro)
    assert divided[2] == 16 // micro
    assert_same(whole, divided)


def test_packing_by_budget_changes_nothing(options, samples):
    packed = loss_and_gradient(options, samples, ragged=True, budget=100)
    assert 1 < packed[2] < 16
    assert_same(loss_and_gradient(options, samples, ragged=False), packed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(options, samples, reentrant):
    plain = loss_and_gradient(options, samples, ragged=True, micro=4)
    again = loss_and_gradient(
        options,
        samples,
        ragged=True,
        micro=4,
        gradient_checkpointing=True,
        gradient_checkpointing_use_reentrant=reentrant,
    )
    assert_same(plain, again)


def test_the_chunked_head_equals_full_logits(options, samples):
    """Against the plain formula: the model's own logits, shifted, cross entropy over the trained tokens."""
    ours = loss_and_gradient(options, samples, ragged=True)
    config = options()
    model = load_model(config.model, config.lora, attn_implementation="sdpa")
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()
        labels = torch.where(torch.from_numpy(sample.target_mask), ids, -100)[1:]
        total = total + cross_entropy(
            model(ids[None], use_cache=False).logits[0, :-1], labels, ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    (total / count).backward()
    plain = (total / count).detach(), {f"model.{name}": p.grad for name, p in model.named_parameters()}
    assert_same(plain, ours)


@pytest.mark.parametrize(
    "given",
    [{"zero_stage": stage} for stage in (1, 2, 3)]
    + [
        {"zero_stage": 0, "packing_samples": True},
        {"zero_stage": 0, "micro_train_batch_size": 1},
        {"adam_offload": True},
    ],
    ids=str,
)
def test_zero_stages_packing_and_accumulation_train_the_same(train, tmp_path, given):
    """Through the whole loop: losses, gradient norms and evaluations of five optimizer steps."""
    plain = train(zero_stage=0, save_path=str(tmp_path / "plain"))
    other = train(save_path=str(tmp_path / "other"), **given)
    assert len(plain) == len(other) == 6
    for one, two in zip(plain, other, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "learning_rate", "tokens", "epoch"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-6), (one["step"], key)


def test_a_model_whose_samples_see_each_other_is_refused(options):
    from transformers import AttentionInterface, AttentionMaskInterface

    from rlhf_core.models.attention import ragged_attention

    def leaky(*args, cu_seq_lens_q=None, **kwargs):
        return ragged_attention(*args, **kwargs)

    AttentionInterface.register("leaky", leaky)
    AttentionMaskInterface.register("leaky", lambda *args, **kwargs: None)
    config = options()
    policy = Policy(load_model(config.model, config.lora, attn_implementation="leaky"), ragged=True)
    with pytest.raises(ValueError, match="see each other"):
        check_model(policy, "token_logps", 256, torch.device("cpu"), torch.float32, False)


def test_a_head_that_is_not_a_linear_map_is_refused(options):
    config = options()
    policy = Policy(load_model(config.model, config.lora, attn_implementation="sdpa"), ragged=False)
    own = policy.base.forward

    def scaled(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    policy.base.forward = scaled
    with pytest.raises(ValueError, match="head does more"):
        check_model(policy, "token_logps", 256, torch.device("cpu"), torch.float32, False)


def test_every_response_token_and_one_eos_is_trained(options, tiny, data):
    import json

    tokenizer = load_tokenizer(str(tiny))
    dataset = prepare_sft(options(eval_ratio=0).data, tokenizer, seed=7).train
    for i, line in enumerate(data.read_text().splitlines()):
        row, sample = json.loads(line), dataset[i]
        trained = sample.input_ids[sample.target_mask]
        assert tokenizer.decode(trained[:-1]) == row["answer"]
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in trained[:-1]
