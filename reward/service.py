"""The scoring API: a scorer behind HTTP, for many clients at once.

    GET  /health      is it up, who judges, how full is the queue
    GET  /metrics     Prometheus
    POST /v1/score    items to scores, probabilities, dimensions, signals
    POST /get_reward  the same in the form that OpenRLHF's remote reward URL expects

A request is answered as a whole: every item has its score, or the request is refused and says
which items are at fault. Over-long input is refused, never truncated; a judge that failed gives
`valid: false`, never 0. Where the device is lost (a fatal CUDA error, say), nothing more can be
judged: /health says `broken` with 503, and so does every request, until whoever watches it starts
the process anew; clients ask again until then.

The rooms behind it: `serving.door` refuses, `reward.serving.judging` asks, `.batching` packs and
scores; `reward.wire` is the form of it all.
"""

from __future__ import annotations

import asyncio
import math
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer

from reward.serving.judging import RefusedError, Service
from reward.wire import (
    ErrorCode,
    ErrorDetail,
    ErrorResponse,
    Health,
    ItemError,
    RewardRequest,
    RewardResponse,
    ScoreRequest,
    ScoreResponse,
)
from serving.answers import Answers
from serving.door import JSON, Door, add_refusals
from serving.server import config_of

SCORING = ("/v1/score", "/get_reward")
KEPT_BYTES = 64 << 20
SHOWN_ERRORS = 5
REFUSALS = {
    400: "the body is not JSON",
    401: "wrong or missing key",
    409: "the id was another request's",
    413: "more than the service takes at once",
    422: "the body, or some of its items, cannot be judged",
    429: "the queue is full; Retry-After says for how long",
    503: "the service is stopping, or broken",
}
CODES: dict[int, ErrorCode] = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    409: "reused_id",
    413: "too_large",
    500: "internal",
    503: "draining",
}


def error_body(code: ErrorCode, message: str, items: tuple[ItemError, ...] = ()) -> bytes:
    """The one form of every refusal."""
    # A message may quote a key of the body that is no text.
    shown = message.encode("utf-8", "replace").decode()
    detail = ErrorDetail(code=code, message=shown, items=items)
    return ErrorResponse(error=detail).model_dump_json().encode()


def _refusal(status: int, message: str) -> bytes:
    return error_body(CODES.get(status, "malformed"), message)


def create_app(service: Service) -> Door:
    """The service as an ASGI app; its queue is closed with the app's lifespan.

    Example:
        >>> from reward.scorer import InProcessScorer
        >>> create_app(Service(InProcessScorer())).is_closing
        False
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(
        title="hybrid-align scoring API",
        version=service.judge.version,
        description="Scores of responses, down to the signals they are made of.",
        lifespan=lifespan,
    )
    door = Door(
        app,
        api_key=service.settings.api_key,
        max_body_bytes=service.settings.max_body_bytes,
        paths=SCORING,
        refusal=_refusal,
        metrics=service.metrics,
    )
    _add_scoring(app, service)
    _add_watching(app, service, door)
    _add_handlers(app)
    add_refusals(app, _refusal)
    return door


def _add_scoring(app: FastAPI, service: Service) -> None:
    answers = Answers(KEPT_BYTES, linger_s=math.inf)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": text} for status, text in REFUSALS.items()
    }
    # The door has checked the key; here it is only told to those who read the OpenAPI.
    key = [Security(HTTPBearer(auto_error=False, description="the service's key, if it has one"))]

    @app.post("/v1/score", response_model=ScoreResponse, responses=refusals, dependencies=key)
    async def score(request: Request, asked: ScoreRequest) -> Response:
        """Scores of a batch of responses, in order."""
        request_id = asked.id or uuid.uuid4().hex

        async def make() -> bytes:
            answer = await service.score(asked.model_copy(update={"id": request_id}))
            return answer.model_dump_json().encode()

        body = await request.body()
        return Response(await answers.once(request_id, body, make), media_type=JSON)

    @app.post("/get_reward", response_model=RewardResponse, responses=refusals, dependencies=key)
    async def get_reward(asked: RewardRequest) -> Response:
        """Rewards in OpenRLHF's form; it sends the key as http://any:KEY@host/get_reward."""
        answer = await service.reward(asked)
        return Response(answer.model_dump_json(), media_type=JSON)


def _add_watching(app: FastAPI, service: Service, door: Door) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether the service takes requests, and who judges."""
        failure = service.batcher.failure
        told = Health(
            status="broken" if failure else "draining" if door.is_closing else "ok",
            reason=failure,
            judge=service.judge,
            queue_items=service.batcher.queue_items,
            queue_tokens=service.batcher.queue_tokens,
        )
        status = 200 if told.status == "ok" else 503
        return Response(told.model_dump_json(), status_code=status, media_type=JSON)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        headers = {"retry-after": str(error.retry_s)} if error.retry_s else None
        body = error_body(error.code, str(error), error.items)
        return Response(body, error.status, headers, media_type=JSON)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        if found[0]["type"] == "json_invalid":
            text = f"not JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}"
            return Response(error_body("malformed", text), 400, media_type=JSON)
        lines = [
            ".".join(str(part) for part in one["loc"][1:] or one["loc"]) + f": {one['msg']}"
            for one in found[:SHOWN_ERRORS]
        ]
        more = f"; {len(found) - SHOWN_ERRORS} more" if len(found) > SHOWN_ERRORS else ""
        return Response(error_body("malformed", "; ".join(lines) + more), 422, media_type=JSON)


class Server(uvicorn.Server):
    """Stops in good order: the first signal closes the door and lets what is inside be answered.

    Args:
        door: of the app that is served.
    """

    def __init__(self, door: Door) -> None:
        super().__init__(config_of(door))
        self._door = door
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers until it is told to stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called with a signal; the second one does not wait for the queue."""
        leave = super().handle_exit
        if self._loop is None or self._door.is_closing:
            leave(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._door.close, lambda: leave(sig, frame))
