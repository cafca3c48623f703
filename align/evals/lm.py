"""Mean negative log-likelihood per trained token on held-out text or chats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from align.data.render import render_chat, render_text
from align.data.rows import ChatRow, TextRow
from align.evals.held_out import HeldOut, read_held_out
from align.evals.likelihood import example_logprobs
from align.evals.types import Context, EvalBase, EvalResult, pick_device
from align.policy import load_policy


class LmEval(EvalBase):
    """Nats per token: all of a text, the assistant's of a chat."""

    kind: Literal["lm"] = "lm"
    """Discriminator."""

    data: tuple[HeldOut, ...] = Field(min_length=1)
    """Held-out text or chat rows."""

    rows: Literal["text", "chat"] = "chat"
    """What to make of sources that can be either; a source's own `as` wins."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens per forward pass; changes memory, not the result."""


def run(config: LmEval, context: Context) -> EvalResult:
    """Nats per token over all rows together; a row's item is its share of that sum.

    The value is (sum of nll) / (sum of tokens), so long rows weigh more; item i is
    nll_i / (mean tokens per row), which makes the value the plain mean of the items and paired
    differences between policies exact. The standard error is the ratio estimator's.

    Raises:
        ValueError: if a row is neither text nor chat or there are fewer than two.
    """
    name = config.name or "lm"
    model, tokenizer = load_policy(context.policy, device=pick_device())
    types: tuple[type[ChatRow | TextRow], ...] = (ChatRow, TextRow)
    rows, skipped = read_held_out(config.data, types, kind=config.rows, name=name, context=context)
    examples = [
        render_chat(row, tokenizer) if isinstance(row, ChatRow) else render_text(row, tokenizer)
        for row in rows
    ]
    sums = example_logprobs(model, examples, batch_tokens=config.batch_tokens)
    nlls = [-total for total in sums]
    return per_token(name, nlls, [sum(e.weights) for e in examples], details=skipped)


def per_token(
    name: str, nlls: Sequence[float], tokens: Sequence[float], details: Mapping[str, float]
) -> EvalResult:
    """The ratio sum(nlls) / sum(tokens) as an EvalResult.

    Example:
        >>> result = per_token("lm", [2.0, 12.0], [1.0, 6.0], {})
        >>> result.value, result.stderr
        (2.0, 0.0)
    """
    count = len(nlls)
    mean_tokens = math.fsum(tokens) / count
    value = math.fsum(nlls) / math.fsum(tokens)
    squares = ((nll - value * size) ** 2 for nll, size in zip(nlls, tokens, strict=True))
    return EvalResult(
        name=name,
        metric="nll",
        value=value,
        stderr=math.sqrt(math.fsum(squares) / (count - 1) / count) / mean_tokens,
        num_items=count,
        items=tuple(nll / mean_tokens for nll in nlls),
        higher_is_better=False,
        details={"tokens": math.fsum(tokens), **details},
    )
