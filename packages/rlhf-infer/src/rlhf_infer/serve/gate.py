"""What every request passes before the application sees it: the token, the size of its body, and a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from rlhf_infer.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)
"""Paths that need no token."""

LEFT = 499
"""What is logged for a client that left before it was answered (nginx's code)."""


class GoneError(Exception):
    """The client left while it was sending."""


class Gate:
    """An ASGI application around another one.

    The body is read here, whole, so that it is bounded however it is sent, and a client that leaves is noticed: what it
    asked for is cancelled.

    Args:
        app: the application inside.
        token: what clients must send as a bearer token; None lets everybody in.
        max_body_bytes: largest body; a larger one is answered with 413.
        read_seconds: within which a body must be there; else 408.
        metrics: where to count.
        log: takes one line per request.
    """

    def __init__(
        self, app: Application, *, token: str | None, max_body_bytes: int, read_seconds: float, metrics: Metrics,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.app, self.max_body_bytes, self.read_seconds = app, max_body_bytes, read_seconds
        self.token = None if token is None else token.encode()
        self.metrics, self.log = metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, code = time.monotonic(), LEFT

        async def watched(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.answer(scope, receive, watched)
        finally:
            self.metrics.requests.labels(code).inc()
            self.log(line(scope, code, time.monotonic() - began))

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if not self.may_pass(scope):
            return await refuse(send, 401, "a bearer token is needed", {"www-authenticate": "Bearer"})
        try:
            async with asyncio.timeout(self.read_seconds):
                body = await self.body(scope, receive)
        except GoneError:
            return None
        except TimeoutError:
            seconds = f"{self.read_seconds:g} s"
            return await refuse(send, 408, f"the body was not there within {seconds}", {"connection": "close"})
        if body is None:
            limit = f"the body has more than {self.max_body_bytes} bytes (--max_body_bytes)"
            return await refuse(send, 413, limit, {"connection": "close"})
        return await self.pass_on(scope, body, receive, send)

    def may_pass(self, scope: Scope) -> bool:
        """Whether the request has the token, or needs none."""
        if self.token is None or scope["path"] in OPEN:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token)

    async def body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if it is too large."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)

    async def pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application on a body, until it has answered or the client has left."""
        left = asyncio.create_task(departure(receive))
        bodies = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(bodies, None) or await asyncio.shield(left)

        answered = asyncio.create_task(_run(self.app(scope, replay, send)))
        try:
            await asyncio.wait({answered, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not answered.done():
                answered.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answered
        if not answered.cancelled():
            answered.result()


async def _run(application: Awaitable[None]) -> None:
    await application


async def departure(receive: Receive) -> Message:
    """Wait until the client leaves."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


async def refuse(send: Send, code: int, detail: str, headers: dict[str, str]) -> None:
    """Answer with a reason, as the application does."""
    body = json.dumps({"detail": detail, "indices": []}).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(body))} | headers
    start = [(name.encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": code, "headers": start})
    await send({"type": "http.response.body", "body": body})


def line(scope: Scope, code: int, seconds: float) -> str:
    """What is logged of a request: who, what, how many samples, how long; nothing of its contents."""
    client = scope.get("client") or ["-"]
    samples = scope["state"].get("samples", 0)
    path = quote(scope["path"])[:100]  # quoted, so that no path can write a line of its own
    return f"{client[0]} {scope['method']} {path} {code} {samples} samples {1000 * seconds:.1f} ms"
