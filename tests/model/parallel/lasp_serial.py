"""LASP as first published: the state goes from rank to rank, each waiting for the one before.

Source: Sun et al. 2024, algorithms 2 and 3 (arXiv:2404.02882). Slow, and plain enough to be right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.lightning.op import lightning_attention
from model.parallel.mesh import Axis
from model.parallel.sequence import ShardLengths


def serial_lasp(
    qkv: Sequence[Tensor], slopes: Tensor, lengths: ShardLengths, *, axis: Axis, grad: Tensor
) -> Tensor:
    """The part's output; gradients of q, k, v for the output's gradient are left in their .grad.

    Args:
        qkv: [T', H, D] each, leaves; every part holds a token.
    """
    heads, size = qkv[0].shape[1:]
    comes = bool(lengths.before[axis.rank])
    device = qkv[0].device
    initial = torch.zeros(len(lengths), heads, size, size, device=device)
    if comes:
        dist.recv(initial[0], axis.rank - 1, group=axis.group)
    initial.requires_grad_()
    out, finals = lightning_attention(
        *qkv, slopes, tuple(lengths), initial_state=initial, with_final=True
    )
    to_final = torch.zeros(heads, size, size, device=device)
    if lengths.continues:
        dist.send(finals[-1].detach().contiguous(), axis.rank + 1, group=axis.group)
        dist.recv(to_final, axis.rank + 1, group=axis.group)
    torch.autograd.backward([out, finals[-1]], [grad, to_final])
    if comes:
        dist.send(initial.grad[0].contiguous(), axis.rank - 1, group=axis.group)
    return out.detach()
