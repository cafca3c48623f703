"""Outcomes as data, limits, places, and the refusal where nothing isolates."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from reward.sandbox import Isolation, Limits, Sandbox, SandboxConfig, runner
from reward.sandbox.process import Task
from reward.sandbox.syscalls import NUMBERS, seccomp_filter

QUICK = Limits(wall_s=0.5)


@pytest.mark.parametrize(
    ("program", "reason", "detail", "exit_code"),
    [
        ("print('hello')", "ok", "", 0),
        ("raise SystemExit(3)", "failed", "exit code 3", 3),
        ("1 / 0", "failed", "exit code 1", 1),
        ("def f(:", "failed", "exit code 1", 1),
        ("import os; os.kill(os.getpid(), 11)", "killed", "signal 11", -11),
        ("import time; time.sleep(9)", "timeout", "passed 0.5 s or 10 s of CPU time", None),
        ("print('x' * (2 << 20))", "output", "wrote more than 1048576 bytes", None),
    ],
)
def test_the_end_is_told_as_data(sandbox, program, reason, detail, exit_code):
    limits = QUICK if reason == "timeout" else None
    outcome = sandbox.run(program, limits=limits)
    assert (outcome.reason, outcome.detail, outcome.exit_code) == (reason, detail, exit_code)
    assert outcome.isolation == "bubblewrap"
    assert outcome.is_known


def test_a_program_reads_its_input_and_writes_both_outputs(sandbox):
    program = "import sys\nprint(input()[::-1])\nsys.stderr.write('bad')\nprint(sys.stdin.read())"
    outcome = sandbox.run(program, "abc\ndéf\n")
    assert (outcome.reason, outcome.stdout, outcome.stderr) == ("ok", "cba\ndéf\n\n", "bad")


def test_output_is_kept_up_to_its_limit_and_broken_text_is_shown(sandbox):
    limits = Limits(output_bytes=1000)
    outcome = sandbox.run("print('x' * 5000, flush=True)", limits=limits)
    assert (outcome.reason, len(outcome.stdout)) == ("output", 1000)
    assert sandbox.run("import os; os.write(1, b'\\xff')").stdout == "\ufffd"


def test_waiting_for_a_place_is_not_the_programs_time(sandbox):
    narrow = Sandbox(SandboxConfig(max_parallel=1))
    with ThreadPoolExecutor(3) as pool:
        program = "import time; time.sleep(0.4)"
        outcomes = list(pool.map(lambda _: narrow.run(program, limits=Limits(wall_s=5)), range(3)))
    assert [outcome.reason for outcome in outcomes] == ["ok"] * 3
    assert max(outcome.queue_s for outcome in outcomes) >= 0.8
    assert max(outcome.wall_s for outcome in outcomes) < 0.4 + min(o.queue_s for o in outcomes) + 3


def test_no_more_run_at_a_time_than_there_are_places(sandbox):
    narrow = Sandbox(SandboxConfig(max_parallel=2))
    now = most = 0
    lock = threading.Lock()
    drive = runner._drive

    def counted(*arguments):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            return drive(*arguments)
        finally:
            with lock:
                now -= 1

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(12) as pool:
        patch.setattr(runner, "_drive", counted)
        outcomes = list(pool.map(lambda n: narrow.run(f"print({n})"), range(12)))
    assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(12)]
    assert most == 2


def in_worker(number: int) -> tuple[str, str]:
    outcome = Sandbox().run(f"print({number})")
    return outcome.reason, outcome.stdout


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_have_places_of_their_own(sandbox, method):
    if method == "spawn":
        pytest.importorskip("torch")
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        assert list(pool.map(in_worker, range(4))) == [("ok", f"{n}\n") for n in range(4)]


def test_a_fork_does_not_inherit_taken_places(sandbox):
    narrow = Sandbox(SandboxConfig(max_parallel=1))
    with narrow._place():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if narrow.run("print(1)").reason == "ok" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def children_of_this_process() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


def test_no_descriptor_and_no_child_is_left(sandbox):
    sandbox.run("print(1)")
    before, children = set(os.listdir("/proc/self/fd")), children_of_this_process()
    for program in ("print(1)", "import time; time.sleep(9)", "print('x' * (2 << 20))"):
        sandbox.run(program, limits=QUICK)
    sandbox.run_joined(
        Task("judge", {"tests": [], "setup": "", "prefix": "", "owned": []}, QUICK, ("values",)),
        Task("candidate", {"program": "", "call_s": 1.0}, QUICK, ("values",)),
    )
    assert set(os.listdir("/proc/self/fd")) == before
    assert children_of_this_process() == children


def test_a_run_starts_fresh(sandbox):
    assert sandbox.run("open('mine', 'w').write('x')").reason == "ok"
    assert sandbox.run("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_without_isolation_every_run_is_refused(monkeypatch):
    monkeypatch.setattr(runner, "find_isolation", lambda: Isolation("none", "no bubblewrap"))
    outcome = Sandbox().run("print(1)")
    assert outcome.reason == "refused"
    assert not outcome.is_known
    assert outcome.stdout == outcome.isolation == ""
    assert outcome.detail == (
        "no bubblewrap; install bubblewrap, or set sandbox.allow_unisolated = true to run code "
        "with this user's rights"
    )


def test_unisolated_runs_have_to_be_allowed_and_say_so(monkeypatch):
    monkeypatch.setattr(runner, "find_isolation", lambda: Isolation("none", "no bubblewrap"))
    monkeypatch.setenv("CANARY", "secret")
    free = Sandbox(SandboxConfig(allow_unisolated=True))
    outcome = free.run("import os\nprint('CANARY' in os.environ, os.listdir('.'))")
    assert (outcome.reason, outcome.stdout, outcome.isolation) == ("ok", "False []\n", "none")
    began = time.monotonic()
    left = free.run("import os, time\nos.fork()\ntime.sleep(99)", limits=QUICK)
    assert left.reason == "timeout"
    assert time.monotonic() - began < 10


def test_a_sandbox_that_cannot_start_says_nothing_of_the_program(sandbox, monkeypatch):
    monkeypatch.setattr(
        Isolation, "command", lambda *_, **__: ["bwrap", "--no-such-option", "python"]
    )
    outcome = sandbox.run("print(1)")
    assert outcome.reason == "unknown"
    assert not outcome.is_known
    assert "before the program's start" in outcome.detail
    assert "no-such-option" in outcome.detail
    monkeypatch.setattr(Isolation, "command", lambda *_, **__: ["/no/such/file"])
    assert sandbox.run("print(1)").reason == "unknown"


def test_a_probe_that_finds_a_hole_refuses(sandbox, monkeypatch):
    monkeypatch.setattr(runner, "_EXPECTED", runner._EXPECTED | {"network": []})
    runner.find_isolation.cache_clear()
    try:
        assert runner.find_isolation() == Isolation("none", "bubblewrap leaves open: network")
    finally:
        runner.find_isolation.cache_clear()


@pytest.mark.parametrize("field", ["wall_s", "memory_bytes", "max_processes", "output_bytes"])
def test_limits_are_positive(field):
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})


def test_the_filter_is_well_formed():
    for machine in NUMBERS:
        code = seccomp_filter(machine)
        steps = [code[start : start + 8] for start in range(0, len(code), 8)]
        for place, step in enumerate(steps):
            if step[0] in (0x15, 0x35, 0x45):
                assert place + 1 + max(step[2], step[3]) < len(steps)
        assert steps[-1][0] == 0x06
    with pytest.raises(ValueError, match="machine = 'vax', expected one of x86_64, aarch64"):
        seccomp_filter("vax")
