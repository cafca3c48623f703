"""The rollout worker: an engine behind HTTP, for trainers and whoever speaks OpenAI's API.

    GET  /health               is it up, which version does it hold, how full is it
    GET  /metrics              Prometheus
    GET  /v1/models            what is served
    POST /v1/completions       OpenAI's, streamed or whole; token ids in and out
    POST /v1/chat/completions  the same of a conversation
    POST /v1/generate          a trainer's request: exact numbers, answered once however often asked
    DELETE /v1/generate/ID     ends it
    GET  /v1/weights           what is held, a checksum a tensor
    POST /v1/weights           new weights or a new adapter, proven before they are used
    POST /v1/weights/broadcast the same from a trainer's process group

A request is answered as it was asked or refused in one line; an asker who leaves gives back his
slots. The rooms behind it: `serving.door` refuses, `rollout.serving.driver` owns the engine,
`.worker` asks it, `.openai` shapes answers; `rollout.wire` is the form of it all.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse

from rollout.serving.openai import Answer
from rollout.serving.worker import RefusedError, Worker
from rollout.wire import (
    BroadcastRequest,
    ChatRequest,
    CompletionRequest,
    ErrorDetail,
    ErrorResponse,
    GenerateRequest,
    Health,
    PushRequest,
)
from serving.answers import Answers, WithdrawnError
from serving.door import GONE, JSON, Door, add_refusals
from serving.server import config_of

PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/generate"),
    *("/v1/models", "/v1/weights", "/v1/weights/broadcast"),
)
SHOWN_ERRORS = 3
LINGER_S = 10.0
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key",
    404: "not_found",
    409: "reused_id",
    413: "too_large",
    500: "internal",
}

Result = TypeVar("Result")


class _LeftError(Exception):
    """The asker has hung up."""


async def _while_asked(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives; it is cancelled if the asker hangs up first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _LeftError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(worker: Worker) -> Door:
    """The worker as an ASGI app; it is closed with the app's lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(
        title="hybrid-align rollout worker",
        description="Samples of a policy, and which policy it is.",
        lifespan=lifespan,
    )
    _add_openai(app, worker)
    _add_trainers(app, worker)
    _add_watching(app, worker)
    _add_handlers(app)
    add_refusals(app, error_body)
    settings = worker.settings
    return Door(
        app,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        paths=PATHS,
        refusal=error_body,
        metrics=worker.metrics,
    )


def _add_openai(app: FastAPI, worker: Worker) -> None:
    async def answer(request: Request, asked: CompletionRequest | ChatRequest) -> Response:
        made = Answer(
            worker,
            asked,
            f"{'chat' if isinstance(asked, ChatRequest) else ''}cmpl-{uuid.uuid4().hex}",
        )
        if not asked.stream:
            return Response(await _while_asked(request, made.whole()), media_type=JSON)
        events = made.events()
        # the first step is acceptance: a refusal is an answer of its own, not an event
        await _while_asked(request, anext(events))
        return StreamingResponse(_to_the_end(events), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continues a prompt."""
        return await answer(request, asked)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answers a conversation."""
        return await answer(request, asked)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        """The one model that is served."""
        one = {
            "id": worker.settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "hybrid-align",
            "max_model_len": worker.settings.max_tokens,
        }
        return {"object": "list", "data": [one]}


async def _to_the_end(events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """Events that are closed when the asker leaves; an engine that breaks off is the last of them.

    The status is out by then, so only an event can say it.
    """
    async with aclosing(events):
        try:
            async for event in events:
                if event:
                    yield event
        except RefusedError as error:
            yield b"data: " + _refusal(error) + b"\n\n"


def _add_trainers(app: FastAPI, worker: Worker) -> None:
    answers = Answers(worker.settings.kept_bytes, linger_s=LINGER_S)

    @app.post("/v1/generate")
    async def generate(request: Request, asked: GenerateRequest) -> Response:
        """Samples of one request, with everything that a trainer asks of them."""

        async def make() -> bytes:
            return (await worker.generate(asked)).model_dump_json().encode()

        body = await request.body()
        try:
            made = await _while_asked(request, answers.once(asked.id, body, make))
        except WithdrawnError as error:
            raise RefusedError(409, "withdrawn", str(error)) from error
        return Response(made, media_type=JSON)

    @app.delete("/v1/generate/{key}")
    async def withdraw(key: str) -> Response:
        """Ends a request that nobody wants any more; its slots are free at once."""
        answers.withdraw(key)
        return Response(status_code=204)

    @app.get("/v1/weights")
    async def weights() -> Response:
        """What is held."""
        return Response((await worker.weights()).model_dump_json(), media_type=JSON)

    @app.post("/v1/weights")
    async def push(asked: PushRequest) -> Response:
        """Takes new weights."""
        return Response((await worker.push(asked)).model_dump_json(), media_type=JSON)

    @app.post("/v1/weights/broadcast")
    async def receive(asked: BroadcastRequest) -> Response:
        """Joins a trainer's process group and takes the weights that it sends."""
        return Response((await worker.receive(asked)).model_dump_json(), media_type=JSON)


def _add_watching(app: FastAPI, worker: Worker) -> None:
    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Whether the worker takes requests, and which policy it holds."""
        told = worker.health()
        return Response(
            told.model_dump_json(), 200 if told.status == "ok" else 503, media_type=JSON
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4")


def error_body(status: int, message: str, *, code: str = "", param: str | None = None) -> bytes:
    """The one form of every refusal, which is OpenAI's."""
    # a message may quote a key of the body that is no text
    shown = message.encode("utf-8", "replace").decode()
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or CODES.get(status, "bad_request")
    detail = ErrorDetail(message=shown, type=kind, code=code, param=param)
    return ErrorResponse(error=detail).model_dump_json().encode()


def _refusal(error: RefusedError) -> bytes:
    return error_body(error.status, str(error), code=error.code, param=error.param)


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        headers = {"retry-after": str(error.retry_s)} if error.retry_s else None
        return Response(_refusal(error), error.status, headers, media_type=JSON)

    @app.exception_handler(_LeftError)
    async def left(request: Request, error: _LeftError) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        if found[0]["type"] == "json_invalid":
            text, param = f"the body is not JSON: {found[0]['ctx']['error']}", None
        else:
            places = [".".join(map(str, one["loc"][1:] or one["loc"])) for one in found]
            told = zip(places[:SHOWN_ERRORS], found[:SHOWN_ERRORS], strict=True)
            text = "; ".join(f"{place}: {one['msg']}" for place, one in told)
            param = places[0].split(".")[0]
        body = error_body(400, text, param=param)
        return Response(body, 400, media_type=JSON)


def make_server(door: Door) -> uvicorn.Server:
    """A server that, told to stop, answers what is inside and takes nothing more."""
    return uvicorn.Server(config_of(door))
