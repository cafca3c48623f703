"""The network: tensors and ranks; no loss of a stage, no dataset, no reward.

Dimension letters, the same in the whole repository:

    T  packed tokens          S  sequences              B  batch rows, or tokens a block
    H  query heads            G  key/value heads        D  head dimension
    C  hidden size            F  expert hidden size     V  vocabulary
    E  experts                K  experts a token        N  blocks or chunks

Importing this package registers the native classes for `model_type: minimax` with transformers'
Auto classes: `AutoModelForCausalLM.from_pretrained(folder)` then gives `HybridForCausalLM`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from model.cache import DecodeCache
from model.config import HybridConfig, preset
from model.hybrid import HybridForCausalLM, HybridModel, PackedOutput
from model.packed import Packed

# transformers translates between the names on disk (an expert a tensor) and in memory (stacked)
# only for its own classes, unless the mapping is registered by hand
register_checkpoint_conversion_mapping(
    "minimax", get_checkpoint_conversion_mapping("minimax"), overwrite=True
)
AutoConfig.register("minimax", HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

__all__ = [
    "DecodeCache",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "Packed",
    "PackedOutput",
    "preset",
]
