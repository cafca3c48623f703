"""A scorer with its queue, and what the routes ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from reward.hierarchy import sigmoid
from reward.scorer import InProcessScorer
from reward.serving.batching import Batcher, Rule
from reward.serving.metrics import Metrics
from reward.serving.types import (
    BrokenError,
    Judged,
    Limits,
    NeverFitsError,
    QueueFullError,
    Task,
    WrongItemsError,
)
from reward.types import Item
from reward.wire import (
    ErrorCode,
    ItemError,
    ItemScore,
    Judge,
    RewardRequest,
    RewardResponse,
    ScoreRequest,
    ScoreResponse,
    read_label,
)

# After which a client asks again whether the service was started anew.
RESTART_S = 5
ReadText = Callable[[str, str], Task | None]


def read_plain(prompt: str, query: str) -> Task | None:
    """The item of a prompt that is one user's text; None if nothing answers it.

    Raises: ValueError if the query does not begin with its prompt.

    Example:
        >>> read_plain("2+3?", "2+3?5").item.response
        '5'
    """
    if not query.startswith(prompt):
        raise ValueError("the query does not begin with its prompt")
    response = query[len(prompt) :]
    item = Item(({"role": "user", "content": prompt},), response)
    return Task(item) if response.strip() else None


@dataclass(frozen=True)
class Settings:
    """What a service is told beside its scorer.

    Args:
        limits: of the queue and of an item.
        max_body_bytes: longest request body.
        api_key: "" lets everybody in; /health and /metrics are always open.
        artifact: digest of the artifact that the scorer was loaded from.
        label_verifier: rule that judges OpenRLHF's plain labels; "" refuses them.
        read_text: an OpenRLHF prompt and query as an item; None for a response that is no legal
            turn of the assistant.
        calibrate: the heads' total to the chance of being preferred, where the artifact holds a
            calibration.
        rule: judges by rule in place of the scorer's, in tests.
    """

    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 8 << 20
    api_key: str = ""
    artifact: str = ""
    label_verifier: str = ""
    read_text: ReadText = read_plain
    calibrate: Callable[[float], float] | None = None
    rule: Rule | None = None


class RefusedError(Exception):
    """A request that is not answered with scores."""

    def __init__(
        self,
        status: int,
        code: ErrorCode,
        message: str,
        *,
        items: Sequence[ItemError] = (),
        retry_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.items, self.retry_s = status, code, tuple(items), retry_s


class Service:
    """A scorer with its queue: what the routes call.

    Args:
        scorer: judges; used by this service alone.

    Raises: ValueError for limits that do not fit the scorer, or an unknown label verifier.
    """

    def __init__(self, scorer: InProcessScorer, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.batcher = Batcher(
            scorer, self.settings.limits, watch=self.metrics, rule=self.settings.rule
        )
        label_rule = self.settings.label_verifier
        if label_rule and label_rule not in self.batcher.known_rules:
            raise ValueError(
                f"Settings.label_verifier = {label_rule!r}, expected a rule of the tree: "
                f"{', '.join(self.batcher.known_rules)}"
            )
        self.metrics.read_queue(lambda: self.batcher.queue_items, lambda: self.batcher.queue_tokens)
        self.judge = Judge(
            version=scorer.version,
            hierarchy=scorer.hierarchy.version,
            artifact=self.settings.artifact,
            calibrated=self.settings.calibrate is not None,
        )

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Scores of a batch.

        Raises: RefusedError for items that cannot be judged, or for want of room.
        """
        empty = [
            ItemError(index=index, code="empty", message="the response is empty")
            for index, item in enumerate(request.items)
            if not item.response.strip()
        ]
        if empty:
            raise _refused_items(empty)
        found = await self._judged([Task(item.to_item()) for item in request.items])
        scores = tuple(
            ItemScore.from_score(
                one.score, probability=self._probability(one.overall), num_tokens=one.num_tokens
            )
            for one in found
        )
        return ScoreResponse(id=request.id, judge=self.judge, scores=scores)

    async def reward(self, request: RewardRequest) -> RewardResponse:
        """The same as OpenRLHF asks for it.

        A response that is no legal turn (empty, or with special tokens inside) gets 0, the lowest
        score: that is a verdict on the policy. A judge that failed has no score, for which the form
        has no word, so the request is refused.

        Raises: RefusedError as `score`.
        """
        tasks = self._read_queries(request)
        found = iter(await self._judged([task for task in tasks if task]) if any(tasks) else [])
        judged = [next(found) if task else None for task in tasks]
        failed = [
            ItemError(index=index, code="no_verdict", message=one.score.reason)
            for index, one in enumerate(judged)
            if one and not one.score.valid
        ]
        if failed:
            raise _refused_items(failed)
        rewards = tuple(one.score.value if one else 0.0 for one in judged)
        logs = {
            "malformed": tuple(0.0 if one else 1.0 for one in judged),
            "num_tokens": tuple(float(one.num_tokens) if one else 0.0 for one in judged),
        }
        return RewardResponse(rewards=rewards, scores=rewards, extra_logs=logs)

    def _read_queries(self, request: RewardRequest) -> list[Task | None]:
        tasks: list[Task | None] = []
        wrong: list[ItemError] = []
        labels = request.labels or (None,) * len(request.query)
        for index, (query, prompt, label) in enumerate(
            zip(request.query, request.prompts, labels, strict=True)
        ):
            try:
                task = self.settings.read_text(prompt, query)
                told = read_label(label, self.settings.label_verifier)
            except ValueError as error:
                message = str(error).replace("\n", " ")
                wrong.append(ItemError(index=index, code="wrong_item", message=message))
                continue
            if task is not None:
                item = replace(
                    task.item,
                    answer=told.answer,
                    verifier=told.verifier,
                    arguments=told.arguments,
                )
                task = replace(task, item=item)
            tasks.append(task)
        if wrong:
            raise _refused_items(wrong)
        return tasks

    async def _judged(self, tasks: Sequence[Task]) -> list[Judged]:
        try:
            found = await asyncio.wrap_future(self.batcher.submit(tasks))
        except QueueFullError as error:
            raise RefusedError(429, "queue_full", str(error), retry_s=error.retry_s) from error
        except NeverFitsError as error:
            raise RefusedError(413, "too_large", str(error)) from error
        except WrongItemsError as error:
            raise _refused_items(error.items) from error
        except BrokenError as error:
            text = f"the reward model can judge nothing more, start the service anew: {error}"
            raise RefusedError(503, "broken", text, retry_s=RESTART_S) from error
        self.metrics.scored(
            num_items=len(found),
            num_tokens=sum(one.num_tokens for one in found),
            num_invalid=sum(not one.score.valid for one in found),
        )
        return found

    def _probability(self, overall: float | None) -> float | None:
        if overall is None:
            return None
        return (self.settings.calibrate or sigmoid)(overall)


def _refused_items(items: Sequence[ItemError]) -> RefusedError:
    first = items[0]
    codes = {one.code for one in items}
    more = f" (and {len(items) - 1} more)" if len(items) > 1 else ""
    return RefusedError(
        422,
        first.code if len(codes) == 1 else "wrong_item",
        f"item {first.index}: {first.message}{more}",
        items=items,
    )
