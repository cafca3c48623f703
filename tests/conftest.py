"""What must be set before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # triton reads it when it is imported, also for its own library functions
    os.environ.setdefault("TRITON_INTERPRET", "1")
