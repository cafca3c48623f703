"""Which activations a block keeps for its backward pass, and which it computes again.

    none       everything that backward reads
    selective  of the attention half: the block's input, and the outputs of its projections and of
               softmax attention; of the experts' half: its inputs alone. Norms, SiLU, rotary, gate,
               lightning attention and the experts are computed again
    full       the block's input alone
    host       as full, and the host holds it: the device keeps nothing of a block

What is worth keeping is time over bytes. An output of a projection costs 2 C operations a number,
3.4 ms a GB at C = 2048 and 600 TFLOP/s whatever its width, so only the sum of what is kept matters;
softmax attention at 32k tokens costs twenty times that, lightning attention and everything
elementwise less. The experts' [g | u], [K T, 2F], is the widest of all and is not kept: with any of
the three the experts take some tokens at a time, in forward and in backward.

At T tokens in bf16 a lightning layer of H D = C keeps 14 C T bytes under `selective` (x, qkv, gate,
projected output, normed), and 2 C T under `full`: on paper the `base` preset at 32,768 tokens peaks
at 3.8 GB of weights, 7.3 kept and 4.5 of one layer's experts, 16 GB in all.

The experts choose from what is kept and not from what is computed again, so that no token changes
its expert between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Checkpointing = Literal["none", "selective", "full", "host"]
Result = TypeVar("Result")

_aten = torch.ops.aten
# products of projections, and softmax attention in each of torch's forms
_KEPT = frozenset(
    {
        _aten.mm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._flash_attention_forward.default,
        _aten._efficient_attention_forward.default,
    }
)


def computed_again(work: Callable[..., Result], *inputs: Any, keeps: bool = False) -> Result:
    """work(*inputs), of which backward keeps the inputs and computes the rest again.

    Args:
        keeps: also keep the outputs of products and of softmax attention inside.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> computed_again(torch.sin, x).sum().backward()
        >>> torch.equal(x.grad, torch.cos(torch.ones(2)))
        True
    """
    if not keeps:
        return checkpoint(work, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(work, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# smaller tensors stay on the device
_HOST_BYTES = 2**20


def kept_on_host() -> saved_tensors_hooks:
    """Inside, what is kept for backward goes to pinned memory of the host, and comes back for it.

    Copies run beside what the device computes; a tensor's memory is free once its copy is made.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with kept_on_host():
        ...     y = computed_again(torch.exp, x)
        >>> y.sum().backward()
        >>> torch.equal(x.grad, x.exp())
        True
    """
    return saved_tensors_hooks(_to_host, _from_host)


@lru_cache(maxsize=16)
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _to_host(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if not x.is_cuda or x.nbytes < _HOST_BYTES:
        return x
    stream = _copies(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    x.record_stream(stream)
    return x.device, held


def _from_host(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, held = kept
    torch.cuda.current_stream(device).wait_stream(_copies(device))
    return held.to(device, non_blocking=True)
