"""Reward servers: asked in their own form, asked again while trouble may pass, and never believed when they talk nonsense."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_data.errors import InputError, RunError
from rlhf_infer.rewards import remote
from rlhf_infer.rewards.remote import Asked, RemoteOptions, RemoteScorer, check_server
from rlhf_infer.rewards.scorer import Answer

Reply = tuple[int, bytes] | None
"""Code and body; None for a connection that is closed without an answer."""


class Server(ThreadingHTTPServer):
    """A server that tells what it was asked, and answers as a test wants it."""

    daemon_threads = True

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply], described: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.described = answer, described
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.reply({"/openapi.json": self.server.described, "/health": (200, b"{}")}.get(self.path, (404, b"")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.headers.append(self.headers)
            self.server.paths.append(self.path)
        self.reply(self.server.answer(number, body))

    def reply(self, reply: Reply) -> None:
        if reply is None:
            self.close_connection = True
            return
        code, body = reply
        self.send_response(code)
        if 300 <= code < 400:
            self.send_header("Location", "http://elsewhere.example/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return


OURS: Reply = (200, b'{"info": {"title": "rlhf reward server"}}')


def right(number: int, body: dict[str, Any]) -> Reply:
    """The length of each response, or of each whole text."""
    texts = body.get("responses") or body["query"]
    return 200, json.dumps({"rewards": [len(text) for text in texts]}).encode()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 1e-3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(remote.TOKEN, raising=False)


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Reply] = right, described: Reply = (404, b"")) -> Iterator[Server]:
    server = Server(answer, described)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


@contextmanager
def asking(server: Server, path: str = "/get_reward", **options: Any) -> Iterator[RemoteScorer]:
    scorer = RemoteScorer(RemoteOptions(url=server.url + path, **options))
    try:
        yield scorer
    finally:
        scorer.close()


def answers(count: int) -> list[Answer]:
    return [Answer(f"prompt {n} ", "x" * (n + 1), label=n) for n in range(count)]


def test_a_server_like_the_reference_systems_is_told_whole_texts_with_prompts_and_labels():
    with serving() as server, asking(server) as scorer:
        assert scorer.score([Answer("1 + 1 = ", "2", label="2"), Answer("a", "")]) == [9, 1]
    assert server.asked == [{"query": ["1 + 1 = 2", "a"], "prompts": ["1 + 1 = ", "a"], "labels": ["2", None]}]


def test_rlhf_serve_is_told_prompts_and_responses_apart_and_how_they_were_written_and_ended():
    asked = [
        Asked(Answer("a", "bc")),
        Asked(Answer("<u>d", "e"), "chat"),
        Asked(Answer("f", "ghi"), "text", complete=False),
    ]
    with serving(described=OURS) as server, asking(server) as scorer:
        assert scorer.start(asked).result() == [2, 1, 3]
    assert "/health" in server.paths
    assert sorted(server.asked, key=lambda body: body["rendered"]) == [
        {"prompts": ["<u>d"], "responses": ["e"], "rendered": "chat", "finish_reasons": ["stop"]},
        {"prompts": ["a", "f"], "responses": ["bc", "ghi"], "rendered": "text", "finish_reasons": ["stop", "length"]},
    ]


def test_a_response_without_text_is_asked_about_as_a_whole_text():
    with serving(described=OURS) as server, asking(server) as scorer:
        assert scorer.score([Answer("ab", ""), Answer("cd", "e")]) == [2, 1]
    assert {"query": ["ab"], "prompts": ["ab"]} in server.asked


def test_what_is_sent_is_what_rlhf_serve_takes():
    from rlhf_infer.serve.protocol import RewardRequest

    with serving(described=OURS) as server, asking(server) as scorer:
        scorer.score([*answers(3), Answer("p", "")])
    with serving() as plain, asking(plain) as scorer:
        scorer.score(answers(3))
    assert len(server.asked) == 2
    for body in [*server.asked, *plain.asked]:
        RewardRequest.model_validate(body)


def test_many_answers_go_out_in_several_requests_and_come_back_in_order(monkeypatch):
    monkeypatch.setattr(remote, "SAMPLES", 3)
    both = threading.Barrier(2)

    def together(number: int, body: dict[str, Any]) -> Reply:
        if number < 2:
            both.wait(30)  # breaks, and fails the test, if the second request waits for the first
        return right(number, body)

    with serving(together, OURS) as server, asking(server) as scorer:
        assert scorer.score(answers(10)) == list(range(1, 11))
    assert Counter(len(body["responses"]) for body in server.asked) == {3: 3, 1: 1}


def test_a_reward_of_zero_is_a_reward():
    with serving(lambda *_: (200, b'{"rewards": [0.0, 0, -1e3]}')) as server, asking(server) as scorer:
        assert scorer.score(answers(3)) == [0.0, 0.0, -1000.0]


TROUBLE = {
    "nothing": None,
    "a fault of the server": (500, b"boom"),
    "a busy server": (503, b"wait"),
    "too many requests": (429, b"slow down"),
    "no JSON": (200, b"<html>"),
    "another shape": (200, b'{"scores": [1, 2]}'),
    "no object": (200, b"[1, 2]"),
    "no list": (200, b'{"rewards": 3}'),
    "too few rewards": (200, b'{"rewards": [1]}'),
    "too many rewards": (200, b'{"rewards": [1, 2, 3]}'),
    "not a number": (200, b'{"rewards": [1, NaN]}'),
    "infinity": (200, b'{"rewards": [1, 1e999]}'),
    "text": (200, b'{"rewards": ["1", "2"]}'),
    "a truth value": (200, b'{"rewards": [true, false]}'),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_request_is_repeated_until_its_trouble_has_passed(kind):
    def at_first(number: int, body: dict[str, Any]) -> Reply:
        return TROUBLE[kind] if number < 2 else right(number, body)

    with serving(at_first) as server, asking(server, retries=2) as scorer:
        assert scorer.score(answers(2)) == [10, 11]
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nothing", "no answer: "),
        ("a fault of the server", "answers 500: boom"),
        ("no JSON", "answers '<html>'"),
        ("too few rewards", "1 rewards for 2 responses"),
        ("not a number", "nan, which is no finite number"),
    ],
)
def test_trouble_that_does_not_pass_ends_with_the_url_the_cause_and_the_request(kind, said):
    with serving(lambda *_: TROUBLE[kind]) as server, asking(server, retries=1) as scorer:
        with pytest.raises(RunError, match=said) as caught:
            scorer.score(answers(2))
        assert server.url in str(caught.value)
        assert "asked 2 times for 2 responses, the first to 'prompt 0 '" in str(caught.value)
        assert len(server.asked) == 2


def test_a_server_that_hangs_is_left_after_its_time():
    freed = threading.Event()

    def hang(*_: Any) -> Reply:
        freed.wait(30)
        return None

    with serving(hang) as server, asking(server, retries=1) as scorer:
        scorer.options = replace(scorer.options, timeout=0.1)
        with pytest.raises(RunError, match=r"no answer within 0.1 s \(--remote_rm_timeout\) \(asked 2 times"):
            scorer.score(answers(1))
        freed.set()


def test_a_request_that_is_refused_is_not_repeated():
    with serving(lambda *_: (422, b'{"detail": "sample 1: too long"}')) as server, asking(server) as scorer:
        with pytest.raises(RunError, match=r"refuses a request \(422\).*sample 1: too long"):
            scorer.score(answers(2))
        assert len(server.asked) == 1


def test_samples_follow_no_redirect():
    with serving(lambda *_: (307, b"")) as server, asking(server) as scorer:
        with pytest.raises(RunError, match=r"redirects to http://elsewhere\.example/"):
            scorer.score(answers(1))
        assert len(server.asked) == 1


def test_an_endless_answer_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(remote, "LARGEST", 1000)
    endless = serving(lambda *_: (200, b"[" * 100_000))
    refused = pytest.raises(RunError, match="more than 1,000 bytes")
    with endless as server, asking(server, retries=0) as scorer, refused:
        scorer.score(answers(1))


def test_the_token_is_sent_and_never_said(monkeypatch):
    monkeypatch.setenv(remote.TOKEN, "a-secret")
    with serving(lambda *_: (500, b"")) as server, asking(server, retries=0) as scorer:
        with pytest.raises(RunError) as caught:
            scorer.score(answers(1))
        assert server.headers[0]["Authorization"] == "Bearer a-secret"
    assert "a-secret" not in str(caught.value) + scorer.describe + repr(scorer.options)


@pytest.mark.parametrize("token", ["two words", "line\nend", "ümlaut"])
def test_a_token_that_no_header_can_hold_is_refused_without_being_said(monkeypatch, token):
    monkeypatch.setenv(remote.TOKEN, token)
    with pytest.raises(InputError, match=remote.TOKEN) as caught:
        check_server(RemoteOptions(url="http://127.0.0.1:5000"))
    assert token not in str(caught.value)


def test_a_url_without_a_path_is_asked_where_rlhf_serve_answers():
    with serving() as server, asking(server, "") as scorer:
        scorer.score(answers(1))
    assert "/get_reward" in server.paths


def test_a_server_with_a_path_of_its_own_only_has_to_answer():
    with serving() as server, asking(server, "/judge?model=a") as scorer:
        assert scorer.score(answers(1)) == [10]
    assert server.paths == ["/judge?model=a", "/judge?model=a"]


def test_a_server_that_nobody_reaches_is_named_before_anything_starts():
    with serving() as server:
        url = server.url
    with pytest.raises(RunError, match=f"{url}/get_reward: no answer: .*asked 3 times"):
        RemoteScorer(RemoteOptions(url=url, retries=2))


def test_a_server_that_cannot_score_is_named_before_anything_starts():
    def sick(self: Handler) -> None:
        self.reply(OURS if self.path == "/openapi.json" else (503, b'{"detail": "the thread has died"}'))

    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", sick)
        with pytest.raises(RunError, match="the thread has died"):
            RemoteScorer(RemoteOptions(url=server.url, retries=1))


def test_a_server_that_refuses_the_token_is_an_error_of_the_user():
    with (
        serving(described=(401, b"")) as server,
        pytest.raises(InputError, match=f"set the environment.*{remote.TOKEN}"),
    ):
        RemoteScorer(RemoteOptions(url=server.url))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/x", "must be a URL such as"),
        ("file:///etc/passwd", "must be a URL such as"),
        ("localhost:5000", "must be a URL such as"),
        ("http://", "must be a URL such as"),
        ("http://host:99999/x", "is no URL"),
        ("http://me:hidden@host/x", "written to the run's record"),
        ("http://host/x#y", "behind `#`"),
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url, said):
    with pytest.raises(InputError, match=said) as caught:
        check_server(RemoteOptions(url=url))
    assert "hidden" not in str(caught.value)


def test_closing_ends_the_repetition_of_requests(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 600.0)
    failing = threading.Event()

    def fail(*_: Any) -> Reply:
        failing.set()
        return 500, b""

    with serving(fail) as server, asking(server) as scorer:
        pending = scorer.start([Asked(answer) for answer in answers(1)])
        assert failing.wait(30)
        scorer.close()
        with pytest.raises(RunError, match="answers 500"):
            pending.result()
