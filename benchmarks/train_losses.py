"""The same training run with our kernels and with their torch forms, on one GPU: do losses agree?

Run: python -m benchmarks.train_losses [--preset small] [--steps 100] [--pairs 8]

A pair of runs has the same weights and data, bf16 with fp32 master weights; every batch is new:
chains of tokens that follow one permutation seven times in ten. Kernels round otherwise than torch
does, so single losses differ, and the two runs of a pair walk apart: their residuals are not
independent of each other, whatever their sign. Pairs are: each has its own weights and data. What
must not be is a drift over pairs: their mean residuals are held against their spread (Student's t,
two-sided at 1 %). How far two runs walk apart by rounding alone is told beside it: torch against
torch with the head's weights moved by about one rounding of theirs.
"""

from __future__ import annotations

import argparse
import multiprocessing
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
# the spacing of bf16 numbers
NUDGE = 2**-8
# two-sided 1 % of Student's t by pairs
BOUNDS = {2: 63.66, 3: 9.92, 4: 5.84, 5: 4.60, 6: 4.03, 7: 3.71, 8: 3.50, 9: 3.36, 10: 3.25}
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


def batches(steps: int, vocabulary: int, seed: int) -> list[Tensor]:
    """[SEQUENCES, LENGTH] tokens a step."""
    generator = torch.Generator().manual_seed(seed)
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


def losses(config: HybridConfig, data: list[Tensor], seed: int, nudge: float = 0.0) -> list[float]:
    model = build(HybridForCausalLM, config, seed=seed)
    with torch.no_grad():
        noise = torch.randn_like(model.lm_head.weight, dtype=torch.float32)
        model.lm_head.weight.copy_(model.lm_head.weight * (1 + nudge * noise))
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


def pair(job: tuple[str, int, int]) -> tuple[list[float], list[float], list[float]]:
    """Losses with kernels, with torch, and with torch once more from a head moved by a rounding."""
    name, steps, seed = job
    config = preset(name)
    data = batches(steps, config.vocab_size, seed)
    ours = losses(config, data, seed)
    with torch_forms():
        return ours, losses(config, data, seed), losses(config, data, seed, NUDGE)


def mean_residual(one: list[float], other: list[float]) -> float:
    return statistics.mean(a - b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=tuple(PRESETS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=8, choices=tuple(BOUNDS))
    options = parser.parse_args()
    jobs = [(options.preset, options.steps, seed) for seed in range(options.pairs)]
    # side by side: each alone is held up by the host
    with multiprocessing.get_context("spawn").Pool(options.pairs) as pool:
        found = pool.map(pair, jobs, chunksize=1)
    say(f"{torch.cuda.get_device_name()}, {options.preset}, {options.steps} steps, loss in nats")
    ours, theirs, _ = found[0]
    for step in [*range(0, options.steps, 10), options.steps - 1]:
        say(f"  step {step:4}: kernels {ours[step]:.4f}, torch {theirs[step]:.4f}")
    for what, against in (("kernels - torch", 0), ("torch moved - torch", 2)):
        means = [mean_residual(runs[against], runs[1]) for runs in found]
        mean = statistics.mean(means)
        t = mean / (statistics.stdev(means) / len(means) ** 0.5)
        gaps = [a - b for runs in found for a, b in zip(runs[against], runs[1], strict=True)]
        largest = max(abs(gap) for gap in gaps)
        verdict = "ok" if abs(t) < BOUNDS[options.pairs] else "DRIFT"
        say(f"{what}: pairs {' '.join(f'{x:+.1e}' for x in means)}")
        say(f"{what}: mean {mean:+.1e}, t {t:+.2f}, largest {largest:.1e}: {verdict}")


if __name__ == "__main__":
    main()
