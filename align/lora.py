"""Low-rank adapters through peft, with the experts' fused tensors among the targets."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LoraConfig(BaseModel):
    """Which adapters to train in place of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1)
    """Inner dimension of each adapter; for experts, of each expert."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training; linear layers only."""
    targets: Literal["attention", "experts", "all"] = "all"
    """Which weights get adapters: projections of attention, the experts' tensors, or both."""
    router: bool = False
    """Also adapt the router; off, because routing learned in pretraining is fragile."""
