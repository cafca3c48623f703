"""What a door lets through, without a service behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.door import Door
from serving.metrics import RequestMetrics

LIMIT = 10


class House:
    """An app that answers with the body that it was given, and the door before it."""

    def __init__(self, *, api_key: str = "") -> None:
        self.bodies: list[bytes] = []
        self.metrics = RequestMetrics("test")
        self.door = Door(
            self._app,
            api_key=api_key,
            max_body_bytes=LIMIT,
            paths=("/ask",),
            refusal=lambda status, text: f"{status}: {text}".encode(),
            metrics=self.metrics,
        )

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive()).get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.bodies[-1]})

    def ask(self, *pieces: bytes | None, **headers: str) -> tuple[int, str] | None:
        """Status and body of the answer to a POST in pieces; None hangs up, and gets nothing."""
        told: list[Any] = []
        messages = [
            {"type": "http.disconnect"}
            if piece is None
            else {"type": "http.request", "body": piece, "more_body": left > 0}
            for left, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True)
        ]
        named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/ask", "headers": named}
        waiting = iter(messages)

        async def receive() -> Any:
            return next(waiting)

        async def send(message: Any) -> None:
            told.append(message)

        asyncio.run(self.door(scope, receive, send))
        return (told[0]["status"], told[1]["body"].decode()) if told else None

    def count(self, status: int) -> bool:
        line = f'test_requests_total{{endpoint="/ask",status="{status}"}} 1.0'
        return line.encode() in self.metrics.text()


def test_a_body_arrives_whole_whatever_its_pieces():
    house = House()
    assert house.ask(b"12345", b"", b"67890") == (200, "1234567890")
    assert house.bodies == [b"1234567890"]


@pytest.mark.parametrize(
    ("pieces", "headers"),
    [
        # longer than was declared, as declared, and far too long to be read
        ([b"123456", b"78901"], {"content_length": "5"}),
        ([b"12345678901"], {"content_length": "11"}),
        ([], {"content_length": "1000"}),
    ],
)
def test_too_long_a_body_never_reaches_the_app(pieces: list[bytes], headers: dict[str, str]):
    house = House()
    status, text = house.ask(*pieces, **headers)
    assert (status, text) == (
        413,
        "413: the body is longer than the limit of 10 bytes; send it in parts",
    )
    assert house.bodies == []
    assert house.count(413)


def test_an_asker_that_leaves_while_it_sends_is_counted_as_gone():
    house = House()
    assert house.ask(b"123", None) is None
    assert house.bodies == []
    assert house.count(499)


def test_a_key_is_taken_as_bearer_or_as_the_password_of_a_url():
    house = House(api_key="k1")
    for given in ("", "Bearer k2", "Digest k1", "Basic !"):
        assert house.ask(b"1", authorization=given)[0] == 401
    for given in ("Bearer k1", "bearer  k1", "Basic YW55Ym9keTprMQ=="):
        assert house.ask(b"1", authorization=given) == (200, "1")


def test_a_door_that_closes_says_when_the_house_is_empty():
    house, empty = House(), []
    house.door.close(lambda: empty.append(1))
    assert (house.door.is_closing, empty) == (True, [1])
    assert house.ask(b"1") == (503, "503: the service is stopping; ask again in a moment")
