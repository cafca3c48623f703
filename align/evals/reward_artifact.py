"""What evals need of a reward artifact: to recognise it, to score with it, to rank pairs by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.data.batch import Pair
from align.data.render import render_item, render_prompt
from align.evals.likelihood import token_batches
from align.evals.types import pick_device
from model import Packed
from reward.model import REWARD_FILE, RewardModel
from reward.sandbox import Sandbox, SandboxConfig
from reward.scorer import InProcessScorer, load_scorer

OVERALL = "overall"


def is_reward(folder: Path) -> bool:
    """Whether an artifact is a reward model's, not a policy's."""
    return (folder / REWARD_FILE).exists()


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in an artifact."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def open_scorer(
    folder: Path, sandbox: SandboxConfig | None = None, *, dtype: torch.dtype = torch.float32
) -> InProcessScorer:
    """The artifact's reward model and hierarchy, rendering with the artifact's own tokenizer.

    Args:
        dtype: of the trunk.
    """
    tokenizer = open_tokenizer(folder)
    return load_scorer(
        folder,
        lambda item: render_item(item, tokenizer),
        encode_prompt=lambda item: render_prompt(item.messages, tokenizer),
        device=pick_device(),
        sandbox=Sandbox(sandbox),
        dtype=dtype,
    )


@torch.no_grad()
def pair_margins(folder: Path, pairs: Sequence[Pair], *, batch_tokens: int) -> list[float]:
    """Score of chosen minus rejected, each pair under the head that its label speaks about.

    Raises:
        ValueError: if a pair's signal is neither a head nor "overall".
    """
    model = RewardModel.load(folder, device=pick_device())
    known = (*model.signals, OVERALL)
    for pair in pairs:
        if pair.signal not in known:
            raise ValueError(
                f"{pair.chosen.place}: signal {pair.signal!r}, expected one of {', '.join(known)}; "
                "set `signal` on its source"
            )
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    columns: list[dict[str, float]] = []
    for group in token_batches(examples, batch_tokens):
        device = model.values.weight.device
        packed = Packed.from_sequences([example.tokens for example in group], device=device)
        prompts = [next(i for i, w in enumerate(e.weights) if w) for e in group]
        output = model(packed, prompts)
        totals = output.overall.tolist()
        for values, total in zip(output.values.tolist(), totals, strict=True):
            columns.append({**dict(zip(model.signals, values, strict=True)), OVERALL: total})
    return [
        columns[2 * index][pair.signal] - columns[2 * index + 1][pair.signal]
        for index, pair in enumerate(pairs)
    ]
