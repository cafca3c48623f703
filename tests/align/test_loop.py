from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import ValidationError
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from align import checkpoint, loop, update
from align.course import Step
from align.data.batch import Batch
from align.data.loader import PackedData
from align.loop import TrainConfig, train
from align.lora import LoraConfig, apply_lora
from align.losses.lm import lm_loss
from align.losses.types import Loss
from align.optim import OptimConfig
from tests.align import small
from tests.helpers import assert_close, slow

SGD_LIKE = OptimConfig(lr=1e-3, schedule="constant", clip_norm=0)


class Course:
    """Next-token training, with hooks for trouble."""

    def __init__(self, data: PackedData, *, stop_before: int = -1, poison: str = "") -> None:
        self.data = data
        self.num_steps = data.num_steps
        self.stop_before = stop_before
        self.poison = poison
        self.steps_made = 0

    def step(self, index: int) -> Step:
        if index == self.stop_before:
            raise KeyboardInterrupt
        self.steps_made += 1
        return Step(self.data.batches(index), {"made": float(self.steps_made)})

    def count(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(packed=batch.packed, targets=batch.targets)
        loss = lm_loss(out.logprobs, batch.weights, aux=out.aux_loss)
        if self.poison in batch.places:
            return replace(loss, sum=loss.sum * math.nan)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"steps_made": self.steps_made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_made = state["steps_made"]


def data(count: int = 12, **changes: Any) -> PackedData:
    given: dict[str, Any] = {"sequence_tokens": 24, "batch_items": 4, "seed": 1}
    return PackedData(small.examples(count), **(given | changes))


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def gradients(model: nn.Module, micro_sequences: int, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Gradients of the first step, read where the optimizer would use them."""
    seen: dict[str, torch.Tensor] = {}
    course = Course(data(batch_items=12, micro_sequences=micro_sequences))

    def keep(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        train(course, model, config=TrainConfig(optim=SGD_LIKE), job=small.job(tmp_path))
    finally:
        handle.remove()
    return seen


def test_gradients_do_not_depend_on_the_split_into_microbatches(tmp_path: Path) -> None:
    whole = gradients(small.model(), 100, tmp_path / "whole")
    split = gradients(small.model(), 1, tmp_path / "split")
    assert whole.keys() == split.keys()
    assert len(whole) > 10
    for name, gradient in whole.items():
        assert_close(name, split[name], gradient, 1e-5)
    first, second = lines(tmp_path / "whole")[0], lines(tmp_path / "split")[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert first["tokens"] == second["tokens"]


def test_loss_falls_and_metrics_count_tokens_on_one_axis(tmp_path: Path) -> None:
    config = TrainConfig(optim=OptimConfig(lr=1e-2, schedule="constant"))
    course = Course(data(epochs=6))
    last = train(course, small.model(), config=config, job=small.job(tmp_path))
    written = lines(tmp_path)
    assert [line["step"] for line in written] == list(range(1, 19))
    assert written[-1]["tokens"] == 6 * course.data.num_tokens
    assert written[-1]["loss"] < 0.8 * written[0]["loss"]
    assert written[-1]["nll"] == pytest.approx(written[-1]["loss"], rel=1e-6)
    assert last == written[-1]


def test_aux_loss_is_weighted_by_tokens(tmp_path: Path) -> None:
    course = Course(data(batch_items=12, micro_sequences=1))
    model = small.model(router_aux_loss_coef=0.5)
    expected = 0.0
    batches = course.data.batches(0)
    total = sum(batch.packed.num_tokens for batch in batches)
    for batch in batches:
        aux = model(packed=batch.packed, targets=batch.targets).aux_loss
        expected += float(aux.detach()) * batch.packed.num_tokens / total
    last = train(course, model, config=TrainConfig(), job=small.job(tmp_path))
    assert last["aux_loss"] == pytest.approx(expected, rel=1e-5)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("adapters", "log_every"), [(True, 1), (False, 3), *slow((False, 1), (True, 3))]
)
def test_resumed_run_is_bit_identical(tmp_path: Path, adapters: bool, log_every: int) -> None:
    config = TrainConfig(
        optim=OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=2),
        save_every_steps=2,
        log_every_steps=log_every,
    )
    # Dropout draws from torch's generator in each forward, so its state must continue too.
    lora = LoraConfig(rank=2, targets="attention", dropout=0.2)

    def run(name: str, stop_before: int = -1) -> dict[str, torch.Tensor]:
        model = small.model()
        trained = apply_lora(model, lora, seed=1) if adapters else model
        course = Course(data(epochs=3), stop_before=stop_before)
        train(course, trained, config=config, job=small.job(tmp_path / name))
        return weights(trained)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_before=5)
    resumed = run("cut")
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    timed = {"seconds", "tokens_per_s"}
    for first, second in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in first.items() if k not in timed} == {
            k: v for k, v in second.items() if k not in timed
        }


def test_finished_run_trains_no_more(tmp_path: Path) -> None:
    config = TrainConfig(save_every_steps=2)
    first = train(Course(data()), small.model(), config=config, job=small.job(tmp_path))
    again = Course(data())
    second = train(again, small.model(seed=9), config=config, job=small.job(tmp_path))
    assert second == first
    assert again.steps_made == first["made"] == 3


def test_loss_that_is_not_finite_names_step_and_rows(tmp_path: Path) -> None:
    course = Course(data(batch_items=4, micro_sequences=1, shuffle=False), poison="rows.jsonl:7")
    model = small.model()
    config = TrainConfig(save_every_steps=1)
    with pytest.raises(RuntimeError, match=r"stage: step 2: loss = nan.*rows\.jsonl:7") as caught:
        train(course, model, config=config, job=small.job(tmp_path))
    assert "rows.jsonl:1," not in str(caught.value)
    assert "rows.jsonl:12" not in str(caught.value)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000001"


def test_gradient_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    model = small.model()
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"stage: step 1: gradient norm = (nan|inf).*rows:"):
        train(Course(data()), model, config=TrainConfig(), job=small.job(tmp_path))
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), name


def test_step_without_batches_changes_no_weight(tmp_path: Path) -> None:
    class Empty(Course):
        def step(self, index: int) -> Step:
            return Step(())

    model = small.model()
    before = weights(model)
    last = train(Empty(data()), model, config=TrainConfig(), job=small.job(tmp_path))
    assert last["is_empty"] == 1.0
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), name


def test_count_of_zero_is_refused(tmp_path: Path) -> None:
    class Countless(Course):
        def count(self, batch: Batch) -> float:
            return 0.0

    with pytest.raises(RuntimeError, match="step 1: count of trained items = 0, expected above 0"):
        train(Countless(data()), small.model(), config=TrainConfig(), job=small.job(tmp_path))


@pytest.mark.parametrize("adapters", [False, True])
def test_checkpointing_changes_no_bit(tmp_path: Path, adapters: bool) -> None:
    results = []
    for checkpointing in ("none", "selective", "full"):
        model: nn.Module = small.model()
        if adapters:
            # dropout must draw the same again
            lora = LoraConfig(rank=2, targets="attention", dropout=0.2)
            model = apply_lora(model, lora, seed=1)
        config = TrainConfig(checkpointing=checkpointing, optim=OptimConfig(lr=1e-2))
        train(Course(data()), model, config=config, job=small.job(tmp_path / checkpointing))
        results.append(weights(model))
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name
        assert torch.equal(weight, results[2][name]), name


def test_checkpointing_needs_our_trunk(tmp_path: Path) -> None:
    config = TrainConfig(checkpointing="selective")
    with pytest.raises(ValueError, match="checkpointing = selective, but Linear holds no Hybrid"):
        train(Course(data()), nn.Linear(2, 2), config=config, job=small.job(tmp_path))


def test_bf16_keeps_fp32_weights_and_learns(tmp_path: Path) -> None:
    config = TrainConfig(precision="bf16", optim=OptimConfig(lr=1e-2, schedule="constant"))
    model = small.model()
    train(Course(data(epochs=4)), model, config=config, job=small.job(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    written = lines(tmp_path)
    # nobody knows what a CPU could do
    assert "mfu" not in written[-1]
    assert written[-1]["loss"] < written[0]["loss"]


@pytest.mark.parametrize("kept", ["bf16_master", "bf16_stochastic"])
def test_bf16_weights_learn_and_resume_bit_for_bit(tmp_path: Path, kept: str) -> None:
    config = TrainConfig(
        precision="bf16",
        optim=OptimConfig(lr=1e-2, schedule="constant", weights=kept),
        save_every_steps=2,
    )

    def run(name: str, stop_before: int = -1) -> dict[str, torch.Tensor]:
        model = small.model().bfloat16()
        course = Course(data(epochs=3), stop_before=stop_before)
        train(course, model, config=config, job=small.job(tmp_path / name))
        return weights(model)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_before=5)
    for name, weight in run("cut").items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, whole[name]), name
    written = lines(tmp_path / "whole")
    assert written[-1]["loss"] < written[0]["loss"]


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    bf16 = TrainConfig(precision="bf16", optim=OptimConfig(weights="bf16_master"))
    for model, config, message in (
        (small.model(), bf16, "bf16_master, but no trained weight is torch.bfloat16"),
        (small.model().bfloat16(), TrainConfig(), "fp32, but no trained weight is torch.float32"),
    ):
        with pytest.raises(ValueError, match=rf"optim\.weights = {message}; open the model in it"):
            train(Course(data()), model, config=config, job=small.job(tmp_path))


def test_bf16_weights_need_bf16_precision_and_no_adapters() -> None:
    optim = OptimConfig(weights="bf16_stochastic")
    message = r"optim\.weights = bf16_stochastic needs precision: bf16 and no lora"
    for changes in ({}, {"precision": "bf16", "lora": LoraConfig(rank=2)}):
        with pytest.raises(ValidationError, match=message):
            TrainConfig(optim=optim, **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", ["fp32", "bf16_master", "bf16_stochastic"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_an_update_waits_for_the_device_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, checkpointing: str
) -> None:
    """From the second step on nothing but reading the loss, and writing a line, may wait."""
    read = 0

    def may_wait(work: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal read
            read += 1
            torch.cuda.set_sync_debug_mode("default")
            found = work(*args)
            torch.cuda.set_sync_debug_mode("error")
            return found

        return wrapped

    class Watched(Course):
        def step(self, index: int) -> Step:
            if index == 1:
                monkeypatch.setattr(update.Updater, "_read", may_wait(update.Updater._read))
                monkeypatch.setattr(loop, "_write_line", may_wait(loop._write_line))
                torch.cuda.set_sync_debug_mode("error")
            return super().step(index)

    model = small.model(head_dim=32, router_aux_loss_coef=0.01).cuda()
    if kept != "fp32":
        model.bfloat16()
    config = TrainConfig(
        precision="bf16",
        checkpointing=checkpointing,
        log_every_steps=3,
        optim=OptimConfig(lr=1e-3, weights=kept),
    )
    job = small.job(tmp_path, accelerator=Accelerator())
    try:
        train(Watched(data(batch_items=4, micro_sequences=1)), model, config=config, job=job)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert read == 3


def test_another_backend_is_refused_by_the_native_loop(tmp_path: Path) -> None:
    config = TrainConfig(backend="trl")
    with pytest.raises(ValueError, match=r"backend = 'trl' reached the native loop"):
        train(Course(data()), small.model(), config=config, job=small.job(tmp_path))


def test_accumulating_accelerator_is_refused(tmp_path: Path) -> None:
    job = small.job(tmp_path)
    # accelerate keeps this number in a state shared by all accelerators of the process.
    job.accelerator.gradient_accumulation_steps = 4
    try:
        with pytest.raises(ValueError, match=r"gradient_accumulation_steps = 4, expected 1"):
            train(Course(data()), small.model(), config=TrainConfig(), job=job)
    finally:
        job.accelerator.gradient_accumulation_steps = 1


@dataclass(frozen=True)
class Launched:
    """As much of an accelerator as the check of the launch looks at."""

    distributed_type: DistributedType
    is_fsdp2: bool = False
    gradient_accumulation_steps: int = 1
    num_processes: int = 2


def test_unsupported_launches_are_refused(tmp_path: Path) -> None:
    fsdp = DistributedType.FSDP
    for launched, message in (
        (Launched(DistributedType.DEEPSPEED), "DeepSpeed is not supported"),
        (Launched(fsdp), "FSDP 1 is not supported; set fsdp_version: 2"),
    ):
        job = small.job(tmp_path, accelerator=launched)
        with pytest.raises(ValueError, match=message):
            train(Course(data()), small.model(), config=TrainConfig(), job=job)
