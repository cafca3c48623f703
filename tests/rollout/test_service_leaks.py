"""`align serve-rollout` as a process: requests of every kind leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rollout_service import ROOM_BYTES, ask, held, worker, wrong


@pytest.mark.slow
def test_requests_of_every_kind_leave_nothing_behind(tmp_path: Path):
    with worker(tmp_path / "policy") as url:
        told = ask(url, range(360), num_clients=8)
        first = held(url)
        told += ask(url, range(360, 1560), num_clients=8)
        last = held(url, tasks=first.held["rollout_tasks"])
    assert wrong(told) == []
    assert told.total() == 1560
    assert last.held == first.held
    assert first.held["rollout_free_slots"] == 16
    assert last.files == first.files
    assert last.memory - first.memory < ROOM_BYTES
