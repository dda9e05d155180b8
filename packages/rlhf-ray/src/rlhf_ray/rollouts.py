"""From prompts to rollouts: which prompts are asked when, which answers belong together, and which are worth training on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_data.errors import RunError
from rlhf_data.sampler import Order
from rlhf_infer.engines.engine import sample_seed
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer, Engines, Request
from rlhf_ray.prompts import Prompts
from rlhf_ray.rollout import Rollout


@dataclass
class Wanted:
    """A rollout that is being written."""

    number: int
    """Of the rollout in the run."""

    first: int
    """Number of its first request."""

    asked: int = 0
    """Requests made for it."""

    waiting: set[int] = field(default_factory=set)
    """Numbers of its requests that are not answered."""

    answers: list[Answer] = field(default_factory=list)
    """Answers that nobody has taken."""


class Rollouts:
    """The prompts of a run, asked in their order, and the answers to them.

    Request k of a run asks prompt `order[k]` and is drawn with a seed made of the run's and k: so neither the number of
    engines nor their speed changes a rollout. A rollout's requests are made as soon as the weights are fresh enough for it,
    which in a run that waits for every update is when it is needed.

    Args:
        prompts: of the run.
        engines: what answers.
        config: the run's options.
        context: longest sequence of the model, in tokens.
        rollout: number of the next rollout.
        request: number of the first request that no rollout has.
        begun: numbers of the first requests of rollouts that had been asked and not trained on when a run stopped, the oldest
            first: they are asked again.
    """

    def __init__(
        self,
        prompts: Prompts,
        engines: Engines,
        config: PPOConfig,
        context: int,
        rollout: int = 0,
        request: int = 0,
        begun: Sequence[int] = (),
    ) -> None:
        self.prompts, self.engines, self.config, self.context = prompts, engines, config, context
        self.total = total_rollouts(config, len(prompts))
        self.order = Order(len(prompts), config.batch.seed)
        self.epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self.request, self.next = request, rollout
        self.left = deque(begun)
        self.wanted: deque[Wanted] = deque()  # the oldest first
        self.owners: dict[int, Wanted] = {}

    def ask(self, version: int) -> None:
        """Make the requests of every rollout that weights of this version may begin.

        Rollout r is trained on when the weights have seen r updates, so those that have seen at least r less the allowed
        staleness may write it.
        """
        size = self.config.prompts_per_rollout
        while self.next < self.total and self.next <= version + self.config.max_staleness:
            first = self.left.popleft() if self.left else self._new(size)
            wanted = Wanted(self.next, first)
            self.wanted.append(wanted)
            self.next += 1
            self._ask_for(wanted, range(first, first + size))

    @property
    def waiting(self) -> bool:
        """Whether an answer of the oldest rollout is still to be collected."""
        return bool(self.wanted[0].waiting or self.wanted[0].answers)

    def collect(self) -> list[Answer]:
        """Answers of the oldest rollout that nobody has taken; waits for the first."""
        wanted = self.wanted[0]
        while not wanted.answers:
            answers = self.engines.collect()
            assert answers, f"rollout {wanted.number} waits for answers that nobody writes"
            self.take(answers)
        answers, wanted.answers = wanted.answers, []
        return answers

    def ask_again(self, count: int) -> None:
        """Ask further prompts for the oldest rollout, in place of those whose responses are all worth the same.

        Raises:
            RunError: that has been done too often.
        """
        wanted, size = self.wanted[0], self.config.prompts_per_rollout
        if wanted.asked + count > self.config.rollout.max_filtered * size:
            raise RunError(
                f"--dynamic_filtering: rollout {wanted.number} has asked {wanted.asked} prompts, and the responses to all but "
                f"{size - count} of them had equal rewards (--max_filtered {self.config.rollout.max_filtered}): the task is too "
                "easy or too hard for the policy, or the reward hardly varies"
            )
        first = self._new(count)
        self._ask_for(wanted, range(first, first + count))

    def finish(self) -> None:
        """Leave the oldest rollout behind: it has been trained on."""
        self.wanted.popleft()

    @property
    def begun(self) -> tuple[int, ...]:
        """Numbers of the first requests of rollouts that have been asked and not trained on, see `Rollouts`."""
        return (*(wanted.first for wanted in self.wanted), *self.left)

    def take(self, answers: Sequence[Answer]) -> None:
        """Give answers to the rollouts that they belong to."""
        for answer in answers:
            wanted = self.owners.pop(answer[0])
            wanted.waiting.remove(answer[0])
            wanted.answers.append(answer)

    def prompt_of(self, request: int) -> int:
        """Number of the prompt that a request asks."""
        epoch, place = divmod(request, len(self.prompts))
        if self.epoch[0] != epoch:
            self.epoch = (epoch, self.order.epoch(epoch))
        return int(self.epoch[1][place])

    def batch(self, answers: Sequence[Answer]) -> Rollout:
        """Answers as a batch, in the order of their requests."""
        ordered = sorted(answers, key=lambda answer: answer[0])
        return batch_of(ordered, [self.prompt_of(number) for number, _ in ordered], self.prompts)

    def _new(self, count: int) -> int:
        """Number of the first of some requests that no rollout has had."""
        self.request += count
        return self.request - count

    def _ask_for(self, wanted: Wanted, numbers: range) -> None:
        wanted.asked += len(numbers)
        wanted.waiting.update(numbers)
        self.owners.update(dict.fromkeys(numbers, wanted))
        rollout, seed = self.config.rollout, self.config.batch.seed
        self.engines.submit(
            [
                make_request(
                    number,
                    self.prompts.ids(self.prompt_of(number)),
                    sample_seed(seed, number),
                    self.config,
                    self.context,
                    n=rollout.n_samples_per_prompt,
                    temperature=rollout.temperature,
                )
                for number in numbers
            ],
            turn=wanted.number,
        )


def make_request(
    number: int, prompt: np.ndarray, seed: int, config: PPOConfig, context: int, *, n: int, temperature: float
) -> Request:
    """A request for responses as long as options and context allow."""
    room = min(config.rollout.generate_max_len, context - len(prompt))
    return Request(number, prompt, seed, n, temperature, config.rollout.top_p, room)


def batch_of(answers: Sequence[Answer], prompts: Sequence[int], data: Prompts) -> Rollout:
    """Some answers as a batch.

    Args:
        answers: requests with their responses.
        prompts: number of the prompt of each request.
        data: the prompts.
    """
    pieces: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    for (_, responses), prompt in zip(answers, prompts, strict=True):
        ids = data.ids(prompt)
        for response in responses:
            pieces += [ids, response.token_ids]
            prompt_lengths.append(len(ids))
    flat = [response for _, responses in answers for response in responses]
    counts = [len(responses) for _, responses in answers]
    return Rollout(
        input_ids=np.concatenate(pieces).astype(np.int32, copy=False),
        prompt_lengths=np.array(prompt_lengths, np.int64),
        response_lengths=np.array([len(response.token_ids) for response in flat], np.int64),
        truncated=np.array([response.truncated for response in flat], np.bool_),
        rollout_logps=np.concatenate([response.logps for response in flat]).astype(np.float32, copy=False),
        prompts=np.repeat(np.array(prompts, np.int64), counts),
        groups=np.repeat(np.array([number for number, _ in answers], np.int64), counts),
        seeds=np.array([response.seed for response in flat], np.int64),
        versions=np.array([response.version for response in flat], np.int64),
    )


def total_rollouts(config: PPOConfig, prompts: int) -> int:
    """Rollouts of a run: prompts that do not fill another one are not asked."""
    whole = config.rollout.num_episodes * prompts // config.prompts_per_rollout
    return whole if config.rollout.max_rollouts is None else min(whole, config.rollout.max_rollouts)
