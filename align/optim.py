"""The optimizer and its learning-rate schedule, built from one strict config.

fp32 weights are updated by torch's AdamW, bf16 weights by `WideAdamW`.

lr(t) = lr * (t + 1) / warmup for the warmup steps, then from lr down to min_lr at the last step:
cosine (half a period), linear, or constant (stays at lr).
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from align.wide_adamw import WideAdamW

Weights = Literal["fp32", "bf16_master", "bf16_stochastic"]


class OptimConfig(BaseModel):
    """How weights are updated.

    Example:
        >>> OptimConfig(lr=1e-5, min_lr=1e-6, schedule="cosine").warmup_steps
        0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["adamw"] = "adamw"
    """Update rule; AdamW with decoupled weight decay."""
    weights: Weights = "fp32"
    """Weights, gradients and optimizer take 16 bytes a parameter as fp32, and 2 more while bf16
    precision runs (fp32 is fp64 in a stage of that precision); 16 as bf16 with an fp32 master copy;
    12 as bf16 with stochastic rounding. Both running means are fp32; gradients of bf16 weights add
    up over microbatches in bf16."""
    lr: float = Field(default=1e-5, gt=0)
    """Highest learning rate, reached after the warmup."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate of the last step; at most lr. A constant schedule does not use it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from lr to min_lr."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warmup; not together with warmup_share."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Warmup as a share of all steps, rounded up; not together with warmup_steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and of the running square of the gradient, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running square."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; never of norms, biases, embeddings or the router."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 clips nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr = {self.min_lr:g}, expected at most optim.lr = {self.lr:g}; "
                "lower min_lr"
            )
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"optim.warmup_steps = {self.warmup_steps} and optim.warmup_share = "
                f"{self.warmup_share:g} both given, expected one; set the other to 0"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas}, expected each in [0, 1)")
        return self


def lr_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of update `step` (0-based) as a share of config.lr.

    Example:
        >>> config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2)
        >>> [round(lr_factor(config, step, 6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.min_lr / config.lr
    # The last update runs at exactly min_lr; a run of one decaying step stays at lr.
    progress = min((step - warmup) / max(num_steps - warmup - 1, 1), 1.0)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay touches a parameter.

    Norms and biases are vectors; embeddings and the router would drift towards uniform outputs
    if shrunk, so only the remaining matrices (and fused experts) decay.
    """
    spared = ("embed_tokens", "mlp.gate.")
    return parameter.ndim >= 2 and not any(part in name for part in spared)


def build_optimizer(
    model: nn.Module, config: OptimConfig, num_steps: int
) -> tuple[Optimizer, LambdaLR]:
    """AdamW over the parameters that require a gradient, and its schedule over num_steps.

    Args:
        model: on the device that it is trained on, in the dtypes that config.weights names.

    Raises:
        ValueError: if no parameter requires a gradient, or the warmup is as long as the run.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "no parameter of the model requires a gradient; unfreeze some or add a lora: table"
        )
    if config.warmup_steps >= num_steps and config.warmup_steps:
        raise ValueError(
            f"optim.warmup_steps = {config.warmup_steps}, expected fewer than the {num_steps} "
            "steps of the run; lower it or use optim.warmup_share"
        )
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: Optimizer
    if config.weights == "fp32":
        # fused on CUDA: one pass over memory
        is_cuda = trained[0][1].is_cuda
        optimizer = AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=is_cuda or None
        )
    else:
        optimizer = WideAdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            is_stochastic=config.weights == "bf16_stochastic",
        )
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(config, step, num_steps))
