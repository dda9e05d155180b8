"""The distillation sums equal the plain formula on full logits, and need only a chunk of them, once."""

import math

import pytest
import torch

from rlhf_losses import (
    forward_kl,
    jsd,
    linear_distillation_sum,
    linear_topk_distillation_sum,
    linear_topk_logps,
    reverse_kl,
    skew_kl,
    token_logps,
    topk_forward_kl,
)

M, H, V, TEACHER_H, TEACHER_V, SHARED = 11, 5, 23, 3, 19, 13
KINDS = {
    "forward_kl": (forward_kl, {}),
    "reverse_kl": (reverse_kl, {}),
    "jsd": (jsd, {"beta": 0.3}),
    "skew_kl": (skew_kl, {"alpha": 0.2}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
HEADS = {"softcap": 2.0, "logit_scale": 0.7}


def student_head(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(M, H), (V, H), (V,)]]


def teacher_head(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in [(M, TEACHER_H), (TEACHER_V, TEACHER_H), (TEACHER_V,)]]


def tokens(dtype=torch.float64):
    """Labels and both weights: some tokens count for one term only, some for none."""
    labels, ce_weights, kd_weights = torch.randint(V, (M,)), torch.rand(M, dtype=dtype), torch.rand(M, dtype=dtype)
    ce_weights[[1, 2, 3, 4]] = 0
    kd_weights[[3, 4, 5]] = 0
    labels[[2, 3]] = torch.tensor([-100, V + 5])
    return labels, ce_weights, kd_weights


def plain_logits(hidden, weight, bias, softcap=None, logit_scale=1.0):
    z = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_losses(z, labels):
    known = (labels >= 0) & (labels < V)
    return -token_logps(z, labels.where(known, 0)).where(known, 0)


def compare(fused, plain, inputs):
    """Of (total, D, losses): values, and gradients of the total with a factor from above."""
    for ours, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not fused[1].requires_grad and not fused[2].requires_grad
    gradients = torch.autograd.grad(fused[0] * 3.7, inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain[0] * 3.7, inputs))


def prefixed(name, head):
    return {f"{name}_{key}": value for key, value in head.items()}


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 1.7, 0.4])
@pytest.mark.parametrize("shared_vocab", [None, SHARED])
@pytest.mark.parametrize("head", [{}, HEADS])
def test_the_sum_is_that_of_full_logits(kind, temperature, shared_vocab, head):
    (h, w, b), (teacher_h, teacher_w, teacher_b), (labels, ce, kd) = student_head(), teacher_head(), tokens()
    divergence, how = KINDS[kind]
    how = {"temperature": temperature, "shared_vocab": shared_vocab, **how}
    for chunk_size in (1, 3, None):
        z, teacher_z = plain_logits(h, w, b, **head), plain_logits(teacher_h, teacher_w, teacher_b, **head)
        d, losses = divergence(z, teacher_z, **how), plain_losses(z, labels)
        plain = ((ce * losses + kd * d).sum(), d.where(kd != 0, 0), losses.where((ce != 0) | (kd != 0), 0))
        fused = linear_distillation_sum(
            h, w, teacher_h, teacher_w, labels, ce_weights=ce, kd_weights=kd, kind=kind, student_bias=b,
            teacher_bias=teacher_b, chunk_size=chunk_size, **how, **prefixed("student", head), **prefixed("teacher", head),
        )  # fmt: skip
        compare(fused, plain, (h, w, b))


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("head", [{}, HEADS])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_the_sum_over_a_stored_top_k_is_that_of_full_logits(k, temperature, head, chunk_size):
    (h, w, b), (labels, ce, kd) = student_head(), tokens()
    logps, indices = torch.randn(M, V, dtype=torch.float64).log_softmax(-1).topk(k)
    z = plain_logits(h, w, b, **head)
    d, losses = topk_forward_kl(z, logps, indices, temperature=temperature), plain_losses(z, labels)
    plain = ((ce * losses + kd * d).sum(), d.where(kd != 0, 0), losses.where((ce != 0) | (kd != 0), 0))
    unused = (kd == 0)[:, None]
    logps, indices = logps.masked_fill(unused, math.nan), indices.masked_fill(unused, -1)
    fused = linear_topk_distillation_sum(
        h, w, logps, indices, labels, ce_weights=ce, kd_weights=kd, temperature=temperature, student_bias=b,
        chunk_size=chunk_size, **prefixed("student", head),
    )  # fmt: skip
    compare(fused, plain, (h, w, b))


@pytest.mark.parametrize("vocabulary", [None, SHARED])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_the_top_k_of_a_head_is_that_of_full_logits(vocabulary, chunk_size):
    h, w, b = student_head()
    how = {"temperature": 1.7, "vocabulary": vocabulary, "chunk_size": chunk_size}
    logps, indices = linear_topk_logps(h, w, 4, bias=b, **how, **HEADS)
    expected = (plain_logits(h, w, b, **HEADS)[:, :vocabulary] / 1.7).log_softmax(-1).topk(4)
    torch.testing.assert_close(logps, expected.values.detach())
    assert torch.equal(indices, expected.indices) and indices.dtype == torch.int64
    assert not logps.requires_grad
    half, _ = linear_topk_logps(h.bfloat16(), w.bfloat16(), 4, bias=b.bfloat16(), **how, **HEADS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, logps.float(), rtol=0, atol=0.05)


def test_a_cache_of_the_whole_vocabulary_is_as_good_as_the_teacher():
    h, w, _ = student_head()
    labels, ce, kd = tokens()
    teacher_h, teacher_w = torch.randn(M, 3, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64)
    cache = linear_topk_logps(teacher_h, teacher_w, V, temperature=2.0)
    weights = {"ce_weights": ce, "kd_weights": kd, "temperature": 2.0}
    live = linear_distillation_sum(h, w, teacher_h, teacher_w, labels, **weights)
    compare(linear_topk_distillation_sum(h, w, *cache, labels, **weights), live, (h, w))


@pytest.mark.parametrize("kind", [*KINDS, "topk"])
def test_a_row_that_does_not_count_is_not_read(kind):
    (h, w, _), (teacher_h, teacher_w, _), (labels, ce, kd) = student_head(), teacher_head(), tokens()
    with torch.no_grad():
        h[(ce == 0) & (kd == 0)] = math.nan
        teacher_h[kd == 0] = math.nan
    if kind == "topk":
        cache = linear_topk_logps(teacher_h, teacher_w, 2)
        result = linear_topk_distillation_sum(h, w, *cache, labels, ce_weights=ce, kd_weights=kd)
    else:
        result = linear_distillation_sum(h, w, teacher_h, teacher_w, labels, ce_weights=ce, kd_weights=kd, kind=kind)
    result[0].backward()
    assert all(x.isfinite().all() for x in (*result, h.grad, w.grad))
    assert (h.grad[[3, 4]] == 0).all() and (h.grad[[1, 2, 5]] != 0).any(1).all()


@every_kind
@pytest.mark.parametrize("gap", [1e4, math.inf])
def test_extreme_logits_stay_finite(kind, gap):
    h, teacher_h = torch.ones(2, 1, requires_grad=True), torch.ones(2, 1)
    w = torch.tensor([[0.0], [1e4], [-1e4]], requires_grad=True)
    bias, teacher_w = torch.tensor([0.0, 0.0, -gap]), torch.tensor([[1e4], [0.0], [-1e4]])
    one = torch.ones(2)
    for cache in (False, True):
        teacher = linear_topk_logps(teacher_h, teacher_w, 2) if cache else (teacher_h, teacher_w)
        fused = linear_topk_distillation_sum if cache else linear_distillation_sum
        how = {} if cache else {"kind": kind, "teacher_bias": bias}
        result = fused(
            h, w, *teacher, torch.tensor([0, 1]), ce_weights=one, kd_weights=one, student_bias=bias, temperature=0.7, **how
        )  # fmt: skip
        gradients = torch.autograd.grad(result[0], (h, w))
        assert all(x.isfinite().all() for x in (*result, *gradients))
        assert (result[1] > 0).all()


def run_heads(h, w, labels, ce, kd):
    return linear_distillation_sum(
        h, w, 2 * h, w.detach().flip(0), labels, ce_weights=ce, kd_weights=kd, temperature=2.0, chunk_size=7
    )


def run_cache(h, w, labels, ce, kd):
    cache = linear_topk_logps(2 * h, w.flip(0), 3, chunk_size=7)
    return linear_topk_distillation_sum(h, w, *cache, labels, ce_weights=ce, kd_weights=kd, chunk_size=7)


both = pytest.mark.parametrize("run", [run_heads, run_cache])


@both
def test_no_tensor_is_as_large_as_the_logits(run, watch):
    count, vocabulary = 211, 307
    h, w = torch.randn(count, 3, requires_grad=True), torch.randn(vocabulary, 3, requires_grad=True)
    with watch:
        run(h, w, torch.randint(vocabulary, (count,)), torch.rand(count), torch.rand(count))[0].backward()
    assert 0 < watch.numel <= 7 * vocabulary
    assert h.grad.isfinite().all() and w.grad.isfinite().all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_float32_result(run, dtype):
    (h, w, _), weights = student_head(torch.float32), tokens(torch.float32)
    half = [x.detach().to(dtype).requires_grad_() for x in (h, w)]
    total, d, losses = run(*half, *weights)
    expected, expected_d, expected_losses = run(h, w, *weights)
    assert total.dtype == d.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0.1)
    torch.testing.assert_close(d, expected_d, rtol=0.05, atol=0.1)
    torch.testing.assert_close(losses, expected_losses, rtol=0.05, atol=0.1)
    gradients = torch.autograd.grad(total, half)
    for near, exact in zip(gradients, torch.autograd.grad(expected, (h, w)), strict=True):
        assert near.dtype == dtype
        assert (near.float() - exact).norm() < 0.03 * exact.norm()


@both
def test_no_token_gives_zero(run):
    h, w = torch.randn(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    total, d, losses = run(h, w, torch.randint(V, (0,)), torch.rand(0), torch.rand(0))
    total.backward()
    assert total == 0 and d.shape == losses.shape == (0,)
    assert (w.grad == 0).all()


@pytest.mark.parametrize(("needs_hidden", "needs_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_wanted_gradients_cost_a_product(needs_hidden, needs_weight, watch):
    h, w = torch.randn(M, H, requires_grad=needs_hidden), torch.randn(V, H, requires_grad=needs_weight)
    weights = {"ce_weights": torch.ones(M), "kd_weights": torch.ones(M)}
    teacher = torch.randn(M, TEACHER_H), torch.randn(TEACHER_V, TEACHER_H)
    with watch:
        total, _, _ = linear_distillation_sum(h, w, *teacher, torch.arange(M), **weights)
        if total.requires_grad:
            total.backward()
    assert watch.products == 2 + needs_hidden + needs_weight
    assert (h.grad is not None, w.grad is not None) == (needs_hidden, needs_weight)


def test_without_grad_mode_no_gradient_is_made(watch):
    h, w, _ = student_head()
    labels, ce, kd = tokens()
    with torch.no_grad(), watch:
        total, _, _ = run_heads(h[:7], w, labels[:7], ce[:7], kd[:7])
    assert watch.products == 2
    assert not total.requires_grad


def test_autocast_changes_nothing():
    (h, w, _), weights = student_head(torch.float32), tokens(torch.float32)
    expected = run_heads(h, w, *weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run_heads(h, w, *weights)
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


def test_the_weight_may_also_embed_the_tokens():
    (_, w, _), (labels, ce, kd) = student_head(), tokens()
    teacher = torch.randn(M, TEACHER_H).double(), torch.randn(V, TEACHER_H).double()
    ids = torch.randint(V, (M,))
    total, _, _ = linear_distillation_sum(w[ids].sin(), w, *teacher, labels, ce_weights=ce, kd_weights=kd)
    z = w[ids].sin() @ w.t()
    plain = (ce * plain_losses(z, labels) + kd * forward_kl(z, teacher[0] @ teacher[1].t())).sum()
    torch.testing.assert_close(torch.autograd.grad(total, w), torch.autograd.grad(plain, w))


@both
def test_the_teacher_may_be_gone_before_the_backward_pass(run):
    """What DeepSpeed ZeRO-3 does to a parameter that was gathered for the forward pass."""
    (h, w, _), weights = student_head(), tokens()
    expected = torch.autograd.grad(run(h, w, *weights)[0], (h, w))
    teacher_h, teacher_w = 2 * h.detach(), w.detach().flip(0).clone()
    if run is run_heads:
        labels, ce, kd = weights
        total, _, _ = linear_distillation_sum(
            h, w, teacher_h, teacher_w, labels, ce_weights=ce, kd_weights=kd, temperature=2.0
        )
    else:
        total, _, _ = run(h, w, *weights)
    teacher_h.fill_(math.nan)
    teacher_w.data = torch.empty(0, dtype=teacher_w.dtype)
    torch.testing.assert_close(torch.autograd.grad(total, (h, w)), expected)


@both
def test_a_second_backward_is_an_error_and_not_a_wrong_gradient(run):
    (h, w, _), weights = student_head(), tokens()
    total, _, _ = run(h, w, *weights)
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * total).backward()


def test_the_arguments_are_left_as_they_were():
    (h, w, b), (teacher_h, teacher_w, teacher_b), (labels, ce, kd) = student_head(), teacher_head(), tokens()
    cache = linear_topk_logps(teacher_h, teacher_w, 3)
    arguments = (h, w, b, teacher_h, teacher_w, teacher_b, labels, ce, kd, *cache)
    before = [x.detach().clone() for x in arguments]
    weights = {"ce_weights": ce, "kd_weights": kd, "student_bias": b}
    linear_distillation_sum(h, w, teacher_h, teacher_w, labels, teacher_bias=teacher_b, **weights)[0].backward()
    linear_topk_distillation_sum(h, w, *cache, labels, **weights)[0].backward()
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind must be"),
        ({"kind": "jsd", "beta": 0.0}, "forward_kl"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"shared_vocab": 8}, "between 1 and 7, got 8"),
        ({"teacher_hidden": torch.ones(4, 5)}, "teacher_hidden must have 3 rows"),
        ({"labels": torch.ones(2).long()}, r"labels must be constants of shape \[3\], got \[2\]"),
        ({"ce_weights": torch.ones(3, 1)}, r"ce_weights must be constants of shape \[3\], got \[3, 1\]"),
        ({"kd_weights": torch.ones(3, requires_grad=True)}, "kd_weights must be constants.*requires_grad=True"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(change, message):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels")
    heads = [torch.ones(3, 5), torch.ones(7, 5)]
    arguments = dict(zip(names, [*heads, *heads, torch.zeros(3).long()], strict=True))
    weights = {"ce_weights": torch.ones(3), "kd_weights": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        linear_distillation_sum(**arguments | weights | change)


def test_a_wrong_top_k_is_named_with_its_value():
    h, w, ones = torch.ones(3, 5), torch.ones(7, 5), torch.ones(3)
    with pytest.raises(ValueError, match="k must be between 1 and 6, the size of the vocabulary, got 7"):
        linear_topk_logps(h, w, 7, vocabulary=6)
    with pytest.raises(ValueError, match="vocabulary must be between 1 and 7, got 8"):
        linear_topk_logps(h, w, 1, vocabulary=8)
    weights = {"ce_weights": ones, "kd_weights": ones}
    with pytest.raises(ValueError, match=r"must be \[3, k\] both, got \[3, 2\] and \[3, 1\]"):
        linear_topk_distillation_sum(h, w, torch.ones(3, 2), torch.ones(3, 1).long(), ones.long(), **weights)
    with pytest.raises(ValueError, match="temperature must be positive"):
        top = linear_topk_logps(h, w, 2)
        linear_topk_distillation_sum(h, w, *top, ones.long(), **weights, temperature=0.0)
