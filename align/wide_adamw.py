"""AdamW for bf16 weights.

bf16 keeps 8 significant bits, so an update below 0.4 percent of a weight would vanish. Here torch's
arithmetic runs in fp32, on a master copy, or on the weights themselves with a result rounded up or
down at random such that its mean is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw


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
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
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
