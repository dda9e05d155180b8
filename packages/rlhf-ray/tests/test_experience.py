"""From rewards to advantages: each estimator, what KL divergence and length cost, and what is not trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_data.options import build
from rlhf_ray.config import PPOConfig
from rlhf_ray.experience import Judged, informative, length_penalty, make_experience
from rlhf_ray.rollout import Experience, Rollout

LENGTHS = (3, 8, 1, 6, 8, 2, 5, 4)
"""Of responses to two prompts; those of 8 tokens are cut off."""
SCORES = (1.0, 0.0, 3.0, 0.0, -1.0, 2.0, 2.0, 1.0)


def options(estimator: str = "gae", **given: Any) -> PPOConfig:
    flat = {
        "pretrain": "unread", "prompt_data": "unread", "reward_pretrain": "unread.py", "rollout_batch_size": 8,
        "train_batch_size": 8, "n_samples_per_prompt": 4, "micro_train_batch_size": 4, "generate_max_len": 8,
        "advantage_estimator": estimator, "seed": 7,
    }  # fmt: skip
    return build(PPOConfig, flat | given)


def judged(scores: tuple[float, ...] = SCORES, **columns: Any) -> Judged:
    """Eight responses with random log-probs and values."""
    lengths, rng = np.array(LENGTHS), np.random.default_rng(0)
    tokens, count = int(lengths.sum()), len(lengths)
    rollout = Rollout(
        input_ids=rng.integers(0, 300, tokens + 2 * count).astype(np.int32),
        prompt_lengths=np.full(count, 2),
        response_lengths=lengths,
        truncated=lengths == 8,
        rollout_logps=rng.normal(-3, 1, tokens).astype(np.float32),
        prompts=np.arange(count) // 4,
        groups=np.arange(count) // 4,
        seeds=np.arange(count),
        versions=np.zeros(count, np.int64),
    )
    logps = rng.normal(-3, 1, tokens).astype(np.float32)
    made = {
        "logps": logps,
        "reference_logps": logps - rng.normal(0.1, 0.5, tokens).astype(np.float32),
        "values": rng.normal(0, 1, tokens).astype(np.float32),
        "after": rng.normal(0, 1, count).astype(np.float32),
    }
    return Judged(rollout, np.array(scores, np.float32), **(made | columns))


def of_responses(experience: Experience, values: Any = None) -> list[list[float]]:
    """Advantages, or others of `[M]`, of each response."""
    values = experience.advantages if values is None else values
    return [part.tolist() for part in np.split(values, experience.target_bounds[1:-1])]


def of_whole(experience: Experience) -> list[float]:
    """The advantage of each response, which all of its tokens have."""
    assert all(len(set(part)) == 1 for part in of_responses(experience))
    return [part[0] for part in of_responses(experience)]


def plain_gae(rewards: Any, values: Any, after: float, gamma: float, lambd: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of one response, step by step from its end."""
    advantages, last, following = [], 0.0, after
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        last = reward + gamma * following - value + gamma * lambd * last
        advantages.append(last)
        following = value
    advantages.reverse()
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize("truncated", ["keep", "bootstrap"])
@pytest.mark.parametrize("in_loss", [False, True])
def test_gae_is_that_of_a_plain_loop(truncated, in_loss):
    """Rewards of tokens pay for KL divergence unless the loss does; what was cut off is worth what comes after, by option."""
    given = judged()
    config = options(
        gamma=0.97, lambd=0.9, normalize_advantages=False, truncated_responses=truncated, use_kl_loss=in_loss, kl_estimator="k1"
    )  # fmt: skip
    made, _ = make_experience(given, config, 0.3)
    assert given.logps is not None and given.reference_logps is not None and given.after is not None
    price = 0.0 if in_loss else 0.3
    rewards = of_responses(made, -price * (given.logps - given.reference_logps))
    for n, (length, score) in enumerate(zip(LENGTHS, SCORES, strict=True)):
        rewards[n][-1] += score
        after = given.after[n] if truncated == "bootstrap" and length == 8 else 0.0
        advantages, returns = plain_gae(rewards[n], of_responses(made, given.values)[n], after, 0.97, 0.9)
        assert of_responses(made)[n] == pytest.approx(advantages, abs=1e-5)
        assert of_responses(made, made.returns)[n] == pytest.approx(returns, abs=1e-5)


@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
def test_how_many_responses_are_taken_through_time_at_once_changes_nothing(estimator, monkeypatch):
    config = options(estimator, gamma=0.9, truncated_responses="mask")
    whole, _ = make_experience(judged(), config, 0.3)
    monkeypatch.setattr("rlhf_ray.experience.AT_ONCE", 16)
    parts, _ = make_experience(judged(), config, 0.3)
    assert parts.advantages == pytest.approx(whole.advantages, abs=1e-6)
    assert (parts.returns is None) == (estimator == "reinforce")
    if parts.returns is not None:
        assert parts.returns == pytest.approx(whole.returns, abs=1e-6)


def test_advantages_of_gae_are_whitened_over_all_tokens_and_returns_are_not():
    raw, _ = make_experience(judged(), options(normalize_advantages=False), 0.1)
    white, figures = make_experience(judged(), options(), 0.1)
    expected = (raw.advantages - raw.advantages.mean()) / raw.advantages.std()
    assert white.advantages == pytest.approx(expected, abs=1e-5)
    assert figures["advantage_mean"] == pytest.approx(0, abs=1e-6) and figures["advantage_std"] == pytest.approx(1)
    assert raw.returns is not None and white.returns is not None
    assert white.returns.tolist() == raw.returns.tolist()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("rloo", [0, -4 / 3, 8 / 3, -4 / 3, -8 / 3, 4 / 3, 4 / 3, 0]),
        ("dr_grpo", [0, -1, 2, -1, -2, 1, 1, 0]),
        ("grpo", [0, *(np.array([-1, 2, -1, -2, 1, 1]) / 2**0.5), 0]),
        ("reinforce_baseline", [0, *(np.array([-1, 2, -1, -2, 1, 1]) / (12 / 8) ** 0.5), 0]),
    ],
)
def test_responses_to_a_prompt_are_compared(estimator, expected):
    made, figures = make_experience(judged(reference_logps=None, values=None, after=None), options(estimator), 0.1)
    assert of_whole(made) == pytest.approx(expected, abs=1e-5)
    assert made.returns is None and made.values is None and "kl" not in figures


def test_reinforce_whitens_the_returns_of_all_tokens():
    given = judged(values=None, after=None)
    made, _ = make_experience(given, options("reinforce", gamma=0.9), 0.3)
    assert given.logps is not None and given.reference_logps is not None
    rewards = of_responses(made, -0.3 * (given.logps - given.reference_logps))
    returns: list[float] = []
    for own, score in zip(rewards, SCORES, strict=True):
        own[-1] += score
        returns += [sum(0.9**k * r for k, r in enumerate(own[t:])) for t in range(len(own))]
    assert made.advantages == pytest.approx((returns - np.mean(returns)) / np.std(returns), abs=1e-5)


def test_responses_are_compared_after_they_have_paid_for_their_divergence():
    """All of a response's, as its reward is of all of it."""
    given = judged()
    assert given.logps is not None and given.reference_logps is not None
    paid = given.rollout.by_sample(given.logps - given.reference_logps)
    found = of_whole(make_experience(given, options("rloo"), 0.3)[0])
    paying = tuple(np.array(SCORES) - 0.3 * paid)
    assert found == pytest.approx(of_whole(make_experience(judged(paying), options("rloo"), 0.0)[0]), abs=1e-5)
    assert found != pytest.approx(of_whole(make_experience(given, options("rloo"), 0.0)[0]), abs=0.1)
    in_loss = make_experience(given, options("rloo", use_kl_loss=True), 0.3)
    assert of_whole(in_loss[0]) == pytest.approx(of_whole(make_experience(given, options("rloo"), 0.0)[0]), abs=1e-6)


def test_grpo_makes_nothing_of_equal_rewards_whose_divergence_differs():
    """Their deviation would be that of the divergence alone, and divided by it noise is as large as any reward."""
    given = judged((1.0,) * len(SCORES))
    assert given.logps is not None and given.reference_logps is not None
    price = 0.3 * given.rollout.by_sample(given.logps - given.reference_logps)
    _, group = np.unique(given.rollout.groups, return_inverse=True)
    means = np.bincount(group, price) / np.bincount(group)
    found = of_whole(make_experience(given, options("grpo"), 0.3)[0])
    assert found == pytest.approx(means[group] - price, abs=1e-6)
    rewarded = of_whole(make_experience(judged(), options("grpo"), 0.3)[0])
    free = of_whole(make_experience(judged(), options("grpo"), 0.0)[0])
    assert rewarded == pytest.approx(np.array(free) + found, abs=1e-5)


@pytest.mark.parametrize(
    ("estimator", "reward"), [("k1", lambda x: x), ("k2", lambda x: x**2 / 2), ("k3", lambda x: np.exp(-x) - 1 + x)]
)
def test_divergence_is_estimated_as_asked(estimator, reward):
    given = judged()
    assert given.logps is not None and given.reference_logps is not None
    expected = reward(given.logps - given.reference_logps)
    _, figures = make_experience(given, options(kl_estimator=estimator), 0.3)
    assert figures["kl"] == pytest.approx(expected.mean(), rel=1e-4)
    assert figures["kl_sequence"] == pytest.approx(expected.sum() / len(LENGTHS), rel=1e-4)
    assert figures["shaped_reward"] == pytest.approx(np.mean(SCORES) - 0.3 * expected.sum() / len(LENGTHS), rel=1e-4)


def test_the_log_probs_of_the_engine_serve_where_no_others_are_needed():
    given = judged(logps=None)
    assert given.reference_logps is not None
    _, figures = make_experience(given, options("grpo", use_kl_loss=True, kl_estimator="k1"), 0.3)
    assert figures["kl"] == pytest.approx((given.rollout.rollout_logps - given.reference_logps).mean(), rel=1e-4)
    assert "rollout_logp_gap" not in figures


def test_rewards_are_clipped_before_anything_else_and_logged_as_they_were():
    made, figures = make_experience(judged(), options("rloo", reward_clip_range=(-0.5, 1.5)), 0.0)
    assert made.scores.tolist() == [1.0, 0.0, 1.5, 0.0, -0.5, 1.5, 1.5, 1.0]
    assert (figures["reward"], figures["reward_min"], figures["reward_max"]) == (1.0, -1.0, 3.0)
    assert figures["shaped_reward"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"overlong_buffer_len": 4, "overlong_penalty": 2.0}, [0, 2, 0, 1, 2, 0, 0.5, 0]),
        ({"truncated_responses": "penalise", "overlong_penalty": 2.0}, [0, 2, 0, 0, 2, 0, 0, 0]),
        ({"overlong_buffer_len": 2, "truncated_responses": "penalise"}, [0, 1, 0, 0, 1, 0, 0, 0]),
        ({}, [0] * 8),
    ],
)
def test_long_and_truncated_responses_lose_what_was_asked_for(given, expected):
    config = options("dr_grpo", **given)
    assert length_penalty(judged().rollout, config).tolist() == expected
    made, figures = make_experience(judged(), config, 0.0)
    assert made.scores.tolist() == (np.array(SCORES) - expected).tolist()
    assert figures.get("length_penalty", 0.0) == pytest.approx(np.mean(expected))
    assert ("length_penalty" in figures) == bool(given)


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "reinforce_baseline"])
def test_what_is_masked_is_not_trained_and_does_not_disturb_whitening(estimator):
    config = options(estimator, truncated_responses="mask")
    made, figures = make_experience(judged(), config, 0.1)
    assert [all(own) for own in of_responses(made, made.mask)] == [length != 8 for length in LENGTHS]
    assert not made.advantages[~made.mask].any()
    assert figures["truncated"] == 0.25
    if estimator == "reinforce_baseline":  # whitened over responses, each of which has one advantage
        whole = np.array(of_whole(made))[np.array(LENGTHS) != 8]
        assert (whole.mean(), whole.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, rel=1e-5))
    else:
        trained = made.advantages[made.mask]
        assert (trained.mean(), trained.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, rel=1e-5))
        strange = judged((1.0, 9.0, 3.0, 0.0, -9.0, 2.0, 2.0, 1.0))
        assert make_experience(strange, config, 0.1)[0].advantages.tolist() == made.advantages.tolist()


def test_masked_responses_are_what_others_are_compared_with_all_the_same():
    masked, _ = make_experience(judged(), options("rloo", truncated_responses="mask"), 0.1)
    kept, _ = make_experience(judged(), options("rloo"), 0.1)
    assert masked.advantages[masked.mask].tolist() == kept.advantages[masked.mask].tolist()


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "reinforce_baseline", "grpo"])
def test_a_rollout_of_which_nothing_is_trained_has_no_advantages(estimator):
    rollout = judged().rollout
    cut = Rollout(**{name: getattr(rollout, name) for name in vars(rollout) if name in Rollout.__dataclass_fields__}
                  | {"truncated": np.ones(8, bool)})  # fmt: skip
    given = judged()
    whole = Judged(cut, given.scores, {}, given.logps, given.reference_logps, given.values, given.after)
    made, figures = make_experience(whole, options(estimator, truncated_responses="mask"), 0.1)
    assert not made.mask.any() and not made.advantages.any()
    assert "advantage_mean" not in figures and figures["truncated"] == 1


def test_figures_are_of_what_was_judged():
    parts = {"style": np.array([1, np.nan, 3, np.nan, 1, 1, 1, 1]), "nothing": np.full(8, np.nan)}
    given = judged((1, 1, 1, 1, 0, 2, 0, 2), parts=parts)
    _, figures = make_experience(given, options(), 0.1)
    assert given.logps is not None and given.values is not None
    gap = np.abs(given.logps - given.rollout.rollout_logps)
    expected = {
        "reward": 1.0, "reward_std": 0.5**0.5, "reward_min": 0.0, "reward_max": 2.0, "reward_style": 8 / 6,
        "groups_without_spread": 0.5, "response_length": sum(LENGTHS) / 8, "response_length_max": 8.0, "prompt_length": 2.0,
        "truncated": 0.25, "rollout_logp_gap": gap.mean(), "rollout_logp_gap_max": gap.max(), "value": given.values.mean(),
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert "reward_nothing" not in figures
    assert all(type(value) is float for value in figures.values())


def test_values_that_are_the_returns_explain_all_of_their_variance():
    config = options(lambd=1.0, init_kl_coef=0.0)
    raw, figures = make_experience(judged(reference_logps=None), config, 0.0)
    assert figures["explained_variance"] < 0.5
    _, better = make_experience(judged(reference_logps=None, values=raw.returns), config, 0.0)
    assert better["explained_variance"] == pytest.approx(1)


def test_responses_are_informative_if_their_group_has_a_spread():
    scores = np.array([1, 0, 0.5, 1, 0.5, 0.5, 1, 2], np.float32)
    groups = np.array([4, 9, 7, 4, 7, 7, 9, 3])
    assert informative(scores, groups).tolist() == [False, True, False, False, False, False, True, False]
    assert informative(scores[:0], groups[:0]).tolist() == []


def test_arrays_that_cannot_be_written_are_taken_as_they_are():
    given = judged()
    expected, _ = make_experience(given, options(), 0.1)
    for values in (given.logps, given.reference_logps, given.values, given.after, given.scores):
        assert values is not None
        values.flags.writeable = False
    assert make_experience(given, options(), 0.1)[0].advantages.tolist() == expected.advantages.tolist()
