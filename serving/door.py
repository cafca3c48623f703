"""What every request passes before it is read: the key, the size, and whether the house is open.

An ASGI layer and not a dependency of the routes, because a body must not be read before its sender
is known, nor kept when it is too large.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serving.answers import ReusedIdError
from serving.metrics import RequestMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Refusal = Callable[[int, str], bytes]
"""The body of an answer that is not 200, from its status and what is to be said."""

JSON = "application/json"
OPEN = ("/health", "/metrics")
BODILESS = ("GET", "HEAD", "OPTIONS", "DELETE")
# nginx's status for an asker who left before the answer; nobody is there to read it
GONE = 499
# A body up to this many times the limit is read to its end and dropped: a sender that is cut off
# in the middle sees a broken connection instead of the answer.
DROPPED_TIMES = 8


class Door:
    """Wraps the app: refuses, counts, and knows what is inside.

    Args:
        api_key: "" lets everybody in; /health and /metrics are open always.
        max_body_bytes: longest body.
        paths: counted under their names, all others as one.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str,
        max_body_bytes: int,
        paths: tuple[str, ...],
        refusal: Refusal,
        metrics: RequestMetrics,
    ) -> None:
        self._app = app
        self._key = api_key.encode()
        self._max_body_bytes = max_body_bytes
        self._paths = (*paths, *OPEN)
        self._refusal = refusal
        self._metrics = metrics
        self._inside = 0
        self._closing: Callable[[], None] | None = None

    @property
    def is_closing(self) -> bool:
        """Whether new requests get 503."""
        return self._closing is not None

    def close(self, when_empty: Callable[[], None]) -> None:
        """Refuses what comes from now on; calls back once what is inside has been answered.

        To be called in the event loop, as everything here.
        """
        self._closing = when_empty
        if not self._inside:
            when_empty()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, start, status = scope["path"], time.perf_counter(), GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        finally:
            endpoint = path if path in self._paths else "other"
            seconds = time.perf_counter() - start
            self._metrics.request(endpoint=endpoint, status=status, seconds=seconds)

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN and not self._is_known(headers):
            text = "wrong or missing key; send Authorization: Bearer KEY"
            await self._refuse(send, 401, text, {b"www-authenticate": b"Bearer"})
            return
        if scope["method"] in BODILESS:
            await self._app(scope, receive, send)
            return
        if self._closing is not None:
            text = "the service is stopping; ask again in a moment"
            await self._refuse(send, 503, text, {b"retry-after": b"1"})
            return
        self._inside += 1
        try:
            await self._read(scope, headers, receive, send)
        finally:
            self._inside -= 1
            if self._closing is not None and not self._inside:
                self._closing()

    async def _read(
        self,
        scope: MutableMapping[str, Any],
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        told = headers.get(b"content-length", b"")
        declared, seen, most = int(told) if told.isdigit() else 0, 0, self._max_body_bytes
        body = bytearray()
        more = declared <= DROPPED_TIMES * most
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            seen += len(message.get("body", b""))
            if max(declared, seen) <= most:
                body += message.get("body", b"")
            more = message.get("more_body", False) and seen <= DROPPED_TIMES * most
        if max(declared, seen) > most:
            text = f"the body is longer than the limit of {most} bytes; send it in parts"
            await self._refuse(send, 413, text, {})
            return
        whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            return next(whole, None) or await receive()

        await self._app(scope, replay, send)

    def _is_known(self, headers: Mapping[bytes, bytes]) -> bool:
        if not self._key:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":
            # Clients that know only a URL send http://user:KEY@host so.
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self._key)

    async def _refuse(
        self, send: Send, status: int, text: str, headers: Mapping[bytes, bytes]
    ) -> None:
        body = self._refusal(status, text)
        plain = {b"content-type": JSON.encode(), b"content-length": str(len(body)).encode()}
        start = {"type": "http.response.start", "status": status}
        await send({**start, "headers": list({**plain, **headers}.items())})
        await send({"type": "http.response.body", "body": body})


def add_refusals(app: FastAPI, refusal: Refusal) -> None:
    """Gives the framework's own refusals, and what nobody foresaw, the service's form."""

    @app.exception_handler(HTTPException)
    async def by_framework(request: Request, error: HTTPException) -> Response:
        body = refusal(error.status_code, str(error.detail))
        return Response(body, error.status_code, error.headers, media_type=JSON)

    @app.exception_handler(ReusedIdError)
    async def reused(request: Request, error: ReusedIdError) -> Response:
        return Response(refusal(409, str(error)), 409, media_type=JSON)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        text = f"{type(error).__name__}; the service's log says more"
        return Response(refusal(500, text), 500, media_type=JSON)
