"""Low-rank adapters through peft, with the experts' fused tensors among the targets.

An adapter adds (alpha / rank) * B A to a weight. B starts at 0, so a new adapter changes nothing;
switched off or not there, the model is its base. For experts, [E, out, in] tensors, every expert
has its own A and B.
"""

from __future__ import annotations

from typing import Literal, Self

import peft
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.distributed.fsdp import fully_shard

from align.shared_adapters import share_adapters
from model import HybridForCausalLM, HybridModel

# Projections of softmax and of lightning layers, as model/layouts.py names them.
ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("qkv_proj", "out_proj", "output_gate"),
)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate.weight"


class LoraConfig(BaseModel):
    """Which adapters to train in place of the weights.

    Example:
        >>> LoraConfig(rank=8).targets
        'all'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1)
    """Inner dimension of each adapter; for experts, of each expert's."""
    alpha: int = Field(default=32, ge=1)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training; only with targets: attention."""
    targets: Literal["attention", "experts", "all"] = "all"
    """Which weights get adapters: projections of attention, the experts' tensors, or both."""
    router: bool = False
    """Also adapt the router; off, because small changes of it move tokens between experts."""

    @model_validator(mode="after")
    def _dropout_needs_inputs(self) -> Self:
        if self.dropout and (self.targets != "attention" or self.router):
            raise ValueError(
                f"lora.dropout = {self.dropout:g}, expected 0 with lora.targets = {self.targets} "
                f"and lora.router = {self.router}: adapters on experts or router are added to the "
                "weight and see no input to drop; set dropout to 0 or targets to attention"
            )
        return self


def peft_config(config: LoraConfig) -> peft.LoraConfig:
    """The same adapters in peft's own words."""
    parameters = [ROUTER] if config.router else []
    if config.targets != "attention":
        parameters.extend(EXPERTS)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(ATTENTION) if config.targets != "experts" else [],
        target_parameters=parameters or None,
        bias="none",
    )


def apply_lora(
    model: HybridForCausalLM | HybridModel, config: LoraConfig, *, seed: int
) -> peft.PeftModel:
    """`model` with new adapters, its own weights frozen; outputs are still those of the base.

    Args:
        seed: of the adapters' first values; the random state outside is left as it was.

    Example:
        >>> from model import preset
        >>> small = HybridForCausalLM(preset("tiny", num_hidden_layers=2))
        >>> adapted = apply_lora(small, LoraConfig(rank=4, targets="attention"), seed=0)
        >>> {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad}
        {'lora_A', 'lora_B'}
    """
    # only the devices in use: asked for none, torch opens every device of the machine
    used = {parameter.device for parameter in model.parameters()}
    with torch.random.fork_rng([device for device in used if device.type == "cuda"]):
        torch.manual_seed(seed)
        adapted = peft.PeftModel(model, peft_config(config))
    share_adapters(adapted)
    return adapted


def shard_head(model: peft.PeftModel) -> None:
    """Shards the head together with the last norm (FSDP2), before the rest is sharded.

    `token_logprobs` reads the head's weight and does not call the head, so the norm's call has to
    gather both. accelerate joins them too, but finds no norm in a model with adapters.
    """
    base = model.get_base_model()
    if isinstance(base, HybridForCausalLM):
        fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False)
