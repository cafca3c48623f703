"""Runs one program as `__main__`, with its own standard input."""

import os
import sys
from typing import Any


def main(payload: dict[str, Any], channel: list[int]) -> None:
    del channel
    path = "stdin"
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(payload["stdin"])
    descriptor = os.open(path, os.O_RDONLY)
    os.unlink(path)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (lives with the process)
    names = sys.modules["__main__"].__dict__
    names.clear()
    names.update(__name__="__main__", __builtins__=__builtins__)
    exec(compile(payload["program"], "<program>", "exec"), names)
