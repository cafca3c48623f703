from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made without values starts as NaN, so that an unwritten element shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _nan(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _nan(empty_like(*a, **k)))


def _nan(x: Tensor) -> Tensor:
    # torch's checkpoint makes an empty one that wants a gradient
    is_value = x.is_floating_point() and x.numel() > 0
    return x.fill_(float("nan")) if is_value else x
