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

from reward.serving.metrics import Metrics
from reward.wire import ErrorCode, ErrorDetail, ErrorResponse, ItemError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

SCORING = ("/v1/score", "/get_reward")
OPEN = ("/health", "/metrics")
# A body up to this many times the limit is read to its end and dropped: a sender that is cut off
# in the middle sees a broken connection instead of the answer.
DROPPED_TIMES = 8


def error_body(code: ErrorCode, message: str, items: tuple[ItemError, ...] = ()) -> bytes:
    """The one form of every refusal."""
    # A message may quote a key of the body that is no text.
    shown = message.encode("utf-8", "replace").decode()
    detail = ErrorDetail(code=code, message=shown, items=items)
    return ErrorResponse(error=detail).model_dump_json().encode()


class Door:
    """Wraps the app: refuses, counts, and knows what is inside.

    Args:
        api_key: "" lets everybody in.
        max_body_bytes: longest body.
    """

    def __init__(self, app: App, *, api_key: str, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._key = api_key.encode()
        self._max_body_bytes = max_body_bytes
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
        path, start, status = scope["path"], time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        finally:
            endpoint = path if path in (*SCORING, *OPEN) else "other"
            seconds = time.perf_counter() - start
            self._metrics.request(endpoint=endpoint, status=status, seconds=seconds)

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN and not self._is_known(headers):
            body = error_body(
                "unauthorized", "wrong or missing key; send Authorization: Bearer KEY"
            )
            await _answer(send, 401, body, {b"www-authenticate": b"Bearer"})
            return
        if scope["path"] not in SCORING:
            await self._app(scope, receive, send)
            return
        if self._closing is not None:
            body = error_body("draining", "the service is stopping; ask again in a moment")
            await _answer(send, 503, body, {b"retry-after": b"1"})
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
            text = f"the body is longer than the limit of {most} bytes; send the items in parts"
            await _answer(send, 413, error_body("too_large", text), {})
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


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[bytes, bytes]) -> None:
    plain = {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": list({**plain, **headers}.items())})
    await send({"type": "http.response.body", "body": body})
