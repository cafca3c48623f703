"""What is judged and what a judgement says.

`Item -> Verdict` per signal, `{signal: Verdict} -> Score` by the declared hierarchy. Unknown is not
wrong: a judge that failed or does not apply says `valid=False`, which is left out, never read as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict


class Message(TypedDict):
    """One turn of a chat, as transformers' and TRL's chat templates take it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Item:
    """One response to be judged.

    Args:
        messages: the conversation up to the response; its last message is not the assistant's.
        response: the text that answers it, without the end-of-turn token.
        answer: reference answer, or "" if there is none.
        verifier: name of the rule that can judge it exactly (a key of
            `reward.verifiers.VERIFIERS`), or "" if there is none.
        arguments: what that rule needs beyond the answer, JSON values only.

    Example:
        >>> item = Item(messages=({"role": "user", "content": "2+3?"},), response="5",
        ...             answer="5", verifier="math")
        >>> item.arguments
        {}
    """

    messages: tuple[Message, ...]
    response: str
    answer: str = ""
    verifier: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """One signal's judgement of one item.

    Args:
        value: exact verdicts are in [0, 1]; a learned head gives any real number.
        valid: False if the judge does not apply or failed; then value means nothing.
        reason: one line for a person: what was found, or why there is no verdict.
    """

    value: float
    valid: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """The hierarchy's answer for one item, down to the signals it was made of.

    Args:
        value: the scalar that training uses; means nothing unless valid.
        dimensions: correctness, truthfulness, helpfulness, harmlessness: those that applied.
        signals: every signal's verdict by name.
        version: name and digest of the hierarchy and the reward model that made it.
    """

    value: float
    dimensions: Mapping[str, float] = field(default_factory=dict)
    signals: Mapping[str, Verdict] = field(default_factory=dict)
    valid: bool = True
    reason: str = ""
    version: str = ""


class Scorer(Protocol):
    """Scores items; in process, over HTTP, or in a test."""

    version: str

    def score(self, items: Sequence[Item]) -> list[Score]: ...
