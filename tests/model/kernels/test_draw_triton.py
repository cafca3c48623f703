"""The drawn token in its Triton form against the torch form in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.kernels.draw.op import draw_tokens
from tests.helpers import slow
from tests.model.kernels import formula

DEVICE = formula.DEVICE
TEMPERATURES = (1.0, 0.5, 1.7, 0.0)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(scope="module")
def launch() -> ModuleType:
    return formula.launch("draw")


def counters(rows: int) -> list[Tensor]:
    """Seed, sample and position of each row; seeds of 63 bits."""
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randint(0, 2**62, (rows,), generator=generator) * 2 + 1,
        torch.arange(rows),
        torch.randint(0, 9999, (rows,), generator=generator),
    ]


def check(launch: ModuleType, logits: Tensor, temperatures: list[float]) -> Tensor:
    """The tokens, after all that is told of them was compared."""
    given = [torch.tensor(temperatures), *counters(len(logits))]
    flags = {"greedy": 0 in temperatures, "tempered": not {*temperatures} <= {0.0, 1.0}}
    found = launch.draw_triton(logits, *(x.to(DEVICE) for x in given), **flags)
    exact = draw_tokens(logits.cpu().double(), *given, **flags)
    tokens, logprobs, drawn = (x.cpu() for x in found)
    assert torch.equal(tokens, exact[0])
    torch.testing.assert_close(logprobs.double(), exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.double(), exact[2], rtol=1e-5, atol=1e-5)
    return tokens


def logits_of(rows: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    return (torch.randn(rows, vocabulary, generator=generator) * 3).to(DEVICE)


@pytest.mark.parametrize("vocabulary", [1, 300, *slow(7, 64)])
@pytest.mark.parametrize("temperatures", [[*TEMPERATURES], [1.0], *slow([0.0, 1.0], [0.3])])
def test_it_draws_what_torch_draws(
    launch: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: int,
    temperatures: Sequence[float],
):
    # several blocks, the last of them not full
    monkeypatch.setattr(launch, "BLOCK_TOKENS", 64)
    check(launch, logits_of(8, vocabulary), [*temperatures] * (8 // len(temperatures)))


def test_rows_may_lie_apart(launch: ModuleType):
    check(launch, logits_of(12, 33)[::3], [1.0] * 4)
    check(launch, logits_of(33, 4).T, [1.0] * 4)


def test_numbers_of_rows_may_lie_apart(launch: ModuleType):
    logits = logits_of(4, 33)
    given = [x.to(DEVICE) for x in (torch.ones(4), *counters(4))]
    apart = [torch.stack([x, x + 1], dim=1)[:, 0] for x in given]
    flags = {"greedy": False, "tempered": False}
    found, exact = (launch.draw_triton(logits, *x, **flags) for x in (apart, given))
    assert all(map(torch.equal, found, exact))


def test_no_row_draws_nothing(launch: ModuleType):
    assert check(launch, logits_of(0, 33), []).tolist() == []


def test_what_has_no_chance_is_never_drawn(launch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "BLOCK_TOKENS", 4)
    logits = torch.full((20, 14), float("-inf"), device=DEVICE)
    logits[:, [5, 6, 9]] = 0.0
    assert {*check(launch, logits, [1.0] * 20).tolist()} == {5, 6, 9}


def test_of_equals_the_first_is_the_most_likely(launch: ModuleType):
    assert check(launch, torch.zeros(1, 50, device=DEVICE), [0.0]).tolist() == [0]


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("-inf"), float("inf")])
def test_a_broken_row_has_no_logprob_and_leaves_the_others(
    launch: ModuleType, broken: float, tempered: bool
):
    logits = logits_of(3, 40)
    logits[1] = broken
    given = [x.to(DEVICE) for x in (torch.tensor([1.0, 1.0, 0.0]), *counters(3))]
    found = launch.draw_triton(logits, *given, greedy=True, tempered=tempered)
    assert torch.isnan(found[1][1])
    assert all(0 <= token < 40 for token in found[0].tolist())
    kept = torch.tensor([0, 2], device=DEVICE)
    whole = launch.draw_triton(
        logits[kept], *(x[kept] for x in given), greedy=True, tempered=tempered
    )
    for mine, other in zip(found, whole, strict=True):
        assert torch.equal(mine[kept], other)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [1000, 32_000, 200_064])
@pytest.mark.parametrize("rows", [1, 32, 300])
def test_the_whole_matrix(launch: ModuleType, rows: int, vocabulary: int):
    check(launch, logits_of(rows, vocabulary), [1.0] * rows)
    mixed = [TEMPERATURES[row % len(TEMPERATURES)] for row in range(rows)]
    check(launch, logits_of(rows, vocabulary), mixed)
