"""A model, a tokenizer and rows small enough to train in a test."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from align.course import Job
from align.data.batch import Example, Pair
from align.data.tokenizer import train_tokenizer
from align.policy import save_policy
from model import HybridForCausalLM, preset

# cuda: tests of several processes meet over NCCL, a GPU for each
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
VOCAB = 280
TEXTS = ["the cat sat on the mat and the hat"] * 4


def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, VOCAB)


def model(seed: int = 0, **changes: Any) -> HybridForCausalLM:
    """Two layers, one of each attention; no router loss, so that sums are linear in the batch."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rotary_dim": 4,
        "initializer_range": 0.2,
        "router_aux_loss_coef": 0.0,
    }
    return HybridForCausalLM(preset("tiny", **(shape | changes)))


def example(rng: random.Random, place: str, length: int) -> Example:
    tokens = tuple(rng.randrange(10, VOCAB - 10) for _ in range(length))
    start = rng.randrange(1, length)
    return Example(tokens, tuple(float(i >= start) for i in range(length)), place)


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [example(rng, f"rows.jsonl:{i + 1}", rng.randrange(4, 12)) for i in range(count)]


def pairs(count: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    return [
        Pair(*(example(rng, f"pairs.jsonl:{i + 1}", rng.randrange(4, 12)) for _ in range(2)))
        for i in range(count)
    ]


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """A file that is whole at any time: each process of a test writes it, and others read it."""
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text("\n".join(lines))
    fresh.replace(file)


def start(folder: Path, **changes: Any) -> Path:
    """A saved policy to start from."""
    save_policy(model(**changes), tokenizer(), folder)
    return folder


def job(folder: Path, start: Path | None = None, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "name": "stage",
        "folder": folder,
        "artifact": folder / "artifact",
        "start": start or folder / "start",
        "base": folder,
        "seed": 0,
    }
    # not made beside another: accelerate keeps one device a process
    if "accelerator" not in changes:
        given["accelerator"] = Accelerator(cpu=DEVICE == "cpu")
        assert given["accelerator"].device.type == DEVICE
    return Job(**(given | changes))
