"""Every kernel on odd shapes, for a memory checker to watch. On a machine with a GPU:

    compute-sanitizer --tool memcheck --padding 4096 --error-exitcode 9 \
        python -m tests.model.kernels.memcheck

Each tensor is an allocation of its own with room behind it, so an access beyond one is seen.
`--plant` stores one element too far: the checker has to report it, or its silence means nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time

# Before torch is loaded: its allocator would put tensors side by side in one block.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
import triton
import triton.language as tl

from model.kernels.lightning.plan import FirstRows
from tests.model.kernels import (
    formula,
    test_block_triton,
    test_experts_triton,
    test_lightning_triton,
    test_logprob_triton,
    test_norm_triton,
)

RAGGED = ([1], [65, 1, 130], [33, 200, 1, 64])


@triton.jit
def _store_one_too_far(out, count, size: tl.constexpr):
    tl.store(out + tl.arange(0, size), 1.0, mask=tl.arange(0, size) <= count)


def plant() -> None:
    out = torch.zeros(1000, device=formula.DEVICE)
    _store_one_too_far[(1,)](out, len(out), 1024)


def lightning() -> None:
    form = formula.launch("lightning").lightning_triton
    for dim, dtype in ((32, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)):
        for lengths in RAGGED:
            case = test_lightning_triton.Case(lengths, 3, dim, dtype)
            case.run(form, formula.DEVICE, initial=True, final=True)


def lightning_step() -> None:
    form = formula.launch("lightning").lightning_step_triton
    for dim in (32, 128):
        q, k, v = torch.randn(3, 5, 3, dim).bfloat16().to(formula.DEVICE).unbind()
        slopes = torch.tensor([0.5, 0.25, 0.125], device=formula.DEVICE)
        states = torch.randn(7, 3, dim, dim).to(formula.DEVICE)
        form(q, k, v, slopes, states, torch.tensor([6, 0, 3, 1, 2], device=formula.DEVICE))


def lightning_piece() -> None:
    form = formula.launch("lightning").lightning_piece_triton
    for dim, dtype in ((32, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)):
        for count in (1, 65, 128):
            q, k, v = torch.randn(3, 128, 3, dim).to(formula.DEVICE, dtype).unbind()
            slopes = torch.tensor([0.5, 0.25, 0.125], device=formula.DEVICE)
            states = torch.randn(7, 3, dim, dim).to(formula.DEVICE)
            slot, of = (torch.tensor([x], device=formula.DEVICE) for x in (6, count))
            form(q, k, v, slopes, states, FirstRows(slot, of))


def block() -> None:
    for total, dtype in ((1, torch.float32), (65, torch.bfloat16)):
        case = test_block_triton.qkv_case(total, 3, 24, dtype, is_strided=True)
        case.run(formula.launch("qkv").silu_qkv_triton, formula.DEVICE, wide=False)
        case = test_block_triton.rotary_case(total, (5, 1), (96, 48), dtype)
        case.run(formula.launch("rotary").rotate_triton, formula.DEVICE, wide=False)


def norm() -> None:
    room = formula.launch("norm")
    for total, columns, dtype in ((1, 33, torch.float32), (65, 96, torch.bfloat16)):
        case = test_norm_triton.norm_case(total, columns, dtype, is_strided=True)
        case.run(room.norm_triton, formula.DEVICE, wide=False)
        case = test_norm_triton.gate_case(total, columns, dtype, is_strided=True)
        case.run(room.gated_norm_triton, formula.DEVICE, wide=False)
        for postnorm in (False, True):
            case = test_norm_triton.join_case(total, columns, dtype, postnorm=postnorm)
            case.run(room.join_norm_triton, formula.DEVICE, wide=False)


def experts() -> None:
    form = formula.launch("experts").expert_layer_triton
    for loads in ("any", "one", "dropped"):
        for tokens, size, inner in ((1, 72, 33), (65, 70, 33)):
            case = test_experts_triton.Case(
                tokens, 5, 2, torch.float32, size=size, inner=inner, loads=loads
            )
            case.run(form, formula.DEVICE, wide=False)
        case = test_experts_triton.Case(65, 5, 2, torch.bfloat16, size=72, inner=40, loads=loads)
        case.run(form, formula.DEVICE, wide=False)


def logprob() -> None:
    fused = formula.launch("logprob").token_logprobs_triton
    form = functools.partial(fused, temperature=0.7)
    for tokens, width, vocabulary in ((1, 8, 129), (65, 72, 1000)):
        test_logprob_triton.Case(tokens, width, vocabulary, torch.bfloat16).run(form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plant", action="store_true", help="only the planted error")
    rooms = (lightning, lightning_step, lightning_piece, block, norm, experts, logprob)
    for room in (plant,) if parser.parse_args().plant else rooms:
        start = time.monotonic()
        room()
        if formula.CUDA:
            torch.cuda.synchronize()
        sys.stdout.write(f"{room.__name__}: ran, {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
