"""Every kernel compiles for the GPUs that are meant, on a machine without one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HOPPER_ONLY = {"lightning_run_hopper", "lightning_bwd_keys_values"}


# a minute each where nothing was compiled before
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_kernels_compile_ahead_of_time(target: int):
    pytest.importorskip("triton")
    # a process of its own: the interpreter, once chosen, stays for the process
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/model/kernels/compile_ahead.py", str(target)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {name for name in _kernels() if target == 90 or name not in HOPPER_ONLY}


def _kernels() -> set[str]:
    """Names of all kernels that a `launch.py` may start, read from the source."""
    names = set()
    for file in (ROOT / "model/kernels").glob("*/*.py"):
        lines = file.read_text().splitlines()
        for above, line in itertools.pairwise(lines):
            is_kernel = above.startswith(("@triton.jit", "@gluon.jit"))
            if is_kernel and line.startswith("def ") and not line.startswith("def _"):
                names.add(line.removeprefix("def ").split("(")[0])
    return names
