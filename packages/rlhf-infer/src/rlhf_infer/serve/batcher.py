"""Batching across requests: samples of whatever requests are waiting are scored together by one thread.

All state belongs to the event loop, which never computes. The thread owns the scorer: it gets a batch, encodes and scores
it, and gives the outcome back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from rlhf_infer.rewards.scorer import Answer
from rlhf_infer.serve.judge import Judge, RefusedError
from rlhf_infer.serve.metrics import Metrics
from rlhf_infer.serve.protocol import Question

log = logging.getLogger("rlhf_infer.serve")

FAILURES = 3
"""Calls of the scorer that must fail one after the other until the server says that it is not healthy."""


class OverloadedError(Exception):
    """There is no room for more waiting samples."""


class ClosingError(Exception):
    """The server is shutting down."""


class ScorerError(Exception):
    """The scorer failed on a request's samples; the message is the cause, in short."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a request is answered with."""

    rewards: list[float]
    truncated: list[int]


@dataclass(eq=False)
class Ticket:
    """A request that waits for its rewards."""

    questions: Sequence[Question]
    answered: asyncio.Future[Scores]
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    """Samples that were given to the thread."""
    answers: list[Answer] | None = None
    """The samples as the scorer wants them, once the thread has read them."""
    rewards: list[float] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.questions) - self.taken

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.answered.done()

    def fail(self, error: Exception) -> None:
        if not self.gone:
            self.answered.set_exception(error)
            self.answered.exception()  # whoever waited may be cancelled before reading it

    def add(self, rewards: Sequence[float]) -> None:
        """Rewards of the next samples."""
        self.rewards += rewards
        if len(self.rewards) == len(self.questions) and not self.gone:
            cut = [i for i, answer in enumerate(self.answers or ()) if answer.sample and answer.sample.truncated]
            self.answered.set_result(Scores(self.rewards, cut))


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples of a request, in one batch."""

    ticket: Ticket
    start: int
    stop: int

    @property
    def answers(self) -> list[Answer]:
        return (self.ticket.answers or [])[self.start : self.stop]


Outcome = list[float] | Exception
"""Rewards of a part, or why it has none."""


class Batcher:
    """Scores the samples of concurrent requests in common batches, in the order in which they came.

    Args:
        judge: reads and scores; only the thread touches it.
        batch_size: most samples in a call of the scorer.
        max_waiting: most samples that may wait.
        metrics: where to count.
    """

    def __init__(self, judge: Judge, *, batch_size: int, max_waiting: int, metrics: Metrics) -> None:
        self.judge, self.batch_size, self.max_waiting, self.metrics = judge, batch_size, max_waiting, metrics
        self.waiting = 0
        """Samples that no batch has taken yet."""
        self._tickets: deque[Ticket] = deque()
        self._news = asyncio.Event()
        self._failures = 0
        self._closing = False
        self._batches: SimpleQueue[tuple[list[Part], asyncio.Future[list[Outcome]]] | None] = SimpleQueue()
        # A daemon: a user's function that never returns must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)
        metrics.watch_waiting(lambda: self.waiting)

    def start(self) -> None:
        """Begin to take batches. Called once, in the event loop."""
        self._thread.start()
        self._dispatcher = asyncio.create_task(self._dispatch())

    @property
    def busy(self) -> bool:
        """Whether the thread runs, as it does after `stop` if the scorer has not come back."""
        return self._thread.is_alive()

    @property
    def trouble(self) -> str | None:
        """Why nothing can be scored, if so."""
        if self._closing:
            return "the server is shutting down"
        if not self.busy or self._dispatcher.done():
            return "the scorer's thread has ended"
        if self._failures >= FAILURES:
            return f"the scorer failed {self._failures} times in a row"
        return None

    async def submit(self, questions: Sequence[Question]) -> Scores:
        """Rewards of some samples, in their order. When the caller is cancelled, what still waits is dropped.

        Raises:
            OverloadedError: too many samples are waiting.
            ClosingError: the server is shutting down.
            RefusedError: samples cannot be scored.
            ScorerError: the scorer failed.
        """
        if self._closing:
            raise ClosingError
        if self.waiting + len(questions) > self.max_waiting:
            raise OverloadedError
        if not questions:
            return Scores([], [])
        ticket = Ticket(questions, asyncio.get_running_loop().create_future())
        self._tickets.append(ticket)
        self.waiting += len(questions)
        self._news.set()
        try:
            return await ticket.answered
        finally:
            self._forget(ticket)

    def close(self) -> None:
        """Take nothing more: requests that still wait fail, those whose last sample is being scored are answered."""
        self._closing = True
        for ticket in list(self._tickets):
            ticket.fail(ClosingError())
            self._forget(ticket)
        self._news.set()

    async def stop(self, seconds: float) -> None:
        """Close, and wait up to `seconds` for the thread to end its batch."""
        self.close()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join, seconds)

    def _forget(self, ticket: Ticket) -> None:
        """What is left of a request waits no more."""
        if ticket.left:
            self._tickets.remove(ticket)
            self.waiting -= ticket.left
            ticket.taken = len(ticket.questions)

    async def _dispatch(self) -> None:
        batch: list[Part] = []
        try:
            while not self._closing:
                if batch := self._take():
                    for part, outcome in zip(batch, await self._judged(batch), strict=True):
                        self._hand_out(part, outcome)
                else:
                    self._news.clear()
                    await self._news.wait()
        finally:  # also when the thread died
            self.close()
            for part in batch:
                part.ticket.fail(ClosingError())

    def _take(self) -> list[Part]:
        """The samples that have waited longest."""
        batch: list[Part] = []
        room = self.batch_size
        while self._tickets and room:
            ticket = self._tickets[0]
            if not ticket.taken:
                self.metrics.queue_seconds.observe(time.monotonic() - ticket.arrived)
            count = min(room, ticket.left)
            batch.append(Part(ticket, ticket.taken, ticket.taken + count))
            ticket.taken += count
            self.waiting -= count
            room -= count
            if not ticket.left:
                self._tickets.popleft()
        return batch

    async def _judged(self, batch: list[Part]) -> list[Outcome]:
        done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._batches.put((batch, done))
        return await done

    def _hand_out(self, part: Part, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            part.ticket.fail(outcome)
            self._forget(part.ticket)
        else:
            part.ticket.add(outcome)

    def _work(self) -> None:
        """The thread."""
        while (given := self._batches.get()) is not None:
            batch, done = given
            try:
                outcomes = self._outcomes(batch)
            except BaseException as error:
                tell(done, done.set_exception, error)
                raise
            tell(done, done.set_result, outcomes)

    def _outcomes(self, batch: list[Part]) -> list[Outcome]:
        """Read and score a batch. A part that cannot be read or scored does not spoil the others."""
        unread = [self._read(part) for part in batch]
        readable = [part for part, error in zip(batch, unread, strict=True) if error is None]
        scored = iter(self._score(readable) if readable else [])
        return [next(scored) if error is None else error for error in unread]

    def _read(self, part: Part) -> Exception | None:
        if part.ticket.answers is None:
            try:
                part.ticket.answers = self.judge.read(part.ticket.questions)
            except RefusedError as refusal:
                return refusal
            except Exception as error:
                return failed(error)
        return None

    def _score(self, parts: list[Part]) -> list[Outcome]:
        answers = [answer for part in parts for answer in part.answers]
        try:
            rewards = iter(self._rewards(answers))
        except (Exception, SystemExit) as error:
            if len(parts) > 1:
                return [outcome for part in parts for outcome in self._score([part])]
            self._failures += 1
            self.metrics.failures.inc()
            return [failed(error)]
        self._failures = 0
        return [[next(rewards) for _ in range(part.start, part.stop)] for part in parts]

    def _rewards(self, answers: list[Answer]) -> list[float]:
        began = time.monotonic()
        rewards = self.judge.score(answers)
        self.metrics.model_seconds.observe(time.monotonic() - began)
        self.metrics.batches.observe(len(answers))
        self.metrics.samples.inc(len(answers))
        self.metrics.tokens.inc(sum(len(answer.sample) for answer in answers if answer.sample))
        return rewards


def tell(done: asyncio.Future[Any], set_it: Callable[[Any], None], value: Any) -> None:
    """Set a future from another thread; nothing happens where nobody waits for it any more."""

    def set_now() -> None:
        if not done.done():
            set_it(value)

    with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it whoever waited
        done.get_loop().call_soon_threadsafe(set_now)


def failed(error: BaseException) -> ScorerError:
    """What the client is told of a failure: the first cause. Where it was is nobody's business, and in the log."""
    log.error("the scorer failed", exc_info=error)
    cause = error.__cause__ or error
    said = " ".join(str(cause).split())[:200]
    return ScorerError(f"the scorer failed: {type(cause).__name__}{': ' * bool(said)}{said}")
