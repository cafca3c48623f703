"""The socket that a service listens on, and how it is served."""

from __future__ import annotations

import socket

import uvicorn

from serving.door import Door


def config_of(door: Door) -> uvicorn.Config:
    """How every service is served: its lifespan matters, and requests are counted, not logged."""
    return uvicorn.Config(door, lifespan="on", log_level="warning", access_log=False)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

    Args:
        port: 0 takes a free one.

    Raises: OSError if the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
