"""All vLLM engines of a run, as the driver holds them: who writes what, how weights get there, and what if one dies."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_data.errors import InputError, RunError
from rlhf_ray.cluster.backend import Backend, WorkerDied
from rlhf_ray.cluster.group import Pending, WorkerGroup, said
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer, Request, Response
from rlhf_ray.rollout import TARGETS, Rollout

WINDOW = 2
"""Responses that an engine has been asked for and not finished, as a multiple of those that it writes at the same time: it
never runs dry while the driver does something else."""

POLLS_PER_SECOND = 250
"""Answers of engines that the driver listens to, over all engines; of more engines, each answers less often."""

LONGEST_POLL = 0.5
"""Seconds after which an engine answers in any case, unless there are very many: how long new weights wait for it."""

PROBES = 4
"""Prompts that engine and policy are compared on."""

PROBE = -(1 << 62)
"""Number of the first request that is a probe, the next ones going down: far from those of prompts, held out or not."""

PROBE_TOKENS = 16
"""Longest response to each of them."""

HEALTHY = {"float32": 0.005, "bfloat16": 0.05}
"""Mean difference of log-probs of engine and policy, in nats, up to which they have the same weights. On a CPU in float32 it is
below 1e-4; in bfloat16, where every operation rounds to three digits, 0.001 to 0.03 is usual."""

Waiting = tuple[int, int, int, int, Request]
"""A request that nobody writes yet, after what decides when it is written: its turn, when it came, how long its prompt is, and a
number that is its own."""


@dataclass(eq=False)
class Seat:
    """An engine, as the driver sees it."""

    number: int
    handle: Any
    call: Any
    """What it is doing: a reference of `setup` or `poll`; None if nothing."""

    is_ready: bool = False
    """Whether vLLM runs."""

    has_weights: bool = False
    """Whether it is connected with the policy and has its weights; only then it writes."""

    asked: dict[int, Waiting] = field(default_factory=dict)
    """What it is to answer, by the number of the request."""

    unsent: list[Request] = field(default_factory=list)
    """Those of them that it has not been told of."""

    load: int = 0
    """Responses that it is to write."""

    def __str__(self) -> str:
        return f"vLLM engine {self.number}"


class VLLMEngines:
    """vLLM engines in processes of their own, kept busy from one queue. See `Engines`.

    An engine that dies is started anew, and its requests are written again, by whoever is free: with the same seeds, so with
    the same answers. It writes again when it has the policy's weights, which takes a new connection of all engines.

    Args:
        config: the run's options.
        backend: calls the engines.
        policy: the role whose weights they write with.
        start: starts the process of an engine (a `VLLMWorker`) by number, anew if there was one.
        setup: what `VLLMWorker.setup` is told.
        prompts: of which the first few serve to compare engines with the policy; each leaves room for a response.
    """

    def __init__(
        self,
        config: PPOConfig,
        backend: Backend,
        policy: WorkerGroup,
        start: Callable[[int], Any],
        setup: tuple[Any, ...],
        prompts: Sequence[NDArray[np.int32]],
    ) -> None:
        self.config, self.backend, self.policy, self.start = config, backend, policy, start
        self.setup, self.prompts = setup, list(prompts[:PROBES])
        self.timeout = config.cluster.call_timeout
        self.capacity = WINDOW * config.engines.max_num_seqs
        self.calls: dict[Any, Seat] = {}
        self.seats = [self._start(number) for number in range(config.engines.vllm_num_engines)]
        self.queue: list[Waiting] = []
        self.answers: list[Answer] = []
        self.batches, self.entries = 0, 0
        self.outstanding, self.load, self.queued = 0, 0, 0
        self.deepest, self.restarts, self.syncs = 0, 0, 0
        self.version = -1
        self.connected = False
        self.manifest: Any = None
        self.bytes = 0

    @property
    def ready(self) -> Pending[list[dict[str, Any]]]:
        """The start of all engines, which goes on: what each says of itself. It is waited for once, before anything else."""
        group = WorkerGroup(
            "vLLM engine", self.backend, [seat.handle for seat in self.seats], self.config.cluster.start_timeout
        )

        def finish(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
            for seat in self.seats:
                self._started(seat)
            return facts

        return Pending(group, "setup", [seat.call for seat in self.seats], finish)

    def submit(self, requests: Sequence[Request], turn: int = 0) -> None:
        """See `Engines.submit`. Of requests that come together, those with long prompts go first."""
        self.batches += 1
        for request in requests:
            self.entries += 1
            self._queue((turn, self.batches, -len(request.prompt_ids), self.entries, request))
        self.outstanding += len(requests)
        self._hand_out()
        self.deepest = max(self.deepest, len(self.queue))

    def collect(self) -> list[Answer]:
        """See `Engines.collect`."""
        while not self.answers and self.outstanding:
            if self._joining:
                self._admit()
            self._listen(self.timeout, "call_timeout")
        answers, self.answers = self.answers, []
        return answers

    @property
    def references(self) -> Sequence[object]:
        """See `Engines.references`."""
        return list(self.calls)

    def advance(self) -> None:
        """See `Engines.advance`."""
        if self.calls:
            self._hear(self.backend.wait(list(self.calls), 0))

    def sync(self, version: int) -> dict[str, float]:
        """See `Engines.sync`.

        Returns:
            `sync_seconds`, `sync_bytes`, and where they were compared `sync_logp_gap`: the mean difference of the log-probs of
            policy and engine, in nats, for the engine that differs most.

        Raises:
            RunError: somebody did not answer in time, engines die too often, or an engine has not got the weights.
        """
        start = time.perf_counter()
        self.version = version
        self._send()
        figures = {"sync_seconds": time.perf_counter() - start, "sync_bytes": float(self.bytes)}
        self.syncs += 1
        every = self.config.engines.check_sync_steps
        # the first sync brings what engines have read themselves; that weights arrive at all shows in the second
        if every and (self.syncs <= 2 or (every > 0 and self.syncs % every == 0)):
            figures["sync_logp_gap"] = self._compare()
        self._hand_out()
        return figures

    def figures(self) -> dict[str, float]:
        """`queue_depth`: most requests that no engine had taken since the last time; `engine_restarts` of the run."""
        depth, self.deepest = self.deepest, len(self.queue)
        return {"queue_depth": float(depth), "engine_restarts": float(self.restarts)}

    def sleep(self) -> None:
        """See `Engines.sleep`."""
        self._call_all("sleep")

    def wake(self) -> None:
        """See `Engines.wake`."""
        self._call_all("wake")

    def close(self) -> None:
        """See `Engines.close`."""
        for seat in self.seats:
            self.backend.stop(seat.handle)

    # Who writes what

    def _queue(self, waiting: Waiting) -> None:
        heapq.heappush(self.queue, waiting)
        self.queued += waiting[-1].n

    def _assign(self, seat: Seat) -> None:
        """Give an engine the request whose turn it is."""
        waiting = heapq.heappop(self.queue)
        request = waiting[-1]
        seat.asked[request.number] = waiting
        seat.unsent.append(request)
        seat.load += request.n
        self.load += request.n
        self.queued -= request.n

    def _hand_out(self) -> None:
        """Give requests to the engines that have least to do, as long as these have room, and wake those that have nothing."""
        writing = [seat for seat in self.seats if seat.has_weights]
        loads = [(seat.load, seat.number) for seat in writing]
        heapq.heapify(loads)
        while self.queue and loads and loads[0][0] < self.capacity:
            seat = self.seats[loads[0][1]]
            self._assign(seat)
            heapq.heapreplace(loads, (seat.load, seat.number))
        for seat in writing:
            if seat.call is None and seat.asked:
                self._poll(seat)

    def _refill(self, seat: Seat, writing: int) -> None:
        """Give an engine more, up to its room and to its share of what is left: the rest is for engines that are faster."""
        share = (self.load + self.queued) / writing
        while self.queue and seat.load < min(self.capacity, share):
            self._assign(seat)

    def _poll(self, seat: Seat) -> None:
        """Have an engine write on."""
        least = len(self.seats) / POLLS_PER_SECOND
        self._call(seat, "poll", seat.unsent, least, max(least, LONGEST_POLL))
        seat.unsent = []

    def _call(self, seat: Seat, verb: str, *args: Any) -> None:
        seat.call = self.backend.call(seat.handle, verb, *args)
        self.calls[seat.call] = seat

    def _listen(self, seconds: float, option: str) -> None:
        """Wait for an engine to answer, as long as an option says, and see to all that did."""
        if not self.calls:
            raise RunError("requests wait, and no engine has weights to write with: `sync` comes first")
        ready = self.backend.wait(list(self.calls), seconds)
        if not ready:
            verbs = sorted({"poll" if seat.is_ready else "setup" for seat in self.calls.values()})
            raise RunError(silence(self.calls.values(), "`, `".join(verbs), seconds, option))
        self._hear(ready)

    def _hear(self, ready: Iterable[Any]) -> None:
        """See to engines whose calls have ended."""
        writing = sum(seat.has_weights for seat in self.seats)
        for reference in ready:
            if (seat := self.calls.pop(reference, None)) is None:
                continue  # of an engine that has been started anew
            seat.call = None
            try:
                result = self.backend.result(reference)
            except InputError:
                raise
            except Exception as error:
                self._revive(seat, error)
                self._hand_out()
                continue
            if not seat.is_ready:
                self._started(seat)
                continue
            for number, responses in result:  # the engine has work again before anybody looks at its answers
                del seat.asked[number]
                seat.load -= len(responses)
                self.load -= len(responses)
            if seat.has_weights:
                self._refill(seat, writing)
                if seat.asked:
                    self._poll(seat)
            self.answers += result
            self.outstanding -= len(result)

    # Engines that start and die

    def _start(self, number: int) -> Seat:
        """Start the process of an engine, and vLLM in it."""
        seat = Seat(number, self.start(number), None)
        self._call(seat, "setup", *self.setup)
        return seat

    def _started(self, seat: Seat) -> None:
        self.calls.pop(seat.call, None)
        seat.call, seat.is_ready, self.connected = None, True, False

    def _revive(self, seat: Seat, error: Exception) -> None:
        """Start an engine anew, and let others write what it had to."""
        if self.restarts >= self.config.engines.engine_restarts:
            raise RunError(
                f"{seat} died: {said(error)}; engines were started anew {self.restarts} times in this run "
                "(--engine_restarts); --load_checkpoint continues from the newest checkpoint"
            ) from error
        self.restarts += 1
        self.calls.pop(seat.call, None)
        self.backend.stop(seat.handle)
        for waiting in seat.asked.values():
            self._queue(waiting)
        self.load -= seat.load
        self.seats[seat.number] = self._start(seat.number)
        self.connected = False

    @property
    def _joining(self) -> bool:
        """Whether engines have started that wait for weights, in a run that has some."""
        return self.version >= 0 and any(seat.is_ready and not seat.has_weights for seat in self.seats)

    def _admit(self) -> None:
        """Give weights to engines that have been started anew; the policy has nothing else to do while the driver waits."""
        shared = self.config.cluster.colocate_all
        if shared:
            self.sleep()  # weights come from the policy, which needs the devices for that
        self._send()
        if self.config.engines.check_sync_steps:
            self._compare()
        if shared:
            self.policy.call("offload")
        self._hand_out()

    # Weights

    def _send(self) -> None:
        """Give all engines that run the policy's weights. Engines that die of it are started anew.

        Raises:
            RunError: somebody did not answer in time, engines die too often, or what an engine has loaded is not what was sent.
        """
        while True:
            members = [seat for seat in self.seats if seat.is_ready]
            if not members:
                self._listen(self.config.cluster.start_timeout, "start_timeout")
                continue
            errors = {} if self.connected else self._connect(members)
            if not errors:
                calls = {
                    seat: self.backend.call(seat.handle, "update", self.manifest, self.version) for seat in members
                }
                sent, loaded, errors = self._with_policy(self.policy.start("send_weights"), "update", calls)
                if not errors:
                    for seat in members:
                        for checksums in loaded[seat]:
                            self._match(seat, sent[0], checksums)
                        seat.has_weights = True
                    return
            self._replace(errors)

    def _connect(self, members: Sequence[Seat]) -> dict[Any, Exception]:
        """Have the policy and the engines that run meet; returns who failed."""
        size = self.config.engines.vllm_tensor_parallel_size
        world_size = 1 + size * len(members)
        address, port = self._first_rank("open_sync", world_size).result()[0]
        calls = {
            seat: self.backend.call(seat.handle, "connect", address, port, 1 + size * place, world_size)
            for place, seat in enumerate(members)
        }
        _, _, errors = self._with_policy(self._first_rank("connect"), "connect", calls)
        if not errors:
            manifest = self.policy.call("describe_weights")[0]
            self.manifest, self.bytes = self.backend.put(manifest), sum(weight.size for weight in manifest)
            self.connected = True
        return errors

    def _first_rank(self, verb: str, *args: Any) -> Pending[list[Any]]:
        """Have the policy's first rank do something."""
        return Pending(self.policy, verb, [self.backend.call(self.policy.handles[0], verb, *args)], list)

    def _with_policy(
        self, pending: Pending[Any], verb: str, calls: dict[Seat, Any]
    ) -> tuple[Any, dict[Seat, Any], dict[Any, Exception]]:
        """Wait for engines and for what the policy does with them: what it and they return, and who failed (None for the policy)."""
        found, errors = self._await(verb, calls, self.timeout, "call_timeout")
        try:
            return pending.result(), found, errors
        except RunError as error:
            return None, found, {None: error, **errors}

    def _replace(self, errors: dict[Any, Exception]) -> None:
        """Start engines anew whose death has made others fail too.

        Raises:
            RunError: nobody died: what failed would fail again.
        """
        self.connected = False
        dead = {seat: error for seat, error in errors.items() if seat and isinstance(error, WorkerDied)}
        if not dead:
            reasons = "; ".join(f"{seat}: {said(error)}" if seat else said(error) for seat, error in errors.items())
            raise RunError(f"the weights did not reach the engines: {reasons}") from next(iter(errors.values()))
        for seat, error in dead.items():
            self._revive(seat, error)

    def _compare(self) -> float:
        """Have every engine write a little, and the policy say how likely it finds that.

        Returns:
            The mean difference of their log-probs, for the engine where it is largest.

        Raises:
            RunError: an engine computes with other weights than the policy.
        """
        size, requests = len(self.prompts), self.backend.put(self._probes())
        while True:
            writing = [seat for seat in self.seats if seat.has_weights]
            if self.config.cluster.colocate_all:
                self.policy.call("offload")  # engines need their cache now
            calls = {seat: self.backend.call(seat.handle, "answer", requests) for seat in writing}
            found, errors = self._await("answer", calls, self.timeout, "call_timeout")
            if not errors:
                break
            self._replace(errors)
            self._send()
        rollout = probe_rollout(self.prompts, [found[seat] for seat in writing])
        if self.config.cluster.colocate_all:
            self.sleep()
            self.policy.call("reload")
        (logps,) = self.policy.map(
            "token_logps", rollout, gives=[TARGETS], size=self.config.rollout.micro_rollout_batch_size
        ).result()
        gaps = np.split(np.abs(logps - rollout.rollout_logps), rollout.target_bounds[size:-1:size])
        return max(self._judge(seat, own) for seat, own in zip(writing, gaps, strict=True))

    def _probes(self) -> list[Request]:
        """Short responses to the first prompts."""
        temperature = self.config.rollout.temperature
        length = min(PROBE_TOKENS, self.config.rollout.generate_max_len)
        return [
            Request(PROBE - number, prompt, number, 1, temperature, 1.0, length)
            for number, prompt in enumerate(self.prompts)
        ]

    def _match(self, seat: Seat, sent: Mapping[str, int], loaded: Mapping[str, int]) -> None:
        """Make sure that the checksums of what an engine has loaded are those of what the policy has sent."""
        wrong = [name for name in sent | loaded if sent.get(name) != loaded.get(name)]
        if wrong:
            raise RunError(
                f"{seat} has not loaded the policy's weights (version {self.version}): the checksums of {len(wrong)} of "
                f"{len(sent)} differ, first of {wrong[0]}; --load_checkpoint continues from the newest checkpoint"
            )

    def _judge(self, seat: Seat, gaps: NDArray[np.float32]) -> float:
        """The mean difference of an engine's log-probs and the policy's."""
        limit = HEALTHY["bfloat16" if self.config.model.bf16 else "float32"]
        mean = float(gaps.mean())
        if not mean <= limit:  # a weight that is no number makes it none too
            raise RunError(
                f"{seat} does not write with the policy's weights (version {self.version}): the log-probs of {len(gaps)} "
                f"sampled tokens differ by {mean:.3g} nats on average and by up to {float(gaps.max()):.3g}, where at most "
                f"{limit:g} on average is healthy (--check_sync_steps); --load_checkpoint continues from the newest checkpoint"
            )
        return mean

    # Calls

    def _call_all(self, verb: str) -> None:
        """Have all engines that run do the same; those that die of it are started anew."""
        calls = {seat: self.backend.call(seat.handle, verb) for seat in self.seats if seat.is_ready}
        _, errors = self._await(verb, calls, self.timeout, "call_timeout")
        for seat, error in errors.items():
            self._revive(seat, error)

    def _await(
        self, verb: str, calls: dict[Seat, Any], seconds: float, option: str
    ) -> tuple[dict[Seat, Any], dict[Seat, Exception]]:
        """Wait for one call of each engine; what they returned, and who failed.

        Raises:
            InputError: an engine cannot do what the options ask for.
            RunError: some do not answer in time.
        """
        left, deadline = {reference: seat for seat, reference in calls.items()}, time.monotonic() + seconds
        found: dict[Seat, Any] = {}
        errors: dict[Seat, Exception] = {}
        while left:
            ready = self.backend.wait(list(left), max(0.0, deadline - time.monotonic()))
            if not ready:
                before = "".join(f"; before that, {seat} failed: {said(error)}" for seat, error in errors.items())
                raise RunError(silence(left.values(), verb, seconds, option) + before)
            for reference in ready:
                seat = left.pop(reference)
                try:
                    found[seat] = self.backend.result(reference)
                except InputError:
                    raise
                except Exception as error:
                    errors[seat] = error
        return found, errors


def silence(seats: Iterable[Seat], verb: str, seconds: float, option: str) -> str:
    """The message that some engines did not answer."""
    numbers = ", ".join(str(number) for number in sorted(seat.number for seat in seats))
    return (
        f"vLLM engine {numbers} did not answer: `{verb}` has taken more than {seconds:g} s (--{option}); --load_checkpoint "
        "continues from the newest checkpoint"
    )


def probe_rollout(prompts: Sequence[NDArray[np.int32]], answers: Sequence[Sequence[Answer]]) -> Rollout:
    """What engines answered to the same prompts, one engine after the other."""
    rows: list[tuple[int, Response]] = [
        (number, responses[0]) for own in answers for number, (_, responses) in enumerate(own)
    ]
    pieces = [piece for number, response in rows for piece in (prompts[number], response.token_ids)]
    numbers = np.array([number for number, _ in rows], np.int64)
    return Rollout(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.array([len(prompts[number]) for number, _ in rows], np.int64),
        response_lengths=np.array([len(response.token_ids) for _, response in rows], np.int64),
        truncated=np.array([response.truncated for _, response in rows], np.bool_),
        rollout_logps=np.concatenate([response.logps for _, response in rows]).astype(np.float32),
        prompts=numbers,
        groups=numbers,
        seeds=np.array([response.seed for _, response in rows], np.int64),
        versions=np.array([response.version for _, response in rows], np.int64),
    )
