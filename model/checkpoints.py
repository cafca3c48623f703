"""Checkpoint folders in any public layout: read tensor by tensor, written shard by shard.

Neither needs the whole model: reading maps a file and holds one tensor, writing holds one shard,
and `stream_logprobs` runs the network one block at a time, so that what was written can be proved
to be the same policy on a machine that could never hold it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.block import Block
from model.config import HybridConfig
from model.config_layouts import read_config, write_config
from model.kernels.logprob.op import token_logprobs
from model.layouts import (
    DERIVED,
    EMBEDDINGS,
    HEAD,
    public_tensors,
    read_tensors,
)
from model.norm import RMSNorm
from model.packed import Packed
from model.rotary import rotary_angles

PublicLayout = Literal["transformers-disk", "text-01", "vllm"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# a shard is held in memory while it is filled
SHARD_BYTES = 2**32
Save = Callable[[dict[str, Tensor], Path], None]


def read_folder_config(folder: Path) -> tuple[HybridConfig, PublicLayout]:
    """The config of a checkpoint folder, and the layout that it is in.

    Raises:
        ValueError: if there is no config.json of this architecture.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder}: no config.json, expected a checkpoint folder")
    values = json.loads(file.read_text(encoding="utf-8"))
    kind = values.get("model_type", "")
    if kind not in ("minimax", "minimax_text_01", "minimax_m1"):
        raise ValueError(
            f"{file}: model_type = {kind!r}, expected minimax, minimax_text_01 or minimax_m1"
        )
    layout: PublicLayout = "vllm" if "attn_type_list" in values else "transformers-disk"
    if kind != "minimax":
        layout = "text-01"
    return read_config(values, layout=layout), layout


def shards_of(folder: Path) -> dict[str, tuple[str, ...]]:
    """File name -> the tensors in it, of every shard of a folder.

    Raises:
        ValueError: if the folder holds no weights.
    """
    if (folder / INDEX).exists():
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in where.items():
            files.setdefault(file, []).append(name)
        return {file: tuple(names) for file, names in files.items()}
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: no {WEIGHTS} or {INDEX}, expected a checkpoint folder")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {WEIGHTS: tuple(file.keys())}


def opened_dtype(folder: Path, device: torch.device | str = "cpu") -> torch.dtype:
    """What weights are opened in to be read: fp32, or fp64 where they were saved so.

    Only on a CPU has every kernel a form in fp64.

    Args:
        folder: weights or an adapter, as safetensors.
    """
    file = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if file is None or torch.device(device).type != "cpu":
        return torch.float32
    with safe_open(file, framework="pt") as opened:
        kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return torch.float64 if "F64" in kinds else torch.float32


def stream_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder under its name on disk, one at a time in memory.

    Raises:
        ValueError: if the folder holds no weights, or a shard lacks what the index says.
    """
    for shard, names in shards_of(folder).items():
        if not (folder / shard).exists():
            raise ValueError(f"{folder}: no {shard}, which {INDEX} names; put it back")
        with safe_open(folder / shard, framework="pt") as file:
            held = set(file.keys())
            for name in names:
                if name not in held:
                    raise ValueError(f"{folder / shard}: no tensor {name}, which {INDEX} names")
                yield name, file.get_tensor(name)


class ShardWriter:
    """Writes a stream of tensors as numbered safetensors shards and their index.

    Args:
        folder: exists; the files appear under their last names at `close`.
        shard_bytes: a shard is written before it would grow beyond this; one tensor may.
        save: writes one file.
    """

    def __init__(
        self, folder: Path, *, shard_bytes: int = SHARD_BYTES, save: Save = save_file
    ) -> None:
        self.folder, self.shard_bytes, self.save = folder, shard_bytes, save
        self.shards: list[tuple[str, ...]] = []
        self.waiting: dict[str, Tensor] = {}
        self.waiting_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor, writing what waits if it would not fit."""
        if self.waiting and self.waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        # of a view, only what it shows: a file holds no memory twice
        owns = tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes
        self.waiting[name] = tensor if owns and tensor.is_contiguous() else tensor.clone()
        self.waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what waits, names the files and writes the index."""
        self._flush()
        number = len(self.shards)
        names = [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
        if number == 1:
            names = [WEIGHTS]
        for index, name in enumerate(names):
            self._temporary(index).rename(self.folder / name)
        if number > 1:
            where = {t: file for file, held in zip(names, self.shards, strict=True) for t in held}
            index_of = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
            text = json.dumps(index_of, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")

    def _temporary(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def _flush(self) -> None:
        self.save(self.waiting, self._temporary(len(self.shards)))
        self.shards.append(tuple(self.waiting))
        self.waiting, self.waiting_bytes = {}, 0


def write_folder(
    public: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    config: HybridConfig,
    layout: PublicLayout,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights under their public names, which all public layouts share, and the config.

    Args:
        public: (name, tensor), in any order, each once, the whole model; decay buffers are dropped.
        folder: exists.
        dtype: of the weights on disk; None keeps each as it is.

    Raises:
        ValueError: if the layout cannot hold this model, or a tensor is unknown, twice or missing.
    """
    values = write_config(config, layout=layout)
    if dtype is not None:
        key = "torch_dtype" if layout == "text-01" else "dtype"
        values[key] = str(dtype).removeprefix("torch.")
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for name, tensor in public_tensors(public, config=config, layout=layout):
        writer.add(name, tensor if dtype is None else tensor.to(dtype))
    writer.close()
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def stream_logprobs(folder: Path, tokens: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Log-probability of each token after the first, one block's weights in memory at a time.

    Args:
        tokens: [T] int64, one sequence.
        dtype: rounds every weight to it first; the arithmetic is fp32.

    Returns: [T - 1] fp32, natural log.

    Raises:
        ValueError: if the folder is no whole checkpoint.
    """
    config, layout = read_folder_config(folder)
    where = {name: shard for shard, names in shards_of(folder).items() for name in names}

    def pick(prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """The weights in memory's names, of those parts of the model only."""
        found = {}
        for name, shard in where.items():
            if name.startswith(prefixes) and not name.endswith(DERIVED):
                with safe_open(folder / shard, framework="pt") as file:
                    weight = file.get_tensor(name)
                found[name] = (weight if dtype is None else weight.to(dtype)).float()
        return found

    packed = Packed.from_sequences([tokens.tolist()])
    x = torch.nn.functional.embedding(tokens, pick((EMBEDDINGS,))[EMBEDDINGS])
    rotary_dim = config.rotary_dim if config.rotary_dim is not None else config.head_dim
    base = float(config.rope_parameters["rope_theta"])
    angles = rotary_angles(packed.positions, rotary_dim, base)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        with torch.device("meta"):
            block = Block(config, layer).eval()
        own = pick((prefix,))
        fused = read_tensors(own.items(), config=config, layout=layout, layer=layer)
        state = {name.removeprefix(prefix): weight for name, weight in fused}
        block.load_state_dict(state, assign=True)
        x, _ = block(x, packed, angles)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.load_state_dict({"weight": pick(("model.norm.weight",))["model.norm.weight"]})
    head = EMBEDDINGS if HEAD not in where else HEAD
    logprobs, _ = token_logprobs(norm(x)[:-1], pick((head,))[head], tokens[1:])
    return logprobs


def describe_foreign(config: HybridConfig, layout: PublicLayout) -> tuple[str, ...]:
    """What the foreign readers of a layout compute otherwise, one line each; often empty.

    Example:
        >>> describe_foreign(HybridConfig(num_hidden_layers=2), "vllm")
        ('vLLM 0.23 adds 1e-5 in the lightning norm',)
    """
    full_rotary = config.rotary_dim in (None, config.head_dim)
    rules: Mapping[str, tuple[tuple[bool, str], ...]] = {
        "transformers-disk": (
            (not full_rotary, f"transformers ignores rotary_dim = {config.rotary_dim}"),
            (not config.postnorm, "transformers computes postnorm = true"),
            (config.lightning_norm_eps != 1e-6, "transformers adds 1e-6 in the lightning norm"),
            (config.lm_head_fp32, "transformers ignores lm_head_fp32"),
        ),
        "vllm": (
            (config.lightning_norm_eps != 1e-5, "vLLM 0.23 adds 1e-5 in the lightning norm"),
            (config.lm_head_fp32, "vLLM 0.23 ignores lm_head_fp32"),
        ),
        "text-01": ((config.lm_head_fp32, "the published code ignores lm_head_fp32"),),
    }
    return tuple(line for applies, line in rules[layout] if applies)
