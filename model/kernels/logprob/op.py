"""Log-probability of given tokens from hidden states, without keeping [T, V] logits for backward.

    logprob_t = z_{t, target} - log sum_v exp(z_{t, v}),   z = hidden W^T / temperature

Backward computes each piece of logits again: dz = (1[v = target] - p_v) * grad. On a CPU p is kept
where it is small.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from model.kernels.cpu import passes
from model.kernels.linear.op import FEW_ROWS, linear, product, weight_grad

# fp32 logits that exist at once; on a CPU of no more tokens than share a pass over the weight well
PIECE_BYTES = 2**28
SHORT = (torch.bfloat16, torch.float16)
CPU_PIECE_TOKENS = 2048
# Bytes of probabilities that a CPU may keep: less than a small model's layers keep anyway.
_KEPT_BYTES = 64 * 2**20


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    head_fp32: bool = False,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Natural log-probability of each target and the entropy of each distribution.

    Args:
        hidden: [T, C]; weight: [V, C], the LM head, in whose dtype they are multiplied, or in
            autocast's if it is fp32; on CUDA sums of 16-bit products stay fp32, on a CPU logits are
            rounded to the dtype.
        targets: [T] int64, 0 <= target < V; on CUDA another one gives NaN.
        temperature: > 0, divides the logits.
        head_fp32: multiply in fp32 whatever the dtypes.
        with_entropy: whether entropies are wanted; they cost a pass over the logits.

    Returns: logprobs [T] with gradients to hidden and weight, and entropies [T] in nats without
        gradient, or None; both fp32 (fp64 stays).

    Raises:
        ValueError: if shapes, dtypes or devices do not fit or the temperature is not positive.

    Example:
        >>> token_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([3]))[0].exp().item()
        0.25
    """
    _check(hidden, weight, targets, temperature)
    weight = _multiplied(weight, head_fp32)
    if not head_fp32 and _runs_fused(weight):
        # not at the top: torch for CPU comes without triton
        from model.kernels.logprob import launch

        hidden = hidden.to(weight.dtype)
        if launch.can_copy(hidden) and launch.can_copy(weight):
            logprobs, entropy = launch.token_logprobs_triton(hidden, weight, targets, temperature)
            return logprobs, entropy if with_entropy else None
    # autocast would take the entropy's products in bf16
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden, weight, targets, temperature, head_fp32, with_entropy)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    if (
        not hidden.ndim == weight.ndim == 2
        or targets.shape != hidden.shape[:1]
        or hidden.shape[1] != weight.shape[1]
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)}: expected [T, C], [V, C], [T]"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets {targets.dtype}, expected torch.int64")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden on {hidden.device}, weight on {weight.device}, targets on {targets.device}: "
            "expected one device"
        )
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}, expected > 0")


@functools.lru_cache(maxsize=16)
def _has_bulk_copies(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def _runs_fused(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in SHORT and _has_bulk_copies(weight.device)


def _multiplied(weight: Tensor, head_fp32: bool) -> Tensor:
    """The head in the type of its products."""
    device = weight.device.type
    if head_fp32 or weight.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return weight
    return weight.to(torch.get_autocast_dtype(device))


def head_logits(hidden: Tensor, weight: Tensor, *, head_fp32: bool = False) -> Tensor:
    """[.., C] x [V, C] -> [.., V] fp32 (fp64 stays); types of products as above."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = _multiplied(weight, head_fp32)
    with torch.autocast(hidden.device.type, enabled=False):
        if head_fp32:
            return linear(hidden.to(wide), weight.to(wide))
        return linear(hidden.to(weight.dtype), weight).to(wide)


def _softmax(
    logits: Tensor, targets: Tensor, temperature: float, keeps: bool, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logprobs [T], probabilities [T, V] if they are kept, and entropies; overwrites the logits."""
    if passes.takes(logits) and not with_entropy:
        return *passes.softmax(logits, targets, temperature), None
    every = logits.div_(temperature).log_softmax(-1)
    entropy = None
    if with_entropy or keeps:
        torch.exp(every, out=logits)
    if with_entropy:
        # not logsumexp - sum p z: both are large where the entropy is small
        entropy = torch.linalg.vecdot(logits, every).neg_()
    return every.gather(1, targets[:, None])[:, 0], logits, entropy


def _slope(probabilities: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    if passes.takes(probabilities, share):
        return passes.softmax_grad(probabilities, targets, share)
    slope = probabilities * -share[:, None]
    return slope.scatter_add_(1, targets[:, None], share[:, None])


def _piece_logits(hidden: Tensor, weight: Tensor, *, head_fp32: bool) -> Tensor:
    """[T, V] fp32 (fp64 stays) of one piece, no gradient."""
    if hidden.is_cuda and weight.dtype in SHORT and not head_fp32:
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    return head_logits(hidden, weight, head_fp32=head_fp32)


def _piece_rows(weight: Tensor, dtype: torch.dtype) -> int:
    """Tokens whose logits exist at once."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = max(PIECE_BYTES // (weight.shape[0] * wide.itemsize), FEW_ROWS)
    return rows if weight.is_cuda else min(rows, CPU_PIECE_TOKENS)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        head_fp32: bool,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, entropies, kept = [], [], []
        size = hidden.shape[0] * weight.shape[0] * 4
        keeps = hidden.is_cpu and any(ctx.needs_input_grad[:2]) and size <= _KEPT_BYTES
        step = _piece_rows(weight, hidden.dtype)
        for rows, target in zip(hidden.split(step), targets.split(step), strict=True):
            logits = _piece_logits(rows, weight, head_fp32=head_fp32)
            found, p, entropy = _softmax(logits, target, temperature, keeps, with_entropy)
            logprobs.append(found)
            if entropy is not None:
                entropies.append(entropy)
            if keeps:
                kept.append(p)
        ctx.save_for_backward(hidden, weight, targets, *kept)
        ctx.temperature, ctx.head_fp32 = temperature, head_fp32
        if not with_entropy:
            return torch.cat(logprobs), None
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *kept = ctx.saved_tensors
        temperature, head_fp32 = ctx.temperature, ctx.head_fp32
        wide = grad.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32: the sum over pieces would lose small terms in bf16
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        step = _piece_rows(weight, hidden.dtype)
        for start in range(0, hidden.shape[0], step):
            piece = slice(start, start + step)
            rows = hidden[piece]
            if kept:
                probabilities = kept[start // step]
            else:
                logits = _piece_logits(rows, weight, head_fp32=head_fp32)
                probabilities = logits.div_(temperature).softmax(-1)
            slope = _slope(probabilities, targets[piece], grad[piece] / temperature)
            back = wide if head_fp32 else weight.dtype
            slope = slope.to(back)
            if grad_hidden is not None:
                grad_hidden[piece] = product(slope, weight.to(back).t()).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += weight_grad(slope, rows.to(back)).to(wide)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None
