"""Prompts to judged groups: what every stage that samples from a policy shares.

row -> Prompt (row and tokens) -> Request -> Completion -> text -> Score, one group a prompt.

A response that is no legal turn (nothing but white space, or the text of a special token inside) is
not handed to a judge: nobody could render it. That is a verdict, not a failure, so it scores 0, the
lowest score that a hierarchy gives.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from align.course import Job
from align.data.mixture import mix
from align.data.render import render_item, render_prompt
from align.data.rows import PromptRow, Row
from align.data.sources import KEPT_REASONS, DataConfig, read_source
from align.experience import Group, response_text
from model import HybridForCausalLM
from reward.client import HttpScorer
from reward.sandbox import Sandbox
from reward.scorer import InProcessScorer, load_scorer
from reward.types import Item, Score, Scorer
from rollout.native.engine import NativeEngine
from rollout.types import Completion, Engine, Request, Sampling

MALFORMED = "malformed: "
PAGE_TOKENS = 64
# Prompt tokens a forward: on a CPU more of them leave its caches (13 tokens a ms at 4,096, 10 at
# 16,384 with the tiny preset), on a GPU fewer leave it idle.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16_384}


@dataclass(frozen=True)
class Prompt:
    """A prompt as a row and as the tokens that a policy is given."""

    row: PromptRow
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """Prompts of all sources in order, never none.

    Args:
        data: for the manifest, one entry per source: what was read, skipped, too long and taken.
    """

    items: tuple[Prompt, ...]
    data: tuple[Mapping[str, Any], ...]

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.tokens) for prompt in self.items)


def read_prompts(
    data: Sequence[DataConfig], *, job: Job, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Prompts:
    """The prompts of a stage's `data:` list, each of which somebody can judge.

    Args:
        max_tokens: longest prompt; longer ones are an error, or counted, as `too_long` says.

    Raises:
        ValueError: if a row is no prompt, is too long, or can be judged by nobody.
    """
    given = [_read(source, job=job, tokenizer=tokenizer, max_tokens=max_tokens) for source in data]
    weights = [source.weight for source in data]
    taken = mix([len(found) for found, _ in given], weights, seed=job.seed)
    return Prompts(
        items=tuple(found[i] for (found, _), rows in zip(given, taken, strict=True) for i in rows),
        data=tuple(
            {**told, "taken": len(rows), "tokens": sum(len(found[i].tokens) for i in rows)}
            for (found, told), rows in zip(given, taken, strict=True)
        ),
    )


def _read(
    source: DataConfig, *, job: Job, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts of one source under its policies, and what became of its rows."""
    rows, report = read_source(
        source, base=job.base, inputs=job.inputs, seed=job.seed, kind="prompt"
    )
    found: list[Prompt] = []
    reasons: list[str] = []
    for any_row in rows:
        row = _judgeable(any_row, has_reward=bool(job.reward_url) or "reward" in job.inputs)
        try:
            found.append(Prompt(row, render_prompt(row.prompt, tokenizer)))
        except ValueError as error:
            if source.on_bad_row == "error":
                raise ValueError(
                    f"{row.origin}: {error} (on_bad_row: skip leaves such rows out)"
                ) from error
            reasons.append(f"{row.origin}: {error}")
    fitting = [prompt for prompt in found if len(prompt.tokens) <= max_tokens]
    if len(fitting) < len(found) and (source.too_long != "skip" or not fitting):
        long = next(prompt for prompt in found if len(prompt.tokens) > max_tokens)
        raise ValueError(
            f"{long.row.origin}: the prompt has {len(long.tokens)} tokens, expected at most "
            f"{max_tokens} before its response; raise the stage's limit, or set too_long: skip "
            f"({len(fitting)} of {len(found)} prompts of {source.label} fit)"
        )
    if not fitting:
        raise ValueError(f"{source.label}: no prompt is left of {len(rows)}, first {reasons[0]}")
    left = dataclasses.replace(
        report,
        rows=len(fitting),
        skipped=report.skipped + len(reasons),
        reasons=(*report.reasons, *reasons)[:KEPT_REASONS],
    )
    return fitting, {**dataclasses.asdict(left), "too_long": len(found) - len(fitting)}


def _judgeable(row: Row, *, has_reward: bool) -> PromptRow:
    if not isinstance(row, PromptRow):
        raise ValueError(
            f"{row.origin}: a {type(row).__name__}, expected a prompt; set `as: prompt` on its "
            "source or take another"
        )
    if not row.verifier and not has_reward:
        raise ValueError(
            f"{row.origin}: names no verifier and the stage has no reward model, so no response to "
            "it can be judged; name a verifier, or add `reward:` to the stage"
        )
    return row


def open_scorer(
    job: Job, tokenizer: PreTrainedTokenizerBase, *, deadline_s: float = 600.0
) -> Scorer:
    """The judge of a stage: a scoring service or a reward artifact if it names one, else the rules.

    Raises:
        RuntimeError: if the service does not answer within deadline_s.
    """
    if job.reward_url:
        return HttpScorer(job.reward_url, api_key=job.reward_key, deadline_s=deadline_s)
    if "reward" not in job.inputs:
        return InProcessScorer(sandbox=Sandbox(job.sandbox))

    def encode(item: Item) -> tuple[int, ...]:
        return render_item(item, tokenizer)

    def encode_prompt(item: Item) -> tuple[int, ...]:
        return render_prompt(item.messages, tokenizer)

    return load_scorer(
        job.inputs["reward"],
        encode,
        encode_prompt=encode_prompt,
        device=job.accelerator.device,
        sandbox=Sandbox(job.sandbox),
    )


def open_engine(
    model: HybridForCausalLM | PeftModel,
    *,
    max_concurrent: int,
    max_tokens: int,
    autocast: torch.dtype | None = None,
    own_bits: bool = True,
) -> NativeEngine:
    """An engine on the live weights, adapters on, with room for its slots at their longest.

    Args:
        max_concurrent: responses decoded at once.
        max_tokens: longest prompt and response together.
        autocast, own_bits: as in `NativeEngine`.
    """
    return NativeEngine(
        model,
        max_slots=max_concurrent + 1,
        max_cache_tokens=(max_concurrent + 1) * (max_tokens + PAGE_TOKENS),
        page_tokens=PAGE_TOKENS,
        prefill_tokens=PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cuda"]),
        autocast=autocast,
        # a training step needs the memory
        keeps_cache=False,
        own_bits=own_bits,
    )


def answer(
    engine: Engine,
    prompts: Sequence[tuple[Prompt, int]],
    *,
    sampling: Sampling,
    num_samples: int,
    return_experts: bool = False,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> list[Group]:
    """One judged group per prompt.

    Args:
        As `requests_of` and `judged`.
    """
    requests = requests_of(
        prompts, sampling=sampling, num_samples=num_samples, return_experts=return_experts
    )
    return judged(prompts, engine.generate(requests), tokenizer=tokenizer, scorer=scorer)


def requests_of(
    prompts: Sequence[tuple[Prompt, int]],
    *,
    sampling: Sampling,
    num_samples: int,
    return_experts: bool = False,
) -> list[Request]:
    """What an engine is asked, one request a prompt.

    Args:
        prompts: each with the seed of its samples.
        sampling: of all; its seed is not used.
        return_experts: whether completions carry the experts of their tokens.
    """
    return [
        Request(
            request_id=str(prompt.row.origin),
            prompt=prompt.tokens,
            sampling=dataclasses.replace(sampling, seed=seed),
            num_samples=num_samples,
            return_experts=return_experts,
        )
        for prompt, seed in prompts
    ]


def judged(
    prompts: Sequence[tuple[Prompt, int]],
    done: Sequence[Completion],
    *,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> list[Group]:
    """Groups of completions, as many of each prompt, in order, with their scores."""
    if not prompts:
        # a process beyond the last prompt of a step
        return []
    num_samples = len(done) // len(prompts)
    texts = [response_text(completion, tokenizer) for completion in done]
    rows = [prompt.row for prompt, _ in prompts for _ in range(num_samples)]
    scores = judge(rows, texts, tokenizer=tokenizer, scorer=scorer)
    starts = range(0, len(done), num_samples)
    return [
        Group(prompt.row, tuple(done[i : i + num_samples]), tuple(scores[i : i + num_samples]))
        for (prompt, _), i in zip(prompts, starts, strict=True)
    ]


def judge(
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> list[Score]:
    """One score per response; malformed ones score 0 without a judge."""
    faults = [malformed(text, tokenizer) for text in texts]
    items = [
        row.item(text) for row, text, fault in zip(rows, texts, faults, strict=True) if not fault
    ]
    judged = iter(scorer.score(items) if items else [])
    return [
        Score(0.0, reason=MALFORMED + fault, version=scorer.version) if fault else next(judged)
        for fault in faults
    ]


def malformed(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a text is no legal turn of the assistant; "" if it is one."""
    if not text.strip():
        return "empty"
    found = next((token for token in tokenizer.all_special_tokens if token in text), "")
    return f"special token {found}" if found else ""


def seed_of(*counters: object) -> int:
    """A sampling seed in [0, 2^63) that is unrelated between any two tuples of counters.

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
        (True, False)
    """
    text = "/".join(str(counter) for counter in counters)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response; rendering a prompt has made sure that there is one."""
    token = tokenizer.eos_token_id
    assert isinstance(token, int), "render_prompt refuses tokenizers without an end-of-turn token"
    return token
