"""How far planted faults lie from the canary's bound: the shipped tiny base, in bf16.

    python -m benchmarks.canary [--pushes 10] [--device cpu]

Trainer and engine multiply bf16 weights, the trainer packed, the engine by prefill and decode. A
push is one canary with samples of its own. For each fault, the lowest and the highest of all: the
rms that the bound is for, in nats and in bounds, and the largest difference, in nats.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from align.lora import LoraConfig, apply_lora
from model import HybridForCausalLM
from rollout.canary import BOUNDS, LARGEST_IN_BOUNDS, Canary, trainer_score
from rollout.native.engine import NativeEngine
from rollout.sync import copy_weights, weights

BASE = Path(__file__).parent.parent / "stages" / "bases" / "tiny"
Plant = Callable[[HybridForCausalLM], None]


def permuted(layer: int) -> Plant:
    """Two experts of a layer change places, without their router."""

    def plant(model: HybridForCausalLM) -> None:
        experts = model.model.layers[layer].mlp.experts
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack[[1, 2]] = stack[[2, 1]].clone()

    return plant


def wrong_weight(model: HybridForCausalLM) -> None:
    """One number of a projection is off by 1."""
    model.get_parameter("model.layers.1.self_attn.qkv_proj.weight")[3, 5] += 1


def stale(model: HybridForCausalLM) -> None:
    """Weights of a push before: all of them a hundredth smaller."""
    for parameter in model.parameters():
        parameter.mul_(0.99)


def adapted(model: HybridForCausalLM) -> PeftModel:
    """A policy with an adapter that has learned something."""
    policy = apply_lora(model, LoraConfig(rank=4), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return policy


def gaps(
    trainer: HybridForCausalLM | PeftModel, held: HybridForCausalLM, pushes: int
) -> tuple[list[float], list[float]]:
    """The rms and the largest difference of each push."""
    engine = NativeEngine(held, max_slots=4, max_cache_tokens=1024)
    canary = Canary.of(held.config.vocab_size, bound=1e9)
    score = trainer_score(trainer)
    found, largest = [], []
    for version in range(pushes):
        engine.policy_version = version
        done = canary.ask(engine, version=version)
        rows = score(done)
        found.append(canary.compare(done, rows, version=version))
        pairs = zip(done, rows, strict=True)
        largest.append(
            max(abs(a - b) for one, row in pairs for a, b in zip(one.logprobs, row, strict=True))
        )
    return found, largest


def main() -> None:
    """Prints a line for each fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pushes", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    base = HybridForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).to(given.device).eval()
    faults: dict[str, Plant] = {"right": lambda _: None}
    for layer in range(base.config.num_hidden_layers):
        faults[f"experts 1 and 2 of layer {layer} permuted"] = permuted(layer)
    faults |= {"one weight off by 1": wrong_weight, "stale by a hundredth": stale}
    bound = BOUNDS[torch.bfloat16]
    table = Table("fault", "rms", "rms / bound", "largest")

    def line(name: str, trainer: HybridForCausalLM | PeftModel, held: HybridForCausalLM) -> None:
        rms, largest = gaps(trainer, held, given.pushes)
        shown = (rms, [value / bound for value in rms], largest)
        table.add_row(name, *(f"{min(x):.2g} to {max(x):.2g}" for x in shown))

    for name, plant in faults.items():
        held = copy.deepcopy(base)
        with torch.no_grad():
            plant(held)
        line(name, base, held)
    policy = adapted(copy.deepcopy(base)).eval()
    line("adapter missing", policy, base)
    merged = copy.deepcopy(base)
    copy_weights(merged, weights(policy))
    line("adapter merged, right", policy, merged)
    console = Console(width=110)
    console.print(f"bounds: rms {bound:g}, largest {LARGEST_IN_BOUNDS * bound:g} nats")
    console.print(table)


if __name__ == "__main__":
    main()
