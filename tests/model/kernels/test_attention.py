from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.kernels.attention.op import cached_attention, packed_attention
from model.kernels.attention.reference import attention_reference
from tests.helpers import assert_close

RAGGED = ([1], [63], [64], [65], [1000], [65, 1, 130], [1, 1, 1], [33, 200, 1, 64, 31])


def inputs(total: int, *, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(total, size, dim) for size in sizes)
    return q, k, v


def run(
    form: str, qkv: Sequence[Tensor], lengths: Sequence[int], window: int | None
) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    function = packed_attention if form == "op" else attention_reference
    out = function(*leaves, lengths, window=window)
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (out * weights).sum().backward()
    grads = {f"gradient of {n}": x.grad for n, x in zip("qkv", leaves, strict=True)}
    return {"output": out, **grads}


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim"),
    [
        *((lengths, 3, 1, 32) for lengths in RAGGED),
        ([63, 1], 8, 8, 64),
        ([65, 2], 8, 2, 128),
    ],
)
def test_equals_each_sequence_alone(
    lengths: list[int], heads: int, kv_heads: int, dim: int, window: int | None
):
    qkv = inputs(sum(lengths), heads=heads, kv_heads=kv_heads, dim=dim)
    found = run("op", qkv, lengths, window)
    exact = run("reference", [x.double() for x in qkv], lengths, window)
    for name, value in exact.items():
        if float(value.detach().abs().max()) < 1e-12:
            # a query that sees one key has no gradient; only rounding may be left
            assert float(found[name].abs().max()) < 1e-5, name
            continue
        assert_close(name, found[name], value, 1e-6)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("past", "new"), [([0, 5], [3, 1]), ([17, 0, 40], [1, 1, 1]), ([9], [8])])
def test_cached_equals_the_tail_of_the_whole(past: list[int], new: list[int], window: int | None):
    totals = [held + more for held, more in zip(past, new, strict=True)]
    q, k, v = inputs(sum(totals), heads=6, kv_heads=2, dim=16)
    whole = attention_reference(q, k, v, totals, window=window)
    room = max(totals) + 5
    # what lies behind a sequence's end must not matter
    keys, values = (torch.full((len(totals), room, 2, 16), 1e3) for _ in range(2))
    tails, start = [], 0
    for i, (held, total) in enumerate(zip(past, totals, strict=True)):
        keys[i, :total], values[i, :total] = k[start : start + total], v[start : start + total]
        tails.append(torch.arange(start + held, start + total))
        start += total
    tail = torch.cat(tails)
    found = cached_attention(q[tail], keys, values, new, torch.tensor(past), window=window)
    assert_close("output", found, whole[tail], 1e-6)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(4, heads=3, kv_heads=1, dim=8)
    with pytest.raises(ValueError, match="H a multiple of G"):
        packed_attention(q, torch.cat((k, k), 1), torch.cat((v, v), 1), [4])
    with pytest.raises(ValueError, match=r"lengths \(3,\) must be >= 1 each and sum to T = 4"):
        packed_attention(q, k, v, [3])
