"""How rollout engines are kept busy, given weights, compared with the policy and started anew, with stand-ins for vLLM."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_data.errors import InputError, RunError
from rlhf_ray.cluster.backend import Done, LocalBackend, WorkerDied
from rlhf_ray.cluster.group import Part, WorkerGroup
from rlhf_ray.config import ClusterConfig, PPOConfig
from rlhf_ray.engines.policy import PolicyEngines
from rlhf_ray.engines.pool import WINDOW, VLLMEngines
from rlhf_ray.engines.request import Answer, Request, Response
from rlhf_ray.engines.transfer import (
    Described,
    WeightSender,
    broadcast,
    buckets,
    checksum,
    fill,
    join,
    read,
    sync_backend,
)
from rlhf_ray.engines.vllm import VLLMWorker

PROMPTS = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 7, 5, 6)]


def make_config(**engines: Any) -> PPOConfig:
    return PPOConfig(
        model={"pretrain": "unread"},  # type: ignore[arg-type]
        data={"prompt_data": "unread.jsonl"},  # type: ignore[arg-type]
        rewards={"reward_pretrain": "unread.py"},  # type: ignore[arg-type]
        rollout={"rollout_batch_size": 128},  # type: ignore[arg-type]
        engines={"vllm_num_engines": 2, "max_num_seqs": 8} | engines,  # type: ignore[arg-type]
    )


def make_requests(count: int, n: int = 2) -> list[Request]:
    return [Request(number, PROMPTS[number % 4], 100 * number, n, 1.0, 1.0, 8) for number in range(count)]


def logp_of(tokens: np.ndarray, weights: int) -> np.ndarray:
    """What a model with some weights thinks of a response."""
    return (-(tokens % 7) / 7 - weights).astype(np.float32)


class Policy:
    """A policy whose weights are one number."""

    def __init__(self) -> None:
        self.weights, self.groups = 0, 0
        self.failing: Exception | None = None
        self.happened: list[str] = []

    def open_sync(self, world_size: int) -> tuple[str, int]:
        self.groups += 1
        return "here", world_size

    def connect(self) -> None: ...

    def describe_weights(self) -> list[Described]:
        return [Described("weights", "float32", (1,))]

    def send_weights(self) -> dict[str, int]:
        if self.failing:
            raise self.failing
        self.happened.append("send")
        return {"weights": 7}

    def offload(self) -> None:
        self.happened.append("offload")

    def reload(self) -> None:
        self.happened.append("reload")

    def token_logps(self, parts: list[Part]) -> list[tuple[np.ndarray]]:
        responses = [np.concatenate([part.batch.response(k) for k in range(len(part.batch))]) for part in parts]
        return [(logp_of(tokens, self.weights),) for tokens in responses]


class Writer:
    """An engine that answers one request per poll, from the seeds alone."""

    def __init__(self, number: int, policy: Policy) -> None:
        self.number, self.policy = number, policy
        self.weights, self.version = -1, -1
        self.waiting: list[Request] = []
        self.polls: list[int] = []
        self.rank: int | None = None
        self.loaded = {"weights": 7}  # as its second device says
        self.compared = 0
        self.errors: dict[str, list[Exception | None]] = {}

    def fail(self, verb: str, *errors: Exception | None) -> None:
        """Have its next calls of a verb fail, or not."""
        self.errors[verb] = list(errors)

    def maybe(self, verb: str) -> None:
        error = self.errors[verb].pop(0) if self.errors.get(verb) else None
        if error:
            raise error

    def setup(self, *given: Any) -> dict[str, Any]:
        self.maybe("setup")
        return {"number": self.number, "given": given}

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        assert (address, port) == ("here", world_size)
        self.maybe("connect")
        self.rank = rank_offset

    def update(self, manifest: list[Described], version: int) -> list[dict[str, int]]:
        assert [weight.name for weight in manifest] == ["weights"] and self.rank is not None
        self.maybe("update")
        self.weights, self.version = self.policy.weights, version
        return [{"weights": 7}, self.loaded]

    def poll(self, requests: Sequence[Request], least: float, most: float) -> list[Answer]:
        self.policy.happened.append("poll")
        self.waiting += requests
        self.polls.append(sum(request.n for request in self.waiting))
        self.maybe("poll")
        return [self.write(self.waiting.pop(0))] if self.waiting else []

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.maybe("answer")
        self.compared += 1
        return [self.write(request) for request in requests]

    def write(self, request: Request) -> Answer:
        responses = []
        for seed in range(request.seed, request.seed + request.n):
            tokens = np.random.default_rng(seed).integers(3, 99, 1 + seed % request.max_new_tokens).astype(np.int32)
            responses.append(Response(tokens, logp_of(tokens, self.weights), False, seed, self.version))
        return request.number, tuple(responses)

    def sleep(self) -> None:
        self.policy.happened.append("sleep")
        self.maybe("sleep")

    def wake(self) -> None:
        self.maybe("wake")


class Run:
    """A policy and engines of one process; engines that were started anew are in `writers` after the first ones."""

    def __init__(self, **options: Any) -> None:
        self.config = make_config(**options)
        self.policy, self.backend = Policy(), LocalBackend()
        self.writers: list[Writer] = []
        self.doomed: dict[int, Exception] = {}  # which process, counted from 0, fails to set up
        group = WorkerGroup("policy", self.backend, [self.policy], timeout=60)
        self.engines = VLLMEngines(self.config, self.backend, group, self.start, (self.config, [1], 99), PROMPTS)

    def start(self, number: int) -> Writer:
        writer = Writer(number, self.policy)
        if len(self.writers) in self.doomed:
            writer.fail("setup", self.doomed[len(self.writers)])
        self.writers.append(writer)
        return writer

    def begin(self) -> VLLMEngines:
        self.engines.ready.result()
        self.engines.sync(0)
        return self.engines

    def answers(self, requests: Sequence[Request]) -> dict[int, list[list[int]]]:
        """Have requests answered; the ids of the responses by request."""
        self.engines.submit(requests)
        found: list[Answer] = []
        while self.engines.outstanding:
            some = self.engines.collect()
            assert some
            found += some
        assert Counter(number for number, _ in found) == Counter(request.number for request in requests)
        return {number: [response.token_ids.tolist() for response in responses] for number, responses in found}


def started(**options: Any) -> Run:
    run = Run(**options)
    run.begin()
    return run


def test_every_request_is_answered_once_and_alike_by_any_number_of_engines() -> None:
    requests = make_requests(50)
    one, three = started(vllm_num_engines=1), started(vllm_num_engines=3)
    assert one.answers(requests) == three.answers(requests)
    assert one.engines.collect() == [] and one.engines.outstanding == 0
    assert all(writer.polls for writer in three.writers)


def test_responses_carry_the_seeds_and_the_version_of_the_weights_that_began_them() -> None:
    run = started()
    run.engines.sync(5)
    run.engines.submit(make_requests(1, n=3))
    ((number, responses),) = run.engines.collect()
    assert (number, [one.seed for one in responses], {one.version for one in responses}) == (0, [0, 1, 2], {5})


def test_engines_are_told_what_setup_needs_and_say_what_they_are() -> None:
    run = Run()
    facts = run.engines.ready.result()
    assert [fact["number"] for fact in facts] == [0, 1]
    assert facts[0]["given"] == (run.config, [1], 99)


def test_requests_are_spread_evenly_and_no_engine_takes_more_than_its_window() -> None:
    run = started(vllm_num_engines=4, max_num_seqs=8)
    run.engines.submit(make_requests(8))
    assert [writer.polls for writer in run.writers] == [[4]] * 4
    run = started(vllm_num_engines=4, max_num_seqs=8)
    run.answers(make_requests(200))
    assert max(most for writer in run.writers for most in writer.polls) == WINDOW * 8


def test_longer_prompts_of_a_batch_go_first_and_later_batches_wait() -> None:
    run = started(vllm_num_engines=1, max_num_seqs=1)
    run.engines.submit(make_requests(4))
    late = [Request(10, np.arange(50, dtype=np.int32), 0, 2, 1.0, 1.0, 8)]
    run.engines.submit(late)
    order = []
    while run.engines.outstanding:
        order += [number for number, _ in run.engines.collect()]
    assert order == [1, 3, 2, 0, 10]


def test_requests_with_an_earlier_turn_overtake_those_that_nobody_writes_yet() -> None:
    run = started(vllm_num_engines=1, max_num_seqs=1)
    run.engines.submit(make_requests(4), turn=2)
    run.engines.submit([Request(10, np.arange(5, dtype=np.int32), 0, 2, 1.0, 1.0, 8)], turn=1)
    order = []
    while run.engines.outstanding:
        order += [number for number, _ in run.engines.collect()]
    assert order == [1, 10, 3, 2, 0]


def test_a_slow_engine_leaves_what_is_left_to_faster_ones() -> None:
    run = started(max_num_seqs=100)
    slow = run.writers[1]
    slow.poll = lambda requests, least, most: slow.waiting.extend(requests) or []  # type: ignore[method-assign]
    run.engines.submit(make_requests(200))
    for _ in range(100):
        run.engines.collect()
    assert sum(request.n for request in slow.waiting) == WINDOW * 100
    assert run.engines.outstanding == 100 and not run.writers[0].waiting


def test_nothing_is_written_before_engines_have_weights() -> None:
    run = Run()
    run.engines.ready.result()
    run.engines.submit(make_requests(3))
    with pytest.raises(RunError, match="`sync` comes first"):
        run.engines.collect()
    run.engines.sync(0)
    while run.engines.outstanding:
        assert run.engines.collect()


def test_all_engines_get_the_weights_and_ranks_of_their_own() -> None:
    run = Run(vllm_num_engines=3, vllm_tensor_parallel_size=2)
    figures = run.begin().sync(1)
    assert figures["sync_bytes"] == 4 and figures["sync_seconds"] >= 0
    assert [writer.rank for writer in run.writers] == [1, 3, 5]
    assert {writer.version for writer in run.writers} == {1} and run.policy.groups == 1


def test_an_engine_that_dies_is_started_anew_and_all_requests_are_answered_alike() -> None:
    requests = make_requests(40)
    expected = started().answers(requests)
    run = started(engine_restarts=1)
    run.writers[1].fail("poll", None, WorkerDied("killed"))
    assert run.answers(requests) == expected
    assert run.engines.figures()["engine_restarts"] == 1
    assert len(run.writers) == 3 and run.writers[2].number == 1
    assert run.policy.groups == 2 and run.writers[2].version == 0, "the new engine has the weights"
    assert run.writers[2].compared == 1, "and was compared with the policy"
    assert run.writers[2].polls, "and writes"


def test_an_only_engine_that_dies_writes_on_after_it_was_started_anew() -> None:
    run = started(vllm_num_engines=1)
    run.writers[0].fail("poll", RuntimeError("illegal memory access"))
    assert run.answers(make_requests(5)) == started().answers(make_requests(5))


def test_on_shared_devices_a_new_engine_gets_weights_while_engines_sleep_and_writes_when_the_policy_has_gone() -> None:
    run = Run(vllm_num_engines=1, check_sync_steps=0)
    run.engines.config = run.config.model_copy(update={"cluster": ClusterConfig(colocate_all=True)})
    run.begin()
    run.writers[0].fail("poll", WorkerDied("killed"))
    assert run.answers(make_requests(1)) == started().answers(make_requests(1))
    assert run.policy.happened == ["send", "poll", "sleep", "send", "offload", "poll"]


def test_engines_that_die_while_the_policy_trains_get_weights_with_the_next_update() -> None:
    run = started()
    run.engines.submit(make_requests(30))
    run.writers[0].fail("poll", WorkerDied("killed"))
    for _ in range(4):
        run.engines.advance()
    assert run.policy.groups == 1, "weights that are being trained are not sent"
    run.policy.weights = 1
    run.engines.sync(1)
    assert run.policy.groups == 2 and run.writers[2].version == 1
    while run.engines.outstanding:
        run.engines.collect()


def test_too_many_deaths_end_the_run_with_their_cause() -> None:
    run = started(engine_restarts=1)
    for writer in run.writers:
        writer.fail("poll", WorkerDied("signal 9"))
    with pytest.raises(RunError, match=r"engine \d died: signal 9; .* 1 times in this run \(--engine_restarts\)"):
        run.answers(make_requests(40))


def test_an_engine_that_cannot_be_started_anew_counts_as_dead_again() -> None:
    run = Run(engine_restarts=2)
    run.doomed = {2: RunError("no memory")}
    run.begin()
    run.writers[0].fail("poll", WorkerDied("killed"))
    run.answers(make_requests(40))
    assert run.engines.figures()["engine_restarts"] == 2


def test_an_engine_that_dies_of_an_update_is_replaced_and_the_update_repeated() -> None:
    run = started(vllm_num_engines=3)
    run.policy.weights = 7
    run.writers[0].fail("update", WorkerDied("killed"))
    run.writers[1].fail("update", RuntimeError("Connection closed by peer"))
    run.engines.sync(1)
    while not run.writers[3].compared:
        run.answers(make_requests(3))
    assert [writer.weights for writer in run.writers[1:]] == [7, 7, 7]


def test_an_update_that_fails_though_nobody_died_ends_the_run_with_all_reasons() -> None:
    run = started()
    run.writers[1].fail("update", KeyError("no such weight"))
    with pytest.raises(RunError, match="did not reach the engines: vLLM engine 1: KeyError: 'no such weight'"):
        run.engines.sync(1)
    run = started()
    run.policy.failing = RuntimeError("out of memory")
    with pytest.raises(RunError, match="the policy, rank 0, `send_weights`: RuntimeError: out of memory"):
        run.engines.sync(1)


def test_an_engine_with_stale_weights_is_found() -> None:
    run = started(check_sync_steps=2)
    run.writers[1].update = lambda manifest, version: [{"weights": 7}]  # type: ignore[method-assign]
    run.policy.weights = 1
    with pytest.raises(RunError, match=r"vLLM engine 1 does not write .* \(version 1\).* differ by 1 nats on average"):
        run.engines.sync(1)


@pytest.mark.parametrize("loaded", [{"weights": 8}, {}, {"weights": 7, "more": 0}])
def test_an_engine_that_has_loaded_something_else_than_was_sent_is_found(loaded: dict[str, int]) -> None:
    run = started(check_sync_steps=0)
    run.writers[1].loaded = loaded
    name = "more" if len(loaded) == 2 else "weights"
    message = rf"vLLM engine 1 has not loaded .* \(version 1\): the checksums of 1 of 1 differ, first of {name};"
    with pytest.raises(RunError, match=message):
        run.engines.sync(1)


def test_an_engine_that_keeps_the_weights_it_has_read_itself_is_found_at_the_first_update() -> None:
    run = started()
    for writer in run.writers:
        writer.update = lambda manifest, version: [{"weights": 7}]  # type: ignore[method-assign]
    run.policy.weights = 1
    with pytest.raises(RunError, match="does not write with the policy's weights"):
        run.engines.sync(1)


def test_an_engine_whose_weights_are_no_numbers_is_found() -> None:
    run = started(check_sync_steps=1)
    run.policy.weights = float("nan")  # type: ignore[assignment]
    with pytest.raises(RunError, match="vLLM engine 0 does not write with the policy's weights"):
        run.engines.sync(1)


@pytest.mark.parametrize(("every", "compared"), [(0, 0), (-1, 2), (2, 4), (50, 2)])
def test_engines_are_compared_with_the_policy_as_often_as_asked(every: int, compared: int) -> None:
    run = Run(check_sync_steps=every)
    run.engines.ready.result()
    gaps = [run.engines.sync(version).get("sync_logp_gap") for version in range(6)]
    assert sum(gap is not None for gap in gaps) == compared == run.writers[1].compared
    assert all(gap == 0 for gap in gaps if gap is not None)


class Silent(LocalBackend):
    """Some engines never answer some verb."""

    def __init__(self, verb: str, number: int) -> None:
        self.verb, self.number, self.seen = verb, number, 0
        self.lost: list[Done] = []

    def call(self, handle: Any, verb: str, *args: Any) -> Done:
        done = super().call(handle, verb, *args)
        if verb == self.verb and getattr(handle, "number", None) == self.number:
            self.lost.append(done)
        return done

    def wait(self, references: Sequence[Done], timeout: float) -> list[Done]:
        return [reference for reference in references if reference not in self.lost]


@pytest.mark.parametrize("verb", ["poll", "update", "answer", "connect", "sleep"])
def test_an_engine_that_does_not_answer_is_named_with_what_it_should_have_done(verb: str) -> None:
    run, backend = Run(vllm_num_engines=3), Silent(verb, 1)
    run.engines.ready.result()
    run.engines.backend = backend
    with pytest.raises(RunError, match=rf"vLLM engine 1 did not answer: `{verb}` .* 1800 s \(--call_timeout\)"):
        run.engines.sync(0)
        run.answers(make_requests(9))
        run.engines.sleep()


def test_what_vllm_cannot_do_is_the_users_error() -> None:
    run = Run()
    run.writers[0].fail("setup", InputError("--vllm_num_engines 2: vLLM is not installed"))
    for seat in run.engines.seats[:1]:
        seat.call = run.backend.call(seat.handle, "setup")
    with pytest.raises(InputError, match="not installed"):
        run.engines.ready.result()


def test_an_engine_that_dies_in_its_sleep_is_started_anew() -> None:
    run = started()
    run.writers[0].fail("sleep", WorkerDied("killed"))
    run.engines.sleep()
    run.engines.wake()
    run.engines.sync(1)
    run.answers(make_requests(5))
    assert run.engines.figures() == {"queue_depth": 0, "engine_restarts": 1}


def test_the_depth_of_the_queue_is_the_largest_since_the_last_time() -> None:
    run = started(vllm_num_engines=1, max_num_seqs=2)
    run.answers(make_requests(10))
    assert run.engines.figures()["queue_depth"] == 8
    assert run.engines.figures()["queue_depth"] == 0


def test_gloo_carries_weights_without_gpus_and_where_engines_share_them() -> None:
    apart = make_config()
    shared = apart.model_copy(update={"cluster": ClusterConfig(colocate_all=True)})
    assert [sync_backend(apart, on_gpu=gpu) for gpu in (False, True)] == ["gloo", "nccl"]
    assert sync_backend(shared, on_gpu=True) == "gloo"


def test_neighbours_share_a_bucket_until_it_is_full() -> None:
    assert [tuple(bucket) for bucket in buckets([10, 20, 30, 8], full=32)] == [(0, [0, 16], 36), (2, [0, 32], 40)]
    assert [tuple(bucket) for bucket in buckets([0, 5], full=32)] == [(0, [0, 0], 5)]
    assert list(buckets([])) == []


def some_weights() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("embedding", torch.randn(7, 3, generator=generator)),
        ("norm", torch.randn(3, generator=generator, dtype=torch.bfloat16)),
        ("router", torch.randn(2, 3, generator=generator, dtype=torch.float64).T),
        ("nothing", torch.zeros(0)),
        ("scale", torch.tensor(2.5)),
        ("head", torch.randn(7, 3, generator=generator, dtype=torch.float16)),
    ]


@pytest.mark.parametrize("full", [1, 50, 10_000])
def test_weights_of_all_formats_and_shapes_go_through_buckets_bit_for_bit(full: int) -> None:
    weights = some_weights()
    manifest = [Described.of(name, weight) for name, weight in weights]
    found: list[tuple[str, torch.Tensor]] = []
    for bucket in buckets([weight.size for weight in manifest], full):
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        for place, start in enumerate(bucket.starts):
            fill(buffer, start, weights[bucket.first + place][1])
        found += read(buffer, bucket, manifest)
    assert [name for name, _ in found] == [name for name, _ in weights]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(found, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 8), (16, 16)])
def test_equal_weights_have_equal_checksums_wherever_they_lie_and_every_bit_counts(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    apart = torch.stack([torch.zeros_like(weight), weight], -1)[..., 1]
    shifted = torch.cat([torch.zeros(1, dtype=dtype), weight.reshape(-1)])[1:].view(shape)
    sums = [int(checksum(x)) for x in (weight, apart, shifted)]
    assert sums == [sums[0]] * 3
    for place in range(weight.nbytes):
        other = weight.clone()
        other.view(-1).view(torch.uint8)[place] ^= 1
        assert int(checksum(other)) != sums[0]


def test_the_receiver_for_nccl_says_what_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer import nccl_engine

    from rlhf_ray.engines.receiver import NCCLReceiver

    weights = some_weights()

    def consumer(*, post_unpack_func: Any, **given: Any) -> None:
        for bucket in (weights[:2], weights[2:]):
            post_unpack_func(bucket)

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consumer)
    receiver, loaded = NCCLReceiver.__new__(NCCLReceiver), list[tuple[str, torch.Tensor]]()
    receiver.model = model = SimpleNamespace(load_weights=loaded.extend)  # type: ignore[assignment]
    receiver.model_update_group = object()  # type: ignore[assignment]
    receiver.packed, receiver.packed_buffer_size_bytes, receiver.packed_num_buffers = True, 1, 2
    receiver.device = torch.device("cpu")
    receiver.receive_weights(SimpleNamespace(names=[], dtype_names=[], shapes=[]))  # type: ignore[arg-type]
    assert [name for name, _ in loaded] == [name for name, _ in weights] and receiver.model is model
    assert receiver.checksums == {name: int(checksum(weight)) for name, weight in weights}


class Listener(threading.Thread):
    """A member of a gloo group that receives one update."""

    def __init__(self, port: int, rank: int, world_size: int, manifest: list[Described]) -> None:
        super().__init__()
        self.place, self.manifest = (port, rank, world_size), manifest
        self.found: list[tuple[str, torch.Tensor]] = []
        self.error: Exception | None = None

    def run(self) -> None:
        port, rank, world_size = self.place
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        group = join(store, rank, world_size)
        try:
            for bucket in buckets([weight.size for weight in self.manifest]):
                buffer = torch.empty(bucket.size, dtype=torch.uint8)
                broadcast(group, buffer, 30).wait()
                self.found += read(buffer, bucket, self.manifest)
        except RuntimeError as error:
            self.error = error


def connected(sender: WeightSender, weights: list[tuple[str, torch.Tensor]], members: int) -> list[Listener]:
    port = sender.open("127.0.0.1", 1 + members)
    manifest = [Described.of(name, weight) for name, weight in weights]
    listeners = [Listener(port, 1 + member, 1 + members, manifest) for member in range(members)]
    for listener in listeners:
        listener.start()
    sender.connect()
    assert sender.describe(weights) == manifest
    return listeners


def test_the_policy_sends_every_engine_the_same_weights() -> None:
    weights, sender = some_weights(), WeightSender("gloo", 30)
    listeners = connected(sender, weights, 2)
    sent = sender.send(iter(weights))
    for listener in listeners:
        listener.join(30)
        assert [name for name, _ in listener.found] == [name for name, _ in weights]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(listener.found, weights, strict=True))
    assert sent == {name: int(checksum(weight)) for name, weight in weights}


def test_weights_out_of_place_are_never_sent_and_gathering_goes_on_for_the_other_ranks() -> None:
    weights, sender = some_weights(), WeightSender("gloo", 30)
    (listener,) = connected(sender, weights, 1)
    rest = iter([weights[1], weights[0], *weights[2:]])
    with pytest.raises(RunError, match=r"name='norm'.* comes where engines expect .*name='embedding'"):
        sender.send(rest)
    assert next(rest, None) is None, "all ranks gather all weights, or wait for each other for ever"
    listener.join(30)
    assert listener.error is not None and not listener.found, "the engine is told, and does not wait"
    with pytest.raises(RunError, match="not connected"):
        sender.send(iter(weights))


@pytest.mark.parametrize("change", [slice(0, -1), slice(0, None)])
def test_too_few_or_too_many_weights_are_an_error(change: slice) -> None:
    weights, sender = some_weights(), WeightSender("gloo", 30)
    connected(sender, weights, 1)
    extra = weights[change] + ([] if change.stop else [("more", torch.zeros(1))])
    with pytest.raises(RunError, match="the policy's weights have changed"):
        sender.send(iter(extra))


class LLM:
    """A vLLM that notes what it is told."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.calls = arguments, list[Any]()
        cache = SimpleNamespace(num_gpu_blocks=1, block_size=16, enable_prefix_caching=False)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, *args, kwargs) if kwargs else (name, *args))


def set_up(patch: pytest.MonkeyPatch, *, gpu: bool, config: PPOConfig) -> tuple[VLLMWorker, LLM]:
    """An engine with a stand-in for vLLM, on a GPU or not."""
    patch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, __version__="0"))
    patch.setattr("rlhf_ray.engines.vllm.check", lambda config: None)
    patch.setattr("rlhf_ray.engines.vllm.register", lambda: None)
    patch.setattr("torch.cuda.is_available", lambda: gpu)
    patch.setattr("os.environ", {})
    worker = VLLMWorker()
    worker.setup(config, [1], 64)
    return worker, worker.llm


def test_an_engine_starts_its_own_parts_when_a_model_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, wanted in ((1, None), (2, "mp")):
        _, llm = set_up(monkeypatch, gpu=False, config=make_config(vllm_tensor_parallel_size=size))
        assert llm.arguments["tensor_parallel_size"] == size
        assert llm.arguments["distributed_executor_backend"] == wanted, "not Ray, though it is an actor"


def test_a_shared_gpu_is_left_with_responses_unfinished_and_taken_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config().model_copy(update={"cluster": ClusterConfig(colocate_all=True)})
    worker, llm = set_up(monkeypatch, gpu=True, config=config)
    assert llm.arguments["enable_sleep_mode"] and llm.arguments["weight_transfer_config"] == {"backend": "rlhf_gloo"}
    assert llm.calls[-1] == ("sleep", {"level": 1, "mode": "keep"})
    llm.calls.clear()
    worker.update([], 1)
    worker.poll([])
    assert [call for call in llm.calls if call[0] == "wake_up"] == [
        ("wake_up", {"tags": ["weights"]}),
        ("wake_up", {"tags": ["kv_cache"]}),
    ]


def test_without_a_gpu_there_is_nothing_to_sleep_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config().model_copy(update={"cluster": ClusterConfig(colocate_all=True)})
    worker, llm = set_up(monkeypatch, gpu=False, config=config)
    worker.sleep()
    worker.wake()
    assert [call for call in llm.calls if call[0] in ("sleep", "wake_up")] == []


def test_without_vllm_the_ranks_of_the_policy_share_requests_and_their_answers_come_together() -> None:
    class Rank:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def generate(self, requests: Sequence[Request]) -> list[Answer]:
            self.seen = [request.number for request in requests]
            return [(number, ()) for number in self.seen]

    ranks = [Rank(), Rank(), Rank()]
    engines = PolicyEngines(WorkerGroup("policy", LocalBackend(), ranks, timeout=60))
    engines.submit(make_requests(7))
    assert engines.outstanding == 7 and list(engines.references) == []
    assert sorted(number for number, _ in engines.collect()) == list(range(7))
    assert sorted(len(rank.seen) for rank in ranks) == [2, 2, 3]
    assert engines.collect() == [] and engines.outstanding == 0
    assert engines.sync(1) == {}
