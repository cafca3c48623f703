"""Logprobs and entropies of the LM head on one GPU, forward and backward, beside TRL and torch.

Run: python -m benchmarks.logprob

"Products" are the four matrix products that recomputing logits needs (logits twice, both
gradients), alone, each whole. TRL's fused head runs if `trl` is installed; plain torch makes all
logits and runs where they fit well. Memory is the peak above what the inputs hold, gradients
included. Times are medians as in `benchmarks/kernels.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels import DEVICE, median_ms, say
from model.kernels.logprob.op import token_logprobs
from model.kernels.logprob.reference import token_logprobs_reference

# tokens, hidden size, vocabulary
SIZES = ((8192, 2048, 32_000), (32_768, 2048, 32_000), (131_072, 2048, 32_000),
         (8192, 6144, 200_064))  # fmt: skip
MAX_PLAIN_LOGITS = 8192 * 32_000
REPEATS = 5
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.t()).float().log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def peers(size: int) -> dict[str, Head]:
    heads: dict[str, Head] = {"ours": token_logprobs}
    if importlib.util.find_spec("trl") is not None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            # 8192 columns at once, as its trainers ask for
            given = (1.0, 8192, None, 1.0, ("entropy",))
            return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *given)[:2]

        heads["TRL"] = trl
    if size <= MAX_PLAIN_LOGITS:
        heads["plain"] = plain
    return heads


def make(tokens: int, width: int, vocabulary: int) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE).bfloat16()
    weight = (2 * torch.randn(vocabulary, width, device=DEVICE) * width**-0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    return leaves, targets, torch.randn(tokens, device=DEVICE)


def error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact).square().mean().sqrt()
    return float(difference / exact.square().mean().sqrt())


def check() -> None:
    """RMS error of every head against fp64."""
    (hidden, weight), targets, grad = make(4096, 512, 5000)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = token_logprobs_reference(*wide, targets)
    gradients = torch.autograd.grad(exact[0], wide, grad.double())
    for name, head in peers(0).items():
        found = head(hidden, weight, targets)
        errors = [error(a.detach(), b.detach()) for a, b in zip(found, exact, strict=True)]
        got = torch.autograd.grad(found[0], (hidden, weight), grad)
        errors += [error(a, b) for a, b in zip(got, gradients, strict=True)]
        say(f"  {name}: " + " ".join(f"{x:.1e}" for x in errors))


def products_ms(hidden: Tensor, weight: Tensor) -> float:
    """Logits twice and both gradients, a vocabulary slice at a time so that it fits."""
    step = max(2**30 // hidden.shape[0] // 256, 1) * 256
    total = 0.0
    with torch.no_grad():
        whole, rest = divmod(weight.shape[0], step)
        for rows, count in ((step, whole), (rest, 1)):
            if not rows * count:
                continue
            columns = weight[:rows]
            logits = hidden @ columns.t()
            times = [
                median_ms(lambda c=columns, z=logits: torch.mm(hidden, c.t(), out=z), REPEATS),
                median_ms(lambda c=columns, z=logits: z @ c, REPEATS),
                median_ms(lambda z=logits: z.t() @ hidden, REPEATS),
            ]
            total += count * (2 * times[0] + times[1] + times[2])
    return total


def time_sizes(tokens: int, width: int, vocabulary: int) -> None:
    (hidden, weight), targets, grad = make(tokens, width, vocabulary)
    floor = products_ms(hidden, weight)
    say(f"T={tokens} C={width} V={vocabulary}: products {floor:.2f} ms")
    for name, head in peers(tokens * vocabulary).items():
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward = median_ms(lambda head=head: head(hidden, weight, targets), REPEATS)
        logprobs = head(hidden, weight, targets)[0]
        backward = median_ms(
            lambda out=logprobs: torch.autograd.grad(
                out, (hidden, weight), grad, retain_graph=True
            ),
            REPEATS,
        )
        peak = (torch.cuda.max_memory_allocated() - held) / 1e9
        say(
            f"  {name}: forward {forward:.2f} ms, backward {backward:.2f} ms, together "
            f"{(forward + backward) / floor:.2f} of the products, peak {peak:.2f} GB"
        )


def main() -> None:
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    say("RMS error against fp64: logprobs, entropy, dhidden, dweight")
    check()
    for size in SIZES:
        time_sizes(*size)


if __name__ == "__main__":
    main()
