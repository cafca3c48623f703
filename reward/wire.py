"""What the scoring API says over HTTP: one form for service and client.

    POST /v1/score   ScoreRequest -> ScoreResponse
    POST /get_reward RewardRequest -> RewardResponse    (OpenRLHF's remote reward URL)

Every refusal, whatever its cause, is an ErrorResponse. Unknown keys are refused, never ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from reward.types import Item, Score, Verdict

ErrorCode = Literal[
    "broken",
    "draining",
    "empty",
    "internal",
    "malformed",
    "method_not_allowed",
    "no_verdict",
    "not_found",
    "queue_full",
    "reused_id",
    "too_large",
    "too_long",
    "unauthorized",
    "unknown_verifier",
    "wrong_item",
]


def _encodable(text: str) -> str:
    # JSON may escape half a surrogate pair, which is no text that a tokenizer could read.
    text.encode()
    return text


def _plain_json(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    return arguments


Text = Annotated[str, AfterValidator(_encodable)]
Arguments = Annotated[dict[str, JsonValue], AfterValidator(_plain_json)]
RequestId = Annotated[str, Field(max_length=128, pattern=r"^[!-~]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class ScoreItem(_Strict):
    """One response to be judged: the conversation, or one user's text, and what answers it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "2+3?"}],
                    "response": "It is 5.",
                    "answer": "5",
                    "verifier": "math",
                },
                {"prompt": "Write a haiku.", "response": "Old pond, a frog jumps"},
            ]
        }
    )

    messages: tuple[ChatMessage, ...] = ()
    """The conversation up to the response; its last message is not the assistant's."""
    prompt: Text = ""
    """In place of `messages`: the text of one user message."""
    response: Text
    """What is judged, without the end-of-turn token."""
    answer: Text = ""
    """Reference answer, where a rule needs one."""
    verifier: Text = ""
    """The rule that judges it exactly; without one the reward model alone does."""
    arguments: Arguments = Field(default_factory=dict)
    """What that rule needs beyond the answer."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if bool(self.messages) == bool(self.prompt):
            raise ValueError("give either messages or prompt, not empty")
        if self.messages and self.messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's; it belongs into response")
        return self

    def to_item(self) -> Item:
        """The item that a scorer takes."""
        turns = self.messages or (ChatMessage(role="user", content=self.prompt),)
        return Item(
            messages=tuple({"role": turn.role, "content": turn.content} for turn in turns),
            response=self.response,
            answer=self.answer,
            verifier=self.verifier,
            arguments=self.arguments,
        )

    @classmethod
    def from_item(cls, item: Item) -> ScoreItem:
        """The form in which an item travels.

        Raises: ValueError for an item that cannot: no messages, or arguments that are not JSON.
        """
        return cls(
            messages=tuple(ChatMessage(**message) for message in item.messages),
            response=item.response,
            answer=item.answer,
            verifier=item.verifier,
            arguments=dict(item.arguments),
        )


class ScoreRequest(_Strict):
    """A batch of items; its scores come back in the same order."""

    id: RequestId = ""
    """Chosen by the caller: the same id with the same items gives the same answer again, so a
    request whose answer was lost can be repeated. "" lets the service choose one."""
    items: tuple[ScoreItem, ...] = Field(min_length=1)
    """What is judged."""


class SignalVerdict(_Strict):
    """One signal's judgement: a rule's in [0, 1], a head's any real number."""

    value: float
    valid: bool
    reason: str


class ItemScore(_Strict):
    """The judgement of one item, down to the signals that it was made of."""

    score: float
    """What training uses, in [0, 1]; means nothing unless valid."""
    probability: float | None
    """Chance that the response is preferred; null where no reward model read it. Calibrated where
    the artifact holds a calibration, else sigmoid of the heads' gate-weighted total: the
    Bradley-Terry chance against a response whose total is 0."""
    dimensions: dict[str, float]
    """Correctness, truthfulness, helpfulness, harmlessness: those that applied."""
    signals: dict[str, SignalVerdict]
    """Verdicts by `rule:<name>` and `head:<name>`."""
    valid: bool
    """False where a judge failed: unknown, which is not 0."""
    reason: str
    """Why it is not valid, or what capped it; else ""."""
    num_tokens: int
    """Tokens that the reward model read; 0 without one."""

    @classmethod
    def from_score(cls, score: Score, *, probability: float | None, num_tokens: int) -> ItemScore:
        """The form in which a score travels."""
        return cls(
            score=score.value,
            probability=probability,
            dimensions=dict(score.dimensions),
            signals={
                name: SignalVerdict(value=v.value, valid=v.valid, reason=v.reason)
                for name, v in score.signals.items()
            },
            valid=score.valid,
            reason=score.reason,
            num_tokens=num_tokens,
        )

    def to_score(self, version: str) -> Score:
        """The score that an in-process scorer would have given."""
        return Score(
            value=self.score,
            dimensions=self.dimensions,
            signals={n: Verdict(v.value, v.valid, v.reason) for n, v in self.signals.items()},
            valid=self.valid,
            reason=self.reason,
            version=version,
        )


class Judge(_Strict):
    """Who judged."""

    version: str
    """Of tree and heads together; stands in every in-process score as well."""
    hierarchy: str
    """Name and digest of the declared tree."""
    artifact: str
    """Digest in the artifact's manifest; "" where the folder has none."""
    calibrated: bool
    """Whether `probability` went through the artifact's calibration."""


class ScoreResponse(_Strict):
    """Scores in the order of the request's items."""

    id: str
    judge: Judge
    scores: tuple[ItemScore, ...]


class RewardRequest(_Strict):
    """What OpenRLHF posts to its remote reward URL."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"query": ["2+3?It is 5."], "prompts": ["2+3?"], "labels": [""]}]
        }
    )

    query: tuple[Text, ...] = Field(min_length=1)
    """Prompt and response as one text, special tokens included."""
    prompts: tuple[Text, ...]
    """The prompt that each query begins with: a rendered chat, or the text of one user message."""
    labels: tuple[Text | None, ...] = ()
    """Reference answers for the service's label verifier, or JSON objects with verifier, answer,
    arguments; "" or null where only the reward model judges."""

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        if len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.query)} queries")
        if self.labels and len(self.labels) != len(self.query):
            raise ValueError(f"{len(self.labels)} labels for {len(self.query)} queries")
        return self


class RewardResponse(_Strict):
    """What OpenRLHF reads from it."""

    rewards: tuple[float, ...]
    """What advantages are made of."""
    scores: tuple[float, ...]
    """The same, in [0, 1], for its dynamic filtering."""
    extra_logs: dict[str, tuple[float, ...]]
    """For its log: `malformed` is 1 where a response was no legal turn and so got 0, the lowest
    score; `num_tokens` what the reward model read."""


class ItemError(_Strict):
    """What is wrong with one item."""

    index: int
    """Place in the request, from 0."""
    code: ErrorCode
    message: str
    num_tokens: int = 0
    """Length of an item that is too long."""
    max_tokens: int = 0
    """The limit that it passed."""


class ErrorDetail(_Strict):
    """Why a request was refused, and what to do."""

    code: ErrorCode
    message: str
    items: tuple[ItemError, ...] = ()
    """The items at fault, where it was items; the others are fine."""


class ErrorResponse(_Strict):
    """The one form of every answer that is not 200."""

    error: ErrorDetail


class Health(_Strict):
    """Whether the service takes requests."""

    status: Literal["ok", "draining", "broken"]
    """`broken`: it answers nothing with scores any more and has to be started anew."""
    reason: str = ""
    """What broke it."""
    judge: Judge
    queue_items: int
    queue_tokens: int


class Label(_Strict):
    """A label of OpenRLHF that names its own rule, as a JSON object in its text."""

    verifier: Text
    answer: Text = ""
    arguments: Arguments = Field(default_factory=dict)


def read_label(label: str | None, verifier: str) -> Label:
    """What a label says about the judging of its query.

    Args:
        verifier: rule for plain labels; "" where the service has none.

    Raises: ValueError for a plain label without a rule, or a JSON object that is no `Label`.

    Example:
        >>> read_label("5", "math").answer, read_label('{"verifier": "exact"}', "").verifier
        ('5', 'exact')
    """
    if not label:
        return Label(verifier="")
    if label.lstrip().startswith("{"):
        return Label.model_validate_json(label)
    if not verifier:
        raise ValueError(
            "a plain label, and the service has no rule for it; start it with --label-verifier, "
            "or send a JSON object with verifier and answer"
        )
    return Label(verifier=verifier, answer=label)
