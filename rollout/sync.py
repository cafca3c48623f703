"""Weights on their way from a trainer to an engine: the stream, the copy, and its proof.

A stream is pairs of plain name and whole tensor, one at a time: a sharded source gathers one
tensor, hands it on and forgets it. What was sent and what is held are compared by `checksums`, made
where the tensors are; stacked experts have one each, so that two that changed places are told from
wrong numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import peft
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Stream = Iterable[tuple[str, Tensor]]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_WORDS = 1 << 22
# odd, so that multiplying by them modulo 2^64 loses nothing
SPREAD, STIR = -7046029254386353131, -4417276706812531889
LOW_HALF = (1 << 32) - 1


def weights(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its plain name, adapters merged; the model's own bits stay as they are.

    Adapters are merged in a whole copy of one layer at a time, and sharded tensors (FSDP2, expert
    parallel) gathered one at a time, so the stream needs the memory of one layer more than the
    model. Of a sharded model every rank runs it, for each gather is a collective.

    Args:
        model: a plain model, or one wrapped by peft or holding its layers, with active adapters.
        dtype: what floating-point tensors are rounded to, after merging in the wider of it and
            their own: the engine's; None leaves them.

    Example:
        >>> [name for name, _ in weights(nn.Linear(2, 2))]
        ['weight', 'bias']
    """
    plain = _plain(model)
    adapted = _adapted(plain)
    for name, tensor in plain.state_dict().items():
        if not any(name.startswith(f"{outer}.") for outer in adapted):
            yield name, _whole(tensor, dtype)
    for outer, layer in adapted.items():
        for name, tensor in _merged(_whole_layer(layer, dtype)).state_dict().items():
            yield f"{outer}.{name}", _whole(tensor, dtype)


def outline(
    model: nn.Module, *, dtype: torch.dtype | None = None
) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Name, shape and type of each tensor that `weights` will give, in order; gathers nothing.

    Example:
        >>> outline(nn.Linear(2, 1))[1]
        ('bias', torch.Size([1]), torch.float32)
    """
    plain = _plain(model)
    adapted = _adapted(plain)
    found = {
        name: tensor
        for name, tensor in plain.state_dict().items()
        if not any(name.startswith(f"{outer}.") for outer in adapted)
    }
    for outer, layer in adapted.items():
        inside = _base(layer).state_dict().items()
        found |= {f"{outer}.{name}": tensor for name, tensor in inside}
    return [
        (name, t.shape, dtype if dtype is not None and t.is_floating_point() else t.dtype)
        for name, t in found.items()
    ]


def _adapted(plain: nn.Module) -> dict[str, BaseTunerLayer]:
    """The outermost wrappers of adapters by name."""
    found: dict[str, BaseTunerLayer] = {}
    for name, module in plain.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer) and not is_inside:
            found[name] = module
    return found


def parts(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight unmerged: the base by its plain names, then the adapters by peft's.

    Args:
        model, dtype: as for `weights`.

    Example:
        >>> [name for name, _ in parts(nn.Linear(2, 2))]
        ['weight', 'bias']
    """
    yield from base_weights(model, dtype=dtype)
    for name, tensor in adapter_weights(model).items():
        yield name, _whole(tensor, dtype)


def base_weights(
    model: nn.Module, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The weights that adapters stand on, by their plain names."""
    for name, tensor in _plain(model).state_dict().items():
        if not is_adapter(name):
            yield name.replace(".base_layer", ""), _whole(tensor, dtype)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a model's adapters by peft's names inside the base; none without one."""
    return {n: tensor for n, tensor in _plain(model).state_dict().items() if is_adapter(n)}


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """What peft has to be told to put the same adapter into another model, as JSON values."""
    default = peft.LoraConfig().to_dict()
    # of where it was trained, not of what it is
    local = ("base_model_name_or_path", "task_type", "inference_mode")
    told = model.peft_config[model.active_adapter].to_dict()
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in sorted(told.items())
        if name not in local and value != default.get(name)
    }


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return ".lora_" in name


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _whole(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole


def _whole_layer(layer: BaseTunerLayer, dtype: torch.dtype | None) -> nn.Module:
    """A copy that holds every weight and adapter whole, whoever shares them."""
    copied = cast(nn.Module, copy.deepcopy(layer))
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wider = torch.promote_types(parameter.dtype, dtype or parameter.dtype)
            whole = _whole(parameter.detach(), wider)
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)
    for module in copied.modules():
        if isinstance(module, ParamWrapper):
            weight = module.get_param()
            module.num_experts = len(weight) if weight.ndim == 3 else 1
    return copied


def _merged(layer: Any) -> nn.Module:
    """The plain layer; two adapted tensors of one module are two wrappers, one in the other."""
    while isinstance(layer, BaseTunerLayer):
        layer.merge()
        layer = cast(Any, layer).base_layer
    return cast(nn.Module, layer)


def _base(layer: Any) -> nn.Module:
    while isinstance(layer, BaseTunerLayer):
        layer = cast(Any, layer).base_layer
    return cast(nn.Module, layer)


def half_updated(version: int) -> str:
    """What an engine says from the beginning of an update until all of it has come."""
    return (
        f"engine: the update to version {version} broke off, so its weights are of two versions; "
        "call update_weights again with a complete stream"
    )


@torch.no_grad()
def copy_weights(model: nn.Module, stream: Stream) -> None:
    """Copies a stream into a model's weights in place, by name and completely.

    Tied weights are one tensor: either of their names is enough.

    Raises:
        ValueError: naming the first tensor that is unexpected or misshapen, or those missing; what
            came before it has been copied.
    """
    copy_tensors(model.state_dict(), stream)


@torch.no_grad()
def copy_tensors(targets: Mapping[str, Tensor], stream: Stream) -> None:
    """As `copy_weights`, into tensors by name.

    Example:
        >>> target = torch.zeros(2)
        >>> copy_tensors({"w": target}, [("w", torch.ones(2))])
        >>> target.tolist()
        [1.0, 1.0]
    """
    seen: set[int] = set()
    for name, tensor in stream:
        target = _target(targets, name, tensor.shape)
        target.copy_(tensor)
        seen.add(target.data_ptr())
    _check_complete(targets, seen)


def check_fit(model: nn.Module, stream: Iterable[tuple[str, torch.Size]]) -> None:
    """Whether a stream of these names and shapes would be copied whole, before it is.

    Raises:
        ValueError: as `copy_weights`.
    """
    targets = model.state_dict()
    seen = {_target(targets, name, shape).data_ptr() for name, shape in stream}
    _check_complete(targets, seen)


def _target(targets: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in targets:
        raise ValueError(
            f"weight {name!r} is unexpected: the model has {len(targets)} tensors, none of "
            "this name; stream the weights of the same architecture, adapters merged"
        )
    if targets[name].shape != shape:
        raise ValueError(
            f"weight {name!r} has shape {tuple(shape)}, the model's is "
            f"{tuple(targets[name].shape)}; stream the weights of the same config"
        )
    return targets[name]


def _check_complete(targets: Mapping[str, Tensor], seen: set[int]) -> None:
    missing = [name for name, target in targets.items() if target.data_ptr() not in seen]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(targets)} weights are missing from the stream, first "
            f"{missing[0]!r}; stream all of them"
        )


def checksums(stream: Stream) -> dict[str, str]:
    """Type, shape and 64-bit hash of the bits of each tensor by name; the same on every device.

    A tensor of three dimensions is a stack of experts, each with an entry `name[e]` of its own.
    Accidents collide with a chance of 2^-64; it is no defence against malice.

    Example:
        >>> one, other = checksums([("a", torch.zeros(2))]), checksums([("a", torch.zeros(1, 2))])
        >>> one["a"] == other["a"]
        False
        >>> sorted(checksums([("e", torch.zeros(2, 1, 1))]))
        ['e[0]', 'e[1]']
    """
    kinds: dict[str, str] = {}
    found: list[Tensor] = []
    for name, tensor in stream:
        is_stack = tensor.ndim == 3
        for place, piece in enumerate(tensor if is_stack else [tensor]):
            kind = str(piece.dtype).removeprefix("torch.")
            kinds[f"{name}[{place}]" if is_stack else name] = f"{kind}{list(piece.shape)}"
            found.append(_hash(piece))
    # one wait for the device, whatever the number of tensors
    values = torch.stack(found).tolist() if found else []
    mask = (1 << 64) - 1
    return {
        n: f"{kind} {v & mask:016x}" for (n, kind), v in zip(kinds.items(), values, strict=True)
    }


def _hash(tensor: Tensor) -> Tensor:
    """Sum modulo 2^64 of a bijection of each word and its place: a scalar int64."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS].long()
        place = torch.arange(start + 1, start + 1 + len(chunk), device=words.device)
        value = (chunk + place * SPREAD) * STIR
        # the mask makes the shift logical, and the step a bijection
        value = (value ^ ((value >> 32) & LOW_HALF)) * SPREAD
        value = (value ^ ((value >> 32) & LOW_HALF)) * STIR
        total += value.sum()
    return total


def difference(
    sent: Mapping[str, str],
    held: Mapping[str, str],
    *,
    earlier: Mapping[str, str] | None = None,
    base: Mapping[str, str] | None = None,
) -> str:
    """Names the first tensor that is not what was sent, and what it looks like; "" if none.

    Args:
        sent, held: `checksums` of the trainer's stream and of the engine's weights.
        earlier: of the push before, to tell a stale tensor.
        base: of the weights without their adapter, to tell a missing adapter.

    Example:
        >>> difference({"a": "float32[1] 01"}, {"a": "float32[1] 02"})
        "'a' holds float32[1] 02, sent was float32[1] 01"
    """
    for name, value in sent.items():
        if held.get(name) == value:
            continue
        return f"{name!r} {_looks_like(name, value, sent, held, earlier or {}, base or {})}"
    extra = next((name for name in held if name not in sent), "")
    return f"{extra!r} is held and was not sent" if extra else ""


def _looks_like(
    name: str,
    value: str,
    sent: Mapping[str, str],
    held: Mapping[str, str],
    earlier: Mapping[str, str],
    base: Mapping[str, str],
) -> str:
    found = held.get(name)
    if found is None:
        return "is missing: no adapter is held" if is_adapter(name) else "is missing"
    if found == base.get(name):
        return "is that of the base: the adapter is missing"
    if found == earlier.get(name):
        return "is that of the push before: the weights are stale"
    stack = name.rpartition("[")[0]
    twin = next((n for n, v in sent.items() if v == found and n.rpartition("[")[0] == stack), "")
    if stack and twin:
        return f"holds what {twin!r} should hold: the experts are permuted"
    return f"holds {found}, sent was {value}"
