"""Items to scores in this process: rules first, then the reward model's heads, then the tree.

The steps stand apart (`encode`, `read_heads`, `rule_signals`, `combine`), because a service runs
them in different threads and packs the items of several callers; `score` is all of them in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import Packed
from model.kernels.experts.blocks import least_rows
from reward.hierarchy import HIERARCHY, Hierarchy, head_key, rule_key
from reward.model import RewardModel
from reward.sandbox import Sandbox
from reward.types import Item, Score, Verdict
from reward.verifiers import verify_all
from reward.verifiers.judge import JudgeModel

Encode = Callable[[Item], tuple[int, ...]]


@dataclass(frozen=True)
class Encoded:
    """An item as the reward model reads it.

    Args:
        tokens: the whole conversation, the response's end-of-turn token last; () where no reward
            model reads it.
        num_prompt_tokens: how many of them come before the response; 0 where no gate asks.
    """

    tokens: tuple[int, ...]
    num_prompt_tokens: int = 0


@dataclass(frozen=True)
class Heads:
    """What the reward model says of one item.

    Args:
        values: by signal, any real number.
        overall: their gate-weighted total, as in `RewardOutput`.
        gate: weight of each dimension; None without a learned gate.
    """

    values: Mapping[str, float]
    overall: float
    gate: Mapping[str, float] | None


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
        judge: asked by the rule `judge`; None leaves that rule without a verdict.

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
        judge: JudgeModel | None = None,
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
        self.max_tokens = max_tokens or _longest(reward_model)
        self._model = reward_model
        self._encode = encode
        self._encode_prompt = encode_prompt
        self._batch_tokens = batch_tokens
        self._sandbox = sandbox
        self._judge = judge

    @property
    def has_heads(self) -> bool:
        """Whether a reward model reads the items beside the rules."""
        return self._model is not None

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order, independent of what else is in the call.

        In fp32 on a CPU, with the C passes built, to the last bit; elsewhere but for rounding.

        Raises: ValueError for wrong data (an unknown rule, a rule the tree does not hold).
        """
        rules = [
            found | self.pattern_signals(item)
            for item, found in zip(items, self.rule_signals(items), strict=True)
        ]
        if self._model is None:
            return [self.combine(found, None) for found in rules]
        encoded = [self.encode(item) for item in items]
        # a group's samples are often the same text: read once, and equal to the last bit
        fitting = dict.fromkeys(one for one in encoded if not self.too_long(one))
        heads: dict[Encoded, Heads] = {}
        for batch in self._batches(fitting):
            heads.update(zip(batch, self.read_heads(batch), strict=True))
        return [
            self.combine(found, heads[one])
            if one in heads
            else self.unknown(found, self.too_long(one))
            for one, found in zip(encoded, rules, strict=True)
        ]

    def rule_signals(self, items: Sequence[Item]) -> list[dict[str, Verdict]]:
        """The verdict of the rule that each item names, by its name in the tree; {} for no rule.

        Raises: ValueError for an unknown rule, or an item that lacks what the rule needs.
        """
        ruled = [item for item in items if item.verifier]
        verdicts = iter(verify_all(ruled, self._sandbox, judge=self._judge) if ruled else [])
        return [{rule_key(i.verifier): next(verdicts)} if i.verifier else {} for i in items]

    def pattern_signals(self, item: Item) -> dict[str, Verdict]:
        """What of the response the tree forbids; needs no other item and no waiting."""
        return self.hierarchy.patterns(item.response)

    def encode(self, item: Item) -> Encoded:
        """The item's tokens; () without a reward model.

        Raises: ValueError for an item that cannot be rendered.
        """
        if self._model is None or self._encode is None:
            return Encoded(())
        if self._model.gate is None or self._encode_prompt is None:
            return Encoded(self._encode(item))
        encoded = Encoded(self._encode(item), len(self._encode_prompt(item)))
        if not 0 < encoded.num_prompt_tokens < len(encoded.tokens):
            raise ValueError(
                f"prompt of {encoded.num_prompt_tokens} tokens in a conversation of "
                f"{len(encoded.tokens)}, expected at least one before the response and one in it"
            )
        return encoded

    def too_long(self, encoded: Encoded) -> str:
        """Why the reward model does not read it; "" if it does."""
        length = len(encoded.tokens)
        if length <= self.max_tokens:
            return ""
        return f"{length} tokens, longer than the limit of {self.max_tokens}"

    @torch.no_grad()
    def read_heads(self, batch: Sequence[Encoded]) -> list[Heads]:
        """The heads of some items in one packed forward, in order.

        Raises: ValueError without a reward model.
        """
        model = self._model
        if model is None:
            raise ValueError("this scorer has no reward model, so there are no heads to read")
        device = model.values.weight.device
        read = list(batch)
        missing = least_rows(model.values.weight) - sum(len(one.tokens) for one in batch)
        if missing > 0:
            # so few tokens are multiplied by other code, which rounds otherwise
            read.append(Encoded(batch[-1].tokens[:1] * (missing + 1), 1))
        packed = Packed.from_sequences([one.tokens for one in read], device=device)
        prompts = None if model.gate is None else [one.num_prompt_tokens for one in read]
        output = model(packed, prompts)
        gates: list[list[float] | None] = [None] * len(read)
        if output.gate is not None:
            gates = output.gate.tolist()
        return [
            Heads(
                values=dict(zip(model.signals, values, strict=True)),
                overall=overall,
                gate=None
                if gate is None
                else dict(zip(self.hierarchy.dimensions, gate, strict=True)),
            )
            for values, overall, gate in zip(
                output.values.tolist(), output.overall.tolist(), gates, strict=True
            )
        ][: len(batch)]

    def check_device(self) -> None:
        """Reads one number of the reward model.

        After a fatal error of a device every later call there fails as well, while memory that ran
        out is free again; so this tells an item that cannot be read from a device that is lost.

        Raises: RuntimeError, as the device does, where it is lost.
        """
        if self._model is not None:
            # Allocates nothing, waits for what was started before.
            self._model.values.weight[0, 0].item()

    def combine(self, rules: Mapping[str, Verdict], heads: Heads | None) -> Score:
        """One score from an item's rules and heads.

        Raises: ValueError for a rule that the tree does not hold.
        """
        signals = dict(rules)
        if heads is not None:
            signals |= {head_key(name): Verdict(value) for name, value in heads.values.items()}
        score = self.hierarchy.score(signals, heads.gate if heads else None)
        return replace(score, version=self.version)

    def unknown(self, rules: Mapping[str, Verdict], reason: str) -> Score:
        """The score of an item that the reward model could not read: none."""
        return Score(0.0, signals=dict(rules), valid=False, reason=reason, version=self.version)

    def _batches(self, encoded: Iterable[Encoded]) -> Iterator[list[Encoded]]:
        batch: list[Encoded] = []
        size = 0
        for one in encoded:
            length = len(one.tokens)
            if batch and size + length > self._batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append(one)
            size += length
        if batch:
            yield batch


def load_scorer(
    folder: Path,
    encode: Encode,
    *,
    encode_prompt: Encode | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    sandbox: Sandbox | None = None,
    judge: JudgeModel | None = None,
) -> InProcessScorer:
    """The scorer of a reward artifact: its model and its tree.

    Raises: ValueError if the folder holds no reward model.
    """
    model = RewardModel.load(folder, dtype=dtype, device=device)
    return InProcessScorer(
        model.hierarchy,
        model,
        encode,
        encode_prompt=encode_prompt,
        sandbox=sandbox,
        judge=judge,
    )


def _longest(model: RewardModel | None) -> int:
    return 0 if model is None else int(model.trunk.config.max_position_embeddings)
