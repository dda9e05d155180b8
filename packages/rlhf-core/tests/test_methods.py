"""The loss and the gradient of every method: the plain formula's, however a step is laid out and divided.

Models are in float64, so that what is left is no rounding: gradients of preferences are differences of large sums. Whole
runs, in float32, are in `test_method_runs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf_core.batch import Batch
from rlhf_core.methods.terms import pair_groups

TIGHT = {"rel": 1e-6, "abs": 1e-8}

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.2},
    "ipo": {"loss_type": "ipo"},
    "ipo_avg": {"loss_type": "ipo_avg", "beta": 0.5},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.02},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
    "orpo": {"loss_type": "orpo"},
    "nll": {"nll_loss_coef": 0.5},
}
DISTANCES: dict[str, dict[str, Any]] = {
    "forward_kl": {"kd_temperature": 2.0},
    "reverse_kl": {"kd_loss": "reverse_kl"},
    "jsd": {"kd_loss": "jsd", "kd_beta": 0.3},
    "skew_kl": {"kd_loss": "skew_kl", "kd_alpha": 0.2},
}


@pytest.fixture
def prepared(prepared):
    return lambda *args, **given: prepared(*args, **({"dtype": torch.float64} | given))


@pytest.fixture
def given(other) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """The method of a case and its options; references are other models, so that no margin is 0."""

    def of(case: str) -> tuple[str, dict[str, Any]]:
        if case in ("simpo", "orpo"):
            return "dpo", LOSSES[case]
        if case in LOSSES:
            return "dpo", LOSSES[case] | {"ref_pretrain": str(other)}
        if case in DISTANCES:
            return "kd", DISTANCES[case]
        extra = {"margin": {"margin_loss": True, "loss": "logexp"}, "kto": {"ref_pretrain": str(other), "beta": 0.1}}
        return {"margin": "rm", "topk": "kd"}.get(case, case), extra.get(case, {})

    return of


CASES = ["rm", "margin", *LOSSES, "kto", *DISTANCES]
METHODS = ["rm", "dpo", "kto", "forward_kl"]


def assert_same(one, other, **tolerance) -> None:
    assert one.loss == pytest.approx(other.loss, **TIGHT)
    assert one.metrics.keys() == other.metrics.keys()
    for name in one.metrics:
        assert other.metrics[name] == pytest.approx(one.metrics[name], **(TIGHT | tolerance)), name
    assert_same_gradient(one.gradient, other.gradient)


def assert_same_gradient(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            gradient / scale, other[name] / scale, rtol=0, atol=1e-6, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_and_layout_change_nothing(step, given, case):
    method, options = given(case)
    whole = step(method, micro_train_batch_size=16, **options)
    assert whole.micro_batches == 1 and whole.loss
    for micro, layout in ((1, {}), (2, {"flash_attn": True}), (8, {})):
        divided = step(method, micro_train_batch_size=micro, **layout, **options)
        assert divided.micro_batches == 16 // micro
        assert_same(whole, divided)


@pytest.mark.parametrize("case", METHODS)
def test_packing_by_budget_changes_nothing(step, given, case):
    method, options = given(case)
    packed = step(method, packing_samples=True, packing_tokens=200, **options)
    assert 1 < packed.micro_batches < 16
    assert_same(step(method, micro_train_batch_size=16, **options), packed)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_gradient_checkpointing_changes_nothing(step, given, case, reentrant):
    method, options = given(case)
    plain = step(method, **options)
    recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_use_reentrant": reentrant}
    assert_same(plain, step(method, flash_attn=True, **recomputed, **options))


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models of other kinds, with the tokenizer of `tiny`."""
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    from rlhf_core.tiny import make_model
    from rlhf_data.tokenizer import load_tokenizer

    tokenizer, folders = load_tokenizer(str(tiny)), {}
    for kind in ("llama", "grouped", "window", "experts"):
        folders[kind] = str(folder := tmp_path_factory.mktemp(kind))
        tokenizer.save_pretrained(folder)
        sizes = {
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
        }  # fmt: skip
        torch.manual_seed(2)
        if kind == "window":
            MistralForCausalLM(MistralConfig(**sizes, sliding_window=7)).save_pretrained(folder)
        elif kind == "experts":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            MixtralForCausalLM(MixtralConfig(**sizes, **experts)).save_pretrained(folder)
        else:
            make_model(tokenizer, folder, hidden_size=64, max_len=128, num_key_value_heads=2 if kind == "llama" else 1)
    return folders


@pytest.mark.parametrize("kind", ["llama", "grouped", "window"])
@pytest.mark.parametrize("case", ["rm", "dpo", "kto"])
def test_prompts_that_are_computed_once_change_nothing(step, given, prepared, models, case, kind):
    """For KTO it is the reference model that sees a prompt with two responses."""
    method, options = given(case)
    trained = "ref_pretrain" if method == "kto" else "pretrain"
    options = options | {trained: models[kind], "micro_train_batch_size": 8}
    off = step(method, **options)
    shared = [{"flash_attn": True}, {"packing_samples": True, "packing_tokens": 192}]
    for layout in shared:
        fit = prepared(method, **options, **layout)
        assert fit.method.share_prefix
        if method != "kto":
            own = prepared(method, **options, **layout, share_prefix=False).method
            assert fit.method.train.lengths.sum() < 0.8 * own.train.lengths.sum()
            batch = fit.method.collate([fit.method.train[i] for i in range(4)])
            assert batch.prefixes is not None and batch.input_ids.numel() == fit.method.train.lengths[:4].sum()
            assert own.collate([own.train[i] for i in range(4)]).prefixes is None
        assert_same(off, step(method, fit=fit))


@pytest.mark.parametrize("shared", [(0, 0, 0, 0), (0, None, 0, None), (1, 2, None, 0)], ids=str)
def test_pairs_may_share_all_a_part_or_nothing_of_their_prompts(prepared, shared):
    fit = prepared("dpo", flash_attn=True)
    pairs = [fit.method.train[i] for i in range(4)]
    mixed = [replace(p, shared=p.shared if n is None else n) for p, n in zip(pairs, shared, strict=True)]
    found = []
    for laid in ([replace(pair, shared=0) for pair in pairs], mixed):
        fit.engine.module.zero_grad()
        logps = fit.engine("token_logps", Batch.from_groups(pair_groups(laid)))[0]
        (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum().backward()
        found.append((logps.detach(), {n: p.grad for n, p in fit.engine.module.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert_same_gradient(found[0][1], found[1][1])


def test_a_reward_model_takes_texts_that_have_no_prompt_in_common(step, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(
        f'{{"chosen": "red {"cat " * (i % 4)}sun", "rejected": "blue {"dog " * (i % 3)}{i}"}}\n' for i in range(20)
    ))  # fmt: skip
    off = step("rm", dataset=str(path), micro_train_batch_size=1)
    assert_same(off, step("rm", dataset=str(path), flash_attn=True))


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("case", [*CASES, "topk"])
def test_a_micro_batch_of_nothing_gives_nothing(prepared, given, case, ragged):
    """What a rank computes when the others have one micro-batch more: zero, exactly."""
    from rlhf_core.method import Window

    method, options = given(case)
    options |= {"cache_teacher": True} if case == "topk" else {}
    fit = prepared(method, flash_attn=ragged, **options)
    window = fit.method.begin_step(fit.engine, Window(fit.method.train, np.arange(2)), fit)
    loss, sums = fit.method.loss(fit.engine, fit.method.collate([window[0]]).without_targets())
    assert loss.requires_grad and loss.item() == 0
    assert not any(torch.as_tensor(x).detach().item() for entry in sums.values() for x in entry)
    loss.backward()
    for name, parameter in fit.engine.module.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("case", ["rm", "dpo", "kto", "forward_kl"])
def test_the_balance_of_experts_is_the_same_in_any_micro_batching(step, given, models, case):
    method, options = given(case)
    options = {"pretrain": models["experts"], "aux_loss_coef": 0.5} | options
    whole = step(method, micro_train_batch_size=16, **options)
    assert 1 <= whole.metrics["aux_loss"] < 4
    for micro, layout in ((1, {}), (2, {"flash_attn": True}), (8, {})):
        assert_same(whole, step(method, micro_train_batch_size=micro, **layout, **options))
    without = step(method, micro_train_batch_size=16, **(options | {"aux_loss_coef": 0.0}))
    assert whole.loss == pytest.approx(without.loss + 0.5 * whole.metrics["aux_loss"], rel=1e-6)
    routers = [name for name in whole.gradient if "gate.weight" in name]
    assert routers and not any(torch.allclose(whole.gradient[n], without.gradient[n], rtol=1e-3) for n in routers)


def plain_logps(model: Any, ids: np.ndarray, start: int) -> Tensor:
    """Log-probs of the tokens from `start` on, by the model's own logits, `[L - start]`."""
    tokens = torch.from_numpy(ids).long()
    logits = model(tokens[None], use_cache=False).logits[0]
    return logits.log_softmax(-1)[start - 1 : -1].gather(1, tokens[start:, None])[:, 0]


def start_of(sample: Any, eos: int) -> int:
    """Where the response starts; it must be all that is trained, up to the one EOS at the end."""
    start = int(sample.target_mask.argmax())
    assert start > 1 and sample.target_mask[start:].all() and list(sample.input_ids).index(eos) == len(sample) - 1
    return start


def plain_rm(fit: Any, pairs: list[Any]) -> Tensor:
    base, total = fit.engine.module.base, 0.0
    for pair in pairs:
        better, worse = (
            base(torch.from_numpy(side.input_ids).long()[None]).logits[0, 0] for side in (pair.chosen, pair.rejected)
        )
        total = total + softplus(worse - better + (pair.margin if fit.config.data.margin_loss else 0.0))
    return total / len(pairs)


def plain_dpo(fit: Any, pairs: list[Any]) -> Tensor:
    o, base, reference = fit.config.preference, fit.engine.module.base, fit.method.frozen_model
    beta = 0.1 if o.beta is None else o.beta
    total = 0.0
    for pair in pairs:
        sides = [(side.input_ids, start_of(side, fit.tokenizer.eos_token_id)) for side in (pair.chosen, pair.rejected)]
        c, r = (plain_logps(base, *side) for side in sides)
        m = c.sum() - r.sum()
        if reference is not None:
            with torch.no_grad():
                rc, rr = (plain_logps(reference.base, *side) for side in sides)
            m = m - (rc.sum() - rr.sum())
        odds = [x.mean() - torch.log(1 - x.mean().exp()) for x in (c, r)]
        total = (
            total
            + {
                "dpo": lambda m=m: (
                    -(1 - o.label_smoothing) * logsigmoid(beta * m) - o.label_smoothing * logsigmoid(-beta * m)
                ),
                "robust": lambda m=m: (-(0.9 * logsigmoid(beta * m)) + 0.1 * logsigmoid(-beta * m)) / 0.8,
                "ipo": lambda m=m: (m - 1 / (2 * beta)) ** 2,
                "ipo_avg": lambda c=c, r=r, rc=0 if reference is None else rc, rr=0 if reference is None else rr: (
                    ((c - rc).mean() - (r - rr).mean() - 1 / (2 * beta)) ** 2
                ),
                "hinge": lambda m=m: (1 - beta * m).clamp(min=0),
                "simpo": lambda c=c, r=r: -logsigmoid(beta * (c.mean() - r.mean()) - 0.5),
                "orpo": lambda c=c, odds=odds: -c.mean() - beta * logsigmoid(odds[0] - odds[1]),
            }[o.kind]()
            - o.nll_loss_coef * c.mean()
        )
    return total / len(pairs)


def plain_kto(fit: Any, examples: list[Any]) -> Tensor:
    o, base, reference = fit.config.kto, fit.engine.module.base, fit.method.frozen_model.base
    starts = [start_of(example.sample, fit.tokenizer.eos_token_id) for example in examples]
    prompts = [list(e.sample.input_ids[:s]) for e, s in zip(examples, starts, strict=True)]
    answers = [list(e.sample.input_ids[s:]) for e, s in zip(examples, starts, strict=True)]
    count, drift = len(examples), 0.0
    for i in range(count):
        after = [(i + n) % count for n in range(1, count)]
        j = next(j for j in after if prompts[j] != prompts[i] and answers[j] != answers[i])
        mixed = np.array(prompts[i] + answers[j])
        with torch.no_grad():
            drift += sum(sign * plain_logps(m, mixed, starts[i]).sum() for sign, m in ((1, base), (-1, reference)))
    z = max(float(drift) / count, 0.0)
    total = 0.0
    for example, start in zip(examples, starts, strict=True):
        with torch.no_grad():
            before = plain_logps(reference, example.sample.input_ids, start).sum()
        gain = plain_logps(base, example.sample.input_ids, start).sum() - before - z
        weight = o.desirable_loss_weight if example.label else o.undesirable_loss_weight
        total = total + weight * (1 - torch.sigmoid(o.beta * (gain if example.label else -gain)))
    return total / count


def plain_kd(fit: Any, samples: list[Any]) -> Tensor:
    o, base, teacher = fit.config.distillation, fit.engine.module.base, fit.method.frozen_model.base
    total, count, t = 0.0, 0, o.kd_temperature
    for sample in samples:
        start, ids = start_of(sample, fit.tokenizer.eos_token_id), torch.from_numpy(sample.input_ids).long()[None]
        with torch.no_grad():
            p = (teacher(ids).logits[0, start - 1 : -1] / t).softmax(-1)
        q = (base(ids, use_cache=False).logits[0, start - 1 : -1] / t).softmax(-1)
        b, a = o.kd_beta or 0.5, o.kd_alpha or 0.1
        mixture, skewed = b * p + (1 - b) * q, a * p + (1 - a) * q
        divergence = {
            "forward_kl": p * (p / q).log(),
            "reverse_kl": q * (q / p).log(),
            "jsd": b * p * (p / mixture).log() + (1 - b) * q * (q / mixture).log(),
            "skew_kl": p * (p / skewed).log(),
        }[o.kd_loss]
        nll = -plain_logps(base, sample.input_ids, start).sum()
        total = total + (1 - o.kd_coef) * nll + o.kd_coef * t**2 * divergence.sum()
        count += len(sample) - start
    return total / count


PLAIN = {"rm": plain_rm, "dpo": plain_dpo, "kto": plain_kto, "kd": plain_kd}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_plain_formula(step, prepared, given, case):
    method, options = given(case)
    fit = prepared(method, **options)
    ours = step(method, fit=fit, samples=8)
    module = fit.engine.module
    module.zero_grad()
    loss = PLAIN[method](fit, [fit.method.train[i] for i in range(8)])
    loss.backward()
    assert ours.loss == pytest.approx(loss.item(), **TIGHT)
    assert_same_gradient({name: p.grad for name, p in module.named_parameters() if p.grad is not None}, ours.gradient)


@pytest.mark.parametrize("verb", ["token_logps", "rewards"])
def test_a_model_that_does_not_see_shared_prefixes_is_refused(options, verb):
    from transformers import AttentionInterface, AttentionMaskInterface

    from rlhf_core.models.attention import RAGGED, ragged_attention
    from rlhf_core.models.check import check_model
    from rlhf_core.models.load import load_model
    from rlhf_core.models.policy import Policy
    from rlhf_core.models.reward import RewardHead, RewardModel

    def blind(*args, prefixes=None, key_places=None, **kwargs):
        return ragged_attention(*args, **kwargs)

    AttentionInterface.register("blind", blind)
    AttentionMaskInterface.register("blind", lambda *args, **kwargs: None)
    config, head = options("dpo"), RewardHead(None) if verb == "rewards" else None
    kind = RewardModel if head else Policy
    for attention in (RAGGED, "blind"):
        loaded = load_model(config.model, config.lora, attn_implementation=attention, head=head)
        model = kind(loaded, ragged=True).eval()
        check_model(model, verb, 256, torch.device("cpu"), torch.float32, False)
        if attention == RAGGED:
            check_model(model, verb, 256, torch.device("cpu"), torch.float32, True)
            continue
        with pytest.raises(ValueError, match="does not see the prefix"):
            check_model(model, verb, 256, torch.device("cpu"), torch.float32, True)
