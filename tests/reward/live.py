"""A scoring service on a real port, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from reward.service import Server, create_app
from reward.serving.judging import Service
from tests.serving.live import running


@dataclass(frozen=True)
class Live:
    url: str
    server: Server
    thread: threading.Thread


@contextmanager
def served(service: Service) -> Iterator[Live]:
    server = Server(create_app(service))
    with running(server) as (url, thread):
        yield Live(url, server, thread)
