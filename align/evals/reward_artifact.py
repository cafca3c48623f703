"""What evals need of a reward artifact: to recognise it, to score with it, to rank pairs by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.data.batch import Pair
from align.data.render import render_item, render_prompt
from align.evals.types import pick_device
from align.pairs import pair_leads
from reward.model import REWARD_FILE, RewardModel
from reward.sandbox import Sandbox, SandboxConfig
from reward.scorer import InProcessScorer, load_scorer
from reward.verifiers.judge import JudgeModel


def is_reward(folder: Path) -> bool:
    """Whether an artifact is a reward model's, not a policy's."""
    return (folder / REWARD_FILE).exists()


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a reward artifact.

    Raises:
        ValueError: if the folder is none.
    """
    for name in (REWARD_FILE, "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; expected the artifact of a reward stage")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def open_scorer(
    folder: Path,
    sandbox: SandboxConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    judge: JudgeModel | None = None,
) -> InProcessScorer:
    """The artifact's reward model and hierarchy, rendering with the artifact's own tokenizer.

    Args:
        dtype: of the trunk, as in `RewardModel.load`.
        judge: asked by the rule `judge`.
    """
    tokenizer = open_tokenizer(folder)
    return load_scorer(
        folder,
        lambda item: render_item(item, tokenizer),
        encode_prompt=lambda item: render_prompt(item.messages, tokenizer),
        device=pick_device(),
        sandbox=Sandbox(sandbox),
        dtype=dtype,
        judge=judge,
    )


def pair_margins(folder: Path, pairs: Sequence[Pair], *, batch_tokens: int) -> list[float]:
    """Value of chosen minus rejected, each pair under what its label speaks about.

    Raises:
        ValueError: if a pair's label is none of the tree's.
    """
    model = RewardModel.load(folder, device=pick_device())
    return pair_leads(model, pairs, batch_tokens=batch_tokens)
