"""A Triton form beside its formula in fp64: outputs and every gradient, by RMS ratio."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
LENGTHS = (1, 63, 64, 65, 1000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
"""A process interprets or compiles, not both (`tests/conftest.py`); a GPU, if any, runs all."""


def launch(room: str) -> ModuleType:
    """`launch.py` of one op, whose kernels are then interpreted or run."""
    triton = pytest.importorskip("triton")
    if (
        not CUDA
        and triton.__version__.startswith("3.6.")
        and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    ):
        pytest.skip("triton 3.6 interprets loops with numpy < 2.4 only; newer triton does with any")
    if not CUDA:
        # no index is near an overflow here, and looking for one takes a quarter of the time
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)
    return importlib.import_module(f"model.kernels.{room}.launch")


Form = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """Tensors in the dtype of the kernel, and the same values for the formula in fp64.

    Args:
        inputs: those that get a gradient, by name; strides are kept.
        others: given behind them, without gradient: numbers, or tensors that stay as they are.
        options: given by keyword.
    """

    inputs: dict[str, Tensor]
    others: Sequence[object] = ()
    options: dict[str, object] | None = None

    def run(self, form: Form, device: str, *, wide: bool) -> dict[str, Tensor]:
        leaves = {name: _leaf(x, device, wide) for name, x in self.inputs.items()}
        others = [x.to(device) if isinstance(x, Tensor) else x for x in self.others]
        found = form(*leaves.values(), *others, **(self.options or {}))
        outputs = (found,) if isinstance(found, Tensor) else found
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for out in outputs:
            # exact in every dtype here, so that both forms get the same gradient
            noise = torch.randn(out.shape, generator=generator).bfloat16()
            loss = loss + (out.double() * noise.to(device).double()).sum()
        loss.backward()
        results = {f"output {i}": out for i, out in enumerate(outputs)}
        return results | {f"gradient of {name}": x.grad for name, x in leaves.items()}


def _leaf(x: Tensor, device: str, wide: bool) -> Tensor:
    if wide:
        return x.detach().double().to(device).requires_grad_()
    # a view of a wider row keeps its strides
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return copy.copy_(x.detach()).requires_grad_()


def check(form: Form, exact: Form, case: Case) -> None:
    found = case.run(form, DEVICE, wide=False)
    expected = case.run(exact, "cpu", wide=True)
    dtype = next(iter(case.inputs.values())).dtype
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if float(value.detach().square().mean().sqrt()) < 1e-9:
            # one channel's norm is a constant: only rounding may be left of its gradient
            assert float(found[name].abs().max()) < 1e-3, name
            continue
        assert_close(name, found[name].cpu(), value, BOUND[dtype])


def noise(*shape: int, dtype: torch.dtype, seed: int, is_strided: bool = False) -> Tensor:
    """Random values; strided ones lie in rows that are 16 wider, behind the first 16."""
    generator = torch.Generator().manual_seed(seed)
    if not is_strided:
        return torch.randn(*shape, generator=generator).to(dtype)
    # 16 keeps what a kernel is compiled for: the matrix then compiles nothing twice
    wide = torch.randn(*shape[:-1], shape[-1] + 16, generator=generator)
    return wide.to(dtype)[..., 16:]
