"""Compiles the kernels of lightning attention and of the block for one GPU, without a GPU.

Run: python tests/model/kernels/compile_ahead.py 90
Prints a line a kernel: registers are the compiler's, bytes of local memory are spills.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from model.kernels.lightning import hopper, kernel, launch
from model.kernels.norm import kernel as norm
from model.kernels.norm.launch import backward_shape, forward_shape
from model.kernels.qkv import kernel as qkv
from model.kernels.qkv import launch as qkv_launch
from model.kernels.rotary import kernel as rotary
from model.kernels.rotary import launch as rotary_launch

FLOATS = {"p_slopes", "p_pieces_out", "p_init", "p_carry", "p_final", "p_states"}
FLOATS |= {"p_rstd", "p_partial", "p_cos", "p_sin"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
NUMBERS = {"eps", "alpha", "beta"}
TABLES = {"p_pieces", "p_carries", "p_chunks", "p_segments"}
FLAGS = ("HAS_CARRY", "HAS_INIT", "HAS_FINAL")


def compile_one(function, constants: dict, arch: int, warps: int, stages: int, dtype: str) -> str:
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("d_"):
            block = [constants["BT"], constants["D"]]
            layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
            signature[name] = f"tensordesc<{dtype}{block},{layout!r}>".replace("<bf16[", "<bf16[")
        elif name in FLOATS or (name == "p_out" and "p_pieces" in function.arg_names):
            signature[name] = "*fp32"
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name in TABLES:
            signature[name] = "*i32"
        elif name == "p_index":
            signature[name] = "*i64"
        elif name.startswith("p_"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and name.startswith(("p_", "s_")):
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


def variants(arch: int):
    """(kernel, constants, warps, stages, dtype) of what `launch` would start."""
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


def block_variants(arch: int):
    """As above, of the block around attention, with all that may be asked for."""
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


def main(arch: int) -> None:
    everything = itertools.chain(variants(arch), block_variants(arch))
    for function, constants, warps, stages, dtype in everything:
        name = function.fn.__name__
        size = constants.get("D", constants.get("DK", constants.get("C")))
        found = compile_one(function, constants, arch, warps, stages, dtype)
        sys.stdout.write(f"{name} {dtype} D={size}: {found}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
