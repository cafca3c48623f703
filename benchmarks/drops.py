"""How many tokens a capacity drops, with each row's own count and with that of many rows together.

Run: python -m benchmarks.drops runs/demo/sft-short/artifact [--row-tokens 1024] [--rows 32]

The global router counts the experts' loads over the rows of all data-parallel ranks before it drops
tokens (`model/parallel/expert.py`). Rows are packed from this project's procedural tasks, one kind
of task a row or all mixed; a trained policy of any size routes them in eval mode, so that nothing
is dropped while its choices are recorded. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from align.data.generate import TASKS
from align.policy import load_policy
from model import HybridForCausalLM, Packed
from model.kernels.experts.router import route
from model.moe import drop_over_capacity

FACTORS = (1.0, 1.25, 1.5, 2.0)
TOGETHER = (1, 2, 4, 8, 16)


def texts(names: Sequence[str], seed: int) -> list[str]:
    """Problems of the named tasks, as a plain text each."""
    chooser = random.Random(seed)
    return [
        TASKS[chooser.choice(names)].problem(seed * 1000 + n, seed=7).text_row().text
        for n in range(40)
    ]


def packed_row(tokenizer: object, names: Sequence[str], tokens: int, seed: int) -> Packed:
    documents: list[list[int]] = []
    left, number = tokens, 0
    while left:
        for text in texts(names, seed * 100 + number):
            ids = tokenizer(text)["input_ids"][:left]  # type: ignore[operator]
            if ids:
                documents.append(ids)
                left -= len(ids)
        number += 1
    return Packed.from_sequences(documents)


@torch.inference_mode()
def chosen_experts(model: HybridForCausalLM, packed: Packed) -> Tensor:
    """[layers, T, K]."""
    logits = model.model.run(packed).router_logits
    return torch.stack([route(x, model.config.num_experts_per_tok)[1] for x in logits])


def dropped(rows: Sequence[Tensor], experts: int, factor: float, together: int) -> float:
    """Share of assignments over capacity, which is counted over `together` rows at once."""
    lost = total = 0
    for start in range(0, len(rows), together):
        joint = torch.cat(list(rows[start : start + together]), dim=1)
        for layer in joint:
            lost += int((drop_over_capacity(layer, experts, factor) == experts).sum())
            total += layer.numel()
    return lost / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", type=Path)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    model, tokenizer = load_policy(options.policy)
    experts, names = model.config.num_local_experts, sorted(TASKS)
    kinds = {
        "one task a row": [[names[n % len(names)]] for n in range(options.rows)],
        "tasks mixed": [names] * options.rows,
    }
    for kind, tasks in kinds.items():
        rows = [
            chosen_experts(model, packed_row(tokenizer, own, options.row_tokens, n))
            for n, own in enumerate(tasks)
        ]
        sys.stdout.write(f"{kind}: % dropped, by rows whose loads are counted together\n")
        sys.stdout.write("  factor " + "".join(f"{n:>8}" for n in TOGETHER) + "\n")
        for factor in FACTORS:
            shares = [dropped(rows, experts, factor, n) for n in TOGETHER]
            sys.stdout.write(f"  {factor:6} " + "".join(f"{x:8.2%}" for x in shares) + "\n")


if __name__ == "__main__":
    main()
