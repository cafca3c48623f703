"""The code rule: what passes, what fails, what has no verdict, and that nothing can fake a pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from reward.sandbox import Isolation, Sandbox, runner
from reward.sandbox.limits import Limits, SandboxConfig
from reward.types import Item, Verdict
from reward.verifiers import code as code_rule
from reward.verifiers import verify, verify_all
from reward.verifiers.code import extract_program
from tests.reward.sandbox.conftest import sandbox as sandbox

SQUARE = ["assert square(2) == 4", "assert square(3) == 9", "assert square(-4) == 16"]
HUMAN = {
    "tests": [
        "def check(candidate):\n"
        "    assert True, 'This prints if this assert fails'\n"
        "    for n in range(4):\n"
        "        assert candidate(n) == n * n, 'wrong'\n"
        "    assert abs(scale(candidate(2.5)) - 12.5) < 1e-6\n"
        "    try:\n"
        "        candidate(None)\n"
        "        assert False\n"
        "    except TypeError:\n"
        "        pass\n"
        "check(square)"
    ],
    "prefix": 'def scale(x):\n    return 2 * x\n\ndef square(x):\n    """The square."""\n',
    "entry_point": "square",
}


def item(response: str, **arguments: object) -> Item:
    return Item((), response, verifier="code", arguments=arguments or {"tests": SQUARE})


def judge(sandbox: Sandbox, response: str, **arguments: object) -> Verdict:
    return verify(item(response, **arguments), sandbox)


def test_the_value_is_the_share_of_tests_passed(sandbox):
    assert judge(sandbox, "def square(n): return n * n") == Verdict(
        1.0, reason="3 of 3 tests passed"
    )
    verdict = judge(sandbox, "def square(n): return n + n")
    assert verdict == Verdict(1 / 3, reason="1 of 3 tests passed; square(3) == 9: does not hold")


@pytest.mark.parametrize("response", ["    return x * x\n", "def square(x):\n    return x ** 2"])
def test_a_check_function_counts_each_assert(sandbox, response):
    assert judge(sandbox, response, **HUMAN) == Verdict(1.0, reason="2 of 2 tests passed")


def test_a_check_function_gives_part_of_the_value(sandbox):
    verdict = judge(sandbox, "    return x * x if x != 3 else 0\n", **HUMAN)
    assert verdict.value == 0.5
    # Not raising where it should leaves the assert that must not be reached.
    verdict = judge(sandbox, "    return x * x if x else 0\n", **HUMAN)
    assert verdict == Verdict(
        2 / 3, reason="2 of 3 tests passed; the rest of the test: AssertionError: "
    )


def test_objects_of_the_programs_own_classes_can_be_used(sandbox):
    program = (
        "class Node:\n"
        "    def __init__(self, value): self.value, self.left = value, None\n"
        "def depth(node): return 0 if node is None else 1 + depth(node.left)\n"
        "def up_to(n): return (i for i in range(n))\n"
        "def first(n): raise KeyError(n)\n"
    )
    tests = [
        "assert depth(root) == 2",
        "assert root.left.value == 'b'",
        "assert list(up_to(3)) == [0, 1, 2]",
        "try:\n    first(1)\nexcept KeyError as error:\n    assert '1' in str(error)",
    ]
    setup = "root = Node('a')\nroot.left = Node('b')"
    assert judge(sandbox, program, tests=tests, setup=setup).value == 1.0


VALUES = [
    "None", "True", "3", "10 ** 5000", "-2.5", "float('inf')", "1j", "'a\\ud800'", "b'ab'",
    "[1, (2, [3])]", "{1, 2}", "frozenset([1])", "{(1, 2): [None]}", "int",
    "__import__('decimal').Decimal('1.10')", "__import__('fractions').Fraction(1, 3)",
    "__import__('collections').Counter('aab')",
]  # fmt: skip


def test_values_pass_both_ways(sandbox):
    tests = [f"assert same({value}) == {value}" for value in VALUES]
    tests += [f"assert isinstance(same({value}), type({value}))" for value in VALUES[:-1]]
    verdict = judge(sandbox, "def same(x): return x", tests=tests)
    assert verdict.reason == f"{len(tests)} of {len(tests)} tests passed"


def test_a_builtin_name_is_the_programs_only_if_the_tests_use_no_other(sandbox):
    assert judge(sandbox, "def sum(a, b): return a * b", tests=["assert sum(2, 3) == 6"]).value == 1
    tests = ["assert sum(pair(2)) == 4"]
    program = "def sum(x): return 4\ndef pair(n): return [n]"
    assert judge(sandbox, program, tests=tests).value == 0


def test_cases_compare_outputs(sandbox):
    cases = [{"input": "2\n3\n", "output": "5"}, {"input": "1\n1\n", "output": "3\n"}]
    verdict = judge(sandbox, "print(int(input()) + int(input()), end='  \\n\\n')", cases=cases)
    assert verdict == Verdict(0.5, reason="1 of 2 tests passed; case 2: another output")
    verdict = judge(sandbox, "print(5)\nraise SystemExit(1)", cases=cases)
    assert verdict.reason == "0 of 2 tests passed; case 1: failed, exit code 1"


FAKES = {
    "exit at once": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef square(n): os._exit(0)",
    "exit cleanly": "import sys\ndef square(n): sys.exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef square(n): return 0",
    "raise": "def square(n): raise AssertionError",
    "stop": "def square(n): raise StopIteration",
    "equal to all": "class A:\n def __eq__(s, o): return True\ndef square(n): return A()",
    "an int equal to all": (
        "class A(int):\n def __eq__(s, o): return True\n def __hash__(s): return 0\n"
        "def square(n): return A()"
    ),
    "a list equal to all": (
        "class A(list):\n def __eq__(s, o): return True\ndef square(n): return A()"
    ),
    "never unequal": "class A:\n __eq__ = lambda s, o: 1\n __bool__ = lambda s: True\nsquare = A",
    "patched builtins": (
        "import builtins\nbuiltins.all = builtins.any = lambda x: True\n"
        "builtins.bool = lambda x: True\nbuiltins.AssertionError = ValueError\n"
        "def square(n): return 0"
    ),
    "patched compile": (
        "import builtins\nbuiltins.compile = None\nbuiltins.exec = None\nsquare = id"
    ),
    "the judge's modules": (
        "import sys\nfor name, m in list(sys.modules.items()):\n"
        "    if 'inside' in name:\n"
        "        m.send = lambda *a: None\n        m.encode = lambda *a: {'int': '0x4'}\n"
        "def square(n): return 0"
    ),
    # The needle is put together at run time: the program's own text is in memory too.
    "looks for the tests": (
        "import gc, sys\nneedle = 'square(2) =' + '= 4'\n"
        "def square(n):\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame:\n"
        "        seen += [*frame.f_globals.values(), *frame.f_locals.values()]\n"
        "        frame = frame.f_back\n"
        "    for each in gc.get_objects():\n"
        "        if isinstance(each, (list, tuple)): seen += each\n"
        "        elif isinstance(each, dict): seen += each.values()\n"
        "    texts = [each for each in seen if isinstance(each, str)]\n"
        "    return n * n if any(needle in each for each in texts if each != needle) else 0"
    ),
    "writes reports": (
        "import os, json\n"
        "for number in range(64):\n"
        '    for text in (\'{"test": 0, "text": "t", "why": ""}\', \'{"done": true}\'):\n'
        "        try: os.write(number, text.encode() + b'\\n')\n"
        "        except OSError: pass\n"
        "def square(n): return 0"
    ),
    "answers ahead": (
        "import os\nbody = b'{\"value\": true}'\n"
        "for number in range(3, 64):\n"
        "    try: os.write(number, len(body).to_bytes(4, 'big') + body)\n"
        "    except OSError: pass\n"
        "def square(n): return 0"
    ),
    "a broken message": (
        "import os\nfor number in range(3, 64):\n"
        "    try: os.write(number, b'\\xff\\xff\\xff\\xff')\n"
        "    except OSError: pass\ndef square(n): return 0"
    ),
    "a false reference": (
        'import os\nbody = b\'{"value": {"reference": ["__mark__", 0]}}\'\n'
        "for number in range(3, 64):\n"
        "    try: os.write(number, len(body).to_bytes(4, 'big') + body)\n"
        "    except OSError: pass\ndef square(n): return 0"
    ),
    "kills the relay": "import os\nos.kill(os.getppid(), 9)\ndef square(n): return 0",
    "deep values": (
        "def square(n):\n    a = []\n    for i in range(100000): a = [a]\n    return a"
    ),
    "endless values": "import itertools\ndef square(n): return itertools.count()",
    "not a number": "def square(n): return float('nan')",
    "defines the marks": "def __mark__(*a): pass\n__failed__ = __mark__\ndef square(n): return 0",
    "a syntax error": "def square(n:",
    "nothing defined": "x = 1",
    "a wrong name": "def sqare(n): return n * n",
    "no program": "",
    "prints instead": "def square(n): print(n * n)",
    "patched json": (
        "import json\njson.dumps = lambda *a: '{\"value\": true}'\ndef square(n): return 0"
    ),
}


def test_nothing_fakes_a_pass(sandbox):
    quick = Sandbox(SandboxConfig(limits=Limits(wall_s=3.0, cpu_s=3), max_parallel=2))
    verdicts = verify_all([item(text) for text in FAKES.values()], quick)
    named = dict(zip(FAKES, verdicts, strict=True))
    assert {name: each for name, each in named.items() if each.value > 0} == {}
    # A judge's failure is no way out either: each of these is wrong, not unknown.
    assert {name: each for name, each in named.items() if not each.valid} == {}


@pytest.mark.parametrize(
    "helper", ["def scale(x): return 12.5", "scale = lambda x: 12.5", "def abs(x): return 0"]
)
def test_helpers_of_the_prefix_are_not_the_programs_to_change(sandbox, helper):
    program = f"{helper}\ndef square(x):\n    return x * x + (x == 2.5)"
    assert judge(sandbox, program, **HUMAN).value == 0.5


def test_a_call_that_hangs_costs_only_its_own_test(sandbox, monkeypatch):
    monkeypatch.setattr(code_rule, "CALL_LIMIT_S", 1.0)
    verdict = judge(sandbox, "def square(n):\n    while n == 3: pass\n    return n * n")
    assert verdict == Verdict(
        2 / 3, reason="2 of 3 tests passed; square(3) == 9: FaultError: no answer in 1 s"
    )


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (["assert square(2"], "test 1 is no Python: '(' was never closed (<unknown>, line 1)"),
        (["import no_such\nassert square(2) == 4"], "test 1: No module named 'no_such'"),
        (["assert square(lambda: 2)"], "test 1: function cannot be passed to the program by value"),
        (
            ["assert make() == make()"],
            "test 1: two objects of the program are compared, which only it could judge",
        ),
    ],
)
def test_a_test_that_cannot_be_judged_gives_no_verdict(sandbox, tests, reason):
    program = "def square(n): return n\nclass make: pass"
    assert judge(sandbox, program, tests=tests) == Verdict(0.0, valid=False, reason=reason)


def test_without_isolation_there_is_no_verdict(monkeypatch):
    monkeypatch.setattr(runner, "find_isolation", lambda: Isolation("none", "no bubblewrap"))
    for arguments in ({"tests": SQUARE}, {"cases": [{"input": "", "output": ""}]}):
        verdict = judge(Sandbox(), "def square(n): return n * n", **arguments)
        assert not verdict.valid
        assert verdict.reason.startswith("refused: no bubblewrap; install bubblewrap")


def test_threads_give_the_same_verdicts_in_order(sandbox):
    items = [item(f"def square(n): return n * n if n != {n} else 0") for n in (2, 3, -4, 5)] * 3
    values = [verdict.value for verdict in verify_all(items, sandbox)]
    assert values == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1.0] * 3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda each: verify(each, sandbox).value, items)) == values


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\nprint(f())\n```", "def f(): pass\n"),
        ("```python\ndef f(): 1\n```\nBetter:\n```py\ndef f(): 2\n```", "def f(): 2\n"),
        ("```python\nclass f:\n  pass\n```\n```bash\npython f.py\n```", "class f:\n  pass\n"),
        ("```python\nf = lambda: 1\n```\n```json\n{}\n```", "f = lambda: 1\n"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("~~~python\ndef f(): pass\n~~~", "def f(): pass\n"),
        ("1. Do\n   ```python\n   x = 2\n   if x:\n     f = 1\n   ```", "x = 2\nif x:\n  f = 1\n"),
        ("```python\ndef f(): 1\n```\nUse\n```python\nf()\nf == 1\nff = 2\n```", "def f(): 1\n"),
        ("```python\nf: int = 1\n```\n```python\nf(2)\n```", "f: int = 1\n"),
        ("```python\na = 1\n```\n```python\nb = 2\n```", "b = 2\n"),
        ("", ""),
    ],
)
def test_the_program_of_a_chat_answer(response, program):
    assert extract_program(response, frozenset({"f"})) == program


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tests": []},
        {"tests": "assert f()"},
        {"tests": [1]},
        {"tests": ["assert f()"], "cases": [{"input": "", "output": ""}]},
        {"cases": ["x"]},
    ],
)
def test_tests_or_cases_are_needed(arguments):
    with pytest.raises(ValueError, match=r"for verifier code; expected 'tests'"):
        verify(Item((), "x", verifier="code", arguments=arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tests": ["f()"], "setup": 1}, r"Item.arguments\['setup'\] holds 1, expected text"),
        ({"cases": [{"input": ""}]}, r"Item.arguments\['cases'\] holds None, expected text"),
    ],
)
def test_what_is_no_text_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(Item((), "x", verifier="code", arguments=arguments))
