"""Which prompts are asked when: for which rollout, with which numbers, and after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlhf_data.errors import RunError
from rlhf_data.options import build
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer, Request, Response
from rlhf_ray.rollouts import Rollouts

PROMPTS, SIZE = 10, 3
WAITS, AHEAD = {}, {"async_rollouts": True, "max_staleness": 2}


class Texts:
    """Ten prompts of different length."""

    def __len__(self) -> int:
        return PROMPTS

    def ids(self, number: int) -> np.ndarray:
        return np.arange(number + 1, dtype=np.int32)


class Recorder:
    """Engines that remember what they are asked, and answer when they are told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int]]] = []
        self.waiting: list[Request] = []

    def submit(self, requests: Sequence[Request], turn: int = 0) -> None:
        self.asked.append((turn, [request.number for request in requests]))
        self.waiting += requests

    def collect(self) -> list[Answer]:
        requests, self.waiting = self.waiting, []
        response = Response(np.ones(1, np.int32), np.zeros(1, np.float32), False, 0, 0)
        return [(request.number, (response,) * request.n) for request in requests]


def rollouts(engines: Recorder, given: dict[str, Any], *position: Any) -> Rollouts:
    flat = {
        "pretrain": "p", "prompt_data": "d", "reward_pretrain": "r.py", "vllm_num_engines": 1, "num_episodes": 100,
        "rollout_batch_size": 2 * SIZE, "train_batch_size": 2 * SIZE, "micro_train_batch_size": 1, "micro_rollout_batch_size": 1,
        "max_filtered": 4, "dynamic_filtering": True, "advantage_estimator": "rloo", "n_samples_per_prompt": 2,
    }  # fmt: skip
    return Rollouts(Texts(), engines, build(PPOConfig, flat | given), 64, *position)  # type: ignore[arg-type]


def train(run: Rollouts, version: int, again: int = 0) -> list[int]:
    """Write a rollout, with some prompts asked again, and train on it; the numbers of its requests."""
    run.ask(version)
    numbers = []
    for count in (again, 0):
        while run.waiting:
            numbers += [number for number, _ in run.collect()]
        if count:
            run.ask_again(count)
    run.finish()
    return numbers


@pytest.mark.parametrize("given", [WAITS, AHEAD], ids=["waiting", "ahead"])
def test_every_request_is_of_one_rollout_and_comes_in_its_turn(given):
    engines = Recorder()
    run = rollouts(engines, given)
    numbers = [train(run, version, again=version % 3) for version in range(5)]
    assert [len(own) for own in numbers] == [3, 4, 5, 3, 4]
    asked = [number for _, own in engines.asked for number in own]
    assert asked == list(range(len(asked)))  # in order, none twice
    turns = {number: turn for turn, own in engines.asked for number in own}
    assert [{turns[number] for number in own} for own in numbers] == [{0}, {1}, {2}, {3}, {4}]
    ahead = 2 if given else 0
    assert run.begun == tuple(own[0] for turn, own in engines.asked if turn > 4) and len(run.begun) == ahead


@pytest.mark.parametrize("given", [WAITS, AHEAD], ids=["waiting", "ahead"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_asks_what_an_uninterrupted_one_asks(given, stop):
    whole = rollouts(Recorder(), given)
    expected = [train(whole, version, again=2 * (version % 2)) for version in range(6)]
    first = rollouts(Recorder(), given)
    found = [train(first, version, again=2 * (version % 2)) for version in range(stop)]
    second = rollouts(Recorder(), given, stop, first.request, first.begun)
    assert second.begun == first.begun
    found += [train(second, version, again=2 * (version % 2)) for version in range(stop, 6)]
    assert found == expected
    assert (second.request, second.begun) == (whole.request, whole.begun)


def test_prompts_come_in_the_order_of_their_episode():
    run = rollouts(Recorder(), WAITS)
    episodes = [[run.prompt_of(10 * episode + place) for place in range(10)] for episode in range(3)]
    assert [sorted(episode) for episode in episodes] == [list(range(10))] * 3
    assert len({tuple(episode) for episode in episodes}) == 3


def test_prompts_are_asked_again_up_to_a_limit():
    run = rollouts(Recorder(), WAITS)
    run.ask(0)
    run.ask_again(3)
    run.ask_again(6)
    with pytest.raises(RunError, match=r"rollout 0 has asked 12 prompts, .* all but 2 of them .*--max_filtered 4"):
        run.ask_again(1)
