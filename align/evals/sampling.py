"""Answers to held-out prompts, and exact verdicts on them: what every sampling eval shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from align.data.render import render_plain_prompt, render_prompt
from align.data.rows import PromptRow
from align.data.sources import DataConfig
from align.evals.held_out import read_held_out
from align.evals.types import Context, EvalBase, EvalResult, pick_device
from align.experience import response_text
from align.policy import load_policy
from align.prompts import end_of_turn, malformed, open_engine, seed_of
from reward.sandbox import Sandbox, SandboxConfig
from reward.types import Verdict
from reward.verifiers import verify_all
from rollout.types import Request, Sampling

# Keys and values held at once, in tokens: half a GiB for a tiny model's softmax layers in fp32.
MAX_CACHE_TOKENS = 1 << 18


class SampledEval(EvalBase):
    """How answers are sampled."""

    form: Literal["chat", "text"] = "chat"
    """How a prompt is put: as a chat, or as plain text (question, answer) for a base model."""

    temperature: float = Field(default=1.0, ge=0)
    """Of the sampling; 1 as in avg@k, 0 takes the most likely token."""

    num_samples: int = Field(default=1, ge=1)
    """Answers per prompt; an item's number is the mean over them."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer in tokens, the end-of-turn token counted."""

    max_concurrent: int = Field(default=256, ge=1)
    """Answers decoded at once; bounds memory, never changes a result."""


@dataclass(frozen=True)
class Answers:
    """What a policy said.

    Args:
        texts: [rows][samples], without the end-of-turn token.
        unfinished: share of answers that reached max_new_tokens without an end-of-turn token.
        tokenizer: the policy's own.
    """

    texts: tuple[tuple[str, ...], ...]
    unfinished: float
    tokenizer: PreTrainedTokenizerBase


def respond(folder: Path, rows: Sequence[PromptRow], *, config: SampledEval, seed: int) -> Answers:
    """Answers of the policy in `folder`; the sampling seeds depend on the row and `seed` only."""
    model, tokenizer = load_policy(folder, device=pick_device())
    render = render_prompt if config.form == "chat" else render_plain_prompt
    requests = [
        Request(
            request_id=str(row.origin),
            prompt=render(row.prompt, tokenizer),
            sampling=Sampling(
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=seed_of(seed, index),
                stop_token_ids=(end_of_turn(tokenizer),),
            ),
            num_samples=config.num_samples,
        )
        for index, row in enumerate(rows)
    ]
    longest = max(len(request.prompt) for request in requests) + config.max_new_tokens
    together = min(config.max_concurrent, len(rows) * config.num_samples)
    together = min(together, max(MAX_CACHE_TOKENS // longest, 1))
    # all rows are asked at once, by one process: their company is always the same
    engine = open_engine(model, max_concurrent=together, max_tokens=longest, own_bits=False)
    try:
        completions = engine.generate(requests)
    finally:
        engine.close()
    texts = [response_text(completion, tokenizer) for completion in completions]
    size = config.num_samples
    return Answers(
        texts=tuple(tuple(texts[i : i + size]) for i in range(0, len(texts), size)),
        unfinished=sum(c.finish == "length" for c in completions) / len(completions),
        tokenizer=tokenizer,
    )


def verdicts(
    rows: Sequence[PromptRow], answers: Answers, *, name: str, sandbox: SandboxConfig
) -> list[list[Verdict]]:
    """[rows][samples] what each row's own verifier says.

    Raises:
        ValueError: if a row names no verifier.
    """
    for row in rows:
        if not row.verifier:
            raise ValueError(
                f"eval {name}: {row.origin} names no verifier, so no answer to it can be judged; "
                "name one or use kind: win_rate with a reward model"
            )
    pairs = [(row, text) for row, texts in zip(rows, answers.texts, strict=True) for text in texts]
    # As in training, a text that is no legal turn is wrong, whatever its verifier would say.
    faults = [malformed(text, answers.tokenizer) for _, text in pairs]
    legal = [row.item(text) for (row, text), fault in zip(pairs, faults, strict=True) if not fault]
    judged = iter(verify_all(legal, Sandbox(sandbox)))
    found = iter([Verdict(0.0, reason=fault) if fault else next(judged) for fault in faults])
    return [[next(found) for _ in texts] for texts in answers.texts]


def mean_valid(values: Sequence[Verdict]) -> float:
    """Mean of the valid verdicts; NaN if there is none.

    Example:
        >>> mean_valid([Verdict(1.0), Verdict(0.0, valid=False)])
        1.0
    """
    valid = [verdict.value for verdict in values if verdict.valid]
    return sum(valid) / len(valid) if valid else math.nan


def accuracy(
    config: SampledEval, data: Sequence[DataConfig], *, name: str, context: Context
) -> EvalResult:
    """Mean verdict on the policy's own answers; details hold the mean per task."""
    rows, skipped = read_held_out(data, PromptRow, kind="prompt", name=name, context=context)
    answers = respond(context.policy, rows, config=config, seed=context.seed)
    judged = verdicts(rows, answers, name=name, sandbox=context.sandbox)
    items = [mean_valid(each) for each in judged]
    details = {"unfinished": answers.unfinished, **skipped, **by_task(rows, items)}
    return EvalResult.from_items(name, "accuracy", items, details=details)


def by_task(rows: Sequence[PromptRow], items: Sequence[float]) -> dict[str, float]:
    """Mean of the valid items per task, where rows come from more than one."""
    groups: dict[str, list[float]] = {}
    for row, item in zip(rows, items, strict=True):
        if not math.isnan(item):
            groups.setdefault(row.task, []).append(item)
    if len(groups) < 2:
        return {}
    return {f"accuracy/{task}": sum(group) / len(group) for task, group in sorted(groups.items())}
