"""The fused head equals the plain formula, in value and gradient, and holds only a chunk of it."""

import pytest
import torch

from rlhf_losses import entropy, linear_cross_entropy_sum, linear_divergence, linear_token_logps, token_logps

M, H, V = 17, 5, 23
HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 2.0, "logit_scale": 0.3, "temperature": 1.7},
    {"logit_scale": 0.25},
]


def make_head(dtype=torch.float64, bias=True):
    hidden = torch.randn(M, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (M,))
    labels[[3, 8]] = -100
    return hidden, weight, torch.randn(V, dtype=dtype, requires_grad=True) if bias else None, labels


def plain_logits(hidden, weight, bias, temperature=1.0, softcap=None, logit_scale=1.0):
    z = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
def test_fused_logps_are_those_of_full_logits(head, chunk_size):
    hidden, weight, bias, labels = make_head()
    logps, entropies = linear_token_logps(
        hidden, weight, labels, bias=bias, chunk_size=chunk_size, with_entropy=True, **head
    )
    z = plain_logits(hidden, weight, bias, **head)
    torch.testing.assert_close(logps, token_logps(z, labels))
    torch.testing.assert_close(entropies, entropy(z).masked_fill(labels == -100, 0))
    assert (logps[[3, 8]] == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_logps_and_entropies_pass_finite_differences(head):
    hidden, weight, bias, labels = make_head()

    def both(h, w, b):
        return linear_token_logps(h, w, labels, bias=b, chunk_size=4, with_entropy=True, **head)

    def logps_only(h, w, b):
        return linear_token_logps(h, w, labels, bias=b, chunk_size=4, **head)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(logps_only, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("head", HEADS)
def test_the_cross_entropy_sum_and_its_gradients_are_the_plain_ones(head):
    hidden, weight, bias, labels = make_head()
    weights = torch.rand(M, dtype=torch.float64)
    total, losses = linear_cross_entropy_sum(
        hidden, weight, labels, token_weights=weights, bias=bias, chunk_size=4, **head
    )
    plain = -token_logps(plain_logits(hidden, weight, bias, **head), labels)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(total, (weights * plain).sum())
    fused_grads = torch.autograd.grad(0.3 * total, (hidden, weight, bias))
    torch.testing.assert_close(fused_grads, torch.autograd.grad(0.3 * (weights * plain).sum(), (hidden, weight, bias)))


def test_both_functions_agree_in_value_and_gradient():
    hidden, weight, _, labels = make_head(torch.float32, bias=False)
    total, losses = linear_cross_entropy_sum(hidden, weight, labels)
    logps = linear_token_logps(hidden, weight, labels)
    torch.testing.assert_close(losses, -logps)
    torch.testing.assert_close(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(-logps.sum(), (hidden, weight))
    )


def test_an_ignored_row_is_not_read():
    hidden, weight, _, labels = make_head(torch.float32, bias=False)
    poisoned = hidden.detach().clone()
    poisoned[[3, 8]] = float("nan")
    poisoned.requires_grad_()
    weights = torch.ones(M)
    weights[3] = float("nan")
    for head in (hidden, poisoned):
        total, _ = linear_cross_entropy_sum(head, weight, labels, token_weights=weights)
        (total + linear_token_logps(head, weight, labels).sum()).backward()
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(poisoned.grad, hidden.grad)
    assert (poisoned.grad[[3, 8]] == 0).all()


@pytest.mark.parametrize("rows", [0, M])
def test_nothing_to_predict_gives_zero(rows):
    hidden, weight, _, _ = make_head(bias=False)
    hidden = hidden[:rows]
    labels = torch.full((rows,), -100)
    total, losses = linear_cross_entropy_sum(hidden, weight, labels)
    logps = linear_token_logps(hidden, weight, labels)
    (total + logps.sum()).backward()
    assert total == 0
    assert losses.shape == logps.shape == (rows,)
    assert (weight.grad == 0).all()


def test_weights_of_the_sum_may_be_split_over_micro_batches():
    hidden, weight, _, labels = make_head(bias=False)
    whole, _ = linear_cross_entropy_sum(hidden, weight, labels)
    first, _ = linear_cross_entropy_sum(hidden[:5], weight, labels[:5])
    second, _ = linear_cross_entropy_sum(hidden[5:], weight, labels[5:])
    torch.testing.assert_close(first + second, whole)
    torch.testing.assert_close(torch.autograd.grad(first + second, weight), torch.autograd.grad(whole, weight))


@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_extreme_logits_stay_finite(gap):
    hidden = torch.tensor([[gap], [-gap]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    labels = torch.tensor([1, 1])
    total, losses = linear_cross_entropy_sum(hidden, weight, labels)
    logps, entropies = linear_token_logps(hidden, weight, labels, with_entropy=True)
    torch.testing.assert_close(losses, torch.tensor([2 * gap, 0]))
    torch.testing.assert_close(logps, torch.tensor([-2 * gap, 0]))
    torch.testing.assert_close(entropies, torch.zeros(2))
    (total - logps.sum() + entropies.sum()).backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[4.0], [0.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[2 * gap], [-2 * gap], [0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_float32_result(dtype):
    hidden, weight, bias, labels = make_head(torch.float32)
    expected, _ = linear_cross_entropy_sum(hidden, weight, labels, bias=bias)
    half = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    total, losses = linear_cross_entropy_sum(half[0], half[1], labels, bias=half[2], chunk_size=4)
    assert total.dtype == losses.dtype == torch.float32
    grads = torch.autograd.grad(expected, (hidden, weight, bias))
    for loss in (total, -linear_token_logps(half[0], half[1], labels, bias=half[2], chunk_size=4).sum()):
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.1)
        half_grads = torch.autograd.grad(loss, half)
        assert all(grad.dtype == dtype for grad in half_grads)
        for near, exact in zip(half_grads, grads, strict=True):
            assert (near.float() - exact).norm() < 0.03 * exact.norm()


def test_autocast_changes_nothing():
    hidden, weight, _, labels = make_head(torch.float32, bias=False)
    expected, _ = linear_cross_entropy_sum(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = linear_cross_entropy_sum(hidden, weight, labels)
        logps = linear_token_logps(hidden.bfloat16(), weight, labels)
        logps.sum().backward()
    assert total == expected
    assert logps.dtype == hidden.grad.dtype == torch.float32


def run_sum(hidden, weight, labels):
    return linear_cross_entropy_sum(hidden, weight, labels, chunk_size=7)[0]


def run_logps(hidden, weight, labels):
    return sum(x.sum() for x in linear_token_logps(hidden, weight, labels, chunk_size=7, with_entropy=True))


def run_divergence(hidden, weight, labels):
    return linear_divergence(hidden, weight, 2 * hidden, weight.detach(), kind="jsd", chunk_size=7).sum()


@pytest.mark.parametrize("run", [run_sum, run_logps, run_divergence])
def test_no_tensor_is_as_large_as_the_logits(run, watch):
    tokens, width, vocabulary = 211, 3, 307
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with watch:
        run(hidden, weight, torch.randint(vocabulary, (tokens,))).backward()
    assert 0 < watch.numel <= 7 * vocabulary
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize(("needs_hidden", "needs_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_wanted_gradients_cost_a_product(needs_hidden, needs_weight, watch):
    hidden, weight = torch.randn(M, H, requires_grad=needs_hidden), torch.randn(V, H, requires_grad=needs_weight)
    with watch:
        linear_cross_entropy_sum(hidden, weight, torch.arange(M), chunk_size=M)
    assert watch.products == 1 + needs_hidden + needs_weight


def test_without_grad_mode_no_gradient_is_made(watch):
    hidden, weight, _, labels = make_head(bias=False)
    with torch.no_grad(), watch:
        total, _ = linear_cross_entropy_sum(hidden, weight, labels, chunk_size=M)
    assert watch.products == 1
    assert not total.requires_grad


def test_a_frozen_head_passes_gradients_through():
    hidden, weight, _, labels = make_head(bias=False)
    (expected,) = torch.autograd.grad(linear_token_logps(hidden, weight, labels).sum(), hidden)
    frozen = weight.detach()
    (through_logps,) = torch.autograd.grad(linear_token_logps(hidden, frozen, labels).sum(), hidden)
    (through_sum,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, frozen, labels)[0], hidden)
    torch.testing.assert_close(through_logps, expected)
    torch.testing.assert_close(through_sum, -expected)


def curved(logps, coefficients):
    """A loss of log-probs whose slope depends on them."""
    return (coefficients * (logps + 0.3 * logps.exp())).sum()


def slope_of_curved(coefficients):
    return lambda logps, places: coefficients[places] * (1 + 0.3 * logps.exp())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_predicted_slope_changes_no_gradient_and_saves_a_product(head, with_entropy, watch):
    hidden, weight, bias, labels = make_head()
    coefficients = torch.randn(M, dtype=torch.float64)

    def loss(slope):
        found = linear_token_logps(
            hidden, weight, labels, bias=bias, chunk_size=M, with_entropy=with_entropy, slope=slope, **head
        )
        return curved(found[0] if with_entropy else found, coefficients) / 7

    expected = torch.autograd.grad(loss(None), (hidden, weight, bias))
    with watch:
        found = torch.autograd.grad(loss(slope_of_curved(coefficients)), (hidden, weight, bias))
    assert watch.products == 3
    torch.testing.assert_close(found, expected)


def one_wrong(logps, places):
    return torch.where(places == 5, 1.001, 1.0).double()


def nothing(logps, places):
    return torch.zeros_like(logps)


def not_a_number(logps, places):
    return torch.full_like(logps, torch.nan)


@pytest.mark.parametrize("slope", [one_wrong, nothing, not_a_number])
def test_a_slope_that_does_not_come_true_changes_no_gradient(slope, watch):
    hidden, weight, bias, labels = make_head()

    def loss(slope):
        return 0.5 * linear_token_logps(hidden, weight, labels, bias=bias, chunk_size=M, slope=slope).sum()

    expected = torch.autograd.grad(loss(None), (hidden, weight, bias))
    with watch:
        found = torch.autograd.grad(loss(slope), (hidden, weight, bias))
    assert watch.products == 6
    torch.testing.assert_close(found, expected)


def test_an_entropy_in_the_loss_is_beyond_a_predicted_slope():
    hidden, weight, bias, labels = make_head()

    def loss(slope):
        logps, entropies = linear_token_logps(
            hidden, weight, labels, bias=bias, with_entropy=True, slope=slope, chunk_size=4
        )
        return logps.sum() + 0.1 * entropies.sum()

    expected = torch.autograd.grad(loss(None), (hidden, weight, bias))
    found = torch.autograd.grad(loss(lambda logps, _: torch.ones_like(logps)), (hidden, weight, bias))
    torch.testing.assert_close(found, expected)


def test_where_nothing_is_to_be_learned_a_predicted_slope_of_zero_gives_zero(watch):
    hidden, weight, bias, labels = make_head()
    with watch:
        logps = linear_token_logps(hidden, weight, labels, bias=bias, slope=nothing, chunk_size=M)
        (0 * logps).sum().backward()
    assert watch.products == 3
    assert (hidden.grad == 0).all() and (weight.grad == 0).all() and (bias.grad == 0).all()


def test_without_grad_mode_no_slope_is_asked_for(watch):
    hidden, weight, _, labels = make_head(bias=False)
    with torch.no_grad(), watch:
        linear_token_logps(hidden, weight, labels, chunk_size=M, slope=lambda *_: pytest.fail("it was asked for"))
    assert watch.products == 1


def test_a_second_backward_through_log_probs_of_predicted_slope_is_an_error_and_not_a_wrong_gradient():
    hidden, weight, _, labels = make_head(bias=False)
    logps = linear_token_logps(hidden, weight, labels, slope=lambda logps, _: torch.ones_like(logps))
    (2 * logps).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * logps).sum().backward()


def test_a_second_backward_through_the_sum_is_an_error_and_not_a_wrong_gradient():
    hidden, weight, _, labels = make_head(bias=False)
    total, _ = linear_cross_entropy_sum(hidden, weight, labels)
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * total).backward()


def test_a_parameter_released_after_forward_and_gathered_before_backward_gets_the_same_gradient():
    """What DeepSpeed ZeRO-3 does to a parameter."""
    hidden, weight, _, labels = make_head(bias=False)
    expected = torch.autograd.grad(linear_token_logps(hidden, weight, labels).sum(), (hidden, weight))
    parameter = torch.nn.Parameter(weight.detach().clone())
    logps = linear_token_logps(hidden, parameter, labels)
    full = parameter.data
    parameter.data = torch.empty(0, dtype=full.dtype)
    parameter.data = full.clone()
    full.fill_(float("nan"))
    torch.testing.assert_close(torch.autograd.grad(logps.sum(), (hidden, parameter)), expected)


def test_the_arguments_are_left_as_they_were():
    hidden, weight, bias, labels = make_head()
    before = [x.detach().clone() for x in (hidden, weight, bias)]
    linear_token_logps(hidden, weight, labels, bias=bias, temperature=0.5, softcap=2.0).sum().backward()
    linear_cross_entropy_sum(hidden, weight, labels, bias=bias, temperature=0.5, softcap=2.0)[0].backward()
    assert all(torch.equal(x, y) for x, y in zip((hidden, weight, bias), before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(2, 3, 5)}, r"hidden must be \[M, 5\], got \[2, 3, 5\]"),
        ({"weight": torch.ones(0)}, r"weight must be \[V, H\], got \[0\].*ZeRO-3"),
        ({"labels": torch.ones(4).long()}, r"labels must be \[3\]"),
        ({"bias": torch.ones(3)}, r"bias must be \[7\], got \[3\]"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"token_weights": torch.ones(2)}, r"token_weights must be constants of shape \[3\]"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(change, message):
    arguments = {"hidden": torch.ones(3, 5), "weight": torch.ones(7, 5), "labels": torch.zeros(3).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_sum(**arguments)
