"""Opening and saving policies: full weights, or an adapter that names the artifact it stands on.

An adapter artifact holds `base.json` with a relative path to its base (full weights or another
adapter) and a digest of it. Opening one merges the whole chain, so the next stage starts from, and
measures its distance to, exactly the policy that the last stage made, never the raw base.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import HybridForCausalLM
from model.checkpoints import opened_dtype
from model.memory import align_weights

BASE = "base.json"
ADAPTER = "adapter_model.safetensors"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SAMPLED_BYTES = 1 << 20


def weights_digest(folder: Path) -> str:
    """Fingerprint of the weights in `folder`, their bases included: 32 hex digits.

    Of each file only the size and three stretches of 1 MiB (first, middle, last) are read: training
    changes nearly every number, and 900 GB are not read to learn that.

    Raises:
        ValueError: if the folder holds no policy.
    """
    digest = hashlib.blake2b(digest_size=16)
    for link in adapter_chain(folder):
        for path in sorted(link.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in (0, size // 2, max(size - SAMPLED_BYTES, 0)):
                    file.seek(start)
                    digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def adapter_chain(folder: Path) -> tuple[Path, ...]:
    """The folders a policy is made of: full weights first, then its adapters, `folder` last.

    Raises:
        ValueError: if a folder or file is missing, or a chain comes back to itself.
    """
    chain = [folder]
    while (chain[0] / BASE).exists():
        pointer = chain[0] / BASE
        base = Path(os.path.normpath(chain[0].absolute() / _read_base(pointer)["path"]))
        if base in (link.absolute() for link in chain):
            raise ValueError(f"{pointer}: the chain of bases comes back to {base}; train it anew")
        if not base.is_dir():
            raise ValueError(
                f"{pointer}: base {base} does not exist; put it back, or export the policy as "
                "full weights before moving it"
            )
        _require(chain[0], ("adapter_config.json",), (ADAPTER,))
        chain.insert(0, base)
    _require(chain[0], ("config.json",), WEIGHTS)
    return tuple(chain)


def _read_base(pointer: Path) -> dict[str, str]:
    try:
        told = json.loads(pointer.read_text(encoding="utf-8"))
        return {"path": told["path"], "digest": told["digest"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{pointer}: expected {{"path": ..., "digest": ...}}, cannot read it; train the '
            "stage anew"
        ) from error


def _require(folder: Path, *groups: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected a policy artifact or checkpoint")
    for names in groups:
        if not any((folder / name).exists() for name in names):
            raise ValueError(
                f"{folder}: no {' or '.join(names)}, expected a policy (full weights or adapter); "
                f"found {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
            )


def load_policy(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[HybridForCausalLM, PreTrainedTokenizerBase]:
    """The policy in `folder` in eval mode, its adapters merged, and its tokenizer.

    Args:
        dtype: of the weights; None takes `model.checkpoints.opened_dtype`. Adapters are merged in
            fp32, or fp64, before the rounding.

    Raises:
        ValueError: if a file is missing, or a base was changed after its adapter was trained.
    """
    chain = adapter_chain(folder)
    _require(folder, ("tokenizer_config.json",))
    for link in chain[1:]:
        told, found = _read_base(link / BASE)["digest"], weights_digest(_base_of(link, chain))
        if told != found:
            raise ValueError(
                f"{link / BASE}: trained on a base with digest {told}, {_base_of(link, chain)} now "
                f"has {found}; train this stage anew"
            )
    # Small updates vanish when added in bf16, so a chain is added up in fp32.
    dtype = dtype or opened_dtype(folder, device)
    merging = torch.promote_types(dtype, torch.float32) if len(chain) > 1 else dtype
    model = HybridForCausalLM.from_pretrained(chain[0], dtype=merging, local_files_only=True)
    for link in chain[1:]:
        model = PeftModel.from_pretrained(model, link).merge_and_unload(safe_merge=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    placed: nn.Module = model
    placed.to(device=device, dtype=dtype).requires_grad_(True).eval()
    align_weights(placed)
    return model, tokenizer


def _base_of(link: Path, chain: tuple[Path, ...]) -> Path:
    return chain[chain.index(link) - 1]


def save_policy(
    model: HybridForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: Path | None = None,
) -> None:
    """Writes full weights, or the adapter with a relative pointer to `base`, and the tokenizer.

    Every process calls it (a sharded model is gathered); the first one writes.

    Args:
        folder: may later be renamed within its parent, not moved alone: the pointer is relative.
        base: artifact that the adapter was trained on; needed for an adapter only.

    Raises:
        ValueError: if an adapter is saved without base.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if sharded else None
    if isinstance(model, PeftModel) and base is None:
        raise ValueError("save_policy: an adapter needs base, the artifact it was trained on")
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), state_dict=state)
    tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel) and base is not None:
        relative = Path(os.path.relpath(base.absolute(), folder.absolute())).as_posix()
        pointer = {"path": relative, "digest": weights_digest(base)}
        (folder / BASE).write_text(json.dumps(pointer, indent=1) + "\n", encoding="utf-8")
        _settle_adapter(folder, relative)


def _settle_adapter(folder: Path, base: str) -> None:
    """Makes an adapter's files the same wherever and whenever it is saved.

    peft writes the absolute path of the base, sets in the order of the process's hashes, and a
    model card that repeats both.
    """
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["base_model_name_or_path"] = base
    settled = {key: sorted(v) if _is_names(v) else v for key, v in sorted(written.items())}
    path.write_text(json.dumps(settled, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
