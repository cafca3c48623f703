"""A reward model whose weights processes share: heads beside a sharded trunk, and whole again."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from reward.model import RewardModel
from rollout.sync import copy_weights, weights


def shard_heads(model: RewardModel) -> None:
    """Shards each head apart (FSDP2), for heads are fp32 where the trunk is trained in bf16."""
    for head in (model.values, model.gate):
        if head is not None:
            fully_shard(head)


@torch.no_grad()
def settled(model: RewardModel, adapters: PeftModel | None) -> RewardModel:
    """The trained model, adapters merged in fp32 at least, with all its weights on each process.

    Every process calls it; of a shared model it is a copy, gathered tensor by tensor.

    Args:
        adapters: that peft put into the trunk.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        if adapters is not None:
            # small updates vanish when added in bf16
            adapters.to(torch.promote_types(model.trunk.dtype, torch.float32))
            model.trunk = adapters.merge_and_unload(safe_merge=True)
        return model
    wide = torch.promote_types(model.trunk.dtype, torch.float32)
    merged = None if adapters is None else wide
    with torch.device(model.trunk.device):
        trunk = AutoModel.from_config(model.trunk.config, dtype=merged or model.trunk.dtype)
    whole = RewardModel(trunk, model.hierarchy)
    copy_weights(whole, weights(model, dtype=merged))
    return whole.eval()
