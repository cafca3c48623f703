"""The sandbox for tests: where bubblewrap is installed it has to work."""

from __future__ import annotations

import shutil

import pytest

from reward.sandbox import Sandbox, find_isolation


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    missing = find_isolation().missing
    if missing and shutil.which("bwrap") is None:
        pytest.skip(f"no isolation here: {missing}")
    assert not missing, f"bubblewrap is installed, but: {missing}"
    return Sandbox()
