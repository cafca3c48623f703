"""Reward-model throughput: our packed scorer against a transformers classifier on padded batches.

    python -m benchmarks.reward [--preset tiny] [--items 128] [--threads 2]
    python -m benchmarks.reward --device cuda --dtype bf16 --preset small --items 2048

Both hold the same weights (the tiny or small shape, a linear head of one row a signal at the last
token) and judge the same items, log-normal in length with a median of 400 tokens. Ours is
`InProcessScorer`, from items to scores. Theirs is `MiniMaxForSequenceClassification` on padded
batches, in the order of arrival as a server gets them and sorted by length as a batch job may;
every batch size is tried, and the best one counts.

Values come before times. In fp32 every item of every run has to lie within rounding of the first
run, which is the truth for bf16 too. In bf16 single items cannot: where two experts are nearly
tied, rounding sends a token to the other one. There every run of ours, whatever shares a forward,
may lie no further from the truth than transformers in bf16 does, over all items and in the worst
one; a run that says otherwise ends the benchmark.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForSequenceClassification
from transformers.utils import logging

from model import HybridConfig, HybridModel
from model.config import PRESETS, count_parameters
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from reward.scorer import InProcessScorer
from reward.types import Item

MEDIAN_TOKENS, SPREAD, LONGEST = 400, 0.8, 4096
GOAL = 3.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fp32: an item's largest difference relative to the largest value; rounding, not mathematics.
WORST_FP32 = 1e-3
# bf16: how much further from fp32 than the peer's values ours may lie. Both round alike, so the
# errors' sizes have one expectation; over some 50 items or more they spread by less than this.
RMS_RATIO, WORST_RATIO = 1.5, 3.0


def shape_of(name: str) -> dict[str, object]:
    """The preset's numbers, with what both sides can do: rotation of the whole head."""
    shape = {key: value for key, value in PRESETS[name].items() if key != "rotary_dim"}
    layers = int(shape["num_hidden_layers"])
    kinds = ["full_attention" if i % 8 == 7 else "linear_attention" for i in range(layers)]
    return {**shape, "layer_types": kinds, "pad_token_id": 0}


def pair(name: str, device: str) -> tuple[RewardModel, MiniMaxForSequenceClassification]:
    """Ours and theirs with the same weights, in fp32."""
    torch.manual_seed(0)
    shape = shape_of(name)
    with torch.device(device):
        trunk = HybridModel(HybridConfig(**shape))
        config = MiniMaxConfig(**shape, num_labels=len(HIERARCHY.heads), use_cache=False)
        theirs = MiniMaxForSequenceClassification(config)
    ours = RewardModel(trunk, HIERARCHY)
    left = theirs.model.load_state_dict(ours.trunk.state_dict(), strict=False)
    assert not left.unexpected_keys
    theirs.score.weight.data.copy_(ours.values.weight.data)
    return ours.to(device).eval(), theirs.to(device).eval()


def draw(num_items: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Token sequences, log-normal in length."""
    generator = torch.Generator().manual_seed(1)
    logs = math.log(MEDIAN_TOKENS) + SPREAD * torch.randn(num_items, generator=generator)
    lengths = logs.exp().long().clamp(8, LONGEST).tolist()
    return [
        tuple(torch.randint(1, vocab_size, (n,), generator=generator).tolist()) for n in lengths
    ]


def scorer(model: RewardModel, sequences: Sequence[tuple[int, ...]], batch_tokens: int) -> Callable:
    """Ours: items to values, packed."""
    items = [Item(({"role": "user", "content": "?"},), str(i)) for i in range(len(sequences))]
    judge = InProcessScorer(
        model.hierarchy,
        model,
        lambda item: sequences[int(item.response)],
        batch_tokens=batch_tokens,
    )

    def run() -> list[list[float]]:
        scores = judge.score(items)
        return [[score.signals[f"head:{n}"].value for n in model.signals] for score in scores]

    return run


def classifier(
    model: MiniMaxForSequenceClassification,
    sequences: Sequence[tuple[int, ...]],
    batch_size: int,
    is_sorted: bool,
) -> Callable:
    """Theirs: token sequences to values, padded."""
    order = list(range(len(sequences)))
    if is_sorted:
        order.sort(key=lambda i: len(sequences[i]))

    @torch.no_grad()
    def run() -> list[list[float]]:
        found: list[list[float]] = [[] for _ in sequences]
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            longest = max(len(sequences[i]) for i in places)
            tokens = torch.zeros(len(places), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, place in enumerate(places):
                tokens[row, : len(sequences[place])] = torch.tensor(sequences[place])
                mask[row, : len(sequences[place])] = 1
            device = model.score.weight.device
            logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
            for place, values in zip(places, logits.float().tolist(), strict=True):
                found[place] = values
        return found

    return run


def timed(run: Callable, repeats: int) -> tuple[float, Tensor]:
    """Best seconds of some runs, and what came out; the values are on the host, so it has ended."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        values = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), torch.tensor(values)


@dataclass(frozen=True)
class Error:
    """Of one run's values against the truth: rms over all relative to the truth's, and of the worst
    item relative to the truth's largest value."""

    rms: float
    worst: float

    @classmethod
    def of(cls, values: Tensor, truth: Tensor) -> Error:
        gaps = values - truth
        rms = gaps.square().mean().sqrt() / truth.square().mean().sqrt()
        return cls(float(rms), float(gaps.abs().max() / truth.abs().max()))


def check(errors: Mapping[str, Error], dtype: str) -> None:
    """Raises: RuntimeError naming the run whose values are not those of the same model."""
    if dtype == "fp32":
        for name, error in errors.items():
            if not error.worst <= WORST_FP32:
                raise RuntimeError(
                    f"{name}: an item differs by {error.worst:.1e}, expected at most {WORST_FP32}"
                )
        return
    peers = [error for name, error in errors.items() if not name.startswith("ours")]
    if not peers:
        raise RuntimeError("no run of the peer's ended, so there is nothing to hold bf16 to")
    rms = RMS_RATIO * max(error.rms for error in peers)
    worst = WORST_RATIO * max(error.worst for error in peers)
    for name, error in errors.items():
        if not (error.rms <= rms and error.worst <= worst):
            raise RuntimeError(
                f"{name}: {error.rms:.1e} from fp32, an item by {error.worst:.1e}; expected at "
                f"most {rms:.1e} and {worst:.1e}, from the peer's own errors"
            )


def runs_of(
    ours: RewardModel,
    theirs: MiniMaxForSequenceClassification,
    sequences: Sequence[tuple[int, ...]],
    options: argparse.Namespace,
) -> dict[str, Callable]:
    runs = {
        f"ours, {size} tokens a forward": scorer(ours, sequences, size)
        for size in options.batch_tokens
    }
    for is_sorted in (False, True):
        for size in options.batch_sizes:
            name = f"transformers, {'sorted, ' if is_sorted else ''}{size} a batch"
            runs[name] = classifier(theirs, sequences, size, is_sorted)
    return runs


def in_fp32(runs: Mapping[str, Callable]) -> tuple[Tensor, dict[str, Error]]:
    """Values of the first run, and how far all of ours and one of the peer's lie from it."""
    peer = next(name for name in runs if not name.startswith("ours"))
    values = {
        name: torch.tensor(run())
        for name, run in runs.items()
        if name.startswith("ours") or name == peer
    }
    truth = next(iter(values.values()))
    return truth, {name: Error.of(found, truth) for name, found in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs; the best one counts")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[16_384])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    console = Console(width=130)
    ours, theirs = pair(options.preset, options.device)
    sequences = draw(options.items, ours.trunk.config.vocab_size)
    num_tokens = sum(len(sequence) for sequence in sequences)
    total = count_parameters(ours.trunk.config).total
    on = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    console.print(
        f"{total / 1e6:.1f}M parameters, {options.items} items, {num_tokens} tokens, median "
        f"{MEDIAN_TOKENS}, {options.dtype}, {on}, torch {torch.__version__}"
    )
    truth, errors = in_fp32(runs_of(ours, theirs, sequences, options))
    for name, error in errors.items():
        console.print(
            f"{name:>32}: in fp32 {error.rms:.0e} from the first, worst {error.worst:.0e}"
        )
    check(errors, "fp32")
    ours.trunk.to(DTYPES[options.dtype])
    theirs.to(DTYPES[options.dtype])
    best: dict[str, float] = {}
    errors = {}
    for name, run in runs_of(ours, theirs, sequences, options).items():
        try:
            run()
            spent, values = timed(run, options.repeats)
        except torch.OutOfMemoryError:
            console.print(f"{name:>32}: out of memory")
            continue
        errors[name] = error = Error.of(values, truth)
        console.print(
            f"{name:>32}: {spent:8.3f} s, {options.items / spent:7.1f} items/s, "
            f"{num_tokens / spent:9.0f} tokens/s, "
            f"from fp32 {error.rms:.0e}, worst {error.worst:.0e}"
        )
        side = name.split(",")[0] + (", sorted" if "sorted" in name else "")
        best[side] = min(spent, best.get(side, math.inf))
    check(errors, options.dtype)
    for peer in ("transformers", "transformers, sorted"):
        if peer in best:
            console.print(f"{peer} / ours: {best[peer] / best['ours']:.2f} (goal >= {GOAL:.0f})")


if __name__ == "__main__":
    main()
