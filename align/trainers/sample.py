"""Kind `sample`: a policy's own responses, judged, become rows that another stage learns from.

make: dpo  best against worst response of each prompt, if their scores are far enough apart
make: sft  the best response of each prompt, if its score is high enough (rejection sampling)

Responses that cannot be a training row are never taken: those without a valid score, cut off at
max_new_tokens, or malformed. Every prompt that gives no row is counted under its reason.

Prompts are sampled in parts. A part is written whole or not at all, so a killed stage goes on with
the first part that is missing, and ends with the same rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from align.course import Job, Outcome
from align.data.rows import ChatRow, PreferenceRow, PromptRow
from align.data.sources import ROWS_FILE, DataConfig
from align.data.supply import write_rows
from align.experience import response_text
from align.policy import load_policy, weights_digest
from align.prompts import (
    MALFORMED,
    Prompts,
    answer,
    end_of_turn,
    open_engine,
    open_scorer,
    read_prompts,
    seed_of,
)
from model import HybridForCausalLM
from reward.types import Message, Score
from rollout.types import Completion, Sampling

# What chooses among responses but does not sample them, or bounds memory only.
CHOOSING = ("make", "min_gap", "min_score", "max_concurrent", "data")


class SampleConfig(BaseModel):
    """Sampling from a policy and choosing by score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Where the prompts come from."""
    make: Literal["dpo", "sft"] = "dpo"
    """Rows to write: preferences (best against worst) or chats (best)."""
    num_samples: int = Field(default=8, ge=1)
    """Responses to each prompt at each temperature."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1)
    """Temperatures to sample at; more than one widens the choice."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest response in tokens, the end-of-turn token counted."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """Longest prompt in tokens; what happens to longer ones is the source's too_long."""
    min_gap: float = Field(default=0.1, gt=0)
    """Least difference between the scores of a pair; make: dpo only."""
    min_score: float = 0.0
    """Least score of the response that is taken as chosen or as the chat's answer."""
    prompts_per_part: int = Field(default=256, ge=1)
    """Prompts between two saves; what a killed stage may have to sample again."""
    max_concurrent: int = Field(default=256, ge=1)
    """Responses decoded at once by one process; bounds memory, never changes a result."""
    seed: int = Field(default=0, ge=0)
    """Of the stage; the runner hands it on in the job."""

    @model_validator(mode="after")
    def _a_pair_needs_two(self) -> Self:
        if self.make == "dpo" and self.num_samples * len(self.temperatures) < 2:
            raise ValueError(
                "make = dpo compares responses, expected num_samples x temperatures >= 2; "
                "raise num_samples"
            )
        return self


class Judged(NamedTuple):
    """One response as a part keeps it; fault says why it cannot be a row, "" if it can."""

    text: str
    score: float
    fault: str


def run(config: SampleConfig, job: Job) -> Outcome:
    """Samples from job.start and writes artifact/rows.jsonl and artifact/summary.json.

    Returns: metrics: prompts, rows, and by reason the prompts that gave none; mean scores.

    Raises:
        ValueError: if a row, a file or the policy is not what it should be, or no prompt gives a
            row.
        RuntimeError: if a part cannot be written.
    """
    accelerator = job.accelerator
    model, tokenizer = load_policy(job.start, device=accelerator.device)
    prompts = read_prompts(
        config.data, job=job, tokenizer=tokenizer, max_tokens=config.max_prompt_tokens
    )
    sampler = Sampler(config, job, model=model, tokenizer=tokenizer, prompts=prompts)
    judged = sampler.run()
    rows, metrics = choose(config, [prompt.row for prompt in prompts.items], judged)
    if not rows:
        told = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        raise ValueError(
            f"{job.name}: no prompt gives a row of make: {config.make} ({told}); lower min_gap or "
            "min_score, raise num_samples, or start from a better policy"
        )
    if accelerator.is_main_process:
        job.artifact.mkdir(parents=True, exist_ok=True)
        write_rows(job.artifact / ROWS_FILE, rows)
        summary = {"scored_by": sampler.scorer.version, "metrics": metrics}
        text = json.dumps(summary, indent=1, sort_keys=True) + "\n"
        (job.artifact / "summary.json").write_text(text, encoding="utf-8")
    accelerator.wait_for_everyone()
    return Outcome(metrics, prompts.data)


class Sampler:
    """Judged responses to every prompt, part by part, each part written once."""

    def __init__(
        self,
        config: SampleConfig,
        job: Job,
        *,
        model: HybridForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
    ) -> None:
        self.config, self.job = config, job
        self.tokenizer, self.prompts = tokenizer, prompts
        self.engine = open_engine(
            model,
            max_concurrent=config.max_concurrent,
            max_tokens=prompts.max_tokens + config.max_new_tokens,
        )
        self.scorer = open_scorer(job, tokenizer)
        self.folder = job.folder / f"parts-{self._digest()}"

    def run(self) -> list[list[Judged]]:
        """[prompts][samples] on every process, sampling only the parts that are not there yet."""
        accelerator, size = self.job.accelerator, self.config.prompts_per_part
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [
            self.folder / f"part-{number:06d}.jsonl"
            for number in range(-(-len(self.prompts.items) // size))
        ]
        for number in range(len(paths))[accelerator.process_index :: accelerator.num_processes]:
            if not paths[number].exists():
                self._write(paths[number], self._part(number * size))
        accelerator.wait_for_everyone()
        return [
            [Judged(*one) for one in json.loads(line)]
            for path in paths
            for line in path.read_text(encoding="utf-8").splitlines()
        ]

    def _part(self, start: int) -> list[list[Judged]]:
        config = self.config
        part = self.prompts.items[start : start + config.prompts_per_part]
        judged: list[list[Judged]] = [[] for _ in part]
        for number, temperature in enumerate(config.temperatures):
            seeds = [seed_of(self.job.seed, start + i, number) for i in range(len(part))]
            groups = answer(
                self.engine,
                list(zip(part, seeds, strict=True)),
                sampling=Sampling(
                    max_new_tokens=config.max_new_tokens,
                    temperature=temperature,
                    stop_token_ids=(end_of_turn(self.tokenizer),),
                ),
                num_samples=config.num_samples,
                tokenizer=self.tokenizer,
                scorer=self.scorer,
            )
            for responses, group in zip(judged, groups, strict=True):
                responses += [
                    Judged(response_text(completion, self.tokenizer), score.value, fault)
                    for completion, score in zip(group.completions, group.scores, strict=True)
                    for fault in [_fault(completion, score)]
                ]
        return judged

    def _write(self, path: Path, judged: Sequence[Sequence[Judged]]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(responses) + "\n" for responses in judged)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise RuntimeError(
                f"{path}: cannot write the sampled part ({error.strerror}); earlier parts stay, "
                "free disk space and run again"
            ) from error

    def _digest(self) -> str:
        """Of everything that a part depends on, so that parts of another run are never reused."""
        digest = hashlib.blake2b(digest_size=8)
        sampled = self.config.model_dump(mode="json", exclude=set(CHOOSING))
        told = [sampled, self.job.seed, weights_digest(self.job.start), self.scorer.version]
        digest.update(json.dumps(told).encode())
        for prompt in self.prompts.items:
            digest.update(repr((prompt.row, prompt.tokens)).encode())
        return digest.hexdigest()


def _fault(completion: Completion, score: Score) -> str:
    """Why a response cannot be a row; "" if it can."""
    if completion.finish == "length":
        return "unfinished"
    if score.reason.startswith(MALFORMED):
        return "malformed"
    return "" if score.valid else "unjudged"


def choose(
    config: SampleConfig, prompts: Sequence[PromptRow], judged: Sequence[Sequence[Judged]]
) -> tuple[list[ChatRow | PreferenceRow], dict[str, float]]:
    """Rows in the order of the prompts, and how many prompts and responses fell out and why.

    Among equal scores the first sampled is taken.
    """
    rows: list[ChatRow | PreferenceRow] = []
    responses = [one for group in judged for one in group]
    counts = Counter(f"responses/{one.fault}" for one in responses if one.fault)
    gaps: list[float] = []
    for prompt, group in zip(prompts, judged, strict=True):
        usable = [one for one in group if not one.fault]
        if not usable:
            counts["prompts/no_usable_response"] += 1
            continue
        best = max(usable, key=lambda one: one.score)
        worst = min(usable, key=lambda one: one.score)
        if best.score < config.min_score:
            counts["prompts/below_min_score"] += 1
        elif config.make == "sft":
            rows.append(ChatRow((*prompt.prompt, _assistant(best.text)), prompt.origin))
        elif best.score - worst.score < config.min_gap:
            counts["prompts/below_min_gap"] += 1
        else:
            gaps.append(best.score - worst.score)
            rows.append(_preference(prompt, best, worst))
    valid = [one.score for one in responses if one.fault not in ("unjudged", "malformed")]
    metrics = {"prompts": float(len(prompts)), "rows": float(len(rows))}
    metrics |= {"responses": float(len(responses))} | {k: float(v) for k, v in counts.items()}
    if valid:
        metrics["score/mean"] = statistics.fmean(valid)
    if gaps:
        metrics["gap/mean"] = statistics.fmean(gaps)
    return rows, metrics


def _preference(prompt: PromptRow, best: Judged, worst: Judged) -> PreferenceRow:
    return PreferenceRow(
        prompt=prompt.prompt,
        chosen=(_assistant(best.text),),
        rejected=(_assistant(worst.text),),
        origin=prompt.origin,
        difficulty=prompt.difficulty,
        margin=best.score - worst.score,
    )


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
