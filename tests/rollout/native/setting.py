"""The model that the engine's tests share."""

from __future__ import annotations

import torch

from model import HybridForCausalLM, preset

VOCABULARY = 64


def make_model(seed: int = 0, layers: int = 3) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = preset(
        "tiny",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        head_dim=16,
        rotary_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"][:layers],
        # larger than the usual 0.02, so that the distributions are far from uniform
        initializer_range=0.3,
    )
    return HybridForCausalLM(config)
