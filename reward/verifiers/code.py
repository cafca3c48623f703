r"""The exact rule for programs: the share of the tests that a response's program passes.

Tests are Python with `assert` (MBPP, HumanEval's `check`), or pairs of input and output. Asserts
are judged in one sandbox and the program runs in another: calls into it go by value, and every
comparison is made where the program has never been (`reward.sandbox.inside.judge`). So a program
passes only by the values it returns. What that costs: a test that passes a function to the program,
or compares two objects of the program's own classes, gives no verdict; one that watches an argument
change in place fails. What remains: a program that knows the tests by heart passes them.

The program of a chat answer is the last fenced block (marked python, py or not at all) that
defines a name which the tests use; if none does, the last such block; without any block, the whole
response.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reward.sandbox import Outcome, Sandbox, shared_sandbox
from reward.sandbox.process import Task
from reward.types import Item, Verdict

# Longest answer of one call into the program, by the wall clock: as long as the default CPU limit.
CALL_LIMIT_S = 10.0
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)"
    r"(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_LANGUAGES = ("", "py", "python", "python3")


def verify_code(item: Item, sandbox: Sandbox | None = None) -> Verdict:
    """Share of the tests that the response's program passes.

    A response without a program passes none. Where nothing isolates here, where the sandbox failed,
    or where a test cannot be judged by value, the verdict is not valid.

    Args:
        item: arguments {"tests": [Python text, ...], "setup": text, "prefix": text,
            "entry_point": name}, or {"cases": [{"input": text, "output": text}, ...]}; only tests
            or cases are needed. Every assert counts as one test; `setup` runs before each text of
            `tests`; `prefix` stands before the program, and what it defines beside `entry_point`
            the tests take from there; `entry_point` is the name that the program must define, if
            the tests do not tell. Outputs are compared line by line, white space at the ends of
            lines and of the whole aside.
        sandbox: where it runs; None takes the shared one.
    Raises: ValueError if neither tests nor cases are there, or something is of the wrong type.

    Example:
        >>> tests = ["assert double(2) == 4", "assert double(0) == 1"]
        >>> item = Item((), "def double(n): return 2 * n", arguments={"tests": tests})
        >>> from reward.sandbox import SandboxConfig
        >>> verify_code(item, Sandbox(SandboxConfig(allow_unisolated=True)))
        Verdict(value=0.5, valid=True, reason='1 of 2 tests passed; double(0) == 1: does not hold')
    """
    sandbox = shared_sandbox() if sandbox is None else sandbox
    given = _Given.read(item.arguments)
    program = extract_program(item.response, given.names)
    if not program.strip():
        return Verdict(0.0, reason="no program in the response")
    program = f"{given.prefix}\n{program}" if given.prefix else program
    if given.cases:
        return _run_cases(program, given.cases, sandbox)
    judge = {
        "tests": given.tests,
        "setup": given.setup,
        # What the prefix defines beside the program is the judge's own copy where it uses it.
        "prefix": given.prefix if _parsed(given.prefix) else "",
        "owned": sorted(given.names),
    }
    candidate = {"program": program, "call_s": CALL_LIMIT_S}
    limits = sandbox.config.limits
    judged, served = sandbox.run_joined(
        Task("judge", judge, limits, ("values",)),
        Task("candidate", candidate, limits, ("values",)),
    )
    return _verdict(judged, served)


def extract_program(response: str, names: frozenset[str] = frozenset()) -> str:
    """The program in a chat answer; see the rule above.

    Args:
        names: names that the tests use.

    Example:
        >>> extract_program("Take\\n```python\\nx = 1\\n```\\nand run\\n```sh\\npython x.py\\n```")
        'x = 1\\n'
    """
    blocks = [
        textwrap.dedent(match["body"]) if match["indent"] else match["body"]
        for match in _FENCE.finditer(response)
        if match["language"].lower() in _LANGUAGES
    ]
    if not blocks:
        return response
    return next((body for body in reversed(blocks) if _defines(body, names)), blocks[-1])


def _defines(body: str, names: frozenset[str]) -> bool:
    # A pattern, not a parser: a parser can be made to fail by what it reads.
    any_name = "|".join(map(re.escape, sorted(names)))
    named = rf"(?:{any_name})(?!\w)[ \t]*"
    forms = rf"(?:async[ \t]+)?def[ \t]+{named}\(|class[ \t]+{named}[(:]|{named}(?::[^=\n]*)?=(?!=)"
    return bool(names) and re.search(rf"^[ \t]*(?:{forms})", body, re.MULTILINE) is not None


@dataclass(frozen=True)
class _Given:
    """An item's arguments, checked."""

    tests: list[str]
    cases: list[tuple[str, str]]
    setup: str
    prefix: str
    names: frozenset[str]

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> _Given:
        tests, cases = arguments.get("tests", []), arguments.get("cases", [])
        if not _are(tests, str) or not _are(cases, Mapping) or bool(tests) == bool(cases):
            raise ValueError(
                f"Item.arguments = {dict(arguments)!r:.200} for verifier code; expected 'tests', a "
                "list of Python texts, or 'cases', a list of input and output: one of them"
            )
        texts = {name: arguments.get(name, "") for name in ("setup", "prefix", "entry_point")}
        pairs = [(case.get("input", ""), case.get("output")) for case in cases]
        for name, text in [*texts.items(), *(("cases", each) for pair in pairs for each in pair)]:
            if not isinstance(text, str):
                raise ValueError(f"Item.arguments[{name!r}] holds {text!r:.40}, expected text")
        entry = texts["entry_point"]
        names = frozenset([entry]) if entry else frozenset()
        return cls(
            list(tests),
            [(given, str(wanted)) for given, wanted in pairs],
            texts["setup"],
            texts["prefix"],
            names | _wanted_names(texts["prefix"], [texts["setup"], *tests], bool(entry)),
        )


def _are(values: object, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(each, kind) for each in values)


def _wanted_names(prefix: str, texts: list[str], has_entry: bool) -> frozenset[str]:
    """Names that the tests read and that only the program can define.

    A name of Python's own (MBPP has a task whose function is `sum`) is the program's only if the
    tests use no other: then it is the function that the first test calls first.
    """
    nodes = [node for text in texts for node in _parsed(text)]
    bound = set(_bound([*nodes, *_parsed(prefix)]))
    modules = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in sys.stdlib_module_names
    }
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    names = read - bound - modules - set(vars(builtins))
    called = [n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    if not names and not has_entry:
        names.update([name for name in called if name not in bound][:1])
    return frozenset(names)


def _parsed(text: str) -> list[ast.AST]:
    try:
        return list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # The judge says which test it is.
        return []


def _bound(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def _run_cases(program: str, cases: list[tuple[str, str]], sandbox: Sandbox) -> Verdict:
    failed = []
    for number, (given, wanted) in enumerate(cases, start=1):
        outcome = sandbox.run(program, given)
        if not outcome.is_known:
            return Verdict(0.0, valid=False, reason=f"{outcome.reason}: {outcome.detail}")
        if outcome.reason != "ok":
            failed.append(f"case {number}: {outcome.reason}, {outcome.detail}")
        elif _lines(outcome.stdout) != _lines(wanted):
            failed.append(f"case {number}: another output")
    return _share(len(cases), failed)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _verdict(judged: Outcome, served: Outcome) -> Verdict:
    for outcome in (judged, served):
        if not outcome.is_known:
            return Verdict(0.0, valid=False, reason=f"{outcome.reason}: {outcome.detail}")
    events = [json.loads(line) for line in judged.stdout.splitlines()]
    problem = next((event["problem"] for event in events if "problem" in event), "")
    if problem or judged.reason != "ok" or not any("done" in event for event in events):
        reason = problem or f"judge {judged.reason}: {judged.detail}"
        return Verdict(0.0, valid=False, reason=reason)
    tests = [event for event in events if "test" in event]
    failed = [f"{test['text']}: {test['why']}" for test in tests if test["why"]]
    if failed and served.reason not in ("ok", "stopped"):
        failed[0] += f" (program: {served.reason}, {served.detail})"
    return _share(len(tests), failed)


def _share(total: int, failed: list[str]) -> Verdict:
    passed = total - len(failed)
    tail = f"; {failed[0]}" if failed else ""
    return Verdict(passed / total, reason=f"{passed} of {total} tests passed{tail}")
