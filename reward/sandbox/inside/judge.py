"""Holds the tests and judges a program that runs in another sandbox.

The tests are ordinary Python, but the names that the program must define are stand-ins: calling one
sends the arguments, by value, to the program's sandbox and gets a value back. Every comparison is
made here, on plain values, by an interpreter that the program has never run in. So a test passes
only on a value that the program gave to that very call; it cannot see the expected value, replace
`==` or `assert`, skip a test by ending early, or write the report.
"""

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from reward.sandbox.inside.values import decode, encode, receive, send


class FaultError(Exception):
    """The program gave no answer."""


class UnfitError(BaseException):
    """The test does what cannot be done between two sandboxes; that is not the program's fault."""


def main(payload: dict[str, Any], channel: list[int]) -> None:
    report = os.dup(1)
    # What a test prints is no report.
    os.dup2(2, 1)
    program = Program(*channel)
    for number, test in enumerate(payload["tests"]):
        marks = Marks(number, report)
        try:
            code = [
                compile(payload["prefix"], "<prefix>", "exec"),
                compile(payload["setup"], "<setup>", "exec"),
                marks.compile(test),
            ]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            _write(report, problem=f"test {number + 1} is no Python: {error}")
            return
        names = Names(program, frozenset(payload["owned"]))
        names.update(__name__="test", __mark__=marks.mark, __failed__=marks.failed)
        try:
            program.begin()
            exec(code[0], names)
            for name in payload["owned"]:
                # The prefix may hold its head; the program has the whole.
                names.pop(name, None)
            exec(code[1], names)
            exec(code[2], names)
        except (UnfitError, ImportError) as error:
            _write(report, problem=f"test {number + 1}: {error}")
            return
        except BaseException as error:
            marks.end(f"{type(error).__name__}: {error}")
        else:
            marks.end("")
    _write(report, done=True)


def _write(report: int, **event: Any) -> None:
    os.write(report, json.dumps(event).encode() + b"\n")


class Marks(ast.NodeTransformer):
    """Turns each assert of one test into a mark of its own, so that every one is counted."""

    def __init__(self, number: int, report: int) -> None:
        self._number = number
        self._report = report
        self._texts: list[str] = []
        self._failed: dict[int, str] = {}
        self._seen: set[int] = set()

    def compile(self, test: str) -> Any:
        tree = ast.fix_missing_locations(self.visit(ast.parse(test)))
        return compile(tree, f"<test {self._number + 1}>", "exec")

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if isinstance(node.test, ast.Constant):
            # "assert True" would count for every program; "assert False" is not to be reached.
            return node
        self._texts.append(ast.unparse(node.test))
        place = ast.Constant(len(self._texts) - 1)
        return ast.Try(
            body=[_call("__mark__", place, node.test)],
            handlers=[ast.ExceptHandler(type=None, name=None, body=[_call("__failed__", place)])],
            orelse=[],
            finalbody=[],
        )

    def mark(self, place: int, value: Any) -> None:
        """Notes whether an assert held."""
        self._seen.add(place)
        if not value:
            self._failed.setdefault(place, "does not hold")

    def failed(self, place: int) -> None:
        """Notes the exception that is being handled, which an assert raised on its way."""
        error = sys.exc_info()[1]
        if isinstance(error, UnfitError | ImportError):
            raise error
        self._seen.add(place)
        self._failed.setdefault(place, f"{type(error).__name__}: {error}")

    def end(self, error: str) -> None:
        """Reports every assert, or the whole test if it has none."""
        for place, text in enumerate(self._texts):
            missed = "" if place in self._seen else error or "was not reached"
            self._tell(text, self._failed.get(place, missed))
        if len(self._seen) == len(self._texts) and (error or not self._texts):
            self._tell("the rest of the test" if self._texts else "the test", error)

    def _tell(self, text: str, why: str) -> None:
        _write(self._report, test=self._number, text=text[:200], why=why[:300])


def _call(name: str, *arguments: ast.expr) -> ast.stmt:
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


class Names(dict[str, Any]):
    """A test's names: its own, Python's, and for the rest the program's."""

    def __init__(self, program: "Program", owned: frozenset[str]) -> None:
        super().__init__()
        self._program = program
        self._owned = owned

    def __missing__(self, name: str) -> Any:
        if name in self._owned:
            return self._program.name(name)
        if name not in vars(builtins) and name in sys.stdlib_module_names:
            return importlib.import_module(name)
        raise KeyError(name)


class Program:
    """The program in the other sandbox."""

    def __init__(self, replies: int, requests: int) -> None:
        self._replies = replies
        self._requests = requests
        self._test = 0

    def begin(self) -> None:
        self._test += 1
        self._send({"do": "begin"})

    def name(self, name: str) -> Any:
        value = self.ask("value", name)
        # By name, so that it can still be called if a call that hung has cost the process.
        return Remote(self, name, value.kind) if isinstance(value, Remote) else value

    def ask(self, do: str, target: Any, *arguments: Any, **named: Any) -> Any:
        self._send(
            {
                "do": do,
                "target": target,
                "arguments": [encode(each, self._refer) for each in arguments],
                "named": {key: encode(each, self._refer) for key, each in named.items()},
            }
        )
        try:
            reply = receive(self._replies)
            if "value" in reply:
                return decode(reply["value"], self._resolve)
            raised, fault = reply.get("raised"), str(reply.get("fault", "no answer"))
        except Exception as error:
            raise FaultError(f"the program's answer cannot be read: {error}") from None
        if not raised:
            raise FaultError(fault)
        kind, text = (str(each) for each in raised)
        known: Any = vars(builtins).get(kind)
        # An import that fails here is the test's fault, so the program's own goes by another name.
        is_error = isinstance(known, type) and issubclass(known, Exception)
        if is_error and not issubclass(known, ImportError):
            raise _made(known, text)
        raise FaultError(f"{kind}: {text}")

    def _send(self, message: dict[str, Any]) -> None:
        try:
            send(self._requests, message)
        except OSError:
            raise FaultError("the program has ended") from None

    def _refer(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return value.reference
        raise UnfitError(f"{type(value).__name__} cannot be passed to the program by value")

    def _resolve(self, reference: Any) -> Any:
        place, kind = reference
        return Remote(self, int(place), str(kind))


def _made(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:
        # UnicodeDecodeError and its like want more than a text.
        return FaultError(f"{kind.__name__}: {text}")


class Remote:
    """An object that stays with the program: usable, but equal to no value of the test's.

    Whether two of the program's objects are equal only the program could say, and it may lie.
    """

    def __init__(self, program: Program, reference: Any, kind: str) -> None:
        vars(self).update(program=program, reference=reference, kind=kind)

    def _ask(self, do: str, *arguments: Any, **named: Any) -> Any:
        program: Program = vars(self)["program"]
        return program.ask(do, vars(self)["reference"], *arguments, **named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("get_item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set_item", key, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remote):
            return False
        if self.reference == other.reference:
            return True
        raise UnfitError("two objects of the program are compared, which only it could judge")

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        return bool(self._ask("truth"))

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __iter__(self) -> Iterator[Any]:
        steps = self._ask("iterate")
        if not isinstance(steps, Remote):
            raise TypeError("iter() gave no iterator")
        while True:
            try:
                yield steps._ask("next")
            except StopIteration:
                return
