from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.kernels.attention import forms, padded, pieces
from model.kernels.attention.op import (
    cached_attention,
    merge_attention,
    packed_attention,
    packed_attention_backward,
    packed_attention_lse,
)
from model.kernels.attention.reference import attention_reference
from tests.helpers import TOLERANCE, assert_close

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


@pytest.mark.usefixtures("cpu_form", "poison")
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim"),
    [
        *((lengths, 3, 1, 32) for lengths in RAGGED),
        ([63, 1], 8, 8, 64),
        ([65, 2], 8, 2, 128),
        ([70, 9], 6, 2, 33),
        ([40], 2, 1, 1),
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


@pytest.mark.usefixtures("cpu_form", "poison")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dim", [33, 64, 128])
def test_bf16_equals_the_formula(dim: int, window: int | None):
    lengths = [65, 1, 130]
    qkv = [x.bfloat16() for x in inputs(sum(lengths), heads=6, kv_heads=2, dim=dim)]
    found = run("op", qkv, lengths, window)
    exact = run("reference", [x.double() for x in qkv], lengths, window)
    for name, value in exact.items():
        assert found[name].dtype == torch.bfloat16
        assert_close(name, found[name], value, TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("cpu_form")
def test_any_strides_are_read_in_place():
    torch.manual_seed(0)
    wide = torch.randn(80, 9, 40)
    views = wide[:, :4, 3:35], wide[:, 4:6, 1:33], wide.permute(2, 1, 0)[:32, 6:8].permute(2, 1, 0)
    found, exact = (run("op", x, [70, 10], None) for x in (views, [x.contiguous() for x in views]))
    for name, value in exact.items():
        assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("cpu_form")
def test_lse_of_fp32_equals_the_whole_softmax():
    qkv = inputs(99, heads=6, kv_heads=2, dim=32)
    out, lse = packed_attention_lse(*qkv, [99])
    seen = torch.ones(99, 99, dtype=torch.bool).tril()
    assert_close("lse", lse, scores(*(x.double() for x in qkv[:2]), seen).logsumexp(-1).T, 1e-6)
    grad = torch.randn_like(out)
    leaves = [x.clone().requires_grad_() for x in qkv]
    exact = torch.autograd.grad(packed_attention(*leaves, [99]), leaves, grad)
    # as whoever merges pieces lays it out
    given = (*qkv, out, lse.contiguous(), [99])
    for name, a, b in zip("qkv", packed_attention_backward(grad, *given), exact, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-6)


@pytest.mark.usefixtures("cpu_form")
def test_large_scores_stay_finite():
    q, k, v = inputs(70, heads=2, kv_heads=1, dim=32)
    found = run("op", (200 * q, 200 * k, v), [70], None)
    exact = run("reference", [x.double() for x in (200 * q, 200 * k, v)], [70], None)
    assert_close("output", found["output"], exact["output"], 1e-5)
    assert all(torch.isfinite(x).all() for x in found.values())


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


@pytest.mark.parametrize("window", [None, 40])
def test_no_bit_of_a_sequence_depends_on_its_company(window: int | None):
    lengths = [1, 8, 9, 63, 64, 65, 66, 200, 256, 257, 1000]
    qkv = inputs(sum(lengths), heads=4, kv_heads=2, dim=32)
    together = packed_attention(*qkv, lengths, window=window).split(lengths)
    apart = zip(*(x.split(lengths) for x in qkv), strict=True)
    for length, own, found in zip(lengths, apart, together, strict=True):
        assert torch.equal(packed_attention(*own, [length], window=window), found), length


def test_little_is_padded():
    rooms = {length: padded._room(length) for length in range(1, 2000)}
    assert all(n <= room <= max(n + 7, 1.25 * n) for n, room in rooms.items())
    assert len({room for n, room in rooms.items() if n <= 256}) == 16
    assert rooms[1999] == 1999


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(4, heads=3, kv_heads=1, dim=8)
    with pytest.raises(ValueError, match="H a multiple of G"):
        packed_attention(q, torch.cat((k, k), 1), torch.cat((v, v), 1), [4])
    with pytest.raises(ValueError, match=r"lengths \(3,\) must be >= 1 each and sum to T = 4"):
        packed_attention(q, k, v, [3])


def scores(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """[H, T, T_k], -inf where not seen."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (torch.einsum("ihd,jhd->hij", q, keys) / q.shape[2] ** 0.5).masked_fill(~seen, -math.inf)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", RAGGED)
def test_lse_and_gradients_equal_the_whole_softmax(lengths: list[int], window: int | None):
    qkv = [x.double() for x in inputs(sum(lengths), heads=6, kv_heads=2, dim=32)]
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = packed_attention_lse(*leaves, lengths, window=window)
    exact = [x.clone().requires_grad_() for x in qkv]
    whole = attention_reference(*exact, lengths, window=window)
    weights = torch.randn_like(whole)
    for found, right in zip(
        torch.autograd.grad((out * weights).sum(), leaves),
        torch.autograd.grad((whole * weights).sum(), exact),
        strict=True,
    ):
        assert float((found - right).abs().max()) < 1e-12
    assert_close("output", out, whole, 1e-12)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    behind = torch.arange(sum(lengths))[:, None] - torch.arange(sum(lengths))[None, :]
    seen = (document[:, None] == document[None, :]) & (behind >= 0) & (behind < (window or 10**9))
    assert_close("lse", lse, scores(*qkv[:2], seen).logsumexp(-1).T, 1e-12)
    assert not lse.requires_grad


def test_rectangle_equals_the_whole_softmax():
    lengths, key_lengths = [3, 40], [70, 1]
    q = torch.randn(43, 6, 16, dtype=torch.float64)
    k, v = (torch.randn(71, 2, 16, dtype=torch.float64) for _ in range(2))
    out, lse = packed_attention_lse(q, k, v, lengths, key_lengths=key_lengths)
    rows, keys = (torch.tensor([0, 1]).repeat_interleave(torch.tensor(n))
                  for n in (lengths, key_lengths))  # fmt: skip
    weights = scores(q, k, rows[:, None] == keys[None, :])
    assert_close("lse", lse, weights.logsumexp(-1).T, 1e-12)
    values = v.repeat_interleave(3, dim=1)
    assert_close("output", out, torch.einsum("hij,jhd->ihd", weights.softmax(-1), values), 1e-12)


def whole_by_pieces(q, k, v, grad, blocks: list[tuple[slice, slice]]):
    """A ring in one process: blocks of (queries, keys) merged, then each one's backward.

    A block on the diagonal is causal, another one a rectangle.
    """
    out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=out.dtype, device=q.device)
    calls = []
    for rows, keys in blocks:
        sizes = [s.stop - s.start for s in (rows, keys)]
        given = {} if rows == keys else {"key_lengths": sizes[1:]}
        calls.append((rows, keys, sizes[:1], given))
        found = packed_attention_lse(q[rows], k[keys], v[keys], sizes[:1], **given)
        out[rows], lse[rows] = merge_attention(out[rows], lse[rows], *found)
    out = out.to(q.dtype)
    sums = [torch.zeros(x.shape, dtype=lse.dtype, device=q.device) for x in (q, k, v)]
    for rows, keys, lengths, given in calls:
        found = packed_attention_backward(
            grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], lengths, **given
        )
        for total, part, place in zip(sums, found, (rows, keys, keys), strict=True):
            total[place] += part
    return out, lse, sums


def test_merged_pieces_and_their_backwards_equal_the_whole():
    cuts = [0, 13, 50, 51, 90]
    shards = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    blocks = [(rows, keys) for i, rows in enumerate(shards) for keys in shards[: i + 1]]
    q, k, v = (x.double() for x in inputs(90, heads=6, kv_heads=2, dim=16))
    grad = torch.randn_like(q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, whole_lse = packed_attention_lse(*leaves, [90])
    out, lse, grads = whole_by_pieces(q, k, v, grad, blocks)
    assert_close("output", out, whole, 1e-12)
    assert_close("lse", lse, whole_lse, 1e-12)
    for name, found, right in zip("qkv", grads, torch.autograd.grad(whole, leaves, grad),
                                  strict=True):  # fmt: skip
        assert_close(f"gradient of {name}", found, right, 1e-12)


def test_long_sequences_stand_alone_and_order_is_kept():
    found = pieces.cut([5, 2048, 4096, 1, 2], None, range(2048, 5000))
    assert [(p.form, p.lengths) for p in found] == [
        ("flash", (5,)), ("cudnn", (2048,)), ("cudnn", (4096,)), ("flash", (1, 2)),
    ]  # fmt: skip
    assert [p.form for p in pieces.cut([5000, 9], 7, range(0))] == ["flash"]
    lengths = range(2048, 70_000, 7)
    padded = [forms.padded_length(n) for n in lengths]
    assert all(n <= p <= 17 / 16 * n for n, p in zip(lengths, padded, strict=True))
    assert len(set(padded)) < 120
    assert forms.padded_length(1_032_192) == 1_032_192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [3]}, r"lengths \(3,\) must be >= 1 each and sum to T = 4"),
        ({"window": 0}, r"window = 0, expected >= 1"),
        ({"k": torch.zeros(4, 1, 8).double()}, r"k torch.float64.*expected one dtype"),
        ({"k": torch.zeros(4, 1, 8, device="meta")}, r"k on meta.*expected one device"),
        ({"key_lengths": [3]}, r"key_lengths \(3,\) must be >= 1 each and sum to the keys = 4"),
        ({"key_lengths": [2, 2]}, r"expected one of each a sequence"),
        ({"key_lengths": [4], "window": 2}, r"window = 2 with key_lengths: expected None"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    q, k, v = inputs(4, heads=3, kv_heads=1, dim=8)
    given = {"q": q, "k": k, "v": v, "lengths": [4], **change}
    with pytest.raises(ValueError, match=message):
        packed_attention_lse(**given)


def test_backward_refuses_what_the_merge_did_not_give():
    q, k, v = inputs(4, heads=3, kv_heads=1, dim=8)
    out, lse = packed_attention_lse(q, k, v, [4])
    with pytest.raises(ValueError, match=r"lse \(3, 4\) .*expected \(4, 3\) torch.float32"):
        packed_attention_backward(out, q, k, v, out, lse.T, [4])
    with pytest.raises(ValueError, match=r"out .*float64.*expected \(4, 3, 8\) torch.float32"):
        packed_attention_backward(out, q, k, v, out.double(), lse, [4])


CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", [*RAGGED, [2048], [2049, 1, 5, 4000, 300, 2047]])
def test_the_whole_matrix(lengths: list[int], dim: int, window: int | None, dtype: torch.dtype):
    for heads, kv_heads in ((3, 1), (6, 2)):
        qkv = inputs(sum(lengths), heads=heads, kv_heads=kv_heads, dim=dim)
        qkv = [x.to("cuda", dtype) for x in qkv]
        weights = torch.randn_like(qkv[0])
        found = [x.clone().requires_grad_() for x in qkv]
        exact = [x.double().requires_grad_() for x in qkv]
        out = packed_attention(*found, lengths, window=window)
        whole = attention_reference(*exact, lengths, window=window)
        assert_close("output", out.detach(), whole.detach(), BOUND[dtype])
        scale = None
        for name, a, b in zip(
            "vkq",
            torch.autograd.grad(out, found, weights)[::-1],
            torch.autograd.grad(whole, exact, weights.double())[::-1],
            strict=True,
        ):
            # of one key, q and k have no gradient; only rounding may be left
            scale = scale or b.square().mean().sqrt()
            if max(lengths) == 1 and name != "v":
                assert float(a.abs().max()) < 1e-2 * scale, name
            else:
                assert_close(f"gradient of {name}", a, b, BOUND[dtype])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("cuts", [[0, 1000, 1064, 2500], [0, 2048, 4096, 6144], [0, 3000, 3001]])
def test_pieces_on_a_gpu_equal_the_whole(cuts: list[int], dtype: torch.dtype):
    shards = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    blocks = [(rows, keys) for i, rows in enumerate(shards) for keys in shards[: i + 1]]
    q, k, v = (x.to("cuda", dtype) for x in inputs(cuts[-1], heads=6, kv_heads=2, dim=64))
    grad = torch.randn_like(q)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    whole = attention_reference(*leaves, [cuts[-1]])
    out, lse, grads = whole_by_pieces(q, k, v, grad, blocks)
    assert_close("output", out, whole.detach(), BOUND[dtype])
    seen = torch.ones(cuts[-1], cuts[-1], dtype=torch.bool, device="cuda").tril()
    with torch.no_grad():
        assert_close("lse", lse, scores(*leaves[:2], seen).logsumexp(-1).T, 1e-5)
    for name, found, right in zip(
        "qkv", grads, torch.autograd.grad(whole, leaves, grad.double()), strict=True
    ):
        assert_close(f"gradient of {name}", found, right, BOUND[dtype])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", list(BOUND))
def test_nothing_waits_for_the_device(dtype: torch.dtype):
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in ([3000, 5, 64, 2048, 1], [3001, 5, 65, 2048, 1]):
            q, k, v = (
                torch.ones(sum(lengths), n, 64, dtype=dtype, device="cuda", requires_grad=True)
                for n in (6, 2, 2)
            )
            packed_attention(q, k, v, lengths).sum().backward()
            assert q.grad is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
def test_strided_views_are_read_in_place():
    torch.manual_seed(0)
    lengths = [2100, 300]
    qkv = torch.randn(2400, 10, 64, device="cuda").bfloat16()
    weights = torch.randn(2400, 6, 64, device="cuda").bfloat16()
    views = [x.requires_grad_() for x in qkv.split([6, 2, 2], dim=1)]
    exact = [x.detach().double().requires_grad_() for x in views]
    out = packed_attention(*views, lengths)
    whole = attention_reference(*exact, lengths)
    assert_close("output", out.detach(), whole.detach(), BOUND[out.dtype])
    for name, found, right in zip(
        "qkv",
        torch.autograd.grad(out, views, weights),
        torch.autograd.grad(whole, exact, weights.double()),
        strict=True,
    ):
        assert_close(f"gradient of {name}", found, right, BOUND[out.dtype])


@pytest.mark.gpu
@gpu
def test_what_no_kernel_takes_is_computed_and_its_lse_refused():
    q, k, v = (x.cuda().double() for x in inputs(70, heads=3, kv_heads=1, dim=12))
    found = packed_attention(q, k, v, [60, 10])
    assert_close("output", found, attention_reference(q, k, v, [60, 10]), 1e-12)
    with pytest.raises(ValueError, match="has no log-sum-exp"):
        packed_attention_lse(q, k, v, [60, 10])
