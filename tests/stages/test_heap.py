"""Memory that the process frees and takes again is not touched for the first time again."""

from __future__ import annotations

import subprocess
import sys

import pytest

# in a process of its own: the setting cannot be taken back
_FAULTS = """
import resource, sys
from stages.heap import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no mallopt")
def block():
    return bytearray(64 << 20)
block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_block_taken_again_costs_no_page_fault():
    faults = {}
    for how in ("keep", "return"):
        command = [sys.executable, "-c", _FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True)
        if "no mallopt" in done.stderr:
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    # 64 MiB are 16,384 pages, or 32 huge ones
    assert faults["keep"] < 16 < faults["return"]
