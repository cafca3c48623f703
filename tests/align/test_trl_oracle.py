"""TRL 1.16's own trainers on our model give our losses: same batch, same weights, gradients too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from align.data.batch import Batch, Example, Pair
from align.data.tokenizer import train_tokenizer
from align.losses.dpo import dpo_loss, sequence_logprobs
from align.losses.lm import lm_loss
from align.losses.policy import PolicyLossConfig, policy_count, policy_loss
from model import HybridForCausalLM
from model.config import preset
from tests.helpers import assert_close

VOCAB = 280
COMMON = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat and the hat"] * 4, VOCAB)


def build(seed: int) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = preset(
        "tiny",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=8,
        rotary_dim=4,
        initializer_range=0.2,
        # Large enough that a wrong router loss cannot hide behind the tolerance.
        router_aux_loss_coef=0.5,
    )
    return HybridForCausalLM(config)


def tokens(count: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(10, VOCAB - 10) for _ in range(count))


def example(prompt: tuple[int, ...], response: tuple[int, ...], place: str) -> Example:
    weights = (0.0,) * len(prompt) + (1.0,) * len(response)
    return Example(prompt + response, weights, place)


def examples(sizes: list[tuple[int, int]], seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        example(tokens(prompt, rng), tokens(response, rng), f"row:{index}")
        for index, (prompt, response) in enumerate(sizes)
    ]


def gradients(loss: Tensor, model: HybridForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Tensor, theirs: Tensor, model: HybridForCausalLM) -> None:
    assert abs(ours.item() - theirs.item()) <= 1e-5
    found, wanted = gradients(ours, model), gradients(theirs, model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(name, found[name], gradient, tolerance=1e-4)


def forward(model: HybridForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    output = model(packed=batch.packed, targets=batch.targets)
    return output.logprobs, output.aux_loss


def labelled(item: Example) -> list[int]:
    return [t if w else -100 for t, w in zip(item.tokens, item.weights, strict=True)]


def test_logprobs_and_entropy_of_the_fused_head_are_ours() -> None:
    model = build(0)
    batch = Batch.from_examples(examples([(3, 9), (1, 4)]))
    temperature = 0.7
    ours = model(
        packed=batch.packed, targets=batch.targets, temperature=temperature, with_entropy=True
    )
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    shifted = batch.targets.masked_fill(batch.weights == 0, -100)
    theirs = model(
        input_ids=batch.packed.tokens[None],
        position_ids=batch.packed.positions[None],
        shift_labels=shifted[None],
        fused_lm_head=True,
    )
    trained = batch.weights != 0
    assert_close("logprobs", ours.logprobs[trained], theirs.log_probs[0, trained])
    assert_close("entropy", ours.entropy[trained], theirs.entropy[0, trained])


@pytest.mark.parametrize("packed", [False, True])
def test_sft_loss_equals_trl(
    packed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, items = build(1), examples([(3, 9), (6, 2), (1, 30), (12, 12)])
    rows = [{"input_ids": list(item.tokens), "labels": labelled(item)} for item in items]
    args = SFTConfig(tmp_path, max_length=None, padding_free=packed, **COMMON)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    assert ("attention_mask" in inputs) is not packed
    theirs = trainer.compute_loss(model, inputs)
    batch = Batch.from_examples(items)
    logprobs, aux = forward(model, batch)
    loss = lm_loss(logprobs, batch.weights, aux=aux)
    assert_same(loss.sum / batch.weights.sum() + aux, theirs, model)


def test_dpo_loss_equals_trl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference = build(2), build(3)
    rng = random.Random(0)
    rows, pairs = [], []
    for index, (prompt, chosen, rejected) in enumerate([(3, 9, 4), (7, 2, 11), (1, 1, 1)]):
        row = {
            "prompt_ids": list(tokens(prompt, rng)),
            "chosen_ids": list(tokens(chosen, rng)),
            "rejected_ids": list(tokens(rejected, rng)),
        }
        start = tuple(row["prompt_ids"])
        sides = [
            example(start, tuple(row[side]), f"row:{index}")
            for side in ("chosen_ids", "rejected_ids")
        ]
        rows.append(row)
        pairs.append(Pair(*sides))
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(tmp_path, max_length=None, beta=0.3, **COMMON),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    theirs = trainer.compute_loss(policy, trainer.data_collator(rows))
    batch = Batch.from_pairs(pairs)
    logprobs, aux = forward(policy, batch)
    with torch.no_grad():
        fixed, _ = forward(reference, batch)
    lengths = batch.packed.lengths
    loss = dpo_loss(
        sequence_logprobs(logprobs, batch.weights, lengths),
        sequence_logprobs(fixed, batch.weights, lengths),
        beta=0.3,
    )
    assert_same(loss.sum / len(pairs) + aux, theirs, policy)


OBJECTIVES = {
    "grpo": {"epsilon": 0.1, "epsilon_high": 0.3},
    "dr_grpo": {"epsilon": 0.2, "epsilon_high": 0.2, "delta": 1.6},
    "dapo": {"epsilon": 0.2, "epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.2},
}


def policy_config(objective: str, beta: float, longest: int) -> PolicyLossConfig:
    bounds = OBJECTIVES[objective]
    if objective == "cispo":
        return PolicyLossConfig(objective="cispo", is_max=bounds["epsilon_high"], beta=beta)
    return PolicyLossConfig(
        objective=objective,
        epsilon_low=bounds["epsilon"],
        epsilon_high=bounds["epsilon_high"],
        ratio_cap=bounds.get("delta", 0.0),
        beta=beta,
        max_response_tokens=longest,
    )


def grpo_inputs(
    items: list[Example], prompts: list[int], columns: dict[str, Tensor], pad: int
) -> dict[str, Tensor]:
    """The padded batch that GRPOTrainer makes: prompts on the left, completions on the right."""
    wide, long = max(prompts), max(len(i.tokens) - p for i, p in zip(items, prompts, strict=True))
    size = len(items)
    inputs = {
        "prompt_ids": torch.full((size, wide), pad),
        "prompt_mask": torch.zeros(size, wide, dtype=torch.long),
        "completion_ids": torch.full((size, long), pad),
        "completion_mask": torch.zeros(size, long, dtype=torch.long),
        **{name: torch.zeros(size, long) for name in columns},
    }
    offset = 0
    for row, (item, start) in enumerate(zip(items, prompts, strict=True)):
        count = len(item.tokens) - start
        inputs["prompt_ids"][row, wide - start :] = torch.tensor(item.tokens[:start])
        inputs["prompt_mask"][row, wide - start :] = 1
        inputs["completion_ids"][row, :count] = torch.tensor(item.tokens[start:])
        inputs["completion_mask"][row, :count] = 1
        for name, column in columns.items():
            # Aligned with targets: the token at position t is predicted at t - 1.
            inputs[name][row, :count] = column[offset + start - 1 : offset + start - 1 + count]
        offset += len(item.tokens)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_grpo_losses_equal_trl(
    objective: str, beta: float, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(4)
    sizes = [(3, 9), (7, 2), (1, 14), (5, 5)]
    prompts, longest = [prompt for prompt, _ in sizes], 16
    items = examples(sizes)
    batch = Batch.from_examples(items)
    logprobs, aux = forward(model, batch)
    noise = torch.Generator().manual_seed(0)
    behaviour = logprobs.detach() + 0.4 * torch.randn(logprobs.shape, generator=noise)
    reference = logprobs.detach() + 0.4 * torch.randn(logprobs.shape, generator=noise)
    scores = torch.tensor([1.2, -0.7, 0.4, -1.5])
    advantages = scores.repeat_interleave(torch.tensor(batch.packed.lengths))
    config = policy_config(objective, beta, longest)
    loss = policy_loss(
        logprobs,
        behaviour=behaviour,
        advantages=advantages,
        weights=batch.weights,
        lengths=batch.packed.lengths,
        config=config,
        reference=reference if beta else None,
    )
    ours = loss.sum / policy_count(batch.weights, batch.packed.lengths, config) + aux

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            tmp_path,
            loss_type=objective,
            use_bias_correction_kl=False,
            num_generations=2,
            max_completion_length=longest,
            **OBJECTIVES[objective],
            **COMMON,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 2),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    # Set late: the constructor would load a reference model, but the batch brings its log-probs.
    trainer.beta = beta
    columns = {"old_per_token_logps": behaviour, "ref_per_token_logps": reference}
    inputs = grpo_inputs(items, prompts, columns, tokenizer.pad_token_id)
    theirs = trainer.compute_loss(model, {**inputs, "advantages": scores})
    assert_same(ours, theirs, model)
