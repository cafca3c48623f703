"""One sandboxed process tree, seen from the host: started, read, ended for good."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward.sandbox.isolation import FIRST_UID, Isolation, limits_processes, program_filter
from reward.sandbox.limits import Limits
from reward.sandbox.types import Outcome, Reason

# bubblewrap and an interpreter start in 50 ms; a machine under load may take a hundred times that.
START_LIMIT_S = 60.0
KILL_LIMIT_S = 10.0
READ_BYTES = 1 << 16
_INSIDE = Path(__file__).parent / "inside"
_SERIAL = itertools.count()
_LIMIT_SIGNALS = {24: "timeout", 25: "files"}


@dataclass(frozen=True)
class Task:
    """What runs inside: a module of `inside/`, what it is given, and its limits.

    Args:
        main: file name without ".py".
        payload: its input, JSON values.
        needs: other modules of `inside/` that it imports.
        channel: descriptors for reading and writing that it shares with another sandbox.
    """

    main: str
    payload: Mapping[str, Any]
    limits: Limits
    needs: tuple[str, ...] = ()
    channel: tuple[int, ...] = ()


class Process:
    """A task that runs; `step` whenever one of `descriptors` can be read or `deadline` passes.

    Args:
        queue_s: how long the task had waited, for the outcome.
    Raises: OSError if it cannot be started.
    """

    def __init__(self, task: Task, isolation: Isolation, queue_s: float) -> None:
        self._limits = task.limits
        self._isolation = isolation
        self._queue_s = queue_s
        self._output = {"stdout": b"", "stderr": b"", "status": b""}
        self._reason: Reason | None = None
        self._started_at = time.monotonic()
        self._has_started = False
        self._ended_at = 0.0
        self._kept = contextlib.ExitStack()
        status, own_status = os.pipe()
        self._info, own_info = os.pipe()
        try:
            self._child = self._start(task, own_status, own_info)
        except BaseException:
            os.close(status)
            os.close(self._info)
            self._kept.close()
            raise
        finally:
            os.close(own_status)
            os.close(own_info)
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self.descriptors = {
            self._child.stdout.fileno(): "stdout",
            self._child.stderr.fileno(): "stderr",
            status: "status",
        }
        self._status = status

    @property
    def deadline(self) -> float:
        """Latest time of the next `step`, on the monotonic clock."""
        if self._ended_at:
            return self._ended_at + KILL_LIMIT_S
        limit_s = self._limits.wall_s if self._has_started else START_LIMIT_S
        return self._started_at + limit_s

    @property
    def is_running(self) -> bool:
        return bool(self.descriptors)

    def step(self, readable: Sequence[int]) -> None:
        """Reads what is there and ends what has passed a limit."""
        for descriptor in readable:
            name = self.descriptors[descriptor]
            part = os.read(descriptor, READ_BYTES)
            if not part:
                del self.descriptors[descriptor]
                continue
            self._output[name] += part
            if name == "status":
                self._note_start()
            elif len(self._output[name]) > self._limits.output_bytes:
                self.end("output")
        if time.monotonic() >= self.deadline:
            if self._ended_at:
                # Not even SIGKILL has emptied the sandbox: a process hangs inside the kernel.
                self._reason = "unknown"
                self.descriptors = {}
            else:
                self.end("timeout" if self._has_started else "unknown")

    def end(self, reason: Reason) -> None:
        """Kills everything in the sandbox; the pipes then close and the outcome can be taken."""
        if self._ended_at:
            return
        self._reason, self._ended_at = reason, time.monotonic()
        if self._isolation.name == "none":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, 9)
        inside = self._first_inside()
        if inside and self._child.poll() is None:
            # Its end is the end of all that runs inside; bubblewrap then reaps it and ends itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(inside, 9)
        else:
            self._child.kill()

    def close(self) -> Outcome:
        """Waits for the end and says how it was."""
        for pipe in (self._child.stdout, self._child.stderr):
            if pipe is not None:
                pipe.close()
        os.close(self._status)
        os.close(self._info)
        try:
            code = self._child.wait(KILL_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = -9
        finally:
            self._kept.close()
        return self._outcome(code)

    def _first_inside(self) -> int:
        """Number of process 1 inside, as the host counts; 0 if there is none yet."""
        if not select.select([self._info], [], [], 0)[0]:
            return 0
        try:
            return int(json.loads(os.read(self._info, READ_BYTES))["child-pid"])
        except (ValueError, KeyError):
            return 0

    def _note_start(self) -> None:
        if not self._has_started and b"\n" in self._output["status"]:
            # Setting up the sandbox is not the program's time.
            self._has_started, self._started_at = True, time.monotonic()

    def _start(self, task: Task, status: int, info: int) -> subprocess.Popen[bytes]:
        is_isolated = self._isolation.name != "none"
        uid = None
        if is_isolated and os.geteuid() == 0:
            uid = FIRST_UID + (os.getpid() % 4096) * 65536 + next(_SERIAL) % 65536
        filter_in, filter_out = os.pipe()
        try:
            os.write(filter_out, program_filter() if is_isolated else b"")
            os.close(filter_out)
            spec = self._kept.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack does)
            spec.write(json.dumps(_spec(task, uid, is_isolated)).encode())
            spec.seek(0)
            folder = None
            if not is_isolated:
                folder = self._kept.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-"))
            return subprocess.Popen(
                [
                    *self._isolation.command(
                        task.limits, uid=uid, filter_fd=filter_in, info_fd=info
                    ),
                    *("-c", _text("supervisor"), str(status)),
                ],
                stdin=spec,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=folder or "/",
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
                pass_fds=(status, filter_in, *([info] if is_isolated else []), *task.channel),
            )
        finally:
            os.close(filter_in)

    def _outcome(self, code: int) -> Outcome:
        events = [json.loads(line) for line in self._output["status"].splitlines()]
        end = next((event for event in events if event["event"] == "end"), None)
        reason, detail = self._explain(end, code)
        limit = self._limits.output_bytes
        shown = {
            name: self._output[name][:limit].decode("utf-8", "replace")
            for name in ("stdout", "stderr")
        }
        return Outcome(
            reason,
            detail,
            **shown,
            exit_code=end["exit_code"] if end else None,
            wall_s=(self._ended_at or time.monotonic()) - self._started_at,
            queue_s=self._queue_s,
            cpu_s=end["cpu_s"] if end else 0.0,
            peak_bytes=end["peak_bytes"] if end else 0,
            isolation=self._isolation.name,
        )

    def _explain(self, end: Mapping[str, Any] | None, code: int) -> tuple[Reason, str]:
        limits = self._limits
        passed = {
            "timeout": f"passed {limits.wall_s:g} s or {limits.cpu_s} s of CPU time",
            "memory": f"passed {limits.memory_bytes} bytes of memory",
            "processes": f"passed {limits.max_processes} processes",
            "files": f"passed {limits.max_files} files or {limits.scratch_bytes} bytes of one",
            "output": f"wrote more than {limits.output_bytes} bytes",
            "stopped": "what it served was over",
            "unknown": "the sandbox did not start or did not end in time",
        }
        if self._reason is not None:
            return self._reason, passed[self._reason]
        if end is None:
            tail = self._output["stderr"].decode("utf-8", "replace").strip()[-300:]
            where = "after" if self._has_started else "before"
            return "unknown", f"the sandbox ended with {code} {where} the program's start: {tail}"
        if end["reason"]:
            return end["reason"], passed[end["reason"]]
        exit_code = end["exit_code"]
        if exit_code == 0:
            return "ok", ""
        if exit_code > 0:
            return "failed", f"exit code {exit_code}"
        if -exit_code in _LIMIT_SIGNALS or end["cpu_s"] >= limits.cpu_s:
            reason: Any = _LIMIT_SIGNALS.get(-exit_code, "timeout")
            return reason, passed[reason]
        return "killed", f"signal {-exit_code}"


def _spec(task: Task, uid: int | None, is_isolated: bool) -> dict[str, Any]:
    limits = task.limits
    rlimits = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CORE": 0,
        # The hard limit; the soft one is a second less.
        "RLIMIT_CPU": limits.cpu_s + 1,
        "RLIMIT_FSIZE": limits.scratch_bytes,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_NOFILE": limits.max_open_files,
    }
    if is_isolated:
        rlimits["RLIMIT_MSGQUEUE"] = 0
        if uid is not None or limits_processes():
            rlimits["RLIMIT_NPROC"] = limits.max_processes
    known = {name: value for name, value in rlimits.items() if name in vars(resource)}
    return {
        "main": f"reward.sandbox.inside.{task.main}",
        "payload": dict(task.payload),
        "modules": {
            f"reward.sandbox.inside.{name}": _text(name) for name in (*task.needs, task.main)
        },
        "channel": list(task.channel),
        "limits": limits.model_dump(mode="json"),
        "rlimits": known,
        "uid": uid,
        "isolated": is_isolated,
        # Another user id cannot look into the supervisor anyway.
        "hide": is_isolated and uid is None,
    }


def _text(name: str) -> str:
    return (_INSIDE / f"{name}.py").read_text(encoding="utf-8")
