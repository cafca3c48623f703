"""Adapters of experts that ranks share: each rank holds those of its experts.

peft makes adapters of all experts, the same on every rank: A [E r, in] by expert, B [out, r E] by
rank of the adapter. Here each rank keeps its experts' part, and of a shared width its part of in or
out. While the experts compute, they and their adapters are the parts held here, which peft takes
for a layer of fewer experts; at all other times they are DTensors of the whole, for checkpoints,
optimizers and whoever gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import is_torch_version
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from align.stretches import part_of
from model.parallel.expert import local


def share_adapters(model: PeftModel) -> None:
    """Leaves each rank the adapters of its experts; does nothing where experts are not shared.

    Raises:
        ValueError: if they are, and torch is older than 2.13.
    """
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, ParamWrapper) or module in inside:
            continue
        chain = _chain(module)
        inside.update(chain)
        if any(isinstance(wrapper.get_param(), DTensor) for wrapper in chain):
            check_torch()
            for wrapper in chain:
                _shard(wrapper)
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


def check_torch() -> None:
    """Refuses a torch on which shared adapters do not train: 2.11 stopped in their first stage."""
    if is_torch_version("<", "2.13"):
        raise ValueError(
            f"torch = {torch.__version__} with adapters on experts and parallel.expert above 1, "
            "expected 2.13 or newer; update torch, or set lora.targets to attention or "
            "parallel.expert to 1"
        )


def _chain(outer: nn.Module) -> list[ParamWrapper]:
    """Wrappers of one module, each of another parameter, from the outermost on."""
    found: list[ParamWrapper] = []
    while isinstance(outer, ParamWrapper):
        found.append(outer)
        outer = outer.base_layer
    return found


def _shard(wrapper: ParamWrapper) -> None:
    weight: DTensor = wrapper.get_param()
    mesh = weight.device_mesh
    width = list(weight.placements[2:])
    # the width of [E, out, in] as A [E r, in] and B [out, r E] have it
    wide_in = [Shard(1) if p.is_shard(2) else Replicate() for p in width]
    wide_out = [Replicate() if p.is_shard(2) else cast(Any, _along(p, 0)) for p in width]
    for name in wrapper.lora_A:
        by_expert: Placement = Shard(0)
        by_rank: Placement = cast(Any, _StridedShard(1, split_factor=wrapper.r[name]))
        for side, placements in (
            (wrapper.lora_A[name], [Replicate(), by_expert, *wide_in]),
            (wrapper.lora_B[name], [Replicate(), by_rank, *wide_out]),
        ):
            linear = cast(nn.Linear, side)
            whole = linear.weight
            placed = DTensor.from_local(
                part_of(whole.detach(), mesh, placements),
                mesh,
                placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            linear.weight = nn.Parameter(placed, requires_grad=whole.requires_grad)
    wrapper.num_experts //= mesh["expert"].size()


def _along(placement: Placement, dim: int) -> Placement:
    assert isinstance(placement, _StridedShard), "gate and up share the first dim of the width"
    return cast(Any, _StridedShard(dim, split_factor=placement.split_factor))


@contextmanager
def parts_held(outer: nn.Module) -> Iterator[None]:
    """Makes the weights of an adapted module, and its adapters, the parts that this rank holds."""
    aside = _set_aside(_chain(outer))
    try:
        yield
    finally:
        _put_back(aside)


Aside = list[tuple[nn.Module, str, nn.Parameter]]


def _set_aside(chain: list[ParamWrapper]) -> Aside:
    aside: Aside = []
    base = chain[-1].base_layer
    for name, parameter in list(base.named_parameters(recurse=False)):
        aside.append((base, name, parameter))
        # frozen under adapters; of the same memory
        base._parameters[name] = nn.Parameter(local(parameter.detach()), requires_grad=False)
    for wrapper in chain:
        for linear in (*wrapper.lora_A.values(), *wrapper.lora_B.values()):
            weight = cast(nn.Parameter, linear.weight)
            aside.append((linear, "weight", weight))
            linear._parameters["weight"] = cast(Any, local(weight))
    return aside


def _put_back(aside: Aside) -> None:
    for module, name, parameter in aside:
        module._parameters[name] = parameter


# Functions of the module that they are called with, so that a copied module is itself copied right.
def _enter(module: nn.Module, _: Any) -> None:
    cast(Any, module).aside = _set_aside(_chain(module))


def _leave(module: nn.Module, *_: Any) -> None:
    aside = module.__dict__.pop("aside", None)
    if aside is not None:
        _put_back(aside)
