"""The models and inputs that the model's tests share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from model import HybridConfig, HybridForCausalLM, Packed
from model.config import preset

EXACT = 1e-6
VOCABULARY = 61
RAGGED = ([65], [1, 63], [64, 1, 130], [1, 1, 1], [7, 300, 2])


def small_config(**changes: object) -> HybridConfig:
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return preset("tiny", **{**values, **changes})


def build(**changes: object) -> HybridForCausalLM:
    torch.manual_seed(0)
    model = HybridForCausalLM(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def exact(model: HybridForCausalLM) -> float:
    """fp64 shows that what fp32 leaves is rounding and nothing else."""
    return {torch.float32: EXACT, torch.float64: 1e-12}[model.dtype]


@functools.cache
def shared_model(dtype: torch.dtype) -> HybridForCausalLM:
    return build().to(dtype)


def random_sequences(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def separate_logits(model: HybridForCausalLM, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]


def packed_logits(model: HybridForCausalLM, packed: Packed) -> Tensor:
    return model.logits(model.model.run(packed).hidden)


def padded(sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(sequence) for sequence in sequences)
    rows, masks = [], []
    for sequence in sequences:
        gap = width - len(sequence)
        pad, real = [0] * gap, [1] * len(sequence)
        rows.append([*pad, *sequence] if left else [*sequence, *pad])
        masks.append([*pad, *real] if left else [*real, *pad])
    return torch.tensor(rows), torch.tensor(masks)


def gradients(model: HybridForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def summed_logprobs(model: HybridForCausalLM, sequences: Sequence[Sequence[int]]) -> Tensor:
    packed = Packed.from_sequences(sequences)
    targets = packed.tokens.roll(-1)
    out = model(packed=packed, targets=targets)
    weights = torch.linspace(0.5, 1.5, VOCABULARY)[packed.tokens]
    ends = packed.cu_seqlens[1:].long() - 1
    weights = weights.index_fill(0, ends, 0.0)
    return (out.logprobs * weights).sum()
