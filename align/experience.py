"""What a policy did and what it was worth -> examples: the one file that reads both rivers.

Experience is ordinary training data with two more numbers a token: what the behaviour policy gave
the token, and how much better than its group the response was.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.advantage import Advantages
from align.data.batch import Example
from align.data.rows import PromptRow
from reward.hierarchy import rule_key
from reward.types import Score
from rollout.types import Completion


@dataclass(frozen=True)
class Group:
    """One prompt, what a policy answered and how each answer was judged, in the same order."""

    row: PromptRow
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]


def response_text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The response without the token that ended it; other special tokens stay visible."""
    tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
    return str(tokenizer.decode(list(tokens)))


def to_example(completion: Completion, advantage: float, place: str) -> Example:
    """The completion as a training sequence: prompt weight 0, response weight 1.

    behaviour_logprobs are at the sampling temperature with nothing filtered, which is what a
    trainer's forward at that temperature gives: log(filtered probability * kept mass).

    Args:
        advantage: of the whole response, given to each of its tokens.

    Example:
        >>> completion = Completion("p", 0, (7, 8), (9,), (-2.0,), (-0.5,), (1.0,), "stop", 0)
        >>> example = to_example(completion, 1.5, "a.jsonl:1")
        >>> example.tokens, example.weights, example.behaviour_logprobs, example.advantages
        ((7, 8, 9), (0.0, 0.0, 1.0), (0.0, 0.0, -0.5), (0.0, 0.0, 1.5))
    """
    before, after = len(completion.prompt), len(completion.tokens)
    behaviour = (
        filtered + math.log(mass)
        for filtered, mass in zip(completion.filtered_logprobs, completion.kept_mass, strict=True)
    )
    return Example(
        tokens=completion.prompt + completion.tokens,
        weights=(0.0,) * before + (1.0,) * after,
        place=place,
        behaviour_logprobs=(0.0,) * before + tuple(behaviour),
        advantages=(0.0,) * before + (advantage,) * after,
        experts=_padded(completion.experts),
    )


def _padded(experts: Tensor | None) -> Tensor | None:
    """With -1 for the last token, which never entered the engine's model."""
    return None if experts is None else F.pad(experts, (0, 0, 0, 0, 0, 1), value=-1)


def examples_of(
    groups: Sequence[Group], advantages: Sequence[Sequence[float | None]]
) -> list[Example]:
    """One example per response that has an advantage, in order; the others are not trained on."""
    return [
        to_example(completion, advantage, f"{group.row.origin}#{completion.sample}")
        for group, values in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, values, strict=True)
        if advantage is not None
    ]


def describe(groups: Sequence[Group], found: Advantages) -> dict[str, float]:
    """Numbers of one rollout: reward, lengths, what teaches nothing, exact accuracy by task.

    A mean over nothing is left out, never 0.
    """
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.tokens) for completion in completions]
    rewards = [score.value for group in groups for score in group.scores if score.valid]
    numbers = {
        "rollout/responses": float(len(completions)),
        "rollout/invalid": float(found.num_invalid),
        "rollout/flat_groups": found.num_flat / len(groups),
        "rollout/unfinished": statistics.fmean(c.finish == "length" for c in completions),
        "rollout/response_tokens": statistics.fmean(lengths),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/nll": -statistics.fmean(x for c in completions for x in c.logprobs),
        "rollout/kept_mass": statistics.fmean(x for c in completions for x in c.kept_mass),
        "rollout/kept_mass_min": min(x for c in completions for x in c.kept_mass),
    }
    if rewards:
        numbers["reward/mean"] = statistics.fmean(rewards)
        numbers["reward/std"] = statistics.pstdev(rewards)
    verdicts: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        for score in group.scores:
            verdict = score.signals.get(rule_key(group.row.verifier))
            if verdict is not None and verdict.valid:
                verdicts[group.row.task or "prompts"].append(verdict.value)
    every = [value for values in verdicts.values() for value in values]
    if every:
        numbers["accuracy/all"] = statistics.fmean(every)
    return numbers | {f"accuracy/{task}": statistics.fmean(v) for task, v in verdicts.items()}
