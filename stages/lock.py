"""One run folder, one run: a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds `run/.lock` for this process; the file names the process that holds it.

    A file left by a dead process locks nothing, so there is no stale lock to remove.

    Raises:
        RuntimeError: another process holds it; its id is in the message.
    """
    path = run / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 64).decode().strip() or "unknown"
            raise RuntimeError(
                f"{run}: process {holder} is running in this folder; wait for it, stop it, or "
                "choose another --out"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)
