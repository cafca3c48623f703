"""Which activations a block keeps for its backward pass, and which it computes again.

    none       everything that backward reads
    selective  of the attention half: the block's input, and the outputs of its projections and of
               softmax attention; of the experts' half: its inputs alone. Norms, SiLU, rotary, gate,
               lightning attention and the experts are computed again
    full       the block's input alone

What is worth keeping is time over bytes. An output of a projection costs 2 C operations a number,
3.4 ms a GB at C = 2048 and 600 TFLOP/s whatever its width, so only the sum of what is kept matters;
softmax attention at 32k tokens costs twenty times that, lightning attention and everything
elementwise less. The experts' [g | u], [K T, 2F], is the widest of all and is not kept; their
outputs are not needed by backward and are not computed twice.

At T tokens in bf16 a lightning layer of H D = C keeps 14 C T bytes under `selective` (x, qkv, gate,
projected output, normed), and 2 C T under `full`: on paper the `base` preset at 32,768 tokens peaks
at 3.8 GB of weights, 7.3 kept and 4.5 of one layer's experts, 16 GB in all.

The experts choose from what is kept and not from what is computed again, so that no token changes
its expert between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Checkpointing = Literal["none", "selective", "full"]
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
