"""A token drawn from each row of logits, with its log-probability, on one GPU.

Run: python -m benchmarks.draw

"ours" is the kernel, "torch" the same by torch's operations, "noise" the usual way without a seed
of each row: the largest of p_i / e_i with exponential noise e, then the log-probability. Each is a
graph; us on the device, medians as in `benchmarks/kernels.py`; the floor is one reading of the
logits over 4.2 TB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import DEVICE, median_ms, say
from model.kernels.draw.op import draw_tokens

BYTES_A_SECOND = 4.2e12
ROWS, VOCABULARIES = (1, 32, 256), (32_000, 200_064)


def noise(logits: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    tokens = (logprobs.exp() / torch.empty_like(logits).exponential_()).argmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def graph_us(form: Callable[[], object]) -> float:
    for _ in range(2):
        form()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form()
    return median_ms(graph.replay) * 1e3


def main() -> None:
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    say(f"{'rows':>5} {'of':>8} {'floor':>6} {'ours':>7} {'torch':>7} {'noise':>7}")
    for size in VOCABULARIES:
        for rows in ROWS:
            logits = 3 * torch.randn(rows, size, device=DEVICE)
            counters = torch.randint(0, 2**62, (3, rows), device=DEVICE)
            ours = partial(
                draw_tokens, logits, torch.ones(rows, device=DEVICE), *counters,
                greedy=False, tempered=False,
            )  # fmt: skip
            forms = ours, partial(ours, form="torch"), partial(noise, logits)
            times = " ".join(f"{graph_us(form):7.1f}" for form in forms)
            floor = logits.nbytes / BYTES_A_SECOND * 1e6
            say(f"{rows:5d} {size:8d} {floor:6.1f} {times}")


if __name__ == "__main__":
    main()
