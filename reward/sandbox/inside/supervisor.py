"""The first process inside a sandbox: starts the program under limits, watches it, reports.

It runs as `python -c` with this text and needs nothing of the project. Standard input holds one
JSON object: what to run, under which limits. The report goes to a file descriptor that the program
never has: one line {"event": "start"} and one {"event": "end", ...}. As process 1 of its own
process namespace it cannot be killed from inside, and its end ends everything in there.
"""

import json
import os
import resource
import sys
import time
import types
from typing import Any, NoReturn

LOOK_S = 0.02


def supervise() -> None:
    status = int(sys.argv[1])
    spec = json.loads(sys.stdin.buffer.read())
    # Standard input was a file of the host: it must not reach the program.
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if spec["hide"]:
        _set_dumpable(False)
    _report(status, event="start")
    child = os.fork()
    if child:
        _close(spec["channel"])
        _watch(child, spec, status)
    os.close(status)
    _enter(spec)


def _enter(spec: dict[str, Any]) -> None:
    """The program's side of the fork; returns when the program has ended."""
    if spec["uid"] is not None:
        os.setgroups([])
        os.setgid(spec["uid"])
        os.setuid(spec["uid"])
    if spec["hide"]:
        _set_dumpable(True)
    for name, value in spec["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    # The soft limit asks, the hard one ends a program that does not listen.
    cpu_s = spec["rlimits"]["RLIMIT_CPU"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s - 1, cpu_s))
    for name, text in spec["modules"].items():
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec(compile(text, f"<{name}>", "exec"), module.__dict__)
    sys.argv = ["program"]
    sys.modules[spec["main"]].main(spec["payload"], spec["channel"])


def _watch(child: int, spec: dict[str, Any], status: int) -> NoReturn:
    pause, reason, code, cpu_s = 0.001, "", 0, 0.0
    peak_bytes = 0
    ended = False
    while not ended and not reason:
        time.sleep(pause)
        pause = min(2 * pause, LOOK_S)
        while not ended:
            try:
                pid, code, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == child:
                ended, cpu_s = True, used.ru_utime + used.ru_stime
        if spec["isolated"] and not ended:
            memory_bytes, reason = _look(spec["limits"])
            peak_bytes = max(peak_bytes, memory_bytes)
    _report(
        status,
        event="end",
        reason=reason,
        exit_code=os.waitstatus_to_exitcode(code) if ended else None,
        cpu_s=cpu_s,
        peak_bytes=peak_bytes,
    )
    if not spec["isolated"]:
        # Nothing else ends what the program left running.
        os.killpg(0, 9)
    os._exit(0)


def _look(limits: dict[str, Any]) -> tuple[int, str]:
    """Resident bytes of all processes but this one, and which limit they pass together."""
    own = os.getpid()
    processes = [name for name in os.listdir("/proc") if name.isdigit() and int(name) != own]
    if len(processes) > limits["max_processes"]:
        return 0, "processes"
    total = sum(_resident(name) for name in processes)
    if total > limits["memory_bytes"]:
        # Pages that forked processes share were counted once for each of them.
        total = sum(_proportional(name) for name in processes)
    scratch = [os.statvfs(folder) for folder in ("/tmp", "/dev/shm")]
    # The two folders, and what leads to an interpreter below /tmp, are not the program's.
    if sum(each.f_files - each.f_ffree for each in scratch) > limits["max_files"] + 16:
        return total, "files"
    return total, "memory" if total > limits["memory_bytes"] else ""


def _resident(process: str) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _proportional(process: str) -> int:
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except OSError:
        # It hid itself, has just ended, or is another user's, as where the host is root.
        return _resident(process)


def _set_dumpable(value: bool) -> None:
    """Whether processes of the same user may read this one's memory and descriptors."""
    import ctypes

    set_dumpable = 4
    if ctypes.CDLL(None).prctl(set_dumpable, int(value), 0, 0, 0):
        raise OSError("prctl(PR_SET_DUMPABLE) failed")


def _report(status: int, **event: object) -> None:
    os.write(status, json.dumps(event).encode() + b"\n")


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    supervise()
