"""Every kernel's odd shapes under a memory checker, in one process. On a machine with a GPU:

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.model.kernels.memcheck

Each tensor is an allocation of its own, so an access beyond one is seen. `--plant` first stores
one element too far: the checker has to report it, or its silence means nothing.
"""

from __future__ import annotations

import argparse
import os
import sys

# Before torch is loaded: its allocator would put tensors side by side in one block.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import pytest
import torch
import triton
import triton.language as tl

FOLDER = "tests/model/kernels"
ODD = (
    f"{FOLDER}/test_lightning_triton.py and matrix and (lengths5 or lengths7)",
    f"{FOLDER}/test_block_triton.py and matrix and 65",
    f"{FOLDER}/test_norm_triton.py and matrix and 65",
    f"{FOLDER}/test_experts_triton.py and matrix",
    f"{FOLDER}/test_logprob_triton.py and matrix and 1000",
    f"{FOLDER}/test_attention.py and matrix and (lengths5 or lengths7)",
)


@triton.jit
def _store_one_too_far(out, size: tl.constexpr):
    tl.store(out + tl.arange(0, size), 1.0, mask=tl.arange(0, size) <= size // 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plant", action="store_true", help="only the planted error")
    if parser.parse_args().plant:
        # 2 MiB is a whole allocation of the driver: nothing of ours lies behind it.
        out = torch.zeros(2**19, device="cuda")
        _store_one_too_far[(1,)](out[-512:], 1024)
        torch.cuda.synchronize()
        return 0
    for line in ODD:
        file, _, words = line.partition(" and ")
        code = pytest.main(["-q", "-x", "-m", "gpu", "-k", words, "-p", "no:cacheprovider", file])
        if code != pytest.ExitCode.OK:
            return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
