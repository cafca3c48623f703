"""Cost of a training step by length of one sequence, on one GPU: only softmax layers may grow.

Run: python -m benchmarks.train_lengths lengths.json
     python -m benchmarks.train_lengths lengths.json --plot lengths.png

Forward + backward under full checkpointing at every length, so that all lengths do the same work a
token. The softmax layers' attention is timed alone (forward twice, backward once) and taken off:
what is left should cost the same a token at any length. The second form draws what the first wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.train_step import (
    DEVICE,
    build,
    free,
    our_pass,
    pack,
    say,
    timed,
    with_checkpointing,
)
from model import HybridConfig, HybridForCausalLM
from model.config import PRESETS, preset
from model.kernels.attention.op import packed_attention

LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072, 262_144)
PASSES = 3


def attention_seconds(config: HybridConfig, tokens: int) -> float:
    """Of one softmax layer: two forward passes and one backward pass of its attention."""
    shape = (tokens, config.num_attention_heads, config.head_dim)
    q = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn_like(q[:, : config.num_key_value_heads]).requires_grad_() for _ in range(2))

    def work() -> None:
        packed_attention(q, k, v, [tokens])
        packed_attention(q, k, v, [tokens]).backward(q.detach())
        q.grad = k.grad = v.grad = None

    work()
    return min(timed(work)[0] for _ in range(PASSES))


def rows(config: HybridConfig) -> list[dict[str, float]]:
    model = with_checkpointing(build(HybridForCausalLM, config), "full")
    layers = len(config.layer_types) - config.layer_types.count("linear_attention")
    found = []
    for tokens in LENGTHS:
        run = our_pass(model, pack([tokens], config.vocab_size))
        run()
        seconds = []
        for _ in range(PASSES):
            model.zero_grad(set_to_none=True)
            seconds.append(timed(run)[0])
        model.zero_grad(set_to_none=True)
        free()
        softmax = layers * attention_seconds(config, tokens)
        free()
        step = min(seconds)
        row = {"tokens": tokens, "us": step / tokens * 1e6, "softmax_us": softmax / tokens * 1e6}
        found.append(row)
        rest = row["us"] - row["softmax_us"]
        say(f"{tokens:8} tokens: {row['us']:6.2f} us a token, softmax {row['softmax_us']:6.2f}, "
            f"the rest {rest:6.2f}")  # fmt: skip
    return found


def plot(measured: list[dict[str, float]], path: Path) -> None:
    from matplotlib import pyplot

    tokens = [row["tokens"] for row in measured]
    total = [row["us"] for row in measured]
    rest = [row["us"] - row["softmax_us"] for row in measured]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(tokens, total, marker="o", label="training step")
    axes.plot(tokens, rest, marker="o", label="without softmax attention")
    axes.set(xlabel="tokens of one sequence", ylabel="microseconds a token", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the numbers are written, or read to plot")
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS))
    parser.add_argument("--plot", type=Path, help="draw the numbers instead of measuring them")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.file.read_text(encoding="utf-8")), options.plot)
        return
    say(f"{torch.cuda.get_device_name()}, {options.preset}, full checkpointing")
    measured = rows(preset(options.preset))
    options.file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
