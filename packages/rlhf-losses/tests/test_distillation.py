"""Divergences between teacher and student."""

import math
from itertools import pairwise

import pytest
import torch

from rlhf_losses import forward_kl, jsd, linear_divergence, reverse_kl, skew_kl, token_logps, topk_forward_kl

KINDS = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}
every_kind = pytest.mark.parametrize("kind", KINDS)


def plain(kind, p, q):
    """The definitions on probabilities, as in the papers."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    half, tenth = 0.5 * p + 0.5 * q, 0.1 * p + 0.9 * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.5 * kl(p, half) + 0.5 * kl(q, half),
        "skew_kl": kl(p, tenth),
    }[kind]


@every_kind
def test_a_divergence_is_its_definition(kind):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = plain(kind, (teacher / 1.7).softmax(-1), (student / 1.7).softmax(-1))
    torch.testing.assert_close(KINDS[kind](student, teacher, temperature=1.7), expected)


@every_kind
def test_equal_distributions_have_zero_divergence_and_zero_gradient(kind):
    teacher = torch.randn(5, 7, dtype=torch.float64)
    student = (teacher + 3).requires_grad_()
    divergence = KINDS[kind](student, teacher)
    divergence.sum().backward()
    torch.testing.assert_close(divergence, torch.zeros_like(divergence))
    torch.testing.assert_close(student.grad, torch.zeros_like(teacher))


@every_kind
def test_gradients_pass_finite_differences_and_leave_the_teacher_alone(kind):
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: KINDS[kind](s, teacher), (student,))
    KINDS[kind](student, teacher).sum().backward()
    assert teacher.grad is None


def test_the_gradient_of_forward_kl_is_student_minus_teacher():
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, student.softmax(-1).detach() - teacher.softmax(-1))


def test_a_certain_teacher_makes_forward_kl_the_cross_entropy():
    student, labels = torch.randn(5, 7), torch.randint(7, (5,))
    teacher = torch.full((5, 7), -math.inf).scatter(-1, labels[:, None], 0.0)
    torch.testing.assert_close(forward_kl(student, teacher), -token_logps(student, labels))


def test_the_bounds_hold_where_the_supports_do_not_meet():
    student, teacher = torch.tensor([[0.0, 1e4]]), torch.tensor([[1e4, 0.0]])
    torch.testing.assert_close(jsd(student, teacher), torch.tensor([math.log(2)]))
    torch.testing.assert_close(skew_kl(student, teacher, alpha=0.1), torch.tensor([-math.log(0.1)]))
    coin = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    torch.testing.assert_close(jsd(student, teacher, beta=0.3), torch.tensor([coin]))


def test_jsd_tends_to_the_two_kls():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    small = 1e-6
    torch.testing.assert_close(
        jsd(student, teacher, beta=small) / small, forward_kl(student, teacher), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        jsd(student, teacher, beta=1 - small) / small, reverse_kl(student, teacher), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(skew_kl(student, teacher, alpha=0), forward_kl(student, teacher))


@every_kind
@pytest.mark.parametrize("gap", [1e4, math.inf])
def test_extreme_logits_stay_finite_in_value_and_gradient(kind, gap):
    student = torch.tensor([[0.0, -1e4, 1e4], [0.0, 1.0, -gap]], requires_grad=True)
    teacher = torch.tensor([[1e4, 0.0, -1e4], [1.0, 0.0, -gap]])
    divergence = KINDS[kind](student, teacher)
    divergence.sum().backward()
    assert divergence.isfinite().all() and (divergence > 0).all()
    assert student.grad.isfinite().all()


@every_kind
def test_a_padded_vocabulary_does_not_count(kind):
    student, teacher = torch.randn(5, 11), torch.randn(5, 7)
    torch.testing.assert_close(KINDS[kind](student, teacher), KINDS[kind](student[:, :7], teacher))
    shared = KINDS[kind](student, teacher, shared_vocab=3)
    torch.testing.assert_close(shared, KINDS[kind](student[:, :3], teacher[:, :3]))


def test_the_gradient_shrinks_with_the_square_of_the_temperature():
    student, teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7).double()
    warm, hot = (
        torch.autograd.grad(forward_kl(student, teacher, temperature=t).sum(), student)[0] * t**2 for t in (50, 100)
    )
    torch.testing.assert_close(warm, hot, rtol=0.1, atol=0.02)


def test_the_top_k_of_the_whole_vocabulary_is_the_full_forward_kl():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    logps, indices = teacher.log_softmax(-1).topk(7)
    torch.testing.assert_close(topk_forward_kl(student, logps, indices), forward_kl(student, teacher))


def test_a_smaller_top_k_sees_less_divergence_and_none_where_there_is_none():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    seen = [topk_forward_kl(student, *teacher.log_softmax(-1).topk(k)) for k in range(1, 8)]
    assert all((less <= more + 1e-12).all() for less, more in pairwise(seen))
    same = topk_forward_kl(teacher, *teacher.log_softmax(-1).topk(3))
    torch.testing.assert_close(same, torch.zeros_like(same))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_is_differentiable_and_finite_for_certain_students(k):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    logps, indices = teacher.log_softmax(-1).topk(k)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: topk_forward_kl(s, logps, indices), (student,))
    certain = (1e4 * student.detach()).float().requires_grad_()
    divergence = topk_forward_kl(certain, logps, indices)
    divergence.sum().backward()
    assert divergence.isfinite().all() and certain.grad.isfinite().all()


def heads():
    """Student and teacher of different widths and vocabularies, with biases."""
    student = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in [(11, 5), (23, 5), (23,)]]
    teacher = [torch.randn(n, dtype=torch.float64) for n in [(11, 3), (19, 3), (19,)]]
    return student, teacher


@every_kind
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_the_linear_divergence_is_the_divergence_of_full_logits(kind, chunk_size):
    (h, w, b), (teacher_h, teacher_w, teacher_b) = heads()
    mask = torch.rand(11) > 0.3
    teacher_h[~mask] = math.nan

    def fused(h, w, b):
        return linear_divergence(
            h, w, teacher_h, teacher_w, kind=kind, mask=mask, student_bias=b, teacher_bias=teacher_b,
            temperature=1.3, student_softcap=2.0, teacher_logit_scale=0.5, chunk_size=chunk_size,
        )  # fmt: skip

    student_z = 2 * torch.tanh((h @ w.t() + b) / 2)
    teacher_z = 0.5 * (teacher_h @ teacher_w.t() + teacher_b)
    expected = torch.where(mask, KINDS[kind](student_z, teacher_z, temperature=1.3), 0)
    torch.testing.assert_close(fused(h, w, b), expected)
    assert torch.autograd.gradcheck(fused, (h, w, b), fast_mode=True)
    assert (torch.autograd.grad(fused(h, w, b).sum(), h)[0][~mask] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind must be"),
        ({"kind": "jsd", "beta": 1.0}, "reverse_kl"),
        ({"kind": "skew_kl", "alpha": 1.0}, "alpha"),
        ({"shared_vocab": 8}, "between 1 and 7, got 8"),
        ({"shared_vocab": 0}, "between 1 and 7, got 0"),
        ({"teacher_hidden": torch.ones(4, 5)}, "teacher_hidden must have 3 rows"),
        ({"mask": torch.ones(3)}, "mask must be boolean"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(change, message):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    arguments = dict(zip(names, [torch.ones(3, 5), torch.ones(7, 5)] * 2, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        linear_divergence(**arguments)
