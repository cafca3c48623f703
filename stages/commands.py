"""What the small commands do: evals by name, answers, scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from align.data.render import render_prompt
from align.evals.reward_artifact import open_scorer
from align.evals.types import EvalResult, pick_device
from align.policy import load_policy
from reward.types import Item, Message
from rollout.native.engine import NativeEngine
from rollout.types import Request, Sampling
from stages.document import nearest
from stages.recipe import Recipe

PAGE_TOKENS = 64


def chosen_evals(recipe: Recipe, names: Sequence[str]) -> list[Any]:
    """Configs of the named evals, or of all.

    Raises:
        ValueError: a name is unknown, or the recipe has no evals.
    """
    if not recipe.evals:
        raise ValueError(f"{recipe.document.file}: the recipe has no evals; add some under evals:")
    for name in names:
        if name not in recipe.evals:
            raise ValueError(f"--only {name}: no such eval; {nearest(name, recipe.evals)}")
    return [recipe.evals[name] for name in names or recipe.evals]


def result_table(results: Sequence[EvalResult]) -> Table:
    """One line per result."""
    table = Table()
    for name in ("eval", "metric", "value", "standard error", "items"):
        table.add_column(name)
    for r in results:
        table.add_row(r.name, r.metric, f"{r.value:.4f}", f"{r.stderr:.4f}", str(r.num_items))
    return table


def answer(
    policy: Path, prompt: str, *, system: str, sampling: Sampling, num_samples: int
) -> list[dict[str, Any]]:
    """Responses to one user message: text, finish, mean log-probability per token."""
    model, tokenizer = load_policy(policy, device=pick_device())
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    tokens = render_prompt(messages, tokenizer)
    longest = len(tokens) + sampling.max_new_tokens + PAGE_TOKENS
    engine = NativeEngine(
        model,
        max_slots=num_samples,
        max_cache_tokens=num_samples * longest,
        page_tokens=PAGE_TOKENS,
    )
    stopping = replace(sampling, stop_token_ids=(tokenizer.eos_token_id,))
    request = Request("prompt", tokens, stopping, num_samples=num_samples)
    found = []
    for completion in engine.generate([request]):
        ended = completion.finish == "stop"
        text = tokenizer.decode(list(completion.tokens[:-1] if ended else completion.tokens))
        mean = sum(completion.logprobs) / len(completion.logprobs)
        found.append({"text": str(text), "finish": completion.finish, "mean_logprob": mean})
    engine.close()
    return found


def scores(reward: Path, items: Path) -> Iterator[dict[str, Any]]:
    """Scores of a JSONL file's items, in order, as JSON values.

    Raises:
        ValueError: a line is no item, with file and line; or the folder is no reward artifact.
    """
    found = [_item(items, n, line) for n, line in enumerate(items.read_text().splitlines(), 1)]
    for score in open_scorer(reward).score(found):
        yield asdict(score)


def _item(file: Path, number: int, line: str) -> Item:
    try:
        values = json.loads(line)
        return Item(
            messages=tuple(values["messages"]),
            response=values["response"],
            answer=values.get("answer", ""),
            verifier=values.get("verifier", ""),
            arguments=values.get("arguments", {}),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}:{number}: not an item ({error}); expected a JSON object with messages and "
            "response"
        ) from error
