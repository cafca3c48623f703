from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import HybridForCausalLM, Packed, checkpointing, preset
from model.checkpointing import Checkpointing
from tests.helpers import TOLERANCE, assert_close

LENGTHS = [70, 1, 33, 64]
QKV = (sum(LENGTHS), 3 * 4 * 32)


def build(dtype: torch.dtype, **changes: Any) -> HybridForCausalLM:
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    keys = {"num_hidden_layers": 3, "layer_types": kinds, **changes}
    return HybridForCausalLM(preset("tiny", **keys)).to(dtype).train()


def backward(model: HybridForCausalLM) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1024, (sum(LENGTHS),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    packed = Packed(tokens, positions, tuple(LENGTHS)).to(model.device)
    out = model(packed=packed, targets=packed.tokens.roll(-1))
    (out.aux_loss - out.logprobs.mean()).backward()
    return {n: p.grad for n, p in model.named_parameters()}, out.router_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["selective", "full", "host"])
@pytest.mark.parametrize("postnorm", [True, False])
def test_no_bit_of_a_gradient_changes(
    dtype: torch.dtype, kind: Checkpointing, postnorm: bool
) -> None:
    plain, routed = backward(build(dtype, postnorm=postnorm))
    model = build(dtype, postnorm=postnorm)
    model.model.checkpointing = kind
    found, routed_again = backward(model)
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name
    assert all(torch.equal(a, b) for a, b in zip(routed, routed_again, strict=True))


class Operations(TorchDispatchMode):
    """Counts operations by name and shape of the first output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor):
            self.seen[func.overloadpacket.__name__, tuple(first.shape)] += 1
        return out


def operations(kind: Checkpointing, **changes: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    model = build(torch.float64, **changes)
    model.model.checkpointing = kind
    with Operations() as counted:
        backward(model)
    return counted.seen


def test_selective_computes_no_projection_and_no_softmax_again() -> None:
    attentions, qkv, gate_up = {}, {}, {}
    for kind in ("none", "selective", "full"):
        seen = operations(kind)
        qkv[kind] = seen["mm", QKV]
        attentions[kind] = sum(n for (name, _), n in seen.items() if name.endswith("_for_cpu"))
        gate_up[kind] = sum(
            n for (name, out), n in seen.items() if (name, out[1:]) == ("mm", (320,))
        )
    assert qkv == {"none": 2, "selective": 2, "full": 4}
    assert attentions["none"] == attentions["selective"] > 0
    assert attentions["full"] == 2 * attentions["none"]
    # 4 experts in 3 layers, of which backward needs the first product only
    assert gate_up["selective"] == gate_up["full"] == gate_up["none"] + 12


def test_switch_of_transformers_means_full() -> None:
    model = build(torch.float64)
    model.gradient_checkpointing_enable()
    with Operations() as counted:
        backward(model)
    assert counted.seen["mm", QKV] == 4


def test_nothing_is_computed_again_outside_of_training() -> None:
    model = build(torch.float64).eval()
    model.model.checkpointing = "full"
    with Operations() as counted:
        backward(model)
    assert counted.seen["mm", QKV] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "selective", "full", "host"])
def test_on_cuda_gradients_agree_and_nothing_waits_for_the_device(
    kind: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_HOST_BYTES", 0)
    plain, _ = backward(build(torch.bfloat16).cuda())
    model = build(torch.bfloat16).cuda()
    model.model.checkpointing = kind
    # the first pass compiles and makes tables
    backward(model)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = backward(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, gradient in plain.items():
        assert_close(name, found[name], gradient, TOLERANCE[torch.bfloat16])
