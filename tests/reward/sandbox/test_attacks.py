"""Hostile programs: nothing gets out, nothing is left, every end is told."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reward.sandbox import Limits, Outcome, Sandbox
from tests.reward.sandbox.attacks import (
    ENDED,
    EXHAUSTING,
    HEAVY,
    REACHING,
    READING,
    WRITING,
)

LIMITS = Limits(wall_s=4.0, cpu_s=2, memory_bytes=512 << 20)
PROBING = READING | WRITING | REACHING


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Things of the host that a program must not reach."""
    canary = tmp_path / "canary"
    canary.write_text("secret")
    canary.chmod(0o666)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("CANARY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0sandbox-canary-{os.getpid()}")
        local.listen()
        port = server.getsockname()[1]
        yield {"canary": str(canary), "pid": os.getpid(), "port": port}
    assert canary.read_text() == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]


def descendants() -> set[tuple[str, str]]:
    """This process's children, their children, and so on: with them every sandbox's inside."""
    parents: dict[str, list[tuple[str, str]]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            # Numbers come round again: the time of its start makes a process the same.
            parents.setdefault(fields[1], []).append((folder.name, fields[19]))
    found: set[tuple[str, str]] = set()
    rest = [str(os.getpid())]
    while rest:
        children = parents.get(rest.pop(), [])
        found.update(children)
        rest.extend(number for number, _ in children)
    return found


def is_alive(process: tuple[str, str]) -> bool:
    try:
        text = Path("/proc", process[0], "stat").read_text()
    except OSError:
        return False
    return text.rsplit(")", 1)[1].split()[19] == process[1]


def resident_bytes(process: str) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGESIZE"
        )
    except OSError:
        return 0


def shared_bytes() -> int:
    """What all scratch folders of the machine hold."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Shmem:"))


def run_all(sandbox: Sandbox, programs: dict[str, str]) -> dict[str, Outcome]:
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda text: sandbox.run(text, limits=LIMITS), programs.values()))
    return dict(zip(programs, outcomes, strict=True))


def test_there_are_forty_attacks_and_more():
    assert len(PROBING) + len(EXHAUSTING) + len(HEAVY) >= 70


def test_nothing_of_the_host_can_be_reached(sandbox, host):
    known = "".join(f"{name} = {value!r}\n" for name, value in host.items())
    outcomes = run_all(sandbox, {name: known + text for name, text in PROBING.items()})
    escaped = {name: each for name, each in outcomes.items() if "ESCAPED" in each.stdout}
    assert not escaped
    assert {name: each for name, each in outcomes.items() if each.reason not in ENDED} == {}
    assert all(each.isolation == "bubblewrap" for each in outcomes.values())


def test_every_limit_ends_what_passes_it(sandbox):
    outcomes = run_all(sandbox, {name: text for name, (text, _) in EXHAUSTING.items()})
    wrong = {
        name: (each.reason, each.detail, each.stderr[-300:])
        for name, each in outcomes.items()
        if each.reason not in EXHAUSTING[name][1]
    }
    assert not wrong


@pytest.mark.slow
def test_bombs_leave_nothing_behind(sandbox):
    before, shared_before = descendants(), shared_bytes()
    highest, watching = 0, True
    seen: set[tuple[str, str]] = set()

    def watch() -> None:
        nonlocal highest
        while watching:
            now = descendants() - before
            seen.update(now)
            highest = max(highest, sum(resident_bytes(number) for number, _ in now))
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        outcomes = run_all(sandbox, {name: text for name, (text, _) in HEAVY.items()})
        watching = False
        watcher.result()
    wrong = {
        name: (each.reason, each.detail, each.stderr[-300:])
        for name, each in outcomes.items()
        if each.reason not in HEAVY[name][1]
    }
    assert not wrong
    assert all(each.wall_s < LIMITS.wall_s + 2 for each in outcomes.values())
    assert len(seen) > len(HEAVY)
    assert list(filter(is_alive, seen)) == []
    # Two run at a time; several processes can pass the limit together for one look.
    assert LIMITS.memory_bytes < highest < 2 * (LIMITS.memory_bytes + (1 << 30))
    assert shared_bytes() - shared_before < 256 << 20
