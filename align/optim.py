"""The optimizer and its learning-rate schedule, built from one strict config.

fp32 weights are updated by torch's AdamW. For bf16 weights, which keep 8 significant bits and would
lose small updates, torch's arithmetic runs in fp32 on a master copy, or on the weights themselves
with a result rounded up or down at random such that its mean is right.

lr(t) = lr * (t + 1) / warmup for the warmup steps, then from lr down to min_lr at the last step:
cosine (half a period), linear, or constant (stays at lr).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

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
    precision runs; 16 as bf16 with an fp32 master copy; 12 as bf16 with stochastic rounding. Both
    running means are fp32; gradients of bf16 weights add up over microbatches in bf16."""
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


class WideAdamW(Optimizer):
    """AdamW for bf16 weights: torch's own arithmetic, in fp32; fp32 weights among them stay exact.

    Args:
        params: groups of parameters, as torch takes them.
        is_stochastic: round updated bf16 weights at random, unbiased, and keep no master copy. The
            random bits depend on the number of the update and the place of the weight alone: all
            replicas draw the same, and a resumed run the same as an unbroken one.

    Source: torch.optim.AdamW; stochastic rounding as in torchao's `_AdamW(bf16_stochastic_round)`,
        which keeps the running means in bf16 where we keep fp32.

    Example:
        >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = WideAdamW([weight], lr=1e-3, is_stochastic=False)
        >>> for _ in range(4):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> round(weight.item(), 4), round(optimizer.state[weight]["master"].item(), 4)
        (0.9961, 0.996)
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        is_stochastic: bool,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "updates": 0})
        self.is_stochastic = is_stochastic

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            group["updates"] += 1
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        has_master = parameter.dtype != torch.float32 and not self.is_stochastic
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if has_master:
                state["master"] = parameter.detach().float()
        own = _local(parameter)
        wide = _local(state["master"]) if has_master else own.float()
        adamw(
            [wide],
            [_local(cast(Tensor, parameter.grad)).float()],
            [_local(state["exp_avg"])],
            [_local(state["exp_avg_sq"])],
            [],
            [state["step"]],
            fused=own.is_cuda,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if parameter.dtype == torch.float32:
            return
        if self.is_stochastic:
            generator = torch.Generator(own.device).manual_seed(group["updates"] << 24 | place)
            wide = round_at_random(wide, generator)
        own.copy_(wide)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast what is kept in fp32 to the dtype of the weights."""
        super().load_state_dict(state_dict)
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(ours, theirs, strict=True):
            if kept := state_dict["state"].get(index):
                self.state[parameter] = {k: v.to(parameter.device) for k, v in kept.items()}


def _local(x: Tensor) -> Tensor:
    """This process's shard, in place."""
    return x.to_local() if isinstance(x, DTensor) else x


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16: one of the two neighbours, each the more likely the nearer it is.

    Example:
        >>> x = torch.full((4000,), 1 + 0.25 / 128)
        >>> rounded = round_at_random(x, torch.Generator().manual_seed(0))
        >>> rounded.unique().tolist(), round((rounded.float().mean().item() - 1) * 128, 1)
        ([1.0, 1.0078125], 0.2)
    """
    # bf16 is the upper half of fp32, so noise below it carries into it as often as x is far from it
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()


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
