"""The same training run with our kernels and with their torch forms, on one GPU: do losses agree?

Run: python -m benchmarks.train_losses [--preset small] [--steps 100]

Same weights, same data, bf16 with fp32 master weights; every batch is new: chains of tokens that
follow one permutation seven times in ten. Kernels round otherwise than torch does, so single losses
differ, and by more the longer the runs go apart. What must not be is a drift: the residuals' mean
over blocks of ten steps is held against its own spread (|t| < 3), and its size is told in nats.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from align.wide_adamw import WideAdamW
from benchmarks.train_step import DEVICE, build, say
from model import HybridConfig, HybridForCausalLM, Packed
from model.config import PRESETS, preset

SEQUENCES, LENGTH = 32, 256
BLOCK = 10
BOUND = 3.0
# what each op asks before it takes kernels; attention has torch's own forms only
ASKED = {
    "experts": "TRITON_DTYPES",
    "lightning": "TRITON_DTYPES",
    "logprob": "SHORT",
    "norm": "TRITON_DTYPES",
    "qkv": "TRITON_DTYPES",
    "rotary": "TRITON_DTYPES",
}


@contextmanager
def torch_forms() -> Iterator[None]:
    """Every op by its torch form, because no dtype is one that kernels take."""
    with ExitStack() as stack:
        for room, name in ASKED.items():
            stack.enter_context(mock.patch(f"model.kernels.{room}.op.{name}", ()))
        yield


def batches(steps: int, vocabulary: int) -> list[Tensor]:
    """[SEQUENCES, LENGTH] tokens a step."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(vocabulary, generator=generator)
    made = []
    for _ in range(steps):
        random = torch.randint(vocabulary, (LENGTH, SEQUENCES), generator=generator)
        is_random = torch.rand(LENGTH, SEQUENCES, generator=generator) < 0.3
        rows = [random[0]]
        for place in range(1, LENGTH):
            rows.append(torch.where(is_random[place], random[place], follows[rows[-1]]))
        made.append(torch.stack(rows, dim=1))
    return made


def losses(config: HybridConfig, data: list[Tensor]) -> list[float]:
    model = build(HybridForCausalLM, config)
    optimizer = WideAdamW(model.parameters(), lr=1e-3, is_stochastic=False)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    positions = torch.arange(LENGTH, device=DEVICE).repeat(SEQUENCES)
    weights = torch.ones(SEQUENCES, LENGTH, device=DEVICE)
    weights[:, -1] = 0
    weights = weights.flatten() / weights.sum()
    seen = []
    for tokens in data:
        flat = tokens.flatten().to(DEVICE)
        packed = Packed(flat, positions, (LENGTH,) * SEQUENCES)
        out = model(packed=packed, targets=flat.roll(-1))
        loss = -(out.logprobs * weights).sum()
        (loss + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        warmup.step()
        seen.append(loss.detach())
    return torch.stack(seen).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=tuple(PRESETS))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    config = preset(options.preset)
    data = batches(options.steps, config.vocab_size)
    ours = losses(config, data)
    with torch_forms():
        theirs = losses(config, data)
    residuals = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = [statistics.mean(residuals[i : i + BLOCK]) for i in range(0, len(residuals), BLOCK)]
    mean = statistics.mean(means)
    spread = statistics.stdev(means) / len(means) ** 0.5
    say(f"{torch.cuda.get_device_name()}, {options.preset}, {len(data)} steps, loss in nats")
    for step in range(0, len(data), BLOCK):
        say(f"  step {step:4}: kernels {ours[step]:.4f}, torch {theirs[step]:.4f}")
    say(f"  last     : kernels {ours[-1]:.4f}, torch {theirs[-1]:.4f}")
    largest = max(abs(r) for r in residuals)
    verdict = "ok" if abs(mean) < BOUND * spread else "DRIFT"
    say(f"residual: mean {mean:+.1e}, t {mean / spread:+.2f}, largest {largest:.1e}: {verdict}")


if __name__ == "__main__":
    main()
