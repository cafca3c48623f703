"""What must be set before any test module is imported, and what saves every test time."""

from __future__ import annotations

import gc
import os

import torch

if not torch.cuda.is_available():
    # triton reads it when it is imported, also for its own library functions
    os.environ.setdefault("TRITON_INTERPRET", "1")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # side by side with all cores each, they would wait for one another
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

# imports make millions of objects and hardly any garbage
gc.disable()


def pytest_collection_finish() -> None:
    """What was imported stays, so collecting garbage need not look at it again.

    accelerate collects at the end of every training: 0.2 s and more of a test's 0.5 s.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    # else C++ bindings report what they hold as leaked at the interpreter's end
    gc.unfreeze()
