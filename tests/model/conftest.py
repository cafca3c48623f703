from __future__ import annotations

import pytest
import torch

from model import HybridForCausalLM
from tests.model.setting import shared_model


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    return shared_model(request.param)
