"""Attention to pages: the CPU forms against packed attention, the Triton form against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.attention.op import packed_attention
from model.kernels.paged.op import paged_attention
from tests.helpers import TOLERANCE, assert_close, slow
from tests.model.kernels import formula

pytestmark = pytest.mark.usefixtures("poison")
CUDA = formula.CUDA


def case(
    lengths: list[int], heads: int, kv_heads: int, size: int, page: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q of each sequence's last token, pages in a random order, and the sequences themselves."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts), generator=generator).tolist()
    table = torch.randint(0, sum(counts), (len(lengths) + 2, max(counts)), generator=generator)
    index = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    pages = noise(2, sum(counts), page, kv_heads, size)
    keys = []
    for slot, count, length in zip(index.tolist(), counts, lengths, strict=True):
        own, order = order[:count], order[count:]
        table[slot, :count] = torch.tensor(own)
        keys.append(pages[:, own].flatten(1, 2)[:, :length])
    q = noise(len(lengths), heads, size)
    return q, pages, table.int(), index, torch.tensor(lengths), torch.cat(keys, dim=1)


def exact(q: Tensor, lengths: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """By the packed form: the last row of each sequence."""
    rows = lengths.cumsum(0) - 1
    every = torch.zeros(keys.shape[1], *q.shape[1:], dtype=q.dtype)
    every[rows] = q
    return packed_attention(every, *keys, lengths.tolist(), window=window)[rows]


@pytest.mark.usefixtures("cpu_form")
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("size", [1, 16, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_a_cpu_it_is_the_packed_form(window: int | None, dtype: torch.dtype, size: int):
    q, *arguments, keys = case([1, 16, 17, 300], 4, 2, size, 16, dtype)
    found = paged_attention(q, *arguments, window=window)
    assert found.dtype == dtype
    reference = exact(q.double(), arguments[3], keys.double(), window)
    assert_close("out", found, reference, max(TOLERANCE[dtype] / 10, 1e-6))


@pytest.mark.usefixtures("cpu_form")
def test_a_sequence_has_the_bits_it_has_alone():
    q, pages, table, index, lengths, _ = case([9, 16, 17, 300], 4, 2, 32, 16, torch.float32)
    together = paged_attention(q, pages, table, index, lengths)
    for i in range(4):
        own = slice(i, i + 1)
        alone = paged_attention(q[own], pages, table, index[own], lengths[own])
        assert torch.equal(alone[0], together[i])


# few programs leave few shares of a sequence, most of which would be empty here; interpreted, each
# takes its time
@pytest.mark.parametrize("programs", [48, *slow(1024)])
@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        (None, torch.float32),
        (40, torch.float16),
        *slow((None, torch.float16), (40, torch.float32)),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "size", "page"),
    [
        ([1, 65, 300], 4, 2, 32, 16),
        *slow(([7, 64, 1, 130, 5], 3, 1, 24, 20)),
        ([128], 16, 4, 64, 64),
    ],
)
def test_triton_form_is_the_torch_form(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    size: int,
    page: int,
    window: int | None,
    dtype: torch.dtype,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
):
    launch = formula.launch("paged")
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    q, *arguments, _ = case(lengths, heads, kv_heads, size, page, dtype)
    place = "cuda" if CUDA else "cpu"
    q, arguments = q.to(place), [x.to(place) for x in arguments]
    found = launch.paged_triton(q, *arguments, window=window)
    wide = q.float(), arguments[0].float(), *arguments[1:]
    reference = paged_attention(*wide, window=window, form="torch")
    assert_close("out", found.float(), reference, 1e-5 if dtype == torch.float32 else 2e-3)


def test_shapes_that_do_not_fit_are_refused():
    q, pages, table, index, lengths, _ = case([5], 4, 2, 16, 16, torch.float32)
    with pytest.raises(ValueError, match=r"H a multiple of G"):
        paged_attention(q[:, :3], pages, table, index, lengths)
    with pytest.raises(ValueError, match=r"index \(2,\), lengths \(1,\): expected \[1\] each"):
        paged_attention(q, pages, table, torch.tensor([0, 1]), lengths)
    with pytest.raises(ValueError, match="expected one device"):
        paged_attention(q, pages, table, index, lengths.to("meta"))
