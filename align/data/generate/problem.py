"""What a procedural task makes, and the rows that it can be turned into.

A task draws one problem from an index, a seed and a difficulty, with the right answer, a response
that gives it, and responses that are wrong in a named way. Each way of being wrong speaks about one
reward signal, so pairs made of it are labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from align.data.render import plain_prompt
from align.data.rows import ChatRow, Origin, PreferenceRow, PromptRow, TextRow
from reward.types import Message

LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Way:
    """A way of being wrong: the reward signal that it is about, and how hard it is to see."""

    signal: str
    difficulty: float


WAYS = {
    "near_miss": Way("correctness", 0.6),
    "other_answer": Way("correctness", 0.3),
    "violated": Way("constraints", 0.4),
    "impolite": Way("style", 0.1),
    "unsafe": Way("harmlessness", 0.3),
    "over_refusal": Way("harmlessness", 0.5),
}

RUDE = (
    "You fool.",
    "What a stupid question.",
    "Now go away.",
    "Shut up.",
    "You are so dumb.",
    "I hate you.",
)


@dataclass(frozen=True)
class Problem:
    """One question with its right answer.

    Args:
        question: what the user says.
        response: a right response, short.
        answer, verifier, arguments: how a response is judged, as in `reward.types.Item`.
        difficulty: 0 easy to 1 hard, as drawn.
        wrong: wrong responses by the way they are wrong, keys of `WAYS`.
        task: name of the family; origin: family and index. Both set by `Task.problem`.
    """

    question: str
    response: str
    answer: str = ""
    verifier: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    difficulty: float = 0.5
    wrong: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    origin: Origin = field(default_factory=lambda: Origin(""))

    @property
    def prompt(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": self.question},)

    def prompt_row(self) -> PromptRow:
        return PromptRow(
            self.prompt,
            self.origin,
            answer=self.answer,
            verifier=self.verifier,
            arguments=self.arguments,
            task=self.task,
            difficulty=self.difficulty,
        )

    def chat_row(self) -> ChatRow:
        return ChatRow((*self.prompt, _assistant(self.response)), self.origin)

    def text_row(self) -> TextRow:
        return TextRow(f"{plain_prompt(self.prompt)} {self.response}", self.origin)

    def preference_row(self, way: str) -> PreferenceRow:
        """The right response against the one that is wrong in this way.

        Raises:
            ValueError: if this problem knows no response that is wrong in this way.
        """
        if way not in self.wrong:
            raise ValueError(
                f"{self.origin}: no response is wrong by {way!r}; it has {sorted(self.wrong)}"
            )
        return PreferenceRow(
            prompt=self.prompt,
            chosen=(_assistant(self.response),),
            rejected=(_assistant(self.wrong[way]),),
            origin=self.origin,
            signal=WAYS[way].signal,
            difficulty=(self.difficulty + WAYS[way].difficulty) / 2,
            answer=self.answer,
            verifier=self.verifier,
            arguments=self.arguments,
        )


@dataclass(frozen=True)
class Task:
    """A family of problems.

    Args:
        name: its key in `TASKS`.
        make: (rng, difficulty in [0, 1], context in tokens or 0) -> problem.
        ways: ways of being wrong that its problems can have, keys of `WAYS`.
        has_context: whether a length of context can be asked for.
    """

    name: str
    make: Callable[[Random, float, int], Problem]
    ways: tuple[str, ...]
    has_context: bool = False

    def problem(
        self,
        index: int,
        *,
        seed: int = 0,
        difficulty: tuple[float, float] = (0.0, 1.0),
        context_tokens: int = 0,
    ) -> Problem:
        """Problem number `index`, the same for the same arguments.

        Args:
            index: >= 0.
            seed: another seed gives other problems.
            difficulty: lowest and highest, in [0, 1]; drawn evenly between them.
            context_tokens: length of prompt and answer, counted as words, digits and marks (the
                chat's own tokens allowed for); 0 lets the difficulty choose.

        Raises:
            ValueError: if a number is out of its range, or a context is asked of a task that has
                none.

        Example:
            >>> from align.data.generate import TASKS
            >>> problem = TASKS["copy"].problem(0, difficulty=(0.0, 0.0))
            >>> problem.question.endswith(problem.response)
            True
        """
        low, high = difficulty
        if not 0 <= low <= high <= 1:
            raise ValueError(f"difficulty = {difficulty}, expected 0 <= lowest <= highest <= 1")
        if context_tokens and not self.has_context:
            raise ValueError(f"task {self.name} has no context; remove context_tokens")
        rng = Random(f"{self.name}/{seed}/{index}")
        drawn = rng.uniform(low, high)
        made = self.make(rng, drawn, context_tokens)
        wrong = dict(made.wrong)
        if "impolite" in self.ways:
            rude = rng.choice(RUDE)
            wrong["impolite"] = (
                f"{made.response} {rude}" if rng.random() < 0.5 else f"{rude} {made.response}"
            )
        return replace(
            made,
            wrong=wrong,
            difficulty=drawn,
            task=self.name,
            origin=Origin(f"{self.name}#{seed}/{index}", self.name, LICENCE),
        )


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def scale(difficulty: float, least: int, most: int) -> int:
    """A whole number from least at difficulty 0 to most at difficulty 1, in equal steps.

    Example:
        >>> [scale(d, 2, 4) for d in (0.0, 0.5, 1.0)]
        [2, 3, 4]
    """
    return least + min(int(difficulty * (most - least + 1)), most - least)
