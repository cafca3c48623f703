"""A stream of weights into the network, under the names on disk or in memory, cut for this rank.

The same code fills a new model from a checkpoint and takes a push into a running one: each tensor
is copied into the weight's own memory, whole or not at all, and nothing is packed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from model import HybridConfig
from model.layouts import DERIVED, EMBEDDINGS, HEAD, Spot, tensor_spots

QKV = ("q_proj", "k_proj", "v_proj")


class Loader:
    """Copies weights into a network by name.

    Args:
        params: this rank's cut of every weight by its name in memory, but q, k and v of a softmax
            layer are one projection; it and the embeddings carry vLLM's own `weight_loader`.
        config: of the whole model.
        rank, ranks: which cut of heads and inner dimensions this process holds.
    """

    def __init__(
        self, params: Mapping[str, Any], config: HybridConfig, *, rank: int, ranks: int
    ) -> None:
        self.params = params
        self.config, self.rank, self.ranks = config, rank, ranks
        self.spots = {**tensor_spots(config, "transformers-disk"), **tensor_spots(config, "native")}

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies a stream, all of the model or a part of it; returns the parameters it touched.

        Decay buffers are skipped, and a tied head is its embeddings.

        Raises:
            ValueError: naming a tensor that is unknown or misshapen; what came before is copied.
        """
        touched = set()
        for name, tensor in stream:
            if name.endswith(DERIVED) or (name == HEAD and self.config.tie_word_embeddings):
                continue
            spot = self.spots.get(name)
            if spot is None:
                raise ValueError(
                    f"tensor {name} is not part of this model; send the weights of a checkpoint of "
                    "the same config.json, adapters merged"
                )
            touched.add(self._copy(name, spot, tensor))
        return touched

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name in `HybridForCausalLM`, as this rank holds it; views."""
        config, ranks = self.config, self.ranks
        q = config.num_attention_heads // ranks * config.head_dim
        kv = max(config.num_key_value_heads // ranks, 1) * config.head_dim
        for name in tensor_spots(config, "native"):
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind in QKV:
                whole = self.params[f"{module}.qkv_proj.weight"].data
                yield name, whole.split([q, kv, kv])[QKV.index(kind)]
            elif name in (EMBEDDINGS, HEAD):
                # vLLM pads the vocabulary
                held = self.params[name].data
                yield name, held[: config.vocab_size] if ranks == 1 else held
            else:
                yield name, self.params[name].data

    def _copy(self, name: str, spot: Spot, tensor: Tensor) -> str:
        module, _, kind = spot.native.removesuffix(".weight").rpartition(".")
        if kind in QKV:
            own = f"{module}.qkv_proj.weight"
            param = self.params[own]
            self._expect(name, tensor, self._projection_shape(kind))
            param.weight_loader(param, tensor, kind[0])
            return own
        param = self.params[spot.native]
        if spot.native in (EMBEDDINGS, HEAD):
            self._expect(name, tensor, (self.config.vocab_size, self.config.hidden_size))
            param.weight_loader(param, tensor)
            return spot.native
        target = param.data if spot.expert is None else param.data[spot.expert]
        if spot.num_parts > 1:
            target = target.chunk(spot.num_parts)[spot.part]
        dim = _cut_dim(spot.native)
        if dim is None or self.ranks == 1:
            self._expect(name, tensor, tuple(target.shape))
            target.copy_(tensor)
            return spot.native
        # a fused [gate | up] is cut in each half on its own
        halves = 2 if kind == "gate_up_proj" and spot.num_parts == 1 else 1
        shape = list(target.shape)
        shape[dim] *= self.ranks
        self._expect(name, tensor, tuple(shape))
        size = target.shape[dim] // halves
        whole = tensor.unflatten(dim, (halves, -1))
        part = whole.narrow(dim if dim < 0 else dim + 1, self.rank * size, size)
        target.copy_(part.reshape(target.shape))
        return spot.native

    def _projection_shape(self, kind: str) -> tuple[int, int]:
        config = self.config
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        return heads * config.head_dim, config.hidden_size

    def _expect(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}; send the "
                "weights of a checkpoint of the same config.json"
            )


def _cut_dim(native: str) -> int | None:
    """The dimension that tensor parallel ranks share, counted from the end; None is whole."""
    for ending, dim in (
        (".self_attn.qkv_proj.weight", -2),
        (".self_attn.output_gate.weight", -2),
        (".self_attn.norm.weight", -1),
        (".self_attn.out_proj.weight", -1),
        (".self_attn.o_proj.weight", -1),
        (".mlp.experts.gate_up_proj", -2),
        (".mlp.experts.down_proj", -1),
    ):
        if native.endswith(ending):
            return dim
    return None
