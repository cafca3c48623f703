"""A step of online RL is exact: first ratio 1, and the gradient is advantage times score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from align.ledger import ledger_line
from align.loop import train
from align.lora import LoraConfig, apply_lora
from align.losses.policy import PolicyLossConfig
from tests.align import small
from tests.align.trainers.grpo_setting import config, course, lines


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one_to_the_last_bit(tmp_path: Path, objective: str, temperature: float):
    settings = config(loss=PolicyLossConfig(objective=objective), temperature=temperature)
    model = small.model()
    made = course(settings, small.job(tmp_path), model)
    batches = made.step(0).batches
    assert batches
    for batch in batches:
        metrics = made.loss(model, batch).metrics
        assert metrics["ratio/mean"][0] == metrics["ratio/mean"][1]
        assert made.loss(model, batch).maxima["ratio/max"] == 1
        gap, count = metrics["engine/gap"]
        assert 0 < gap / count < 1e-5
        assert made.loss(model, batch).maxima["engine/gap_max"] < 1e-4


def test_behaviour_of_the_engine_makes_a_ratio_of_one_up_to_rounding(tmp_path: Path):
    model = small.model()
    made = course(config(behaviour="engine"), small.job(tmp_path), model)
    batches = made.step(0).batches
    assert batches
    for batch in batches:
        exact = model(packed=batch.packed, targets=batch.targets).logprobs.detach()
        gaps = (exact - batch.behaviour_logprobs) * batch.weights
        assert 0 < gaps.abs().max() < 1e-4
        found = made.loss(model, batch).maxima["ratio/max"]
        torch.testing.assert_close(found, gaps.exp().max())


def test_the_gradient_is_advantage_times_score(tmp_path: Path):
    model = small.model()
    made = course(config(scale="none"), small.job(tmp_path), model)
    batches = made.step(0).batches
    sum(made.loss(model, batch).sum for batch in batches).backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    for batch in batches:
        logprobs = model(packed=batch.packed, targets=batch.targets).logprobs
        (-(logprobs * batch.advantages * batch.weights).sum()).backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad)
    assert found.abs().max() > 0


def test_later_steps_of_a_rollout_compare_with_the_policy_that_made_it(tmp_path: Path):
    model = small.model()
    made = course(config(updates_per_rollout=2), small.job(tmp_path), model)
    made.step(0)
    scored = small.model()
    second = made.step(1).batches
    # nothing was updated in between, so the fixed numbers are those of the forward, bit for bit; of
    # one with entropies, as the trainer's: without them a softmax in C may serve
    for batch in second:
        assert made.loss(model, batch).maxima["ratio/max"] == 1
        out = scored(packed=batch.packed, targets=batch.targets, with_entropy=True)
        exact = out.logprobs
        assert torch.equal(batch.behaviour_logprobs, exact * batch.weights)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert any(made.loss(model, batch).maxima["ratio/max"] > 1.001 for batch in second)


def test_a_rollout_is_sampled_once_and_carries_its_version(tmp_path: Path, monkeypatch: Any):
    made = course(config(updates_per_rollout=2, max_steps=3), small.job(tmp_path), small.model())
    versions = []
    generate = made.source.engine.generate

    def counted(requests: Any) -> Any:
        done = generate(requests)
        # the canary of the first step is no rollout
        if not requests[0].request_id.startswith("canary-"):
            versions.append({c.policy_version for c in done})
        return done

    monkeypatch.setattr(made.source.engine, "generate", counted)
    sizes = [sum(len(b.places) for b in made.step(index).batches) for index in range(3)]
    assert versions == [{0}, {2}]
    # a response without a score is not trained on
    assert all(0 < size <= 8 for size in sizes)
    assert made.waiting == []


def test_responses_without_a_score_leave_the_loss_and_are_counted(tmp_path: Path):
    made = course(config(prompts_per_step=5), small.job(tmp_path), small.model())
    step = made.step(0)
    assert step.metrics["rollout/invalid"] > 0, "the test needs a response of 5 letters"
    trained = sum(len(batch.places) for batch in step.batches)
    assert trained == step.metrics["rollout/responses"] - step.metrics["rollout/invalid"]


def test_flat_groups_may_be_left_out_of_training(tmp_path: Path):
    given = {"prompts_per_step": 5, "sequence_tokens": 512, "max_new_tokens": 2}
    kept = course(config(**given), small.job(tmp_path), small.model()).step(0)
    left = course(config(**given, flat_groups="leave_out"), small.job(tmp_path), small.model())
    step = left.step(0)
    assert 0 < step.metrics["rollout/flat_groups"] < 1
    assert step.metrics == kept.metrics
    found, every = (sum(len(b.places) for b in s.batches) for s in (step, kept))
    assert 0 < found < every
    groups = {place.split("#")[0] for batch in step.batches for place in batch.places}
    assert len(groups) == round((1 - step.metrics["rollout/flat_groups"]) * 5)
    assert all((batch.advantages != 0).any() for batch in step.batches)


def test_epochs_see_every_prompt_once_in_an_order_of_the_seed(tmp_path: Path):
    made = course(config(max_steps=0, epochs=2), small.job(tmp_path), small.model())
    assert made.num_steps == 5
    seen = [(p.row.origin.place, seed) for i in range(5) for p, seed in made.turns.of(i)]
    places = [place for place, _ in seen]
    assert sorted(places[:5]) == sorted(places[5:]) == sorted({*places})
    assert places[:5] != places[5:]
    assert len({seed for _, seed in seen}) == 10
    kept = course(config(max_steps=0, shuffle=False), small.job(tmp_path), small.model())
    order = [p.row.origin.place for i in range(3) for p, _ in kept.turns.of(i)]
    assert order == [f"p.jsonl:{i}" for i in range(1, 6)]


def test_recorded_experts_agree_and_replaying_them_changes_no_bit(tmp_path: Path):
    def told(experts: str) -> dict[str, float]:
        settings = config(experts=experts, max_steps=2, updates_per_rollout=2, behaviour="engine")
        model, job = small.model(), small.job(tmp_path / experts)
        train(course(settings, job, model), model, config=settings, job=job)
        return lines(job.folder)[0]

    plain, recorded, replayed = told("router"), told("record"), told("replay")
    assert "ledger/router" not in plain
    # engine and trainer are one model in fp32: they route alike, so their numbers stay the same
    assert recorded["ledger/router"] == replayed["ledger/router"] == 1
    for name in ("loss", "grad_norm", "ledger/log_ratio"):
        assert plain[name] == recorded[name] == replayed[name], name


def test_replayed_experts_are_the_recorded_ones_whatever_the_router_chose(tmp_path: Path):
    model = small.model()
    made = course(config(experts="replay", behaviour="engine"), small.job(tmp_path), model)
    batch = made.step(0).batches[0]
    other = replace(batch, experts=(batch.experts + 1) % 4 * (batch.experts >= 0))
    one, two = (made.loss(model, given) for given in (batch, other))
    assert abs(one.sum - two.sum) > 1e-4
    line = ledger_line(two.ledger.tolist())
    assert line["ledger/router"] < 1
    assert line["ledger/gap_p50"] > 1e-3


def test_a_step_inside_a_rollout_that_is_not_there_is_refused(tmp_path: Path):
    made = course(config(updates_per_rollout=2), small.job(tmp_path), small.model())
    with pytest.raises(RuntimeError, match="step 2 lies inside a rollout that is not there"):
        made.step(1)


def test_the_reference_holds_the_policy_back(tmp_path: Path):
    settings = config(loss=PolicyLossConfig(beta=0.1))
    model, reference = small.model(), small.model()
    made = course(settings, small.job(tmp_path), model, reference=reference)
    batch = made.step(0).batches[0]
    assert made.loss(model, batch).metrics["kl"][0] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.2)
    assert made.loss(model, batch).metrics["kl"][0] > 0


def test_adapters_are_sampled_from_and_switched_off_for_the_reference(tmp_path: Path):
    settings = config(loss=PolicyLossConfig(beta=0.1), lora=LoraConfig(rank=2))
    policy = apply_lora(small.model(), settings.lora, seed=0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    made = course(settings, small.job(tmp_path), policy, reference=policy)
    batch = made.step(0).batches[0]
    loss = made.loss(policy, batch)
    gap, count = loss.metrics["engine/gap"]
    assert gap / count < 1e-5, "the engine must sample with the adapters on"
    assert loss.metrics["kl"][0] > 0


def test_groups_split_over_packed_sequences_and_microbatches_alike(tmp_path: Path):
    def gradient(**changes: Any) -> tuple[torch.Tensor, int]:
        model = small.model()
        made = course(config(**changes), small.job(tmp_path), model)
        batches = made.step(0).batches
        count = sum(made.count(batch) for batch in batches)
        (sum(made.loss(model, batch).sum for batch in batches) / count).backward()
        return model.lm_head.weight.grad, len(batches)

    one, few = gradient(sequence_tokens=512)
    other, many = gradient(sequence_tokens=32, micro_sequences=1)
    assert few == 1 < many
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch_sequences": 4}, "batch_sequences is not used by grpo.*set prompts_per_step"),
        ({"batch_items": 4}, "batch_items is not used by grpo"),
        ({"max_new_tokens": 64}, "max_new_tokens = 64, expected less than sequence_tokens = 64"),
        ({"temperature": 0.0}, "temperature"),
        ({"group_size": 1}, "group_size"),
        ({"data": ()}, "data"),
    ],
)
def test_a_config_that_cannot_work_is_refused(bad: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(**bad)
