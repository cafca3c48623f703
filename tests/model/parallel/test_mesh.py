"""Sizes that do not divide are refused with those that do; ranks find their neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pydantic import ValidationError

from model.parallel.mesh import ParallelConfig, open_mesh
from tests.model.parallel.world import world


@pytest.mark.parametrize(
    ("sizes", "processes", "experts", "told"),
    [
        ({"sequence": 3}, 8, 0, r"parallel.sequence = 3, .* the 8 processes: 1, 2, 4, 8$"),
        ({"expert": 5}, 6, 0, r"parallel.expert = 5, .* the 6 processes: 1, 2, 3, 6$"),
        (
            {"expert": 4},
            8,
            6,
            r"expert = 4, .* the 8 processes and of the model's 6 experts: 1, 2$",
        ),
        ({"expert": 4}, 0, 6, r"parallel.expert = 4, .* the model's 6 experts: 1, 2, 3, 6$"),
        ({"sequence": 2}, 1, 0, r"parallel.sequence = 2, .* the 1 processes: 1$"),
    ],
)
def test_sizes_that_do_not_divide(sizes: dict[str, int], processes: int, experts: int, told: str):
    with pytest.raises(ValueError, match=told):
        ParallelConfig(**sizes).check(processes, num_experts=experts)


def test_sizes_that_divide_and_sizes_not_known_yet():
    ParallelConfig(sequence=2, expert=4).check(8, num_experts=32)
    ParallelConfig(sequence=3, expert=4).check(0)
    ParallelConfig(expert=2, expert_tensor=2).check(8, num_experts=2, expert_width=6)
    with pytest.raises(ValidationError):
        ParallelConfig(sequence=0)


def test_the_width_of_experts_is_shared_beside_the_experts():
    with pytest.raises(ValidationError, match=r"expert_tensor = 2 with parallel.expert = 1"):
        ParallelConfig(expert_tensor=2)
    told = r"expert_tensor = 3, .* the 4 processes that parallel.expert leaves .* width 8: 1, 2, 4$"
    with pytest.raises(ValueError, match=told):
        ParallelConfig(expert=2, expert_tensor=3).check(8, num_experts=2, expert_width=8)


def neighbours(config: ParallelConfig) -> Any:
    mesh = open_mesh(config, device_type="cpu")
    axes = (mesh.sequence, mesh.expert, mesh.replica)
    return [
        dist.get_process_group_ranks(axis.group) if axis.group else [dist.get_rank()]
        for axis in axes
    ]


@pytest.mark.multi
def test_ranks_of_each_axis(tmp_path: Path):
    found = world(4, neighbours, ParallelConfig(sequence=2, expert=4), tmp_path)
    every = [0, 1, 2, 3]
    assert [rank[0] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank[1] for rank in found] == [every] * 4
    assert [rank[2] for rank in found] == [[0], [1], [2], [3]]
