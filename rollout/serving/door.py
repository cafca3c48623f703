"""What every request passes before it is read: the key and the size, and it is counted."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rollout.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health", "/metrics")
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/generate"),
    *("/v1/models", "/v1/weights", *OPEN),
)


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> bytes:
    """The one form of every refusal, which is OpenAI's."""
    # a message may quote a key of the body that is no text
    shown = message.encode("utf-8", "replace").decode()
    error = {"message": shown, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


class Door:
    """Wraps the app: refuses and counts.

    Args:
        api_key: "" lets everybody in; /health and /metrics are open always.
        max_body_bytes: longest body.
    """

    def __init__(self, app: App, *, api_key: str, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._key = api_key.encode()
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, start, status = scope["path"], time.perf_counter(), 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, noting)
            else:
                await _answer(noting, *refusal)
        finally:
            endpoint = path if path in PATHS else "other"
            seconds = time.perf_counter() - start
            self._metrics.request(endpoint=endpoint, status=status, seconds=seconds)

    def _refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, bytes] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                text = "wrong or missing key; send Authorization: Bearer KEY"
                kind, code = "authentication_error", "invalid_api_key"
                return 401, error_body(text, kind=kind, code=code)
        if scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            return None
        told = headers.get(b"content-length", b"")
        if not told.isdigit():
            # the server below reads no more than was declared
            text = "the length of the body is not declared; send Content-Length"
            return 411, error_body(text, kind="invalid_request_error", code="length_required")
        if int(told) > self._max_body_bytes:
            text = f"a body of {int(told)} bytes, expected at most {self._max_body_bytes}"
            return 413, error_body(text, kind="invalid_request_error", code="too_large")
        return None


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # the body was not read, so the connection cannot go on
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
