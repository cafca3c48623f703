"""Weights on their way from a trainer to an engine: the stream, the copy, and its proof."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its plain name, adapters merged; the model's own bits stay as they are.

    Adapters are merged in a copy of one layer at a time, so the stream needs the memory of one
    layer more than the model.

    Args:
        model: a plain model, or one wrapped by peft with its active adapters.

    Example:
        >>> [name for name, _ in weights(nn.Linear(2, 2))]
        ['weight', 'bias']
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted: dict[str, BaseTunerLayer] = {}
    for name, module in plain.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in adapted)
        if isinstance(module, BaseTunerLayer) and not is_inside:
            adapted[name] = module
    for name, tensor in plain.state_dict().items():
        if not any(name.startswith(f"{outer}.") for outer in adapted):
            yield name, tensor
    for outer, layer in adapted.items():
        for name, tensor in _merged(copy.deepcopy(layer)).state_dict().items():
            yield f"{outer}.{name}", tensor


def _merged(layer: Any) -> nn.Module:
    """The plain layer; two adapted tensors of one module are two wrappers, one in the other."""
    while isinstance(layer, BaseTunerLayer):
        layer.merge()
        layer = cast(Any, layer).base_layer
    return cast(nn.Module, layer)


@torch.no_grad()
def copy_weights(model: nn.Module, stream: Iterable[tuple[str, Tensor]]) -> None:
    """Copies a stream into a model's weights in place, by name and completely.

    Tied weights are one tensor: either of their names is enough.

    Raises:
        ValueError: naming the first tensor that is unexpected or misshapen, or those missing; what
            came before it has been copied.
    """
    targets = model.state_dict()
    seen: set[int] = set()
    for name, tensor in stream:
        if name not in targets:
            raise ValueError(
                f"weight {name!r} is unexpected: the model has {len(targets)} tensors, none of "
                "this name; stream the weights of the same architecture, adapters merged"
            )
        target = targets[name]
        if target.shape != tensor.shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(target.shape)}; stream the weights of the same config"
            )
        target.copy_(tensor)
        seen.add(target.data_ptr())
    missing = [name for name, target in targets.items() if target.data_ptr() not in seen]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(targets)} weights are missing from the stream, first "
            f"{missing[0]!r}; stream all of them"
        )


def checksums(stream: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Digest of each tensor's type, shape and bytes by name: equal if and only if the bits are.

    Example:
        >>> one, other = checksums([("a", torch.zeros(2))]), checksums([("a", torch.zeros(1, 2))])
        >>> one["a"] == other["a"]
        False
    """
    return {name: _digest(tensor) for name, tensor in stream}


def _digest(tensor: Tensor) -> str:
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
