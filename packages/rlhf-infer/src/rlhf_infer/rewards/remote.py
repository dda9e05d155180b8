"""Rewards by a server over HTTP: `rlhf serve`, or whatever speaks what the reference system's servers speak.

A server that says it is `rlhf serve` is told prompts and responses apart, so that what it scores is what `rlhf score` would.
Any other one gets `{"query": [prompt + response, …], "prompts": […], "labels": […]}`. Both answer `{"rewards": […]}`.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

from rlhf_data.errors import InputError, RunError
from rlhf_infer.rewards.function import is_finite
from rlhf_infer.rewards.scorer import Answer, Judgement, Scorer

TOKEN = "RLHF_REMOTE_RM_TOKEN"
"""The environment variable that holds the bearer token."""

SECRET = re.compile(r"token|key|secret|password|auth|signature", re.IGNORECASE)
"""Names of parameters of a URL whose values are nobody's business."""

PATHS = ("/get_reward", "/v1/rewards")
"""Where `rlhf serve` takes requests; the first is the reference system's, and taken where a URL has no path."""

TITLE = "rlhf reward server"
"""What `rlhf serve` calls itself in its `/openapi.json`."""

SAMPLES = 64
"""Most samples of a request."""

CONNECTIONS = 8
"""Requests that a server gets at the same time."""

FIRST_PAUSE = 1.0
"""Seconds before a request is repeated for the first time, on average half of it more; they double each time."""

LONGEST_PAUSE = 60.0
"""Seconds."""

LARGEST = 16 * 2**20
"""Bytes of an answer."""

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Codes with which the same request may succeed later."""


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """What decides how a server is asked."""

    url: str
    """Where, with `http` or `https`; without a path, at `/get_reward`."""

    option: str = "--remote_rm_url"
    """The option that named it, for errors."""

    timeout: float = 180
    """Seconds that a request may take."""

    retries: int = 5
    """How often a request is repeated."""

    seed: int = 0
    """Of the pauses, which differ so that clients do not all come back at once."""


@dataclass(frozen=True)
class Asked:
    """An answer, with how its prompt was written out and how it ended."""

    answer: Answer
    rendered: str = "text"
    complete: bool = True


class TroubleError(Exception):
    """A request has failed in a way that may pass.

    Args:
        said: what happened.
        pause: seconds that the server asks to be left alone.
        answered: whether it was the server that said so.
    """

    def __init__(self, said: str, *, pause: float = 0.0, answered: bool = False) -> None:
        super().__init__(said)
        self.pause, self.answered = pause, answered


class RefusedError(Exception):
    """A request that the server will not answer, however often it is sent."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code = code


def is_server(name: str) -> bool:
    """Whether what was named as a source of rewards is a server."""
    return "://" in name


def check_server(options: RemoteOptions) -> None:
    """Find what is wrong with a URL or a token, without asking anybody.

    Raises:
        InputError: with the way out.
    """
    said = f"{options.option} {without_secrets(options.url)}"
    try:
        url = urlsplit(options.url)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise InputError(f"{said} is no URL: {error}") from None
    if url.scheme not in ("http", "https") or not host:
        raise InputError(f"{said} must be a URL such as http://rewards.example:5000/get_reward")
    if url.username is not None or url.password is not None:
        raise InputError(
            f"{said}: a password in a URL would be written to the run's record; give the environment variable {TOKEN}"
        )
    if secrets := [name for name, _ in parse_qsl(url.query) if SECRET.search(name)]:
        raise InputError(
            f"{said}: `{secrets[0]}` behind the `?` would be written to the run's record; give a token in the environment "
            f"variable {TOKEN}"
        )
    if url.fragment:
        raise InputError(f"{said}: what stands behind `#` is sent to no server; leave it out")
    token = os.environ.get(TOKEN, "")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{TOKEN} holds something that no bearer token has (a space or a line end?)")


def without_secrets(url: str) -> str:
    """A URL without user and password, nor what stands behind a `?` if it holds a secret."""
    before, mark, query = url.partition("?")
    if any(SECRET.search(name) for name, _ in parse_qsl(query)):
        url = f"{before}{mark}…"
    scheme, mark, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}"


class RemoteScorer(Scorer):
    """A reward server.

    Requests go out from threads of this process, several at the same time, and are repeated when a connection fails, when
    the server says that it is busy or at fault, and when its answer is no answer.

    Args:
        options: which server, and how patient to be.

    Raises:
        InputError: the URL cannot be used, or the server refuses the token.
        RunError: the server cannot be reached, or says that it cannot score.
    """

    needs_tokens: ClassVar[bool] = False

    def __init__(self, options: RemoteOptions) -> None:
        check_server(options)
        self.options, self.url = options, full_url(options.url)
        self.name = f"{options.option} {urlunsplit(self.url)}"
        self._token = os.environ.get(TOKEN, "")
        self._open = urllib.request.build_opener(_NoRedirects).open
        self._random = random.Random(options.seed)
        self._closed = threading.Event()
        self._work: queue.SimpleQueue[tuple[Future[list[float]], list[Asked]] | None] = queue.SimpleQueue()
        self.speaks_apart = self._meet()
        for _ in range(CONNECTIONS):
            # not an executor's threads, which Python waits for when it ends
            threading.Thread(target=self._serve, daemon=True, name="reward requests").start()

    @property
    def describe(self) -> str:
        """How it is asked, for people."""
        how = "`rlhf serve`, told prompts and responses apart" if self.speaks_apart else "told whole texts (`query`)"
        return f"{urlunsplit(self.url)} ({how})"

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        return Judgement(self.start([Asked(answer) for answer in answers]).result())

    def start(self, asked: Sequence[Asked]) -> RemoteRewards:
        """Ask for the rewards of some answers, and do not wait."""
        batches = self._batches(asked)
        futures: list[Future[list[float]]] = []
        for batch in batches:
            futures.append(Future())
            self._work.put((futures[-1], [asked[place] for place in batch]))
        return RemoteRewards(batches, futures)

    def close(self) -> None:
        """Ask nothing more. Requests on their way are not waited for."""
        self._closed.set()
        for _ in range(CONNECTIONS):
            self._work.put(None)

    def _batches(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Places of what is asked together: alike in how prompts were written out, at most `SAMPLES`."""
        kinds: dict[Any, list[int]] = {}
        for place, one in enumerate(asked):
            kind = (one.rendered, not one.answer.response) if self.speaks_apart else None
            kinds.setdefault(kind, []).append(place)
        return [
            places[start : start + SAMPLES] for places in kinds.values() for start in range(0, len(places), SAMPLES)
        ]

    def _serve(self) -> None:
        """Send requests, one at a time, until closed."""
        while (work := self._work.get()) is not None:
            future, asked = work
            try:
                future.set_result(self._ask(asked))
            except Exception as error:  # it belongs to whoever waits for the rewards
                future.set_exception(error)

    def _ask(self, asked: list[Asked]) -> list[float]:
        body = json.dumps(self._body(asked)).encode()
        about = f"{len(asked)} responses, the first to {asked[0].answer.prompt[-80:]!r}"
        return self._patiently(lambda: rewards_of(self._call(self.url, body), len(asked)), about)

    def _body(self, asked: list[Asked]) -> dict[str, Any]:
        answers = [one.answer for one in asked]
        prompts, responses = [answer.prompt for answer in answers], [answer.response for answer in answers]
        labels = {} if all(answer.label is None for answer in answers) else {"labels": [a.label for a in answers]}
        # a response without text is no text to `rlhf serve`, but its prompt with an end is
        if self.speaks_apart and all(responses):
            ends = ["stop" if one.complete else "length" for one in asked]
            told = {"prompts": prompts, "responses": responses, "rendered": asked[0].rendered, "finish_reasons": ends}
            return told | labels
        whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return {"query": whole, "prompts": prompts} | labels

    def _meet(self) -> bool:
        """Make sure that the server answers; whether it says that it is `rlhf serve`."""
        base = self.url.path.removesuffix(next((path for path in PATHS if self.url.path.endswith(path)), ""))
        if base == self.url.path:  # nobody knows what else there is
            self._patiently(self._knock, "any answer at all")
            return False
        described = self._patiently(lambda: self._find(f"{base}/openapi.json"), "a description of itself")
        try:
            ours = json.loads(described)["info"]["title"] == TITLE
        except (ValueError, KeyError, TypeError):
            return False
        if ours:
            self._patiently(lambda: self._find(f"{base}/health"), "word that it can score")
        return ours

    def _find(self, path: str) -> bytes:
        """What the server has at a path; nothing where it has no such path."""
        try:
            return self._call(self.url._replace(path=path, query=""))
        except RefusedError as error:
            if error.code in (401, 403):
                raise InputError(
                    f"{self.name} refuses the bearer token ({error.code}): set the environment variable {TOKEN}"
                ) from None
            return b""

    def _knock(self) -> None:
        """See whether anybody answers, whatever they say."""
        try:
            self._call(self.url)
        except RefusedError:
            return
        except TroubleError as trouble:
            if not trouble.answered:
                raise

    def _patiently(self, call: Any, about: str) -> Any:
        """The result of a request that is repeated while its trouble may pass."""
        for attempt in range(self.options.retries + 1):
            try:
                return call()
            except TroubleError as trouble:
                if attempt == self.options.retries or self._closed.is_set():
                    times = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise RunError(
                        f"{self.name}: {trouble} (asked {times} for {about}); see to the server, or give more "
                        "--remote_rm_retries or a longer --remote_rm_timeout"
                    ) from trouble
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 16)) * (1 + self._random.random())
                self._closed.wait(max(pause, trouble.pause))
            except RefusedError as error:
                raise RunError(f"{self.name} refuses a request ({error.code}) for {about}: {error}") from None
        raise AssertionError("the last attempt returns or raises")

    def _call(self, url: SplitResult, body: bytes | None = None) -> bytes:
        """One request.

        Raises:
            TroubleError: it failed in a way that may pass.
            RefusedError: it failed in a way that will not.
        """
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body else {})
        request = urllib.request.Request(urlunsplit(url), body, headers)
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        deadline = time.monotonic() + self.options.timeout
        try:
            with self._open(request, timeout=self.options.timeout) as answer:
                return read_until(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                said = text_of(error, deadline)
            if error.code in PASSING:
                pause = pause_of(error.headers.get("Retry-After"))
                raise TroubleError(f"it answers {error.code}: {said}", pause=pause, answered=True) from None
            if 300 <= error.code < 400:
                said = (
                    f"it redirects to {error.headers.get('Location', 'nowhere')}; give that URL if it is the right one"
                )
            raise RefusedError(error.code, said) from None
        except TimeoutError:
            raise TroubleError(f"no answer within {self.options.timeout:g} s (--remote_rm_timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise TroubleError(f"no connection within {self.options.timeout:g} s (--remote_rm_timeout)") from None
            raise TroubleError(f"no answer: {str(cause) or type(cause).__name__}") from None


class RemoteRewards:
    """Rewards that are on their way.

    Args:
        batches: places of what was asked together.
        futures: of the rewards of each batch.
    """

    def __init__(self, batches: Sequence[Sequence[int]], futures: Sequence[Future[list[float]]]) -> None:
        self.batches, self.futures = batches, futures

    def result(self) -> list[float]:
        """All of them, in the order in which they were asked for; waits.

        Raises:
            RunError: the server has not given them, however often it was asked.
        """
        found = {
            place: reward
            for places, future in zip(self.batches, self.futures, strict=True)
            for place, reward in zip(places, future.result(), strict=True)
        }
        return [found[place] for place in range(len(found))]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows none: a redirected POST loses its body, and may take the samples to somebody else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def full_url(url: str) -> SplitResult:
    """Where to send requests."""
    split = urlsplit(url)
    return split._replace(path=PATHS[0]) if split.path in ("", "/") else split


def read_until(answer: Any, deadline: float) -> bytes:
    """A whole body, if it is there in time and of a sensible size."""
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise TroubleError(f"its answer has more than {LARGEST:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def pause_of(retry_after: str | None) -> float:
    """Seconds that a server asks to be left alone; a date is taken for none."""
    return min(LONGEST_PAUSE, float(retry_after)) if retry_after and retry_after.isdigit() else 0.0


def text_of(error: urllib.error.HTTPError, deadline: float) -> str:
    """What the body of an error says, in one line; the code's own words where it cannot be read."""
    try:
        said = read_until(error, deadline)[:1000].decode(errors="replace")
    except (OSError, http.client.HTTPException, TroubleError):
        said = ""
    return " ".join(said.split()) or str(error.reason)


def rewards_of(answer: bytes, count: int) -> list[float]:
    """Rewards in a server's answer.

    Raises:
        TroubleError: it is not JSON with as many finite numbers as were asked for.
    """
    shown = answer[:200].decode(errors="replace")
    try:
        rewards = json.loads(answer)["rewards"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TroubleError(f'it answers {shown!r}, not {{"rewards": […]}}') from None
    if not isinstance(rewards, list):
        raise TroubleError(f"its `rewards` are no list: {shown!r}")
    if len(rewards) != count:
        raise TroubleError(f"it answers {len(rewards)} rewards for {count} responses")
    for reward in rewards:
        if isinstance(reward, bool) or not is_finite(reward):
            raise TroubleError(f"it answers {reward!r:.80}, which is no finite number")
    return [float(reward) for reward in rewards]
