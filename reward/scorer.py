"""Items to scores in this process: rules first, then the reward model's heads, then the tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from model import Packed
from reward.hierarchy import HIERARCHY, Hierarchy, head_key, rule_key
from reward.model import RewardModel
from reward.sandbox import Sandbox
from reward.types import Item, Score, Verdict
from reward.verifiers import verify_all

Encode = Callable[[Item], tuple[int, ...]]


class InProcessScorer:
    """Implements `reward.types.Scorer`.

    Args:
        hierarchy: the tree; with a reward model it must be the one its heads were trained for.
        reward_model: None scores by rules alone.
        encode: tokens of an item's whole conversation, the response's end-of-turn token last;
            needed with a reward model. A ValueError from it ends the call: it means wrong data.
        encode_prompt: tokens of an item up to its response; needed for a learned gate.
        batch_tokens: tokens per forward pass; changes memory, not the result.
        max_tokens: longer conversations are not scored by the heads: their score is not valid.
        sandbox: where programs run; None takes the shared one.

    Raises: ValueError if something needed is missing or does not fit together.

    Example:
        >>> prompt = ({"role": "user", "content": "2+3?"},)
        >>> InProcessScorer().score([Item(prompt, "5", answer="5", verifier="math")])[0].value
        1.0
    """

    def __init__(
        self,
        hierarchy: Hierarchy = HIERARCHY,
        reward_model: RewardModel | None = None,
        encode: Encode | None = None,
        *,
        encode_prompt: Encode | None = None,
        batch_tokens: int = 16384,
        max_tokens: int = 0,
        sandbox: Sandbox | None = None,
    ) -> None:
        if reward_model is not None and encode is None:
            raise ValueError("a reward model needs `encode`, which gives an item's tokens")
        if reward_model is not None and reward_model.hierarchy.version != hierarchy.version:
            raise ValueError(
                f"hierarchy {hierarchy.version} is not the reward model's "
                f"{reward_model.hierarchy.version}; pass reward_model.hierarchy"
            )
        if reward_model is not None and reward_model.gate is not None and encode_prompt is None:
            raise ValueError(
                "hierarchy.gate = learned needs `encode_prompt`, which gives a prompt's tokens"
            )
        self.hierarchy = hierarchy
        self.version = hierarchy.version if reward_model is None else reward_model.version
        self._model = reward_model
        self._encode = encode
        self._encode_prompt = encode_prompt
        self._batch_tokens = batch_tokens
        self._sandbox = sandbox
        self._max_tokens = max_tokens or _longest(reward_model)

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order; independent of what else is in the call.

        Raises: ValueError for wrong data (an unknown rule, a rule the tree does not hold).
        """
        signals = self._rule_signals(items)
        gates: list[dict[str, float] | None] = [None] * len(items)
        refused: dict[int, str] = {}
        if self._model is not None and self._encode is not None:
            tokens = [self._encode(item) for item in items]
            refused = {
                index: f"{len(sequence)} tokens, longer than the limit of {self._max_tokens}"
                for index, sequence in enumerate(tokens)
                if len(sequence) > self._max_tokens
            }
            for batch in self._batches(tokens, refused):
                self._read_heads(self._model, items, tokens, batch, signals=signals, gates=gates)
        return [
            Score(0.0, signals=found, valid=False, reason=refused[index], version=self.version)
            if index in refused
            else self._versioned(self.hierarchy.score(found, gates[index]))
            for index, found in enumerate(signals)
        ]

    def _rule_signals(self, items: Sequence[Item]) -> list[dict[str, Verdict]]:
        ruled = [item for item in items if item.verifier]
        verdicts = iter(verify_all(ruled, self._sandbox))
        return [{rule_key(i.verifier): next(verdicts)} if i.verifier else {} for i in items]

    def _versioned(self, score: Score) -> Score:
        return Score(
            score.value, score.dimensions, score.signals, score.valid, score.reason, self.version
        )

    def _batches(
        self, tokens: Sequence[tuple[int, ...]], refused: dict[int, str]
    ) -> Iterator[list[int]]:
        batch: list[int] = []
        size = 0
        for index, sequence in enumerate(tokens):
            if index in refused:
                continue
            if batch and size + len(sequence) > self._batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append(index)
            size += len(sequence)
        if batch:
            yield batch

    @torch.no_grad()
    def _read_heads(
        self,
        model: RewardModel,
        items: Sequence[Item],
        tokens: Sequence[tuple[int, ...]],
        batch: Sequence[int],
        *,
        signals: list[dict[str, Verdict]],
        gates: list[dict[str, float] | None],
    ) -> None:
        device = model.values.weight.device
        packed = Packed.from_sequences([tokens[index] for index in batch], device=device)
        prompts = None
        if model.gate is not None and self._encode_prompt is not None:
            prompts = [len(self._encode_prompt(items[index])) for index in batch]
        output = model(packed, prompts)
        values = output.values.tolist()
        weights = None if output.gate is None else output.gate.tolist()
        for place, index in enumerate(batch):
            for name, value in zip(model.signals, values[place], strict=True):
                signals[index][head_key(name)] = Verdict(value)
            if weights is not None:
                gates[index] = dict(zip(self.hierarchy.dimensions, weights[place], strict=True))


def load_scorer(
    folder: Path,
    encode: Encode,
    *,
    encode_prompt: Encode | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sandbox: Sandbox | None = None,
) -> InProcessScorer:
    """The scorer of a reward artifact: its model and its tree.

    Raises: ValueError if the folder holds no reward model.
    """
    model = RewardModel.load(folder, dtype=dtype, device=device)
    return InProcessScorer(
        model.hierarchy, model, encode, encode_prompt=encode_prompt, sandbox=sandbox
    )


def _longest(model: RewardModel | None) -> int:
    return 0 if model is None else int(model.trunk.config.max_position_embeddings)
