"""`backend: trl` takes the native backend's steps: same rows, same weights after every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.base_trainer
from safetensors.torch import load_file
from torch import Tensor

from align.course import Job, Outcome
from align.data.batch import Batch, Example, Pair
from align.data.loader import PackedData
from align.data.sources import DataConfig
from align.lora import LoraConfig
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.policy import load_policy
from align.trainers import dpo, grpo, sft
from align.trainers.dpo import DpoConfig
from align.trainers.grpo import GrpoConfig
from align.trainers.sft import SftConfig
from align.trl_backend import run_dpo, run_grpo, run_sft
from align.trl_trainers import StepList, dpo_inputs, sft_inputs
from tests.align import small
from tests.align.processes import launch
from tests.align.trainers.test_dpo import preferences
from tests.align.trainers.test_lm import chats
from tests.helpers import slow

GENTLE = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1, weight_decay=0.1)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **others: object) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return small.start(tmp_path / "start")


def sft_config(folder: Path, **changes: Any) -> SftConfig:
    given = {"data": (chats(folder),), "sequence_tokens": 48, "batch_items": 5, "optim": GENTLE}
    return SftConfig(**(given | changes))


def dpo_config(folder: Path, **changes: Any) -> DpoConfig:
    given = {"data": (preferences(folder),), "sequence_tokens": 64, "batch_items": 3}
    return DpoConfig(**(given | {"optim": GENTLE} | changes))


def grpo_config(folder: Path, **changes: Any) -> GrpoConfig:
    given = {
        "data": (DataConfig(task="sort", num_rows=8),),
        "sequence_tokens": 128,
        "max_steps": 3,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_new_tokens": 6,
        "optim": GENTLE,
        "loss": PolicyLossConfig(objective="dapo"),
    }
    return GrpoConfig(**(given | changes))


ON_TRL = {sft.run: run_sft, dpo.run: run_dpo, grpo.run: run_grpo}


def both(
    tmp_path: Path,
    start: Path,
    config: Any,
    native: Callable[[Any, Job], Outcome],
) -> tuple[Job, Job, Outcome, Outcome]:
    """The stage on either backend."""
    jobs = [replace(small.job(tmp_path / name, start), base=tmp_path) for name in ("ours", "trl")]
    ours = native(config, jobs[0])
    theirs = ON_TRL[native](config.model_copy(update={"backend": "trl"}), jobs[1])
    return jobs[0], jobs[1], ours, theirs


def weights(job: Job) -> dict[str, Tensor]:
    (file,) = job.artifact.glob("*.safetensors")
    return load_file(file)


def assert_same_update(ours: Job, theirs: Job, start: Path) -> None:
    """Both moved the weights, and to the same place up to a small share of the way."""
    found, wanted = weights(theirs), weights(ours)
    assert found.keys() == wanted.keys()
    before = load_file(next(start.glob("*.safetensors")))
    far = gap = 0.0
    for name, tensor in wanted.items():
        gap += float((found[name] - tensor).square().sum())
        far += float((tensor - before.get(name, torch.zeros_like(tensor))).square().sum())
    assert far > 0
    assert (gap / far) ** 0.5 < 1e-3


def losses(job: Job) -> list[float]:
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_items": 0, "batch_sequences": 2, "micro_sequences": 2},
        {"lora": LoraConfig(rank=2), "epochs": 2},
        *slow({"epochs": 2}, {"checkpointing": "selective", "max_steps": 2}),
    ],
)
def test_sft_takes_the_native_steps(changes: dict[str, Any], tmp_path: Path, start: Path) -> None:
    config = sft_config(tmp_path, **changes)
    ours, theirs, native, other = both(tmp_path, start, config, sft.run)
    assert losses(theirs) == pytest.approx(losses(ours), abs=1e-4)
    assert_same_update(ours, theirs, start)
    assert native.data == other.data
    assert other.metrics["tokens"] == native.metrics["tokens"]
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        if (ours.artifact / name).exists():
            assert (theirs.artifact / name).read_text() == (ours.artifact / name).read_text()
    load_policy(theirs.artifact)


def test_bf16_is_entered_although_the_process_is_fp32(tmp_path: Path, start: Path) -> None:
    config = sft_config(tmp_path, precision="bf16")
    ours, theirs, _, _ = both(tmp_path, start, config, sft.run)
    full = replace(small.job(tmp_path / "fp32", start), base=tmp_path)
    run_sft(sft_config(tmp_path), full)
    assert losses(theirs) == pytest.approx(losses(ours), rel=5e-3)
    assert abs(losses(theirs)[0] - losses(full)[0]) > 1e-6


@pytest.mark.parametrize("changes", [{"epochs": 2}, *slow({"lora": LoraConfig(rank=2)})])
def test_dpo_takes_the_native_steps(changes: dict[str, Any], tmp_path: Path, start: Path) -> None:
    # Steps of 3, 3 and 2 pairs in microbatches of one packed sequence each: unequal parts.
    config = dpo_config(tmp_path, **changes)
    ours, theirs, _, _ = both(tmp_path, start, config, dpo.run)
    assert losses(theirs) == pytest.approx(losses(ours), abs=1e-4)
    assert losses(theirs)[0] == pytest.approx(0.693147, abs=1e-5)
    assert_same_update(ours, theirs, start)


@pytest.mark.parametrize(
    "loss",
    [
        PolicyLossConfig(objective="dapo", epsilon_high=0.28),
        PolicyLossConfig(objective="cispo", is_max=5.0),
        *slow(
            PolicyLossConfig(objective="grpo"),
            PolicyLossConfig(objective="dr_grpo", max_response_tokens=9, ratio_cap=2.0),
        ),
    ],
)
def test_grpo_samples_and_learns_as_the_native_backend(
    loss: PolicyLossConfig, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every answer is nearly always wrong, so a score that varies takes the judge's place.
    monkeypatch.setattr(
        "reward.scorer.verify_all", lambda items, _, **__: [_share(item.response) for item in items]
    )
    config = grpo_config(tmp_path, loss=loss, updates_per_rollout=1)
    ours, theirs, native, other = both(tmp_path, start, config, grpo.run)
    assert_same_update(ours, theirs, start)
    assert native.data == other.data
    first = json.loads((theirs.folder / "metrics.jsonl").read_text().splitlines()[0])
    told = json.loads((ours.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reward"] == pytest.approx(told["reward/mean"], abs=1e-6)


def _share(text: str) -> Any:
    from reward.types import Verdict

    return Verdict(sum(letter in "aeiou" for letter in text) / max(len(text), 1))


def test_grpo_with_adapters_and_a_reference_and_reused_rollouts(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "reward.scorer.verify_all", lambda items, _, **__: [_share(item.response) for item in items]
    )
    loss = PolicyLossConfig(objective="grpo", beta=0.1)
    config = grpo_config(
        tmp_path, loss=loss, lora=LoraConfig(rank=2), updates_per_rollout=2, max_steps=4
    )
    job = replace(small.job(tmp_path / "trl", start), base=tmp_path)
    outcome = run_grpo(config, job)
    assert outcome.metrics["kl"] > 0
    assert (job.artifact / "adapter_model.safetensors").exists()
    assert not (job.artifact / "ref").exists()
    load_policy(job.artifact)


def test_microbatches_of_a_step_reach_trl_with_their_borders() -> None:
    items = small.examples(6)
    batch = Batch.from_examples(items)
    inputs = sft_inputs(batch)
    start = 0
    for item in items:
        end = start + len(item.tokens)
        labels = [t if w else -100 for t, w in zip(item.tokens, item.weights, strict=True)]
        assert inputs["labels"][0, start:end].tolist() == labels
        assert inputs["position_ids"][0, start:end].tolist() == list(range(end - start))
        start = end


def test_only_what_the_assistant_wrote_is_compared() -> None:
    # A user's turn inside the answer keeps weight 0.
    side = Example((1, 2, 3, 4, 5), (0.0, 1.0, 0.0, 0.0, 1.0), "a:1")
    inputs = dpo_inputs([Pair(side, Example((1, 2), (0.0, 1.0), "a:1"))])
    assert inputs["completion_mask"].tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_a_step_smaller_than_the_processes_is_refused() -> None:
    data = PackedData(small.examples(3), sequence_tokens=32, batch_items=2, shuffle=False)
    with pytest.raises(ValueError, match=r"trl: step 1 has fewer packed sequences than the 2"):
        StepList(data, world=2)[1]


def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path: Path, start: Path) -> None:
    broken = small.model()
    with torch.no_grad():
        broken.lm_head.weight[:] = float("nan")
    small.save_policy(broken, small.tokenizer(), tmp_path / "broken")
    job = replace(small.job(tmp_path / "trl", tmp_path / "broken"), base=tmp_path)
    with pytest.raises(RuntimeError, match=r"stage: step 1: loss = nan, .*chats.jsonl:\d+"):
        run_sft(sft_config(tmp_path), job)


@pytest.mark.parametrize(
    ("run", "make", "changes", "message"),
    [
        (run_sft, sft_config, {"save_every_steps": 5}, "save_every_steps = 5: TRL's checkpoints"),
        (run_dpo, dpo_config, {"label_smoothing": 0.1}, "label_smoothing = 0.1: TRL's sigmoid"),
        (run_dpo, dpo_config, {"sft_weight": 0.5}, "sft_weight = 0.5: TRL's sigmoid loss"),
        (run_grpo, grpo_config, {"behaviour": "engine"}, "behaviour = engine: TRL takes"),
        (run_grpo, grpo_config, {"flat_groups": "leave_out"}, "flat_groups = leave_out: TRL"),
        (run_grpo, grpo_config, {"precision": "bf16"}, "precision = bf16: TRL scores"),
        (
            run_grpo,
            grpo_config,
            {"loss": PolicyLossConfig(drop_ratio=3.0)},
            "loss.drop_ratio = 3: TRL drops no token",
        ),
        (
            run_grpo,
            grpo_config,
            {"loss": PolicyLossConfig(beta=0.1)},
            "loss.beta = 0.1: TRL would load transformers' own class",
        ),
        (
            run_grpo,
            grpo_config,
            {"max_steps": 0, "prompts_per_step": 3},
            "prompts_per_step = 3: TRL drops the last 2 of 8 prompts",
        ),
    ],
)
def test_what_trl_cannot_honour_is_refused_by_name(
    run: Any, make: Any, changes: dict[str, Any], message: str, tmp_path: Path, start: Path
) -> None:
    job = replace(small.job(tmp_path / "trl", start), base=tmp_path)
    with pytest.raises(ValueError, match=f"backend: trl: {message}.*or use backend: native"):
        run(make(tmp_path, **changes), job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_aux_scaling": "paper"}, "router_aux_scaling = paper: TRL knows"),
        ({"router_z_loss_coef": 0.1}, "router_z_loss_coef = 0.1: TRL has no z-loss"),
        ({"lm_head_fp32": True}, "lm_head_fp32 = true: TRL multiplies"),
    ],
)
def test_a_model_that_trl_would_train_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    job = replace(
        small.job(tmp_path / "trl", small.start(tmp_path / "start", **changes)), base=tmp_path
    )
    with pytest.raises(ValueError, match=f"backend: trl: {message}"):
        run_sft(sft_config(tmp_path, precision="bf16"), job)


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

from align.trl_backend import run_dpo, run_sft
from tests.align import small
from tests.align.test_trl_backend import dpo_config, sft_config

torch.set_num_threads(1)
folder, work = Path(sys.argv[1]), Path(sys.argv[2])
job = replace(small.job(work, folder / "start"), base=folder)
if sys.argv[3] == "sft":
    run_sft(sft_config(folder, batch_items=6, sequence_tokens=24), job)
else:
    run_dpo(dpo_config(folder, batch_items=4), job)
"""


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path, start: Path) -> None:
    for processes in (1, 2):
        work = tmp_path / str(processes)
        told = launch(SCRIPT, [str(tmp_path), str(work), kind], processes)
        assert (work / "artifact").exists(), told
    one, two = small.job(tmp_path / "1"), small.job(tmp_path / "2")
    assert_same_update(one, two, start)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
