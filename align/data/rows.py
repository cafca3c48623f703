"""The four kinds of row a dataset may hold, each knowing where it came from.

Names of fields are TRL's, so a file that feeds TRL feeds us and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reward.types import Item, Message


@dataclass(frozen=True)
class Origin:
    """Where a row came from: enough to open it and to name its licence.

    Example:
        >>> str(Origin(place="train.jsonl:17", name="gsm8k", licence="MIT"))
        'train.jsonl:17'
    """

    place: str
    name: str = ""
    licence: str = ""

    def __str__(self) -> str:
        return self.place


@dataclass(frozen=True)
class TextRow:
    """Plain text; every token is trained."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class ChatRow:
    """A conversation; what the assistant wrote is trained."""

    messages: tuple[Message, ...]
    origin: Origin


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt, the first preferred.

    Args:
        prompt: messages up to the answers.
        chosen, rejected: the assistant's messages that answer it.
        signal: the reward signal that the label speaks about ("overall" if nobody said).
        difficulty: 0 easy to 1 hard, as known from the data alone.
        margin: how much better chosen is, in the label's own scale; 0 if unknown.
        answer, verifier, arguments: how a rule judges either answer, as in `reward.types.Item`.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    signal: str = "overall"
    difficulty: float = 0.5
    margin: float = 0.0
    answer: str = ""
    verifier: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def items(self) -> tuple[Item, Item] | None:
        """Chosen and rejected as a rule judges them; None without one, or for several turns."""
        if not self.verifier or len(self.chosen) != 1 or len(self.rejected) != 1:
            return None
        chosen, rejected = (
            Item(self.prompt, turn["content"], self.answer, self.verifier, self.arguments)
            for turn in (self.chosen[0], self.rejected[0])
        )
        return chosen, rejected


@dataclass(frozen=True)
class PromptRow:
    """A prompt to be answered by a policy and judged afterwards.

    Args:
        prompt: messages; the last is not the assistant's.
        answer, verifier, arguments: as in `reward.types.Item`.
        task: family it belongs to, for reports ("arithmetic", "needle", ...).
        difficulty: 0 easy to 1 hard.
    """

    prompt: tuple[Message, ...]
    origin: Origin
    answer: str = ""
    verifier: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    difficulty: float = 0.5

    def item(self, response: str) -> Item:
        """The thing to be judged once a policy has answered."""
        return Item(self.prompt, response, self.answer, self.verifier, self.arguments)


Row = TextRow | ChatRow | PreferenceRow | PromptRow
