"""A scoring service on a real port, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from reward.service import Server, create_app, listen
from reward.serving.judging import Service


@dataclass(frozen=True)
class Live:
    url: str
    server: Server
    thread: threading.Thread


@contextmanager
def served(service: Service) -> Iterator[Live]:
    server = Server(create_app(service))
    with listen("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield Live(url, server, thread)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
