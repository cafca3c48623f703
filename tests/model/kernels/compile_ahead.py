"""Compiles every kernel for one GPU architecture, without a GPU.

Run: python tests/model/kernels/compile_ahead.py 90 [lightning block experts logprob]
Prints a line a kernel: registers are the compiler's, bytes of local memory are spills.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from model.kernels.draw import kernel as draw_kernel
from model.kernels.draw import launch as draw_launch
from model.kernels.experts import kernel as experts_kernel
from model.kernels.experts import launch as experts_launch
from model.kernels.experts_few import kernel as few_kernel
from model.kernels.experts_few import launch as few
from model.kernels.lightning import hopper, kernel, launch
from model.kernels.logprob import kernel as logprob_kernel
from model.kernels.logprob import launch as logprob_launch
from model.kernels.norm import kernel as norm
from model.kernels.norm.launch import backward_shape, forward_shape
from model.kernels.paged import kernel as paged_kernel
from model.kernels.qkv import kernel as qkv
from model.kernels.qkv import launch as qkv_launch
from model.kernels.rotary import kernel as rotary
from model.kernels.rotary import launch as rotary_launch

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
NUMBERS = {"eps", "alpha", "beta", "scale"}
FLAGS = ("HAS_CARRY", "HAS_INIT", "HAS_FINAL")
# taken as multiples of 16, as in any model
SIZES = ("C", "F", "N_OUT", "N_IN", "vocabulary")
# of Triton's own descriptors; Gluon's take a layout too
BLOCKS = {
    "d_rows": ("BM", "BK"), "d_w": ("BK", "BN"),
    "d_hidden": ("BM", "BK"), "d_weight": ("BN", "BK"),
}  # fmt: skip


class Variant(NamedTuple):
    """One kernel as its `launch` would start it, in the order of `compile_one`."""

    function: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    dtype: str


def pointers(**names: str) -> dict[str, str]:
    """type="a b" -> {"p_a": "*type", ..}: pointers to something else than the tensors' dtype."""
    return {f"p_{name}": f"*{kind}" for kind, given in names.items() for name in given.split()}


POINTERS = {
    "lightning": pointers(
        fp32="slopes pieces_out init carry final states", i32="pieces carries chunks segments",
        i64="index",
    ),
    "block": pointers(fp32="rstd partial cos sin"),
    "experts": pointers(
        fp32="logits weights dweights dlogits scale", i32="counts sums position place ends",
        i64="chosen",
    ),
    "paged": pointers(fp32="out lse shares", i32="table", i64="index lengths"),
    "draw": pointers(fp32="temperature logprobs drawn", i64="seed sample position tokens"),
    "logprob": pointers(
        fp32="max sum slack picked logprobs entropy normaliser grad", i64="targets"
    ),
}  # fmt: skip


def compile_one(variant: Variant, arch: int, types: dict[str, str]) -> str:
    function, constants, warps, stages, dtype = variant
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in BLOCKS:
            block = [constants[size] for size in BLOCKS[name]]
            signature[name] = f"tensordesc<{dtype}{block}>".replace(" ", "")
        elif name.startswith("d_"):
            block = [constants["BT"], constants["D"]]
            layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
            signature[name] = f"tensordesc<{dtype}{block},{layout!r}>".replace("<bf16[", "<bf16[")
        elif name == "p_out" and "p_pieces" in function.arg_names:
            signature[name] = "*fp32"
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name in types:
            signature[name] = types[name]
        elif name.startswith("p_"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and (name.startswith(("p_", "s_")) or name in SIZES):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if "num_warps" in function.arg_names else ASTSource
    binary = triton.compile(
        source(function, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return f"{resources(binary.asm['cubin'])} shared {binary.metadata.shared}"


def resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return f"registers {found[1]} local {found[2]}"


def lightning(arch: int) -> Iterator[tuple]:
    for dtype, size in (("bf16", 128), ("bf16", 32), ("fp32", 128), ("bf16", 256)):
        wide = dtype == "fp32"
        torch_dtype = launch.torch.float32 if wide else launch.torch.bfloat16
        shape = launch.choose_shape(torch_dtype, size, is_hopper=False)
        for reverse, states in ((False, False), (True, True)):
            constants = {
                "DK": size, "DV": size, "BK": size, "BV": shape.columns, "REVERSE": reverse,
                "BT": shape.chunk_tokens, "PRECISION": "ieee", **dict.fromkeys(FLAGS, states),
            }  # fmt: skip
            yield kernel.lightning_run, constants, shape.warps, shape.stages, dtype
        columns = min(size, 32 if wide else 128 if size <= 128 else 64)
        constants = {
            "DK": size, "DV": size, "BK": size, "BV": columns, "BT": 32 if wide else 64,
            "REVERSE": True, "PRECISION": "ieee",
        }  # fmt: skip
        yield kernel.lightning_carry_pieces, constants, 8, 1 if wide else 3, dtype
    scan = {"DK": 128, "DV": 128, "BLOCK": 1024, "REVERSE": False, "HAS_INIT": True}
    yield kernel.lightning_carry_scan, scan, 4, 1, "fp32"
    yield kernel.lightning_step, {"D": 128, "BD": 128, "BV": 32}, 4, 1, "bf16"
    if arch != 90:
        return
    for size, states in itertools.product(launch.HOPPER_SIZES, (False, True)):
        shape = launch.choose_shape(launch.torch.bfloat16, size, is_hopper=True)
        constants = {
            "D": size, "BT": shape.chunk_tokens, "STAGES": shape.stages,
            **dict.fromkeys(FLAGS, states), "num_warps": shape.warps,
        }  # fmt: skip
        forward = {**constants, "REVERSE": states}
        yield hopper.lightning_run_hopper, forward, shape.warps, shape.stages, "bf16"
        yield hopper.lightning_bwd_keys_values, constants, shape.warps, shape.stages, "bf16"


def block(arch: int) -> Iterator[tuple]:
    """With all that may be asked for."""
    flags = ("HAS_BRANCH", "HAS_CARRIED", "HAS_DRESIDUAL", "HAS_DBRANCH", "HAS_DW")
    for columns, padded, dtype in ((96, 128, "fp32"), (2048, 2048, "bf16"), (8192, 8192, "bf16")):
        shape = forward_shape(columns)
        constants = {"C": columns, "BC": padded, "BT": shape.rows}
        keeps = {"HAS_BRANCH": True, "KEEPS_X": True}
        yield norm.norm_fwd_join, {**constants, **keeps}, shape.warps, 1, dtype
        yield norm.norm_fwd_gate, constants, shape.warps, 1, dtype
        for is_gated in (False, True):
            shape = backward_shape(
                columns,
                item_bytes=4 if dtype == "fp32" else 2,
                shared_bytes=SHARED_BYTES[arch],
                is_gated=is_gated,
            )
            constants = {"C": columns, "BC": padded, "BT": shape.rows, "STAGES": shape.stages}
            if is_gated:
                yield norm.norm_bwd_gate, {**constants, "HAS_DW": True}, shape.warps, 1, dtype
            else:
                wanted = {**constants, **dict.fromkeys(flags, True), "POSTNORM": True}
                yield norm.norm_bwd_join, wanted, shape.warps, 1, dtype
    rows = qkv_launch.TILE_ELEMENTS // 128
    constants = {"H": 16, "D": 128, "BD": 128, "BR": rows}
    yield qkv.qkv_bwd_silu, constants, qkv_launch.WARPS, 1, "bf16"
    rows = rotary_launch.TILE_ELEMENTS // 128
    constants = {
        "H": 16, "G": 4, "D": 128, "R": 64, "BH": 32, "BP": 64, "BR": rows, "INVERSE": True,
    }  # fmt: skip
    yield rotary.rotary_fwd_pair, constants, rotary_launch.WARPS, 1, "bf16"


def experts(arch: int) -> Iterator[tuple]:
    sort, block = {"BP": 256, "BE": 32}, {"K": 2, "BC": 2048}
    yield experts_kernel.experts_count, sort, 4, 3, "bf16"
    yield experts_kernel.experts_place, sort, 4, 3, "bf16"
    tokens, padded = experts_launch.route_block(32)
    route = {"K": 2, "BT": tokens, "BE": padded}
    yield experts_kernel.experts_fwd_route, {**route, "BK": 2}, 4, 3, "fp32"
    yield experts_kernel.experts_bwd_route, route, 4, 3, "fp32"
    yield experts_kernel.experts_spread, block, 4, 3, "bf16"
    for weighted in (False, True):
        yield experts_kernel.experts_combine, {**block, "HAS_WEIGHTS": weighted}, 4, 3, "bf16"
    yield experts_kernel.experts_fwd_swiglu, {"BF": 2048}, 4, 3, "bf16"
    yield experts_kernel.experts_bwd_swiglu, {"BF": 2048}, 4, 3, "bf16"
    for dtype in ("bf16", "fp32"):
        wide = dtype == "fp32"
        tile = experts_launch.choose_tile(launch.torch.float32 if wide else launch.torch.bfloat16)
        shape = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PRECISION": "ieee"}
        for dense in ("s_w_in", "s_w_out"):
            product = {**shape, "BE": 32, "GROUP": 8, dense: 1}
            yield experts_kernel.experts_product, product, tile.warps, tile.stages, dtype
        yield experts_kernel.experts_weight_grad, shape, tile.warps, tile.stages, dtype

    sort = {"BP": 1024, "BE": 32}
    yield few_kernel.experts_few_sort, sort, 8, 3, "bf16"
    for places, has_scale in ((2, False), (64, True), (512, False)):
        tile = few.choose_shape(places, 8, launch.torch.bfloat16)
        shape = {"BM": tile.rows, "BK": tile.depth, "BE": 8, "PRECISION": "ieee"}
        for function, columns in (
            (few_kernel.experts_few_inner, tile.inner_columns),
            (few_kernel.experts_few_outer, tile.outer_columns),
        ):
            wanted = {**shape, "BN": columns, "HAS_SCALE": has_scale}
            if function is few_kernel.experts_few_inner:
                wanted["K"] = 2
            yield function, wanted, tile.warps, tile.stages, "bf16"


def logprob(arch: int) -> Iterator[tuple]:
    tile, warps = logprob_launch.TILE, logprob_launch.LAUNCH["num_warps"]
    stages = logprob_launch.LAUNCH["num_stages"]
    yield logprob_kernel.logprob_fwd_tiles, tile, warps, stages, "bf16"
    yield logprob_kernel.logprob_fwd_merge, logprob_launch.MERGE, 4, 3, "fp32"
    yield logprob_kernel.logprob_bwd_slope, tile, warps, stages, "bf16"


def paged(arch: int) -> Iterator[tuple]:
    for dtype, block in (("bf16", 64), ("fp32", 32)):
        shape = {"H": 16, "G": 4, "D": 128, "BH": 16, "BD": 128, "BN": block, "SHARES": 8}
        options = {"HAS_WINDOW": dtype == "fp32", "PRECISION": "ieee"}
        yield paged_kernel.paged_share, {**shape, **options}, 4, 2, dtype
    yield paged_kernel.paged_merge, {"D": 128, "BD": 128, "SHARES": 8}, 1, 3, "bf16"


def draw(arch: int) -> Iterator[tuple]:
    block, count = draw_launch.BLOCK_TOKENS, 64
    for flag in (False, True):
        shape = {"BV": block, "BN": count, "TEMPERED": flag, "GREEDY": flag, **draw_launch.HASH}
        yield draw_kernel.draw_rows, shape, draw_launch.WARPS, 3, "fp32"


OPS = {
    "draw": draw,
    "paged": paged,
    "lightning": lightning,
    "block": block,
    "experts": experts,
    "logprob": logprob,
}


def main(arch: int, *names: str) -> None:
    for op in names or OPS:
        for variant in itertools.starmap(Variant, OPS[op](arch)):
            constants = variant.constants
            size = next(
                (f"D={constants[d]}" for d in ("D", "DK", "C") if d in constants), constants
            )
            found = compile_one(variant, arch, POINTERS[op])
            sys.stdout.write(f"{variant.function.fn.__name__} {variant.dtype} {size}: {found}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
