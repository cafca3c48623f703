"""The one file that rewires a finished model, in a fixed order: sequence, then experts.

Layers know nothing of ranks: each has a seam (`core`, `begin`, `drop`, the trunk's `row`), and here
stands what is put into it.
"""

from __future__ import annotations

import torch
from torch import nn

from model.attention import SoftmaxAttention
from model.hybrid import HybridModel
from model.lightning import LightningAttention, decay_slopes
from model.moe import Experts, MoE
from model.parallel.expert import CountedDrop, ExpertShare, shard_experts
from model.parallel.lasp import LightningShare
from model.parallel.mesh import Mesh, ParallelConfig
from model.parallel.sequence import CutRow
from model.parallel.softmax import SoftmaxShare


def parallelize(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    """Rewires a model in place, so that the ranks of `mesh` compute it together.

    Packed calls then take whole rows, the same on every rank of a row, and give whole rows of
    log-probabilities; calls in transformers' own form and calls with a cache are still computed by
    each rank alone, unless experts are shared. The gradient of a rank is its share: summed over all
    ranks, each of which weighs its loss by 1 / config.sequence, it is that of one process.

    Args:
        model: holds one `HybridModel`; call it before optimizers, DDP or FSDP see the parameters.

    Raises:
        ValueError: if there is no `HybridModel`, or the sizes do not fit it.
    """
    trunk = _trunk(model)
    if trunk is None:
        raise ValueError(f"model = {type(model).__name__} holds no HybridModel to share over ranks")
    config.check(
        mesh.world.size,
        num_experts=trunk.config.num_local_experts,
        expert_width=trunk.config.intermediate_size,
    )
    counted = mesh.world if config.router == "global" else mesh.sequence
    trunk.row = CutRow(mesh, counted)
    if mesh.sequence.size > 1:
        _cut_sequence(trunk, mesh)
    if counted.size > 1:
        for module in trunk.modules():
            if isinstance(module, MoE):
                module.drop = CountedDrop(counted)
    if mesh.expert.size > 1:
        _share_experts(trunk, mesh)


def mesh_of(model: nn.Module) -> Mesh:
    """The axes that a model was shared over; axes of one rank if it was not."""
    trunk = _trunk(model)
    row = None if trunk is None else trunk.row
    return row.mesh if isinstance(row, CutRow) else Mesh()


def _trunk(model: nn.Module) -> HybridModel | None:
    return next((m for m in model.modules() if isinstance(m, HybridModel)), None)


def _share_experts(trunk: HybridModel, mesh: Mesh) -> None:
    assert mesh.experts is not None, "made with the expert axis"
    for module in trunk.modules():
        if isinstance(module, Experts):
            shard_experts(module, mesh.experts)
            module.core = ExpertShare(mesh.expert, module.core, tensor=mesh.tensor)


def _cut_sequence(trunk: HybridModel, mesh: Mesh) -> None:
    for module in trunk.modules():
        if isinstance(module, LightningAttention):
            cpu = torch.device("cpu")
            slopes = decay_slopes(module.heads, module.layer, module.num_layers, cpu)
            module.begin = LightningShare(mesh.sequence, slowest=float(slopes.min())).begin
        elif isinstance(module, SoftmaxAttention):
            module.core = SoftmaxShare(mesh.sequence)
