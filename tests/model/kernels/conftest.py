from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels.cpu import passes


@pytest.fixture(params=["passes", "torch"])
def cpu_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test once with the passes in C and once with the torch forms that serve without them."""
    if request.param == "torch":
        monkeypatch.setattr(passes, "library", lambda: None)
    elif passes.library() is None:
        pytest.skip("model/kernels/cpu was not built: pip install -e . with a C compiler")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made without values starts as NaN, so that an unwritten element shows."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(place, name, _poisoned(getattr(place, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: _spoil(make(*args, **options))


def _spoil(x: Tensor) -> Tensor:
    # torch's checkpoint makes an empty one that wants a gradient
    if not x.numel():
        return x
    if x.is_floating_point():
        return x.fill_(float("nan"))
    return x.fill_(2**30) if x.dtype in (torch.int32, torch.int64) else x
