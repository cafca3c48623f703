"""The ledger's numbers are those of the definition, however tokens are split over microbatches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from align.ledger import EDGES, entries, ledger_line, ledger_table
from align.losses.policy import PolicyLossConfig
from align.losses.types import Loss
from align.metrics import Meter

LENGTHS = (40, 1, 159)
T = sum(LENGTHS)


def numbers(seed: int = 0, spread: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    engine = -torch.rand(T, generator=generator) * 5
    weights = (torch.rand(T, generator=generator) < 0.7).float()
    weights[40] = 0
    return {
        "logprobs": engine + spread * torch.randn(T, generator=generator),
        "engine": engine,
        "weights": weights,
        "advantages": torch.randn(T, generator=generator),
    }


def ledger(given: dict[str, torch.Tensor], lengths=LENGTHS, **changes) -> dict[str, float]:
    settings = {"config": PolicyLossConfig(drop_ratio=1.2)} | changes
    return ledger_line(entries(**given, lengths=lengths, **settings).tolist())


def test_every_number_is_its_definition():
    given = numbers()
    kept = given["weights"] != 0
    here, there = given["logprobs"][kept].double(), given["engine"][kept].double()
    gap = here - there
    ratio = gap.exp()
    line = ledger(given)
    pair = torch.stack([here.exp(), there.exp()])
    assert line["ledger/correlation"] == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-9)
    assert line["ledger/log_ratio"] == pytest.approx(gap.mean().item())
    assert line["ledger/ratio"] == pytest.approx(ratio.mean().item())
    ess = ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())
    assert line["ledger/ess_tokens"] == pytest.approx(ess.item())
    whole = torch.stack(
        [
            ((given["logprobs"] - given["engine"]) * given["weights"])[part].double().sum().exp()
            for part in (slice(0, 40), slice(41, T))
        ]
    )
    ess = whole.sum() ** 2 / (2 * whole.square().sum())
    assert line["ledger/ess_responses"] == pytest.approx(ess.item(), rel=1e-6)
    outside = ((ratio < 0.8) | (ratio > 1.2)).double().mean()
    assert line["ledger/outside"] == pytest.approx(outside.item())
    dropped = ((ratio > 1.2) & (given["advantages"][kept] < 0)).double().mean()
    assert line["ledger/dropped"] == pytest.approx(dropped.item())
    assert 0 < line["ledger/dropped"] < line["ledger/outside"]
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = gap.abs().sort().values[int(share * len(gap) - 1e-9)].item()
        assert exact <= line[f"ledger/gap_{name}"] <= exact * 10 ** (1 / 8) * 1.0001
    for decade in (-3, -2, -1):
        over = (gap.abs() > 10.0**decade).double().mean().item()
        assert line[f"ledger/gap_over_1e{decade}"] == pytest.approx(over)


def test_equal_policies_give_one_and_nothing_beyond():
    given = numbers(spread=0.0)
    line = ledger(given)
    assert line["ledger/correlation"] == 1
    assert line["ledger/ratio"] == line["ledger/ess_tokens"] == line["ledger/ess_responses"] == 1
    assert line["ledger/gap_p999"] == EDGES[0]
    assert line["ledger/gap_over_1e-6"] == line["ledger/outside"] == 0
    assert "ledger/router" not in line


def test_microbatches_and_processes_add_up_through_the_meter():
    given = numbers()
    meter, split = Meter(), ((0, 40, (40,)), (40, T, (1, 159)))
    for begin, end, lengths in split:
        part = {name: x[begin:end] for name, x in given.items()}
        sums = entries(**part, lengths=lengths, config=PolicyLossConfig(drop_ratio=1.2))
        meter.add(Loss(sum=torch.zeros(()), ledger=sums))
    resumed = Meter()
    accelerator = Accelerator(cpu=True)
    resumed.load_state_dict(meter.state_dict(accelerator))
    found = resumed.means(accelerator)
    assert found == pytest.approx(ledger(given), rel=1e-9)


def test_an_engine_that_answers_with_another_policy_is_seen():
    given = numbers(spread=2.0)
    line = ledger(given, config=PolicyLossConfig(objective="cispo", is_max=2.0))
    assert line["ledger/correlation"] < 0.8
    assert line["ledger/ess_tokens"] < 0.5
    ratio = (given["logprobs"] - given["engine"]).exp()[given["weights"] != 0]
    assert line["ledger/outside"] == pytest.approx((ratio > 2).float().mean().item())


def test_router_agreement_counts_recorded_experts_of_trained_tokens():
    logits = torch.eye(4)[[0, 1, 2]] * 2 + torch.eye(4)[[1, 2, 3]]
    # [T, layers, K]: the first agrees, the second in one of two, the third is not recorded
    experts = torch.tensor([[[1, 0]], [[1, 3]], [[-1, -1]]])
    given = {name: x[:3] for name, x in numbers().items()} | {"weights": torch.ones(3)}
    more = {"experts": experts, "router_logits": (logits,)}
    assert ledger(given, (3,), **more)["ledger/router"] == 0.75
    given["weights"] = torch.tensor([0.0, 1.0, 0.0])
    assert ledger(given, (3,), **more)["ledger/router"] == 0.5


def test_a_microbatch_that_trains_nothing_adds_nothing():
    given = numbers() | {"weights": torch.zeros(T)}
    assert ledger(given) == {}


def test_the_table_shows_a_line_a_step(tmp_path: Path):
    for message, text in (
        ("no such file; give the folder of a grpo stage", None),
        ("no line holds a ledger", '{"step": 1}\n'),
    ):
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            ledger_table(tmp_path)
    lines = [{"step": n, "engine/gap_max": None} | ledger(numbers(n)) for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(ledger_table(tmp_path))
    shown = console.export_text()
    assert "correlation" in shown
    assert f"{lines[1]['ledger/ess_tokens']:.6g}" in shown
