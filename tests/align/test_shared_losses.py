"""Every kind of loss on rows and experts that ranks share: what one process gives, wherever cut.

Loss, every gradient and the final state of every document in every lightning layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from align.losses.dpo import chosen_nll, dpo_loss, sequence_logprobs
from align.losses.lm import lm_loss
from align.losses.policy import PolicyLossConfig, policy_loss
from align.losses.reward import reward_loss
from align.losses.types import Loss
from model import HybridForCausalLM, Packed
from model.lightning import LightningAttention
from model.parallel.apply import parallelize
from model.parallel.expert import average_expert_gradients, shared_experts
from model.parallel.mesh import ParallelConfig, open_mesh
from model.parallel.sequence import ShardLengths
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from tests.helpers import assert_close
from tests.model.parallel.world import world
from tests.model.setting import random_sequences, small_config

TYPES = ["linear_attention", "full_attention", "linear_attention"]
SHAPE = {"num_hidden_layers": 3, "layer_types": TYPES, "head_dim": 8, "router_aux_loss_coef": 0.3}


def policy_of(objective: str) -> Callable[[Any, Packed], Loss]:
    config = PolicyLossConfig(objective=objective, beta=0.04)

    def loss(model: HybridForCausalLM, packed: Packed) -> Loss:
        out = model(packed=packed, targets=packed.tokens.roll(-1), with_entropy=True)
        near = out.logprobs.detach()
        return policy_loss(
            out.logprobs,
            behaviour=near + 0.1 * wave(packed, 1),
            advantages=wave(packed, 2),
            weights=trained(packed),
            lengths=packed.lengths,
            config=config,
            reference=near - 0.2 * wave(packed, 3),
            entropy=out.entropy,
            aux=out.aux_loss,
        )

    return loss


def wave(packed: Packed, seed: int) -> Tensor:
    return torch.sin(packed.tokens * seed + packed.positions * 0.7)


def trained(packed: Packed) -> Tensor:
    """A weight of 0 for each document's last token and for some others."""
    weights = (packed.tokens % 3 > 0).float()
    return weights.index_fill(0, packed.cu_seqlens[1:].long() - 1, 0.0)


def lm(model: HybridForCausalLM, packed: Packed) -> Loss:
    out = model(packed=packed, targets=packed.tokens.roll(-1))
    return lm_loss(out.logprobs, torch.ones_like(out.logprobs), aux=out.aux_loss)


def sft(model: HybridForCausalLM, packed: Packed) -> Loss:
    out = model(packed=packed, targets=packed.tokens.roll(-1))
    return lm_loss(out.logprobs, trained(packed), aux=out.aux_loss)


def dpo(model: HybridForCausalLM, packed: Packed) -> Loss:
    out = model(packed=packed, targets=packed.tokens.roll(-1))
    weights = torch.ones_like(out.logprobs)
    sums = sequence_logprobs(out.logprobs, weights, packed.lengths)
    loss = dpo_loss(sums, sums.detach() - 1.0, beta=0.1, label_smoothing=0.1, aux=out.aux_loss)
    return Loss(loss.sum + chosen_nll(out.logprobs, weights, packed.lengths), loss.aux)


def reward(model: RewardModel, packed: Packed) -> Loss:
    out = model(packed)
    chosen, rejected = out.values[0::2], out.values[1::2]
    return reward_loss(
        chosen, rejected, mask=torch.ones_like(chosen), centring=0.1, aux=out.aux_loss
    )


LOSSES: dict[str, Callable[[Any, Packed], Loss]] = {
    "lm": lm,
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    **{name: policy_of(name) for name in ("grpo", "dapo", "cispo")},
}


class Case(NamedTuple):
    """How ranks share a model, and the documents of each row that they compute at once."""

    parallel: ParallelConfig
    rows: tuple[tuple[int, ...], ...]


class Found(NamedTuple):
    """Of one loss: by name of the parameter, and by row, layer and document."""

    loss: Tensor
    grads: dict[str, Tensor]
    states: dict[tuple[int, int, int], Tensor]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    lm = HybridForCausalLM(small_config(**SHAPE)).train()
    return RewardModel(lm.model, HIERARCHY).train() if kind == "reward" else lm


def keep_states(model: nn.Module) -> list[tuple[Sequence[int], Tensor]]:
    """Lengths and final states of each lightning layer, as it computes them."""
    kept: list[tuple[Sequence[int], Tensor]] = []

    def keeping(begin: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keys: Any) -> Any:
            end = begin(*args, **{**keys, "with_final": True})

            def ended() -> Any:
                out, final = end()
                kept.append((args[4], final.detach()))
                return out, final

            return ended

        return wrapped

    for module in model.modules():
        if isinstance(module, LightningAttention):
            module.begin = keeping(module.begin)
    return kept


def states_of(
    kept: Sequence[tuple[Sequence[int], Tensor]], row: int
) -> dict[tuple[int, int, int], Tensor]:
    """States of the documents that end here."""
    found = {}
    for layer, (lengths, finals) in enumerate(kept):
        whole = lengths.row if isinstance(lengths, ShardLengths) else tuple(lengths)
        place = lengths.start if isinstance(lengths, ShardLengths) else 0
        ends = torch.tensor(whole).cumsum(0).tolist()
        for local, final in zip(lengths, finals, strict=True):
            place += local
            if place in ends:
                found[row, layer, ends.index(place)] = final
    return found


def run(model: nn.Module, kind: str, row: Sequence[int], seed: int) -> Tensor:
    packed = Packed.from_sequences(random_sequences(row, seed=seed))
    loss = LOSSES[kind](model, packed)
    assert loss.aux is not None
    return loss.sum + loss.aux * packed.num_tokens


def on_ranks(cases: Sequence[Case]) -> list[Found]:
    results = []
    for parallel, rows in cases:
        mesh = open_mesh(parallel, device_type="cpu")
        own = parallel.place(mesh.world.rank)
        for kind in LOSSES:
            model = build(kind)
            parallelize(model, mesh, parallel)
            kept = keep_states(model)
            loss = run(model, kind, rows[own], own) / parallel.sequence
            loss.backward()
            average_expert_gradients(model, mesh)
            experts = {name for name, _ in shared_experts(model)}
            total, grads = loss.detach(), {}
            dist.all_reduce(total)
            for name, parameter in model.named_parameters():
                if name in experts:
                    grads[name] = parameter.grad.full_tensor() * mesh.world.size
                elif parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    grads[name] = parameter.grad
            results.append(Found(total, grads, states_of(kept, own)))
    return results


def alone(case: Case, kind: str) -> Found:
    model = build(kind)
    kept, states, total = keep_states(model), {}, torch.zeros(())
    for number, row in enumerate(case.rows):
        loss = run(model, kind, row, number)
        loss.backward()
        total += loss.detach()
        states |= states_of(kept, number)
        kept.clear()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Found(total, grads, states)


def assert_gradients_close(
    name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Each to 1e-5 of its own size; one that is 0 but for rounding, as of q where no document has
    two tokens, has to be no more than rounding here as well."""
    sizes = {key: float(grad.square().mean().sqrt()) for key, grad in expected.items()}
    rounding = 1e-7 * max(sizes.values())
    for key, grad in expected.items():
        if sizes[key] > rounding:
            assert_close(f"{name}: {key}", found[key], grad)
        else:
            assert found[key].square().mean().sqrt() <= 10 * rounding, f"{name}: {key}"


def check(cases: Sequence[Case], ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = world(ranks, on_ranks, cases, Path(folder))
    place = 0
    for case in cases:
        for kind in LOSSES:
            one, name = alone(case, kind), f"{kind} {case}"
            ended: dict[tuple[int, int, int], Tensor] = {}
            for rank in found:
                shared = rank[place]
                ended |= shared.states
                assert_close(f"{name}: loss", shared.loss, one.loss)
                assert shared.grads.keys() == one.grads.keys()
                assert_gradients_close(name, shared.grads, one.grads)
            assert ended.keys() == one.states.keys()
            for key, state in one.states.items():
                assert_close(f"{name}: state {key}", ended[key], state)
            place += 1


def rows_of(number: int, at_least: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    pairs = st.lists(st.integers(1, 30), min_size=2, max_size=8).filter(lambda x: not len(x) % 2)
    row = pairs.filter(lambda x: sum(x) >= at_least).map(tuple)
    return st.lists(row, min_size=number, max_size=number).map(tuple)


def cases_of(ranks: int, sizes: Sequence[tuple[int, int]]) -> st.SearchStrategy[tuple[Case, ...]]:
    """One case of each (sequence, expert)."""
    drawn = []
    for sequence, expert in sizes:
        parallel = ParallelConfig(sequence=sequence, expert=expert)
        rows = rows_of(ranks // sequence, sequence)
        drawn.append(rows.map(lambda rows, parallel=parallel: Case(parallel, rows)))
    return st.tuples(*drawn)


# a document over all parts, documents of one token at every border, rows unlike each other
LONG, ONES = (61, 1), (1, 1, 1, 1)


@pytest.mark.multi
@settings(max_examples=2, deadline=None, derandomize=True)
@given(cases=cases_of(2, [(2, 1), (1, 2), (2, 2)]))
@example(cases=(Case(ParallelConfig(sequence=2, expert=2), (LONG,)),))
@example(cases=(Case(ParallelConfig(sequence=2), (ONES,)),))
def test_two_ranks_give_every_loss_of_one(cases: tuple[Case, ...]):
    check(cases, 2)


@pytest.mark.multi
@settings(max_examples=1, deadline=None, derandomize=True)
@given(cases=cases_of(4, [(4, 1), (2, 1), (2, 2), (2, 4), (1, 4)]))
@example(cases=(Case(ParallelConfig(sequence=4, expert=2), (LONG,)),))
@example(cases=(Case(ParallelConfig(sequence=2, expert=4), (ONES, LONG)),))
@example(cases=(Case(ParallelConfig(sequence=4, expert=2), (ONES,)),))
def test_four_ranks_give_every_loss_of_one(cases: tuple[Case, ...]):
    check(cases, 4)
