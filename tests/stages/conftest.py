"""A tiny policy, an adapter on it and a reward model, for the commands that open one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.lora import LoraConfig, apply_lora
from align.policy import load_policy, save_policy
from model import HybridForCausalLM, preset
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from tests.stages.fakes import TOKENIZER


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "full"
    torch.manual_seed(0)
    shape = preset(
        "tiny",
        vocab_size=290,
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        eos_token_id=TOKENIZER.eos_token_id,
        initializer_range=0.2,
    )
    save_policy(HybridForCausalLM(shape), TOKENIZER, folder)
    return folder


@pytest.fixture(scope="session")
def adapter(policy: Path) -> Path:
    model, tokenizer = load_policy(policy)
    adapted = apply_lora(model, LoraConfig(rank=2, alpha=4), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_policy(adapted, tokenizer, policy.parent / "adapter", base=policy)
    return policy.parent / "adapter"


@pytest.fixture(scope="session")
def judge(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    model, tokenizer = load_policy(policy)
    RewardModel(model.model, HIERARCHY).save(folder)
    tokenizer.save_pretrained(folder)
    return folder
