from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from align.course import Job
from align.data.batch import Batch
from align.data.loader import PackedData
from align.data.sources import DataConfig
from align.loop import train
from align.lora import LoraConfig, apply_lora
from align.losses.dpo import chosen_nll
from align.optim import OptimConfig
from align.policy import load_policy, save_policy
from align.trainers import dpo, sft
from align.trainers.dpo import DpoConfig, DpoCourse
from align.trainers.sft import SftConfig
from tests.align import small
from tests.align.test_lora import shake
from tests.align.trainers.test_lm import FAST, chats
from tests.helpers import assert_close

LN_2 = math.log(2)


def preferences(folder: Path) -> DataConfig:
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": f"the cat {i}"}],
                "chosen": [{"role": "assistant", "content": "sat on the mat"}],
                "rejected": [{"role": "assistant", "content": "hat"}],
            }
        )
        for i in range(8)
    ]
    small.write_lines(folder / "pairs.jsonl", lines)
    return DataConfig(path="pairs.jsonl", split="all")


def config(folder: Path, **changes: Any) -> DpoConfig:
    given: dict[str, Any] = {
        "data": (preferences(folder),),
        "sequence_tokens": 128,
        "batch_items": 4,
        "optim": FAST,
    }
    return DpoConfig(**(given | changes))


def lines(job: Job) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2), LoraConfig(rank=2, router=True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_of_step_0_is_ln_2_to_the_last_bit(
    tmp_path: Path, lora: LoraConfig | None, precision: str
) -> None:
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    dpo.run(config(tmp_path, lora=lora, precision=precision, max_steps=1), job)
    first = lines(job)[0]
    # A mean of exact ln 2 over 4 pairs, which halving and doubling keeps.
    assert first["loss"] == LN_2
    assert first["rewards/margins"] == 0.0
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_margin_grows(tmp_path: Path, lora: LoraConfig | None) -> None:
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    outcome = dpo.run(config(tmp_path, lora=lora, epochs=6), job)
    last = lines(job)[-1]
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 0.2
    assert last["loss"] < 0.6
    assert outcome.metrics["loss"] == last["loss"]


def test_reference_after_an_adapter_sft_is_the_sft_policy(tmp_path: Path) -> None:
    raw = small.start(tmp_path / "raw")
    first = small.job(tmp_path / "sft", raw, base=tmp_path)
    sft_config = SftConfig(
        data=(chats(tmp_path),),
        sequence_tokens=64,
        batch_items=6,
        epochs=4,
        optim=FAST,
        lora=LoraConfig(rank=4),
    )
    sft.run(sft_config, first)
    for lora in (None, LoraConfig(rank=4)):
        second = small.job(tmp_path / f"dpo-{lora is None}", first.artifact, base=tmp_path)
        dpo.run(config(tmp_path, lora=lora, max_steps=1), second)
        # Were the reference the raw base, the SFT policy would already be ahead of it.
        assert lines(second)[0]["loss"] == LN_2

    policy, _ = load_policy(first.artifact)
    base, _ = load_policy(raw)
    rows = PackedData(small.pairs(4), sequence_tokens=128)
    course = DpoCourse(rows, first.accelerator, reference=base, config=config(tmp_path))
    against_raw = float(course.loss(policy, rows.batches(0)[0]).sum.detach()) / 4
    assert abs(against_raw - math.log(2)) > 1e-3


def test_frozen_reference_gets_no_gradient_and_stays(tmp_path: Path) -> None:
    model = small.model()
    reference = small.model().requires_grad_(False)
    before = {n: p.clone() for n, p in reference.named_parameters()}
    job = small.job(tmp_path)
    rows = PackedData(small.pairs(6), sequence_tokens=64, batch_items=3, epochs=3)
    course = DpoCourse(rows, job.accelerator, reference=reference, config=config(tmp_path))
    train(course, model, config=config(tmp_path), job=job)
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_switching_adapters_off_leaves_their_gradients(tmp_path: Path) -> None:
    batch = Batch.from_pairs(small.pairs(3))
    job = small.job(tmp_path)
    rows = PackedData(small.pairs(3), sequence_tokens=128)
    adapted = apply_lora(small.model(), LoraConfig(rank=2), seed=0)
    shake(adapted)
    gradients = []
    for reference in (adapted, small.model().requires_grad_(False)):
        course = DpoCourse(rows, job.accelerator, reference=reference, config=config(tmp_path))
        adapted.zero_grad()
        course.loss(adapted, batch).sum.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
        )
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_gradients_do_not_depend_on_the_split(tmp_path: Path, sft_weight: float) -> None:
    def gradients(micro_sequences: int) -> dict[str, torch.Tensor]:
        model, reference = small.model(), small.model(seed=3).requires_grad_(False)
        seen: dict[str, torch.Tensor] = {}

        def keep(*_: object) -> None:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

        job = small.job(tmp_path / str(micro_sequences))
        rows = PackedData(
            small.pairs(7), sequence_tokens=50, batch_items=7, micro_sequences=micro_sequences
        )
        given = config(tmp_path, sft_weight=sft_weight, optim=OptimConfig(clip_norm=0))
        course = DpoCourse(rows, job.accelerator, reference=reference, config=given)
        handle = register_optimizer_step_pre_hook(keep)
        try:
            train(course, model, config=given, job=job)
        finally:
            handle.remove()
        return seen

    whole, split = gradients(100), gradients(1)
    for name, gradient in whole.items():
        assert_close(name, split[name], gradient, 1e-5)


def test_sft_weight_adds_the_chosen_answers_nll(tmp_path: Path) -> None:
    rows = PackedData(small.pairs(3), sequence_tokens=128)
    batch = rows.batches(0)[0]
    model, job = small.model(), small.job(tmp_path)
    plain, with_sft = (
        DpoCourse(
            rows, job.accelerator, reference=model, config=config(tmp_path, sft_weight=weight)
        ).loss(model, batch)
        for weight in (0.0, 0.25)
    )
    out = model(packed=batch.packed, targets=batch.targets)
    nll = chosen_nll(out.logprobs, batch.weights, batch.packed.lengths)
    assert_close("sum", with_sft.sum.detach(), (plain.sum + 0.25 * nll).detach(), 1e-6)
    assert float(with_sft.metrics["nll/chosen"][1]) == 3.0


def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    start = small.start(tmp_path / "start")

    def run(name: str, stop_at: int = -1) -> dict[str, torch.Tensor]:
        model, tokenizer = load_policy(start)
        adapted = apply_lora(model, LoraConfig(rank=2), seed=0)
        job = small.job(tmp_path / name, start)
        rows = PackedData(small.pairs(8), sequence_tokens=64, batch_items=2, epochs=2)

        class Stopping(DpoCourse):
            def step(self, index: int):
                if index == stop_at:
                    raise KeyboardInterrupt
                return super().step(index)

        given = config(tmp_path, save_every_steps=2, lora=LoraConfig(rank=2))
        course = Stopping(rows, job.accelerator, reference=adapted, config=given)
        train(course, adapted, config=given, job=job)
        save_policy(adapted, tokenizer, job.artifact, base=start)
        return {n: p.detach() for n, p in load_policy(job.artifact)[0].named_parameters()}

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=5)
    resumed = run("cut")
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
