"""Reward-model throughput: our packed scorer against a transformers classifier on padded batches.

    python -m benchmarks.reward [--preset tiny] [--items 128] [--threads 2]
    python -m benchmarks.reward --device cuda --dtype bf16 --preset small --items 2048

Both hold the same weights (the tiny or small shape, a linear head of one row a signal at the last
token) and judge the same items, log-normal in length with a median of 400 tokens. Ours is
`InProcessScorer`, from items to scores. Theirs is `MiniMaxForSequenceClassification` on padded
batches, in the order of arrival as a server gets them and sorted by length as a batch job may;
every batch size is tried, and the best one counts. Values are compared before times.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

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
# Of an item's largest difference, relative to the values' own size: rounding, not mathematics.
# fp32 holds every item to it, bf16 the median one: where two experts are nearly tied, rounding may
# send a token to the other, and with random weights that moves a single item by anything.
BOUNDS = {"fp32": 1e-3, "bf16": 1e-1}


def shape_of(name: str) -> dict[str, object]:
    """The preset's numbers, with what both sides can do: rotation of the whole head."""
    shape = {key: value for key, value in PRESETS[name].items() if key != "rotary_dim"}
    layers = int(shape["num_hidden_layers"])
    kinds = ["full_attention" if i % 8 == 7 else "linear_attention" for i in range(layers)]
    return {**shape, "layer_types": kinds, "pad_token_id": 0}


def pair(
    name: str, device: str, dtype: torch.dtype
) -> tuple[RewardModel, MiniMaxForSequenceClassification]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    shape = shape_of(name)
    ours = RewardModel(HybridModel(HybridConfig(**shape)), HIERARCHY)
    theirs = MiniMaxForSequenceClassification(
        MiniMaxConfig(**shape, num_labels=len(ours.signals), use_cache=False)
    )
    left = theirs.model.load_state_dict(ours.trunk.state_dict(), strict=False)
    assert not left.unexpected_keys
    theirs.score.weight.data.copy_(ours.values.weight.data)
    ours.trunk.to(dtype)
    return ours.to(device).eval(), theirs.to(device, dtype).eval()


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
    console = Console(width=110)
    ours, theirs = pair(options.preset, options.device, DTYPES[options.dtype])
    sequences = draw(options.items, ours.trunk.config.vocab_size)
    num_tokens = sum(len(sequence) for sequence in sequences)
    runs: dict[str, Callable] = {
        f"ours, {size} tokens a forward": scorer(ours, sequences, size)
        for size in options.batch_tokens
    }
    for is_sorted in (False, True):
        for size in options.batch_sizes:
            name = f"transformers, {'sorted, ' if is_sorted else ''}{size} a batch"
            runs[name] = classifier(theirs, sequences, size, is_sorted)
    total = count_parameters(ours.trunk.config).total
    on = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    console.print(
        f"{total / 1e6:.1f}M parameters, {options.items} items, {num_tokens} tokens, median "
        f"{MEDIAN_TOKENS}, {options.dtype}, {on}, torch {torch.__version__}"
    )
    best: dict[str, float] = {}
    exact: Tensor | None = None
    for name, run in runs.items():
        try:
            run()
            spent, values = timed(run, options.repeats)
        except torch.OutOfMemoryError:
            console.print(f"{name:>32}: out of memory")
            continue
        exact = values if exact is None else exact
        gaps = (values - exact).abs().amax(1) / exact.abs().max()
        gap, typical = float(gaps.max()), float(gaps.median())
        held = gap if options.dtype == "fp32" else typical
        if held > BOUNDS[options.dtype]:
            raise RuntimeError(f"{name}: values differ by {held:.1e}: not the same model")
        console.print(
            f"{name:>32}: {spent:8.3f} s, {options.items / spent:7.1f} items/s, "
            f"{num_tokens / spent:9.0f} tokens/s, difference {typical:.0e} (largest {gap:.0e})"
        )
        side = name.split(",")[0] + (", sorted" if "sorted" in name else "")
        best[side] = min(spent, best.get(side, math.inf))
    for peer in ("transformers", "transformers, sorted"):
        if peer in best:
            console.print(f"{peer} / ours: {best[peer] / best['ours']:.2f} (goal >= {GOAL:.0f})")


if __name__ == "__main__":
    main()
