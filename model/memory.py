"""Where weights lie on a CPU."""

from __future__ import annotations

import torch
from torch import nn

# what torch's own allocator gives
ALIGNMENT = 64


@torch.no_grad()
def align_weights(model: nn.Module) -> None:
    """Moves weights on a CPU to addresses that are multiples of 64 bytes, as torch's own are.

    Files are mapped into memory as they lie on disk. MKL adds in another order where an operand is
    not aligned, so a process that got its weights from another one would compute other last bits
    than one that read them itself, and training would carry the two apart.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> layer.weight.data = torch.arange(4.0)[1:].view(1, 3)
        >>> align_weights(layer)
        >>> layer.weight.data_ptr() % 64, layer.weight.tolist()
        (0, [[1.0, 2.0, 3.0]])
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
