"""What must be set before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # triton reads it when it is imported, also for its own library functions
    os.environ.setdefault("TRITON_INTERPRET", "1")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # side by side with all cores each, they would wait for one another
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
