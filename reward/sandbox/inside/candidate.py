"""Serves calls into a program, by value, to a judge in another sandbox.

The process of `main` never runs the program. For each test it forks a child that loads the program
and answers requests, so that no test sees what another left behind, and it ends a child that does
not answer in time; the next request then finds a fresh one. Whatever this side does, lies included,
it can only send values.
"""

import contextlib
import os
import select
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from reward.sandbox.inside.values import EndedError, decode, encode, receive, send


def main(payload: dict[str, Any], channel: list[int]) -> None:
    requests, replies = channel
    child: Child | None = None
    while True:
        try:
            request = receive(requests)
        except EndedError:
            return
        if request["do"] == "begin":
            if child is not None:
                child.end()
            child = None
            continue
        if child is None:
            child = Child(payload["program"], channel)
        try:
            reply = child.ask(request, payload["call_s"])
        except TimeoutError:
            child.end()
            reply = {"fault": f"no answer in {payload['call_s']:g} s"}
            child = None
        except (EndedError, OSError, ValueError):
            reply = {"fault": f"the program ended with {child.end()}"}
            child = None
        send(replies, reply)


class Child:
    """A forked process that has loaded the program."""

    def __init__(self, program: str, channel: list[int]) -> None:
        own_requests, self._requests = os.pipe()
        self._replies, own_replies = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            for descriptor in (self._requests, self._replies, *channel):
                os.close(descriptor)
            os.setpgid(0, 0)
            Served(program).serve(own_requests, own_replies)
        os.close(own_requests)
        os.close(own_replies)

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The child's reply. Raises: TimeoutError; EndedError, OSError or ValueError for none."""
        send(self._requests, request)
        if not select.select([self._replies], [], [], limit_s)[0]:
            raise TimeoutError
        return receive(self._replies)

    def end(self) -> int:
        """Ends the child and gives its exit code, or minus the signal that ended it."""
        os.close(self._requests)
        os.close(self._replies)
        for kill in (os.killpg, os.kill):
            # It may have ended already, or never come to have a group of its own.
            with contextlib.suppress(OSError):
                kill(self._pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class Served:
    """The program's names and the objects that were handed out."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._names: dict[str, Any] = {"__name__": "program"}
        self._objects: list[Any] = []

    def serve(self, requests: int, replies: int) -> NoReturn:
        load_error: dict[str, Any] | None = None
        try:
            exec(compile(self._program, "<program>", "exec"), self._names)
        except BaseException as error:
            load_error = _raised(error)
        while True:
            try:
                request = receive(requests)
            except EndedError:
                os._exit(0)
            reply = load_error or self._answer(request)
            try:
                send(replies, reply)
            except (ValueError, RecursionError, MemoryError) as error:
                send(replies, _raised(error))

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            target = self._resolve(request["target"])
            arguments = [decode(each, self._resolve) for each in request["arguments"]]
            named = {k: decode(v, self._resolve) for k, v in request.get("named", {}).items()}
            value = OPERATIONS[request["do"]](target, *arguments, **named)
            return {"value": encode(value, self._refer)}
        except BaseException as error:
            return _raised(error)

    def _resolve(self, reference: Any) -> Any:
        if isinstance(reference, int):
            return self._objects[reference]
        if reference not in self._names:
            raise NameError(f"name {reference!r} is not defined")
        return self._names[reference]

    def _refer(self, value: Any) -> Any:
        self._objects.append(value)
        return [len(self._objects) - 1, type(value).__name__]


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:300]
    except BaseException:
        text = ""
    return {"raised": [type(error).__name__, text]}


def _call(target: Any, *arguments: Any, **named: Any) -> Any:
    return target(*arguments, **named)


def _set(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


def _set_item(target: Any, key: Any, value: Any) -> None:
    target[key] = value


OPERATIONS: dict[str, Callable[..., Any]] = {
    "value": lambda target: target,
    "call": _call,
    "get": getattr,
    "set": _set,
    "get_item": lambda target, key: target[key],
    "set_item": _set_item,
    "truth": bool,
    "length": len,
    "iterate": iter,
    "next": next,
    "text": str,
}
