"""uvicorn, started and ended as a command should: it says when it listens, and a signal to stop is no failure."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from rlhf_infer.serve.gate import Application

KEEP_ALIVE_SECONDS = 30
"""How long an idle connection is kept for the client's next request."""

HEADER_BYTES = 64 * 1024
"""Most bytes of a request's headers."""


class Server(uvicorn.Server):
    """A server of one application.

    Args:
        app: what answers.
        seconds: within which running requests must end when the server does.
        started: called when connections are accepted.
        stopping: called when no more are, before running requests are waited for.
    """

    def __init__(
        self, app: Application, *, seconds: float, started: Callable[[], None], stopping: Callable[[], None]
    ) -> None:
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=int(seconds),
            h11_max_incomplete_event_size=HEADER_BYTES,
        )  # fmt: skip
        super().__init__(config)
        self.when_started, self.when_stopping = started, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.when_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.when_stopping()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End when told to. uvicorn would raise the signal again afterwards, as if it had not been handled."""
        handlers = {sign: signal.signal(sign, self.handle_exit) for sign in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
