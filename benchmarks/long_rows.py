"""LoRA SFT and DPO steps of a packed row that one GPU can hardly hold: peak memory and time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.lora import LoraConfig, apply_lora
from align.losses.dpo import dpo_loss, sequence_logprobs
from align.losses.lm import lm_loss
from align.losses.types import Loss
from align.trainers.dpo import reference_of
from benchmarks.ranks import Ranks, build, row
from model import Packed
from model.config import preset
from model.parallel.apply import parallelize
from model.parallel.mesh import ParallelConfig, open_mesh

LORA = LoraConfig(rank=16, targets="all")
Step = Callable[[nn.Module, Packed], Loss]


def sft(model: nn.Module, packed: Packed) -> Loss:
    out = model(packed=packed, targets=packed.tokens.roll(-1))
    return lm_loss(out.logprobs, trained(packed), aux=out.aux_loss)


def dpo(model: nn.Module, packed: Packed) -> Loss:
    """Chosen and rejected in one row, against the model without its adapters."""
    targets, weights = packed.tokens.roll(-1), trained(packed)
    with torch.no_grad(), reference_of(model) as reference:
        known = reference(packed=packed, targets=targets).logprobs
    out = model(packed=packed, targets=targets)
    return dpo_loss(
        sequence_logprobs(out.logprobs, weights, packed.lengths),
        sequence_logprobs(known, weights, packed.lengths),
        beta=0.1,
        aux=out.aux_loss,
    )


def trained(packed: Packed) -> Tensor:
    """An answer of a quarter behind each prompt."""
    parts = [torch.arange(n) >= n - n // 4 for n in packed.lengths]
    return torch.cat(parts).float().to(packed.tokens.device)


# documents of the row, and the loss
STEPS: dict[str, tuple[int, Step]] = {"sft": (1, sft), "dpo": (2, dpo)}


def measure(ranks: Ranks, options: argparse.Namespace, size: int) -> None:
    """Each step once on so many ranks, after a short row that compiles what it needs."""
    config, tokens = preset(options.preset), options.long_tokens
    ranks.say(
        f"\nlong: {options.preset}, LoRA rank {LORA.rank} on {LORA.targets} weights, block inputs "
        f"on the host, {tokens} packed tokens on {size} GPU{'s' * (size > 1)}"
    )
    model = build(config, ranks)
    if size > 1:
        parallel = ParallelConfig(sequence=size)
        parallelize(model, open_mesh(parallel, device_type=ranks.device.type), parallel)
    model.model.checkpointing = "host"
    adapted = apply_lora(model, LORA, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                # an adapter that changes something
                parameter.normal_(std=1e-3, generator=_generator(ranks))
    for name in options.long_steps:
        documents, step = STEPS[name]
        for total in (min(8192, tokens // 4), tokens):
            ranks.clear()
            packed = row([total // documents] * documents, config.vocab_size, ranks)
            found = [0.0] * 3
            if size > 1 or ranks.world.rank == 0:
                found = list(update(adapted, packed, step, ranks, size))
            ranks.meet()
        seconds, peak = (ranks.largest(x) for x in found[:2])
        ranks.say(
            f"  {name}, {documents} document{'s' * (documents > 1)}: {seconds:7.2f} s, "
            f"{tokens / seconds:9.0f} tokens/s, peak {peak:6.1f} GB, loss {found[2]:.6f}"
        )


def _generator(ranks: Ranks) -> torch.Generator:
    return torch.Generator(ranks.device).manual_seed(1)


def update(
    model: nn.Module, packed: Packed, step: Step, ranks: Ranks, size: int
) -> tuple[float, float, float]:
    """Seconds of one update with AdamW, peak memory in GB, loss an item."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)
    ranks.wait()
    start = time.perf_counter()
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
        loss = step(model, packed)
    items = 1.0 if len(packed.lengths) > 1 else float(trained(packed).sum())
    assert loss.aux is not None, "the presets have experts"
    ((loss.sum / items + loss.aux) / size).backward()
    if size > 1:
        for parameter in adapters:
            dist.all_reduce(parameter.grad)
    optimizer.step()
    ranks.wait()
    seconds = time.perf_counter() - start
    optimizer.zero_grad(set_to_none=True)
    is_cuda = ranks.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0
    return seconds, peak, float(loss.sum.detach()) / items
