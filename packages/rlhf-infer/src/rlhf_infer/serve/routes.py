"""The paths of the reward server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from rlhf_infer.serve.batcher import Batcher, ClosingError, OverloadedError, ScorerError
from rlhf_infer.serve.config import LimitsConfig
from rlhf_infer.serve.gate import Application, Gate
from rlhf_infer.serve.judge import Judge, RefusedError
from rlhf_infer.serve.metrics import Metrics
from rlhf_infer.serve.protocol import VERSION, Health, Refusal, RewardAnswer, RewardRequest

REASONS = {
    400: "The body cannot be read.",
    401: "The bearer token is missing or wrong.",
    408: "The body was not there in time.",
    413: "The body is too large.",
    422: "The request is not one of the protocol, or samples in it cannot be scored.",
    500: "The scorer failed on this request's samples.",
    503: "Too many samples are waiting, or the server cannot score.",
    504: "The rewards were not there in time.",
}
"""Status codes besides 200."""


class Unanswered(HTTPException):
    """A request that gets a reason instead of rewards."""

    def __init__(self, code: int, detail: str, *, indices: Iterable[int] = (), retry_after: int | None = None) -> None:
        super().__init__(code, detail, None if retry_after is None else {"Retry-After": str(retry_after)})
        self.indices = sorted(indices)


def make_app(
    judge: Judge, limits: LimitsConfig, *, name: str, token: str | None = None, stop_seconds: float = 10,
    log: Callable[[str], None] = print,
) -> tuple[Application, Batcher]:  # fmt: skip
    """The server as an ASGI application.

    Args:
        judge: what reads and scores.
        limits: of requests.
        name: of the model, for the answers.
        token: bearer token that clients must send; None for none.
        stop_seconds: to wait at the end for a batch that is being scored.
        log: takes one line per request.

    Returns:
        The application, and what batches for it: closing that ends requests that wait.
    """
    metrics = Metrics()
    batcher = Batcher(judge, batch_size=limits.batch_size, max_waiting=limits.max_waiting, metrics=metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop(stop_seconds)

    app = FastAPI(
        title="rlhf reward server", version=str(VERSION), lifespan=lifespan, docs_url=None, redoc_url=None,
        dependencies=[] if token is None else [Depends(HTTPBearer(auto_error=False))],  # for the description: see Gate
    )  # fmt: skip
    app.add_exception_handler(HTTPException, refusal)
    app.add_exception_handler(RequestValidationError, misunderstanding)
    app.add_exception_handler(Exception, accident)
    add_rewards(app, batcher, limits, name)
    add_watching(app, batcher, metrics, name)
    gate = Gate(
        app, token=token, max_body_bytes=limits.max_body_bytes, read_seconds=limits.request_timeout, metrics=metrics,
        log=log,
    )  # fmt: skip
    return gate, batcher


def add_rewards(app: FastAPI, batcher: Batcher, limits: LimitsConfig, name: str) -> None:
    @app.post("/get_reward", responses=documented(*REASONS), summary="Rewards (the reference system's path)")
    @app.post("/v1/rewards", responses=documented(*REASONS), summary="Rewards")
    async def rewards(asked: RewardRequest, request: Request) -> RewardAnswer:
        questions = asked.questions()
        request.state.samples = len(questions)
        if len(questions) > limits.max_queries:
            detail = (
                f"{len(questions)} samples in one request, and at most {limits.max_queries} are taken (--max_queries)"
            )
            raise Unanswered(422, detail)
        try:
            async with asyncio.timeout(limits.request_timeout):
                scores = await batcher.submit(questions)
        except RefusedError as error:
            raise Unanswered(422, str(error), indices=error.reasons) from error
        except OverloadedError as error:
            detail = f"{batcher.waiting} samples are waiting, and at most {limits.max_waiting} may (--max_waiting)"
            raise Unanswered(503, detail, retry_after=1) from error
        except ClosingError as error:
            raise Unanswered(503, batcher.trouble or "", retry_after=10) from error
        except ScorerError as error:
            raise Unanswered(500, str(error)) from error
        except TimeoutError as error:
            detail = f"no rewards within {limits.request_timeout:g} s (--request_timeout)"
            raise Unanswered(504, detail) from error
        return RewardAnswer(rewards=scores.rewards, model=name, truncated=scores.truncated)


def add_watching(app: FastAPI, batcher: Batcher, metrics: Metrics, name: str) -> None:
    @app.get("/health", responses=documented(503), summary="Whether the server can score")
    async def health() -> Health:
        if trouble := batcher.trouble:
            raise Unanswered(503, trouble)
        return Health(model=name)

    @app.get("/metrics", responses=documented(401), response_class=PlainTextResponse, summary="Prometheus metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    """How status codes are described in the OpenAPI document."""
    return {code: {"model": Refusal, "description": REASONS[code]} for code in codes}


async def refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    content = Refusal(detail=str(error.detail), indices=getattr(error, "indices", []))
    return JSONResponse(content.model_dump(), error.status_code, headers=error.headers)


async def misunderstanding(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a body, where; never what it says there: that may be secret, large, or no text at all."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    first = faults[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    detail = f"{place}: {first['msg']}{others}".removeprefix(": ").replace("Value error, ", "")
    if "json" not in request.headers.get("content-type", ""):
        detail += " (a body is read as JSON if the header says `content-type: application/json`)"
    return JSONResponse(Refusal(detail=detail, indices=[]).model_dump(), 422)


async def accident(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours; uvicorn logs where."""
    return JSONResponse(Refusal(detail=f"the server failed: {type(error).__name__}").model_dump(), 500)
