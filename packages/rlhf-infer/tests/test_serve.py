"""The reward server in one process, with a scorer that the tests can hold, break and watch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from rlhf_data.encode import Encoder
from rlhf_data.errors import InputError
from rlhf_infer.rewards.scorer import Answer, Judgement, Scorer
from rlhf_infer.serve import app as command
from rlhf_infer.serve.config import AddressConfig, LimitsConfig, ServeConfig, ServedModelConfig
from rlhf_infer.serve.judge import Judge, encode_options

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)

TOKEN = "a-token"


class Reply(NamedTuple):
    """What a request was answered with; code 0 for nothing."""

    code: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Numbers(Scorer):
    """Rewards a response `"7"` with 7. Every call is noted, and waits while the scorer is held."""

    needs_tokens = False

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.seen: list[Answer] = []
        self.free = threading.Event()
        self.called = threading.Semaphore(0)
        self.free.set()

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        self.calls.append([answer.response for answer in answers])
        self.seen += answers
        self.called.release()
        assert self.free.wait(30), "the test did not free the scorer"
        return Judgement([self.reward(answer.response) for answer in answers])

    def reward(self, text: str) -> float:
        if text == "exit":
            sys.exit(3)
        if text == "die":
            raise GeneratorExit
        if text == "chained":
            raise RuntimeError("in a file whose place nobody should learn") from KeyError("x")
        return float(text)

    async def in_a_call(self) -> None:
        """Wait until the scorer has been called once more."""
        assert await asyncio.to_thread(self.called.acquire, True, 30)


class Ids(Scorer):
    """Notes the token ids that it gets; the reward is their number."""

    needs_tokens = True

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        samples = [answer.sample for answer in answers if answer.sample is not None]
        self.ids += [sample.input_ids.tolist() for sample in samples]
        return Judgement([float(len(sample)) for sample in samples])


class Client:
    """Speaks ASGI with the server, so that it can send slowly and leave."""

    def __init__(self, app: Any, batcher: Any, log: list[str]) -> None:
        self.app, self.batcher, self.log = app, batcher, log

    async def ask(
        self, path: str = "/get_reward", body: Any = None, *, parts: Sequence[bytes] | None = None, method: str = "POST",
        headers: dict[str, str] | None = None, left: asyncio.Event | None = None, slow: bool = False,
    ) -> Reply:  # fmt: skip
        """Send a request: `body` as JSON, or `parts` as they are, without a length; `slow` never sends the last one."""
        sent = [json.dumps(body).encode()] if parts is None else list(parts)
        head = {"content-type": "application/json"} | ({"content-length": str(len(sent[0]))} if parts is None else {})
        events = [{"type": "http.request", "body": part, "more_body": True} for part in sent]
        events[-1]["more_body"] = slow
        left, code, answered, out = left or asyncio.Event(), 0, {}, []

        async def receive() -> Any:
            if events:
                return events.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal code, answered
            if message["type"] == "http.response.start":
                code, answered = message["status"], {k.decode(): v.decode() for k, v in message["headers"]}
            out.append(message.get("body", b""))

        given = [(k.encode(), v.encode()) for k, v in (head | (headers or {})).items()]
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": given, "client": ("192.0.2.1", 5), "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        await self.app(scope, receive, send)
        return Reply(code, answered, b"".join(out))

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.ask(path, parts=[b""], method="GET", headers=headers)

    async def score(self, *texts: str) -> Reply:
        return await self.ask(body={"query": list(texts)})

    async def count(self, name: str) -> float:
        """The value of a metric."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@asynccontextmanager
async def serving(judge: Judge, token: str | None = None, **limits: Any) -> AsyncIterator[Client]:
    from rlhf_infer.serve.routes import make_app

    log: list[str] = []
    app, batcher = make_app(judge, LimitsConfig(**limits), name="fake", token=token, log=log.append)
    batcher.start()
    try:
        yield Client(app, batcher, log)
    finally:
        if isinstance(judge.scorer, Numbers):
            judge.scorer.free.set()
        await batcher.stop(30)
        assert not batcher.busy


@asynccontextmanager
async def held(scorer: Numbers, client: Client, *texts: str) -> AsyncIterator[asyncio.Task[Reply]]:
    """While a first request is in the scorer, which does not come back."""
    while scorer.called.acquire(blocking=False):
        pass  # calls before this one
    scorer.free.clear()
    first = asyncio.create_task(client.score(*(texts or ("0",))))
    await scorer.in_a_call()
    yield first
    scorer.free.set()


async def waiting(client: Client, samples: int) -> None:
    """Wait until so many samples wait."""
    for _ in range(10_000):
        if client.batcher.waiting == samples:
            return
        await asyncio.sleep(0)
    pytest.fail(f"{client.batcher.waiting} samples wait, not {samples}")


def run(judge: Judge | Scorer, test: Callable[[Client], Any], **options: Any) -> Any:
    """Run a test against a server."""

    async def whole() -> Any:
        async with serving(judge if isinstance(judge, Judge) else Judge(judge), **options) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.fixture
def scorer() -> Numbers:
    return Numbers()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from rlhf_core.tiny import make_tokenizer

    return make_tokenizer(["say red", "say blue"], tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


def reading(tokenizer: Any, max_len: int = 16, truncate: bool = False) -> Judge:
    return Judge(Ids(), Encoder(tokenizer, encode_options(max_len, truncate)), max_len)


@pytest.mark.parametrize("path", ["/get_reward", "/v1/rewards"])
def test_whole_texts_are_answered_in_order_as_the_reference_system_expects(scorer, path):
    reply = run(scorer, lambda client: client.ask(path, {"query": ["3", "1", "2"]}))
    assert reply.code == 200
    assert reply.json == {"rewards": [3.0, 1.0, 2.0], "model": "fake", "version": 1, "truncated": []}
    assert [(answer.prompt, answer.response) for answer in scorer.seen] == [("", "3"), ("", "1"), ("", "2")]


def test_prompts_responses_and_labels_reach_a_function_as_they_were_sent(scorer):
    body = {"prompts": ["a ", "b "], "responses": ["1", "2"], "labels": [{"right": "1"}, None]}
    assert run(scorer, lambda client: client.ask(body=body)).json["rewards"] == [1.0, 2.0]
    seen = [(answer.prompt, answer.response, answer.label) for answer in scorer.seen]
    assert seen == [("a ", "1", {"right": "1"}), ("b ", "2", None)]


def test_prompts_beside_whole_texts_say_where_a_response_begins(scorer):
    body = {"query": ["a 1", "2"], "prompts": ["a ", "b "], "labels": ["x", "y"]}
    run(scorer, lambda client: client.ask(body=body))
    assert [(a.prompt, a.response, a.label) for a in scorer.seen] == [("a ", "1", "x"), ("", "2", "y")]


def test_no_texts_have_no_rewards(scorer):
    assert run(scorer, lambda client: client.score()).json["rewards"] == []
    assert scorer.calls == []


BAD = {
    "neither shape": ({}, "give either `query`"),
    "both shapes": ({"query": ["1"], "prompts": ["a"], "responses": ["1"]}, "give either `query`"),
    "responses alone": ({"responses": ["1"]}, "`responses` need `prompts`"),
    "fewer prompts": ({"prompts": ["a"], "responses": ["1", "2"]}, "`prompts` has 1 values for 2 samples"),
    "more labels": ({"query": ["1"], "labels": [1, 2]}, "`labels` has 2 values for 1 samples"),
    "rendered text": ({"query": ["1"], "rendered": "chat"}, "`rendered` and `finish_reasons` are for"),
    "another rendering": ({"prompts": ["a"], "responses": ["1"], "rendered": "html"}, "rendered: "),
    "a misspelt key": ({"queries": ["1"]}, "queries: Extra inputs are not permitted"),
    "one text": ({"query": "1"}, "query: Input should be a valid list"),
    "a number": ({"query": ["1", 7, 8]}, "query.1: Input should be a valid string (and 1 more)"),
    "a list": (["1"], "valid dictionary"),
    "too many": ({"query": ["1"] * 9}, "9 samples in one request, and at most 8 are taken (--max_queries)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_is_not_of_the_protocol_is_refused_with_what_is_wrong(scorer, case):
    body, said = BAD[case]
    reply = run(scorer, lambda client: client.ask(body=body), max_queries=8)
    assert reply.code == 422
    assert said in reply.json["detail"]
    assert scorer.calls == []


RAW = {
    "no JSON": (b'{"query": [', 422, "JSON decode error"),
    "half a surrogate pair": (b'{"query": ["\\ud800"]}', 422, "sample 0: the text has a broken character"),
    "nothing": (b"", 422, "Field required"),
    "no UTF-8": (b'{"query": ["\xff"]}', 400, "error parsing the body"),
    "nested too deep": (b'{"labels": ' + b"[" * 100_000, 400, "error parsing the body"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_body_that_cannot_be_read_is_refused(scorer, case):
    body, code, said = RAW[case]
    reply = run(scorer, lambda client: client.ask(parts=[body]))
    assert (reply.code, scorer.calls) == (code, [])
    assert said in reply.json["detail"]


def test_a_body_that_does_not_say_that_it_is_json_is_refused(scorer):
    body = [b'{"query": ["1"]}']
    refused = run(scorer, lambda client: client.ask(parts=body, headers={"content-type": "text/plain"}))
    assert refused.code == 422 and "content-type: application/json" in refused.json["detail"]


def test_empty_texts_are_refused_with_their_numbers(scorer):
    reply = run(scorer, lambda client: client.score("1", "", "2", ""))
    assert (reply.code, reply.json["indices"]) == (422, [1, 3])
    assert reply.json["detail"] == "sample 1: the text is empty (and 1 more cannot be scored)"
    assert scorer.calls == []


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_may_be_as_large_as_allowed_and_no_larger_however_it_is_sent(scorer, announced, extra):
    body = json.dumps({"query": ["1"]}).encode()
    body += b" " * (100 - len(body) + extra)
    headers = {"content-length": str(len(body))} if announced else {}
    parts = [body[:60], body[60:]]
    reply = run(scorer, lambda client: client.ask(parts=parts, headers=headers), max_body_bytes=100)
    assert reply.code == (413 if extra else 200)
    assert not extra or (reply.headers["connection"], len(scorer.calls)) == ("close", 0)


def test_a_body_without_an_end_is_read_no_further_than_allowed(scorer):
    assert run(scorer, lambda client: client.ask(parts=[b" " * 60] * 2, slow=True), max_body_bytes=100).code == 413


def test_a_body_that_does_not_come_is_not_waited_for(scorer):
    reply = run(scorer, lambda client: client.ask(parts=[b'{"que'], slow=True), request_timeout=0.05)
    assert (reply.code, reply.headers["connection"]) == (408, "close")


CREDENTIALS = {"": 401, TOKEN: 401, f"Basic {TOKEN}": 401, "Bearer ": 401, f"Bearer {TOKEN}x": 401,
               f"Bearer {TOKEN[:-1]}": 401, f"Bearer {TOKEN}": 200, f"bearer  {TOKEN}": 200}  # fmt: skip


@pytest.mark.parametrize("credentials", CREDENTIALS)
def test_only_who_has_the_token_is_answered(scorer, credentials):
    async def ask(client: Client) -> list[Reply]:
        headers = {"authorization": credentials}
        asked = [await client.ask(body={"query": ["1"]}, headers=headers)]
        return asked + [await client.get(path, **headers) for path in ("/metrics", "/openapi.json")]

    replies = run(scorer, ask, token=TOKEN)
    assert [reply.code for reply in replies] == [CREDENTIALS[credentials]] * 3
    if CREDENTIALS[credentials] == 401:
        assert replies[0].headers["www-authenticate"] == "Bearer"
        assert scorer.calls == []


def test_health_needs_no_token_and_the_token_is_in_no_log_and_no_description(scorer):
    async def ask(client: Client) -> tuple[Reply, Reply, list[str]]:
        health = await client.get("/health")
        return health, await client.get("/openapi.json", authorization=f"Bearer {TOKEN}"), client.log

    health, described, log = run(scorer, ask, token=TOKEN)
    assert health.json == {"status": "ok", "model": "fake"}
    assert described.code == 200
    assert TOKEN not in described.body.decode() + "".join(log)


def test_requests_that_wait_together_are_scored_together_and_get_their_own_rewards(scorer):
    requests = [[str(10 * i + k) for k in range(size)] for i, size in enumerate((3, 1, 4, 2, 5), start=1)]

    async def ask(client: Client) -> list[Reply]:
        async with held(scorer, client):
            others = [asyncio.create_task(client.score(*texts)) for texts in requests]
            await waiting(client, 15)
        return await asyncio.gather(*others)

    replies = run(scorer, ask, batch_size=6)
    assert [reply.json["rewards"] for reply in replies] == [[float(text) for text in texts] for texts in requests]
    in_order = [text for texts in requests for text in texts]
    assert scorer.calls == [["0"], in_order[:6], in_order[6:12], in_order[12:]]


def test_the_server_answers_while_the_scorer_computes(scorer):
    async def ask(client: Client) -> int:
        async with held(scorer, client):
            return (await client.get("/health")).code

    assert run(scorer, ask) == 200


def test_a_request_for_which_there_is_no_room_is_told_to_come_back(scorer):
    async def ask(client: Client) -> list[Reply]:
        async with held(scorer, client, "0"):
            fits = asyncio.create_task(client.score("1", "2", "3"))
            await waiting(client, 3)
            refused = await client.score("4", "5")
        return [refused, await fits, await client.score("4", "5", "6", "7")]

    refused, fits, later = run(scorer, ask, max_waiting=4, max_queries=4)
    assert (refused.code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json["detail"] == "3 samples are waiting, and at most 4 may (--max_waiting)"
    assert (fits.code, later.code) == (200, 200)
    assert ["4", "5"] not in scorer.calls


def test_a_request_that_waits_too_long_is_answered_so_and_leaves_the_queue(scorer):
    async def ask(client: Client) -> tuple[list[Reply], int]:
        async with held(scorer, client) as first:
            late = await client.score("1", "2")
            return [await first, late], client.batcher.waiting

    replies, left = run(scorer, ask, request_timeout=0.05)
    assert [reply.code for reply in replies] == [504, 504]
    assert left == 0
    assert replies[1].json["detail"] == "no rewards within 0.05 s (--request_timeout)"
    assert scorer.calls == [["0"]]


def test_what_a_client_asked_for_before_it_left_is_not_scored(scorer):
    async def ask(client: Client) -> tuple[Reply, Reply, list[str]]:
        left = asyncio.Event()
        async with held(scorer, client):
            leaves = asyncio.create_task(client.ask(body={"query": ["1", "2"]}, left=left))
            await waiting(client, 2)
            stays = asyncio.create_task(client.score("3"))
            await waiting(client, 3)
            left.set()
            gone = await leaves
            await waiting(client, 1)
        return gone, await stays, client.log

    gone, stays, log = run(scorer, ask)
    assert gone.code == 0
    assert stays.json["rewards"] == [3.0]
    assert scorer.calls == [["0"], ["3"]]
    assert log[0].startswith("192.0.2.1 POST /get_reward 499 2 samples ")


def test_a_client_that_leaves_in_the_middle_of_its_request_spoils_no_other(scorer):
    async def ask(client: Client) -> tuple[Reply, Reply]:
        left = asyncio.Event()
        scorer.free.clear()
        leaves = asyncio.create_task(client.ask(body={"query": ["1", "2", "3"]}, left=left))
        await scorer.in_a_call()
        stays = asyncio.create_task(client.score("4", "5"))
        await waiting(client, 3)
        left.set()
        gone = await leaves
        scorer.free.set()
        return gone, await stays

    gone, stays = run(scorer, ask, batch_size=2)
    assert (gone.code, stays.json["rewards"]) == (0, [4.0, 5.0])
    assert scorer.calls == [["1", "2"], ["4", "5"]]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("boom", "ValueError: could not convert string to float: 'boom'"),
        ("exit", "SystemExit: 3"),
        ("chained", "KeyError: 'x'"),
        ("nan", "RunError: a reward is nan"),
        ("-inf", "RunError: a reward is -inf"),
    ],
)
def test_a_failure_of_the_scorer_is_that_of_the_guilty_request_alone(scorer, text, cause):
    async def ask(client: Client) -> list[Reply]:
        async with held(scorer, client):
            others = [asyncio.create_task(client.score(*texts)) for texts in (("1", "2"), (text, "3"), ("4",))]
            await waiting(client, 5)
        return [*await asyncio.gather(*others), await client.get("/health")]

    before, guilty, after, health = run(scorer, ask)
    assert (before.json["rewards"], after.json["rewards"]) == ([1.0, 2.0], [4.0])
    assert (guilty.code, guilty.json["detail"]) == (500, f"the scorer failed: {cause}")
    assert health.code == 200


def test_a_scorer_that_gives_too_few_rewards_fails(scorer, monkeypatch):
    monkeypatch.setattr(scorer, "judge", lambda answers: Judgement([1.0]))
    reply = run(scorer, lambda client: client.score("1", "2"))
    assert (reply.code, reply.json["detail"]) == (500, "the scorer failed: RunError: 1 rewards for 2 samples")


def test_health_says_when_the_scorer_only_fails_and_when_it_works_again(scorer):
    from rlhf_infer.serve.batcher import FAILURES

    async def ask(client: Client) -> list[int]:
        codes = []
        for text in ["boom"] * FAILURES + ["1"]:
            await client.score(text)
            codes.append((await client.get("/health")).code)
        assert await client.count("rlhf_serve_scorer_failures_total") == FAILURES
        return codes

    assert run(scorer, ask) == [200] * (FAILURES - 1) + [503, 200]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_scorers_thread_dies_nobody_is_left_waiting_and_health_says_so(scorer):
    async def ask(client: Client) -> list[Reply]:
        async with held(scorer, client, "die") as first:
            waits = asyncio.create_task(client.score("1"))
            await waiting(client, 1)
        return [await first, await waits, await client.score("2"), await client.get("/health")]

    assert [reply.code for reply in run(scorer, ask)] == [503] * 4


def test_at_the_end_what_waits_is_refused_and_what_is_being_scored_is_answered(scorer):
    async def ask(client: Client) -> list[Reply]:
        async with held(scorer, client, "7", "8") as first:
            half = asyncio.create_task(client.score("1", "2", "3"))
            await waiting(client, 3)
            client.batcher.close()
            replies = [await half, await client.score("4"), await client.get("/health")]
        return [await first, *replies]

    first, *refused = run(scorer, ask, batch_size=2)
    assert first.json["rewards"] == [7.0, 8.0]
    assert [reply.code for reply in refused] == [503] * 3
    assert {reply.json["detail"] for reply in refused} == {"the server is shutting down"}
    assert scorer.calls == [["7", "8"]]


def test_a_scorer_that_does_not_come_back_is_not_waited_for_at_the_end(scorer):
    async def ask(client: Client) -> bool:
        async with held(scorer, client) as first:
            await client.batcher.stop(0)
            stuck = client.batcher.busy
        await first
        return stuck

    assert run(scorer, ask)


def test_metrics_count_requests_samples_and_batches(scorer):
    async def ask(client: Client) -> dict[str, float]:
        await client.score("1", "2", "3")
        await client.score("")
        async with held(scorer, client):
            other = asyncio.create_task(client.score("4"))
            await waiting(client, 1)
            counts = {"waiting": await client.count("rlhf_serve_waiting_samples")}
        await other
        names = {"samples": "samples_total", "batches": "batch_samples_count", "in batches": "batch_samples_sum",
                 "queued": "queue_seconds_count", "computed": "model_seconds_count", "200": 'requests_total{code="200"}',
                 "422": 'requests_total{code="422"}'}  # fmt: skip
        return counts | {name: await client.count(f"rlhf_serve_{metric}") for name, metric in names.items()}

    assert run(scorer, ask, batch_size=2) == {
        "waiting": 1, "samples": 5, "batches": 4, "in batches": 5, "queued": 4, "computed": 4, "200": 9, "422": 1,
    }  # fmt: skip


def test_two_servers_count_apart(scorer):
    run(scorer, lambda client: client.score("1"))
    assert run(scorer, lambda client: client.count("rlhf_serve_samples_total")) == 0


def test_the_log_has_a_line_for_every_request_and_nothing_of_its_contents(scorer):
    async def ask(client: Client) -> list[str]:
        await client.score("31415", "92653")
        await client.get("/no\nsuch path")
        return client.log

    scored, other = run(scorer, ask)
    assert scored.startswith("192.0.2.1 POST /get_reward 200 2 samples ")
    assert "31415" not in scored
    assert other.startswith("192.0.2.1 GET /no%0Asuch%20path 404 0 samples ")


def test_a_path_and_a_method_that_are_not_there_are_refused_in_the_same_form(scorer):
    async def ask(client: Client) -> list[Reply]:
        return [await client.get("/rewards"), await client.get("/get_reward"), await client.get("/docs")]

    replies = run(scorer, ask)
    assert [reply.code for reply in replies] == [404, 405, 404]
    assert replies[0].json == {"detail": "Not Found", "indices": []}


def test_a_whole_text_is_encoded_with_one_bos_and_one_eos(tokenizer):
    judge = reading(tokenizer)
    run(judge, lambda client: client.score("say red", "<s>say red", "say red</s>"))
    ids = [0, *tokenizer("say red", add_special_tokens=False)["input_ids"], 1]
    assert judge.scorer.ids == [ids] * 3


def test_prompt_and_response_are_encoded_apart(tokenizer):
    judge = reading(tokenizer)
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("say r", "ed")]
    body = {"prompts": ["say r"], "responses": ["ed"]}

    async def ask(client: Client) -> None:
        await client.ask(body=body)
        await client.ask(body=body | {"rendered": "chat"})
        await client.ask(body=body | {"finish_reasons": ["length"]})
        await client.score("say red")

    run(judge, ask)
    plain, chat, cut, whole = judge.scorer.ids
    assert plain == [0, *apart[0], *apart[1], 1]
    assert chat == plain[1:]
    assert cut == plain[:-1]
    assert whole != plain, "no token spans the two, so this would show nothing"


def test_a_sample_that_is_too_long_is_refused_with_its_number_and_length(tokenizer):
    judge = reading(tokenizer, max_len=6)
    reply = run(judge, lambda client: client.score("red", "say red say red say red"))
    assert (reply.code, reply.json["indices"]) == (422, [1])
    length = 2 + len(tokenizer("say red say red say red", add_special_tokens=False)["input_ids"])
    assert reply.json["detail"] == f"sample 1: {length} tokens, and at most 6 are scored (--max_len)"
    assert judge.scorer.ids == []


def test_a_sample_that_is_too_long_is_cut_when_that_is_asked_for_and_the_answer_says_so(tokenizer):
    judge = reading(tokenizer, max_len=6, truncate=True)
    reply = run(judge, lambda client: client.score("red", "say red say red say red", "say red say red say red"))
    assert (reply.code, reply.json["truncated"]) == (200, [1, 2])
    assert reply.json["rewards"][1:] == [6.0, 6.0]
    body = {"prompts": ["say red say red say red"], "responses": ["red"]}
    refused = run(judge, lambda client: client.ask(body=body))
    assert (refused.code, refused.json["indices"]) == (422, [0])


def test_tokens_are_counted(tokenizer):
    async def ask(client: Client) -> tuple[list[float], float]:
        reply = await client.score("red", "say red")
        return reply.json["rewards"], await client.count("rlhf_serve_tokens_total")

    rewards, counted = run(reading(tokenizer), ask)
    assert counted == sum(rewards) > 0


def test_the_token_is_read_from_the_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RLHF_SERVE_TOKEN", "another")
    assert command.read_token(AddressConfig(token_file=str(file))) == TOKEN
    assert command.read_token(AddressConfig()) == "another"
    monkeypatch.delenv("RLHF_SERVE_TOKEN")
    assert command.read_token(AddressConfig()) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", "ümlaut".encode(), b"\xff"])
def test_what_cannot_be_a_token_is_refused_and_not_shown(tmp_path, content):
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"--token_file .*token") as refused:
        command.read_token(AddressConfig(token_file=str(file)))
    assert "words" not in str(refused.value)


def test_an_empty_token_in_the_environment_is_no_open_door(monkeypatch):
    monkeypatch.setenv("RLHF_SERVE_TOKEN", "")
    with pytest.raises(InputError, match="RLHF_SERVE_TOKEN must hold"):
        command.read_token(AddressConfig())


def test_a_token_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--token_file .*cannot be read"):
        command.read_token(AddressConfig(token_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("host", "token", "warned"),
    [
        ("127.0.0.1", None, False), ("127.1.2.3", None, False), ("::1", None, False), ("localhost", None, False),
        ("0.0.0.0", None, True), ("::", None, True), ("192.0.2.1", None, True), ("node7", None, True),
        ("0.0.0.0", TOKEN, False),
    ],
)  # fmt: skip
def test_listening_to_other_machines_without_a_token_is_warned_of(host, token, warned):
    said = list(command.warnings(AddressConfig(host=host), token))
    assert bool(said) == warned
    assert all(host in line and "--token_file" in line for line in said)


def test_a_token_file_that_others_can_read_is_warned_of(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    address = AddressConfig(token_file=str(file))
    (said,) = command.warnings(address, TOKEN)
    assert "open to other users (mode 644)" in said
    assert TOKEN not in said.replace(str(file), "")
    file.chmod(0o600)
    assert list(command.warnings(address, TOKEN)) == []


def test_a_port_that_is_taken_is_refused_with_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=rf"--port {port} cannot be listened on .*give another --port"),
            command.bound(AddressConfig(port=port)),
        ):
            pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_this_machines_is_refused(host):
    with pytest.raises(InputError, match=f"--host {host} --port 0"), command.bound(AddressConfig(host=host, port=0)):
        pass


def test_port_0_takes_a_free_one_that_refuses_clients_until_it_listens():
    with command.bound(AddressConfig(port=0)) as port:
        place = port.getsockname()
        assert command.url(port) == f"http://127.0.0.1:{place[1]}"
        with contextlib.closing(socket.socket()) as client:
            assert client.connect_ex(place) != 0


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"needs {missing}, .*rlhf-infer\[serve\]"):
        command.check_installed()


def test_options_about_tokens_are_refused_for_a_function():
    model = ServedModelConfig(reward_pretrain="rewards.py", disable_fast_tokenizer=True)
    config = ServeConfig(model=model, limits=LimitsConfig(max_len=7, batch_size=2))
    with pytest.raises(InputError, match=r"--disable_fast_tokenizer, --max_len: .* reads texts, not tokens"):
        command.check_options(config)


def test_a_full_request_must_fit_into_the_queue():
    with pytest.raises(ValueError, match=r"--max_queries 10 .* --max_waiting 9"):
        LimitsConfig(max_queries=10, max_waiting=9)


class Architecture:
    """A model's config that says how long its context is."""

    def __init__(self, max_position_embeddings: int | None) -> None:
        self.max_position_embeddings = max_position_embeddings

    def get_text_config(self) -> Architecture:
        return self


@pytest.mark.parametrize(
    ("asked", "context", "longest"), [(None, 128, 128), (None, 9999, 2048), (None, None, 2048), (99, 128, 99)]
)
def test_the_longest_sample_is_no_longer_than_the_models_context(asked, context, longest):
    assert command.longest_sample(LimitsConfig(max_len=asked), "rm", Architecture(context)) == longest


def test_a_max_len_beyond_the_models_context_is_refused():
    with pytest.raises(InputError, match=r"--reward_pretrain rm takes 128: set --max_len 128 or less"):
        command.longest_sample(LimitsConfig(max_len=129), "rm", Architecture(128))


def test_answers_name_the_model_without_its_folders(tmp_path):
    assert command.display_name(str(tmp_path / "rewards.py:f")) == "rewards.py:f"
    assert command.display_name(str(tmp_path)) == tmp_path.name
    assert command.display_name("group/rm") == "group/rm"
