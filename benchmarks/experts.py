"""The MoE block on one GPU, forward and backward, beside its six bare products and transformers'.

Run: python -m benchmarks.experts [--part block|pieces|all]

"Block" is all of `model.moe.MoE`: router, routing, sort, spread, products, SwiGLU, combine, and the
gradients of x, router and experts. "Products" are the six `torch._grouped_mm` of the same shapes
alone, on rows already sorted. The peer is transformers' MiniMax block with `grouped_mm` experts on
the same weights. Times are medians as in `benchmarks/kernels.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxSparseMoeBlock

from benchmarks.kernels import DEVICE, copy_bandwidth, median_ms, say
from model.config import HybridConfig
from model.kernels.experts import launch
from model.kernels.experts.router import route, router_logits
from model.moe import MoE

# experts, hidden size, expert hidden size
SIZES = ((8, 2048, 4096), (32, 6144, 9216))
TOKENS = (8192, 32_768)
TOP_K = 2


def build(experts: int, size: int, inner: int) -> tuple[MoE, nn.Module]:
    """Our block and the peer's, of one set of weights."""
    sizes = {
        "hidden_size": size, "intermediate_size": inner, "num_local_experts": experts,
        "num_experts_per_tok": TOP_K,
    }  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        mine = MoE(HybridConfig(**sizes))
    with torch.device("meta"):
        config = MiniMaxConfig(**sizes)
        config._experts_implementation = "grouped_mm"
        peer = MiniMaxSparseMoeBlock(config)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    for weight in mine.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    peer.load_state_dict(mine.state_dict(), assign=True)
    return mine, peer


def both(block: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, module: nn.Module) -> None:
    torch.autograd.grad(block(x), [x, *module.parameters()], dy)


def products(rows: Tensor, inner: Tensor, joined: Tensor, moe: MoE, ends: Tensor) -> None:
    """Two products forward, two for the inputs' gradients, two for the weights'."""
    gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    for left, right in (
        (rows, gate_up.transpose(1, 2)), (joined, down.transpose(1, 2)), (rows, down),
        (rows.t(), joined), (inner.t(), rows), (inner, gate_up),
    ):  # fmt: skip
        torch._grouped_mm(left, right, offs=ends)


def place(moe: MoE, x: Tensor) -> tuple[Tensor, launch.Places]:
    weights, chosen = route(router_logits(x, moe.gate.weight), TOP_K)
    return weights, launch.sort_places(chosen, len(moe.gate.weight))


def time_blocks(moe: MoE, peer: nn.Module, tokens: int) -> None:
    experts, twice, size = moe.experts.gate_up_proj.shape
    x = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)
    mine = median_ms(lambda: both(lambda h: moe(h)[0], x, dy, moe), 7)
    other = median_ms(lambda: both(lambda h: peer(h[None])[0], x, dy, peer), 5)
    with torch.no_grad():
        _, places = place(moe, x)
        rows = launch.spread(x, places.position)
        inner = torch.randn(len(rows), twice, device=DEVICE, dtype=torch.bfloat16)
        joined = launch.swiglu(inner, places.ends)
        bare = median_ms(lambda: products(rows, inner, joined, moe, places.ends), 7)
    operations = 6 * tokens * TOP_K * size * twice * 1.5
    say(f"| {experts} | {size} x {twice // 2} | {tokens} | {mine:.2f} | {bare:.2f} "
        f"({operations / bare * 1e-9:.0f}) | {bare / mine:.3f} | {other:.2f} | "
        f"{other / mine:.2f} |")  # fmt: skip


def time_pieces(moe: MoE, tokens: int, bandwidth: float) -> None:
    """Each step but the products, its bytes a second over those of a device copy."""
    experts, twice, size = moe.experts.gate_up_proj.shape
    x = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16)
    count, inner_size, word = tokens * TOP_K, twice // 2, 2
    weights, places = place(moe, x)
    rows = launch.spread(x, places.position)
    inner = torch.randn(count, twice, device=DEVICE, dtype=torch.bfloat16)
    back = torch.randn(count, inner_size, device=DEVICE, dtype=torch.bfloat16)
    logits = router_logits(x, moe.gate.weight)
    _, chosen = route(logits, TOP_K)
    steps: Sequence[tuple[str, int, Callable[[], object]]] = (
        ("router", tokens * size * word, lambda: router_logits(x, moe.gate.weight)),
        ("route", tokens * experts * 4, lambda: route(logits, TOP_K)),
        ("sort", count * 16, lambda: launch.sort_places(chosen, experts)),
        ("spread", (tokens + count) * size * word, lambda: launch.spread(x, places.position)),
        ("swiglu", count * inner_size * 3 * word, lambda: launch.swiglu(inner, places.ends)),
        ("combine", (tokens + count) * size * word,
         lambda: launch.combine(rows, places.position, weights, tokens)),
        ("swiglu backward", count * inner_size * 6 * word,
         lambda: launch.swiglu_backward(inner, back, weights, places)),
    )  # fmt: skip
    for name, moved, work in steps:
        found = median_ms(work)
        say(f"    {name}: {found * 1e3:.0f} us, floor {moved / bandwidth * 1e6:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="all", choices=("all", "block", "pieces"))
    part = parser.parse_args().part
    bandwidth = copy_bandwidth()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, K={TOP_K}, "
        f"device copy {bandwidth / 1e12:.2f} TB/s")  # fmt: skip
    say("| E | C x F | T | block, ms | products, ms (TFLOP/s) | ratio | transformers, ms | x |")
    for size in SIZES:
        moe, peer = build(*size)
        for tokens in TOKENS:
            if part != "pieces":
                time_blocks(moe, peer, tokens)
            if part != "block":
                with torch.no_grad():
                    time_pieces(moe, tokens, bandwidth)
        del moe, peer


if __name__ == "__main__":
    main()
