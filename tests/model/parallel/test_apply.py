"""A model shared by ranks gives the loss and every gradient of the model on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model import HybridForCausalLM, Packed
from model.checkpointing import Checkpointing
from model.parallel.apply import parallelize
from model.parallel.expert import average_expert_gradients, shared_experts
from model.parallel.mesh import ParallelConfig, open_mesh
from tests.helpers import assert_close
from tests.model.parallel.world import world
from tests.model.setting import VOCABULARY, random_sequences, small_config

TYPES = ["linear_attention", "full_attention", "linear_attention", "sliding_attention"]
ROWS = ([9, 1, 22], [40], [1, 1, 1, 2], [13, 12, 7, 1, 1, 30])


NOTHING: dict[str, Any] = {}


class Case(NamedTuple):
    """A model and how it is shared."""

    parallel: ParallelConfig
    changes: dict[str, Any] = NOTHING
    checkpointing: Checkpointing = "none"


TIGHT = {"expert_capacity_factor": 0.7}
SHARED_KEYS = {"num_key_value_heads": 1}
ODD_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
TWO = (
    Case(ParallelConfig(sequence=2), SHARED_KEYS | TIGHT, "full"),
    Case(ParallelConfig(expert=2, router="global"), TIGHT),
    Case(ParallelConfig(sequence=2, expert=2), ODD_HEADS),
    Case(ParallelConfig(sequence=2), TIGHT | {"router_aux_scaling": "paper"}),
    Case(ParallelConfig(sequence=2), ODD_HEADS, "selective"),
    Case(ParallelConfig(expert=2), TIGHT, "selective"),
)
FOUR = (
    Case(ParallelConfig(sequence=4), TIGHT),
    Case(ParallelConfig(sequence=4), ODD_HEADS),
    Case(ParallelConfig(sequence=2, expert=2), NOTHING, "full"),
    Case(ParallelConfig(sequence=2, expert=4), TIGHT),
    Case(ParallelConfig(expert=2), TIGHT),
    Case(ParallelConfig(sequence=2, expert=2, router="global"), TIGHT),
    Case(ParallelConfig(expert=2, expert_tensor=2), TIGHT),
    Case(ParallelConfig(sequence=2, expert=2, expert_tensor=2), NOTHING, "full"),
)


def build(case: Case) -> HybridForCausalLM:
    shape = {"num_hidden_layers": 4, "layer_types": TYPES, "sliding_window": 6, "head_dim": 8}
    routing = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1}
    torch.manual_seed(0)
    model = HybridForCausalLM(small_config(**{**shape, **routing, **case.changes})).train()
    model.model.checkpointing = case.checkpointing
    return model


def loss(model: HybridForCausalLM, row: list[list[int]]) -> Tensor:
    """Adds up over documents, and is not linear in their log-probabilities."""
    packed = Packed.from_sequences(row)
    out = model(packed=packed, targets=next_tokens(row), with_entropy=True)
    assert out.entropy.shape == out.logprobs.shape == packed.tokens.shape
    weighed = out.logprobs * torch.linspace(0.5, 1.5, VOCABULARY)[packed.tokens]
    sums = torch.stack([document.sum() for document in weighed.split(packed.lengths)])
    return (sums / 10).square().sum() + out.aux_loss * packed.num_tokens


def next_tokens(row: list[list[int]]) -> Tensor:
    return torch.tensor([token for document in row for token in (*document[1:], 0)])


def rows_of(step: int, number: int) -> list[list[list[int]]]:
    """So many rows of tokens, which are computed at once."""
    chosen = [ROWS[(step + n) % len(ROWS)] for n in range(number)]
    return [random_sequences(row, seed=n) for n, row in enumerate(chosen)]


def on_ranks(cases: tuple[Case, ...]) -> list[Any]:
    results = []
    for case in cases:
        model, parallel = build(case), case.parallel
        mesh = open_mesh(parallel, device_type="cpu")
        parallelize(model, mesh, parallel)
        for step in range(len(ROWS)):
            model.zero_grad(set_to_none=True)
            rows = rows_of(step, parallel.rows_at_once(mesh.world.size))
            found = loss(model, rows[parallel.place(mesh.world.rank)]) / parallel.sequence
            found.backward()
            average_expert_gradients(model, mesh)
            shared = {name for name, _ in shared_experts(model)}
            total = found.detach()
            dist.all_reduce(total)
            grads = {}
            for name, parameter in model.named_parameters():
                grad = parameter.grad
                if name in shared:
                    grads[name] = grad.full_tensor() * mesh.world.size
                else:
                    dist.all_reduce(grad)
                    grads[name] = grad
            results.append((total, grads))
    return results


def check(cases: tuple[Case, ...], ranks: int, folder: Path) -> None:
    found = world(ranks, on_ranks, cases, folder)
    for rank in found:
        results = iter(rank)
        for case in cases:
            model = build(case)
            for step in range(len(ROWS)):
                model.zero_grad(set_to_none=True)
                rows = rows_of(step, case.parallel.rows_at_once(ranks))
                if case.parallel.router == "global":
                    rows = [[document for row in rows for document in row]]
                one = sum(loss(model, row) for row in rows)
                one.backward()
                shared, grads = next(results)
                name = f"{case.parallel} {case.changes} {step}"
                assert_close(f"{name}: loss", shared, one.detach())
                for key, parameter in model.named_parameters():
                    assert_close(f"{name}: {key}", grads[key], parameter.grad)


@pytest.mark.multi
@pytest.mark.parametrize(("cases", "ranks"), [(TWO, 2), (FOUR, 4)])
def test_ranks_are_one_process(cases: tuple[Case, ...], ranks: int, tmp_path: Path):
    check(cases, ranks, tmp_path)
