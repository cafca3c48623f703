"""Runs untrusted code: a bounded number at a time, each under limits, each with an outcome."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reward.sandbox.isolation import Isolation, find_bubblewrap
from reward.sandbox.limits import Limits, SandboxConfig
from reward.sandbox.process import Process, Task
from reward.sandbox.types import Outcome

# Time that the asking side gets beyond the serving one's, to say what it saw.
GRACE_S = 5.0
_PROBE = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def writable(path):
    try:
        open(path, "w").close()
    except OSError:
        return False
    return True
print(json.dumps({
    "privileges": int(status["CapEff"], 16) + int(status["CapPrm"], 16),
    "filter": int(status["Seccomp"]),
    "processes": [name for name in os.listdir("/proc") if name.isdigit()],
    "network": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
    "writable": [path for path in ("/x", "/usr/x", "/dev/x", "/proc/sys/x") if writable(path)],
    "environment": sorted(set(os.environ) - {"LC_CTYPE", "PWD"}),
}))
"""
_EXPECTED = {
    "privileges": 0,
    "filter": 2,
    "processes": ["1", "2"],
    "network": ["lo"],
    "writable": [],
    "environment": ["HOME", "LANG", "MALLOC_ARENA_MAX", "PATH", "PYTHONHASHSEED"],
}


class Sandbox:
    """Runs Python programs that nobody trusts; safe to use from any thread and forked worker.

    Where nothing isolates (see `isolation`), every run is refused, unless the config allows it.

    Example:
        >>> outcome = Sandbox(SandboxConfig(allow_unisolated=True)).run("print(6 * 7)")
        >>> outcome.reason, outcome.stdout
        ('ok', '42\\n')
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = SandboxConfig() if config is None else config
        self._places = threading.BoundedSemaphore(self.config.places)
        self._owner = os.getpid()

    @property
    def isolation(self) -> Isolation:
        """What isolates here, found and tried once a process."""
        return find_isolation()

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Runs a program as `__main__`, with this standard input.

        Args:
            limits: instead of the config's.
        """
        payload = {"program": program, "stdin": stdin}
        task = Task("program", payload, limits or self.config.limits)
        return self._run([task])[0]

    def run_joined(
        self, asking: Task, serving: Task, *, limits: Limits | None = None
    ) -> tuple[Outcome, Outcome]:
        """Runs two tasks in two sandboxes that share nothing but two pipes, in one place.

        When the asking one is over, the serving one is stopped.

        Args:
            limits: of the serving task instead of the config's; the asking one gets a little more
                time, so that it can say how the other ended.
        """
        bounds = limits or self.config.limits
        requests, replies = os.pipe(), os.pipe()
        ends = [*requests, *replies]
        longer = bounds.model_copy(
            update={"wall_s": bounds.wall_s + GRACE_S, "cpu_s": bounds.cpu_s + int(GRACE_S)}
        )
        try:
            first = Task(
                asking.main, asking.payload, longer, asking.needs, (replies[0], requests[1])
            )
            second = Task(
                serving.main, serving.payload, bounds, serving.needs, (requests[0], replies[1])
            )
            asked, served = self._run([first, second], ends)
        finally:
            _close(ends)
        return asked, served

    def _run(self, tasks: Sequence[Task], ends: list[int] | None = None) -> list[Outcome]:
        isolation = self.isolation
        if isolation.missing and not self.config.allow_unisolated:
            detail = (
                f"{isolation.missing}; install bubblewrap, or set sandbox.allow_unisolated = true "
                "to run code with this user's rights"
            )
            return [Outcome("refused", detail) for _ in tasks]
        with self._place() as queue_s:
            return _drive(tasks, isolation, queue_s, ends or [])

    @contextlib.contextmanager
    def _place(self) -> Iterator[float]:
        if self._owner != os.getpid():
            # A fork copies places that its parent's threads hold and will never give back here.
            self._places = threading.BoundedSemaphore(self.config.places)
            self._owner = os.getpid()
        before = time.monotonic()
        with self._places:
            yield time.monotonic() - before


def _drive(
    tasks: Sequence[Task], isolation: Isolation, queue_s: float, ends: list[int]
) -> list[Outcome]:
    """Runs tasks side by side until the first is over; the others are then stopped."""
    processes: list[Process] = []
    try:
        for task in tasks:
            processes.append(Process(task, isolation, queue_s))
        # Only the sandboxes may hold the pipes between them, so that an end is seen.
        _close(ends)
        while any(process.is_running for process in processes):
            _step(processes)
            if not processes[0].is_running:
                for process in processes[1:]:
                    process.end("stopped")
    except OSError as error:
        for process in processes:
            process.end("unknown")
            process.close()
        return [Outcome("unknown", f"the sandbox failed: {error}") for _ in tasks]
    except BaseException:
        for process in processes:
            process.end("unknown")
            process.close()
        raise
    return [process.close() for process in processes]


def _step(processes: Sequence[Process]) -> None:
    running = [process for process in processes if process.is_running]
    with selectors.DefaultSelector() as selector:
        for process in running:
            for descriptor in process.descriptors:
                selector.register(descriptor, selectors.EVENT_READ)
        wait_s = min(process.deadline for process in running) - time.monotonic()
        ready = {key.fd for key, _ in selector.select(max(wait_s, 0.0))}
    for process in running:
        process.step([fd for fd in process.descriptors if fd in ready])


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


@functools.cache
def find_isolation() -> Isolation:
    """Bubblewrap, if a program that looks around inside finds what it should; else what is missing.

    Example:
        >>> find_isolation().name in ("bubblewrap", "none")
        True
    """
    isolation = find_bubblewrap()
    if isolation.missing:
        return isolation
    task = Task("program", {"program": _PROBE, "stdin": ""}, Limits())
    outcome = _drive([task], isolation, 0.0, [])[0]
    if outcome.reason != "ok":
        text = (outcome.stderr.strip() or outcome.detail).splitlines()[-1][-300:]
        return Isolation("none", f"bubblewrap does not work here: {text}")
    found: Mapping[str, Any] = json.loads(outcome.stdout)
    wrong = [name for name, expected in _EXPECTED.items() if found.get(name) != expected]
    if wrong:
        return Isolation("none", f"bubblewrap leaves open: {', '.join(wrong)}")
    return isolation


@functools.cache
def shared_sandbox() -> Sandbox:
    """The process-wide sandbox with the default config."""
    return Sandbox()
