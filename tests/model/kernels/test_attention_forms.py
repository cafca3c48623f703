"""What is laid out for torch's CUDA kernels, with stand-ins that compute the same on a CPU.

The stand-ins keep to the layouts that the kernels were seen to take and give on one H200 with torch
2.11; the kernels themselves run in `test_attention.py` where there is a GPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from model.kernels.attention import forms, pieces
from model.kernels.attention.forms import Piece
from model.kernels.attention.op import packed_attention_lse
from tests.helpers import assert_close

CPU = forms.FORMS["cpu"]


def split(total: Tensor) -> list[slice]:
    ends = total.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def single(is_causal: bool, keys: int, window: int | None) -> Piece:
    return Piece("cpu", (1,), None if is_causal else (keys,), window)


class StandIns:
    """torch.ops.aten's CUDA attention, sequence by sequence."""

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, with_lse, dropout, causal, debug):
        assert q.shape[0] == 1
        assert q.shape[2] > 1
        assert with_lse
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        out, lse = CPU.forward(*rows, single(causal, k.shape[2], None))
        return out[None].transpose(1, 2), lse.t().contiguous()[None, :, :, None], None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal
    ):
        assert lse.shape == (1, q.shape[1], q.shape[2], 1)
        assert lse.is_contiguous()
        assert grad.stride() == out.stride()
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        rows = [x[0].transpose(0, 1) for x in (grad, q, k, v, out)]
        grads = CPU.backward(*rows, lse[0, :, :, 0].t(), single(causal, max_k, None))
        return [x[None].transpose(1, 2) for x in grads]

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        window = None if window_size_left is None else window_size_left + 1
        found = [
            CPU.forward(q[a], k[b], v[b], single(causal, b.stop - b.start, window))
            for a, b in zip(split(cu_q), split(cu_k), strict=True)
        ]
        out, lse = (torch.cat(x) for x in zip(*found, strict=True))
        return out, lse.t().contiguous(), None

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert lse.shape == (q.shape[1], q.shape[0])
        assert lse.is_contiguous()
        window = None if window_size_left is None else window_size_left + 1
        found = []
        for a, b in zip(split(cu_q), split(cu_k), strict=True):
            piece = single(causal, b.stop - b.start, window)
            given = (grad[a], q[a], k[b], v[b], out[a], lse.t()[a])
            found.append(CPU.backward(*given, piece))
        return [torch.cat(x) for x in zip(*found, strict=True)]

    def _efficient_attention_forward(
        self, q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask, with_lse, window_size=None
    ):
        assert q.shape[2] == k.shape[2]
        assert with_lse
        window = None if window_size is None else window_size - 1
        flash = self._flash_attention_forward(
            q[0], k[0], v[0], cu_q, cu_k, max_q, max_k, 0.0, mask == 1, False, window, 0
        )
        lse = torch.full((len(cu_q) - 1, q.shape[2], -(-max_q // 32) * 32), math.nan)
        for i, rows in enumerate(split(cu_q)):
            lse[i, :, : rows.stop - rows.start] = flash[1][:, rows]
        return flash[0][None], lse, None

    def _efficient_attention_backward(
        self, grad, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, mask,
        bias_grad, window_size=None,
    ):  # fmt: skip
        assert lse.is_contiguous()
        assert lse.shape[2] % 32 == 0
        flat = torch.cat([lse[i, :, : r.stop - r.start] for i, r in enumerate(split(cu_q))], dim=1)
        window = None if window_size is None else window_size - 1
        grads = self._flash_attention_backward(
            grad[0], q[0], k[0], v[0], out[0], flat, cu_q, cu_k, max_q, max_k, 0.0, mask == 1,
            None, None, window, 0,
        )  # fmt: skip
        return *(x[None] for x in grads), None


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    real = forms.aten

    class Both(StandIns):
        _scaled_dot_product_flash_attention_for_cpu = (
            real._scaled_dot_product_flash_attention_for_cpu
        )
        _scaled_dot_product_flash_attention_for_cpu_backward = (
            real._scaled_dot_product_flash_attention_for_cpu_backward
        )

    monkeypatch.setattr(forms, "aten", Both())


@pytest.mark.parametrize(
    ("given", "lengths", "key_lengths", "window"),
    [
        ([Piece("flash", (5, 1, 70))], [5, 1, 70], None, None),
        ([Piece("flash", (5, 1, 70), None, 9)], [5, 1, 70], None, 9),
        ([Piece("flash", (5, 3), (2, 30))], [5, 3], [2, 30], None),
        ([Piece("efficient", (5, 1, 70))], [5, 1, 70], None, None),
        ([Piece("efficient", (5, 1, 70), None, 9)], [5, 1, 70], None, 9),
        ([Piece("efficient", (5, 3), (2, 30))], [5, 3], [2, 30], None),
        ([Piece("cudnn", (67,))], [67], None, None),
        ([Piece("cudnn", (64,), (32,))], [64], [32], None),
        (pieces.cut([3, 67, 2, 1, 33], None, range(30, 99)), [3, 67, 2, 1, 33], None, None),
    ],
)
def test_forms_give_what_each_sequence_gives_alone(
    given: list[Piece], lengths: list[int], key_lengths: list[int] | None, window: int | None
):
    torch.manual_seed(0)
    total, keys = sum(lengths), sum(key_lengths or lengths)
    q, grad = (torch.randn(total, 6, 16) for _ in range(2))
    k, v = (torch.randn(keys, 2, 16) for _ in range(2))
    out, lse = pieces.forward(q, k, v, given)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, whole_lse = packed_attention_lse(
        *leaves, lengths, key_lengths=key_lengths, window=window
    )
    assert_close("output", out, whole.detach(), 1e-6)
    assert_close("lse", lse, whole_lse, 1e-6)
    # strides as a reduction's backward gives them
    found = pieces.backward(grad.permute(2, 0, 1).contiguous().permute(1, 2, 0), q, k, v, out, lse,
                            given)  # fmt: skip
    for name, a, b in zip("qkv", found, torch.autograd.grad(whole, leaves, grad), strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-6)
