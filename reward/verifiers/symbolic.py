"""Symbolic comparison of two mathematical answers in a process that can be killed.

A hostile answer such as 9^9^9^9 keeps sympy busy for ever inside one big-integer operation: no
signal and no thread can stop that, only the end of the process. So math-verify runs in a child that
reads one JSON request a line and writes one JSON reply a line. This file is both ends: imported it
gives `SymbolicChecker`, run as a script it is the child and needs nothing of this project.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import select
import subprocess
import sys
import threading
from pathlib import Path

LIMIT_S = 5.0
START_LIMIT_S = 120.0
MEMORY_BYTES = 4 << 30


class SymbolicChecker:
    """Compares answers in one child process; safe to call from any thread.

    Args:
        limit_s: longest time for one comparison in seconds; beyond it the child is replaced.

    Example:
        >>> SymbolicChecker().equal(gold="1/2", response=r"\\frac{2}{4}")
        True
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def equal(self, *, gold: str, response: str) -> bool | None:
        """Whether both mean the same; None if no mathematics could be read in the response.

        Raises: RuntimeError if the comparison passed its time limit, failed, or the reference
            answer cannot be read.
        """
        request = json.dumps({"gold": gold, "response": response}).encode() + b"\n"
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            # A child that has just died is told by what is read.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request)
            reply = self._read(child, self.limit_s)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return None if reply["equal"] is None else bool(reply["equal"])

    def close(self) -> None:
        """Ends the child; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[bytes]:
        # A forked process must not talk over its parent's pipes.
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            # -P keeps this folder off the child's path: it holds a `math.py`.
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            self._owner = os.getpid()
            self._read(self._child, START_LIMIT_S)
        return self._child

    def _read(self, child: subprocess.Popen[bytes], limit_s: float) -> dict[str, object]:
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], limit_s)
        line = child.stdout.readline() if ready else b""
        if not line:
            self._stop()
            cause = "ended early (out of memory?)" if ready else f"passed {limit_s:g} s"
            raise RuntimeError(f"symbolic comparison {cause}")
        reply: dict[str, object] = json.loads(line)
        return reply

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


@functools.cache
def shared_checker() -> SymbolicChecker:
    """The process-wide checker: starting a child costs a second, so it is kept."""
    return SymbolicChecker()


def _compare(gold: str, response: str) -> dict[str, object]:
    from math_verify import parse, verify

    wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
    if not wanted:
        return {"error": f"cannot read the reference answer {gold!r}"}
    found = parse(response, parsing_timeout=None, raise_on_error=True)
    if not found:
        return {"equal": None}
    return {"equal": verify(wanted, found, timeout_seconds=None, raise_on_error=True)}


def _serve() -> None:
    import logging

    import math_verify  # noqa: F401  (paid for before the first clock starts)

    # Its warning that time limits are off: the parent holds the clock.
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = _compare(request["gold"], request["response"])
        except Exception as error:
            reply = {"error": f"math-verify: {type(error).__name__}: {str(error)[:200]}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
