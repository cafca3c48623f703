"""A scorer that lives elsewhere: `reward.types.Scorer` over HTTP, and as a TRL reward function.

Items go out in batches, several at a time. A batch that was not answered (no connection, the
service is full, stopping or dead) is sent again with the same id until it is, or until the deadline
passes; scores come back one an item, in order. What an in-process scorer gives as an invalid score
(an item that is too long) is one here too; what it raises as ValueError is one here too.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import ValidationError

from reward.types import Item, Message, Score, Scorer
from reward.wire import ErrorDetail, ErrorResponse, Health, ScoreItem, ScoreRequest, ScoreResponse
from serving.client import CONNECT_S, FIRST_WAIT_S, LONGEST_WAIT_S, connect, read_form

AGAIN = (429, 502, 503, 504)
SERVICE = "scoring service"


class HttpScorer:
    """Implements `reward.types.Scorer` with a scoring service; safe to call from several threads.

    Args:
        url: of the service, such as "http://judge:8000".
        api_key: that the service asks for; "" sends none.
        batch_items: items per request; smaller where the service says that they are too many.
        num_connections: requests under way at once.
        deadline_s: seconds for one call of `score`, retries and all.
        transport: in place of the network, in tests.

    Raises: RuntimeError if no service answers within the deadline.

    Example:
        >>> HttpScorer("http://localhost:1", deadline_s=0.01)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: http://localhost:1: no answer within 0.01 s (...
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        batch_items: int = 256,
        num_connections: int = 4,
        deadline_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        for name, value in (("batch_items", batch_items), ("num_connections", num_connections)):
            if value < 1:
                raise ValueError(f"HttpScorer.{name} = {value}, expected 1 or more")
        if deadline_s <= 0:
            raise ValueError(f"HttpScorer.deadline_s = {deadline_s:g}, expected more than 0")
        self.url = url.rstrip("/")
        self._batch_items = batch_items
        self._num_connections = num_connections
        self._deadline_s = deadline_s
        self._client = connect(self.url, api_key=api_key, transport=transport)
        told = self._ask("GET", "/health", b"", time.monotonic() + deadline_s)
        self.version = read_form(Health, told, self.url, service=SERVICE).judge.version

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order.

        Raises:
            ValueError: an item is wrong, by its place in `items`, or the key is.
            RuntimeError: the deadline passed without an answer, or another reward model answered
                than at first.
        """
        until = time.monotonic() + self._deadline_s
        starts = range(0, len(items), self._batch_items)
        pool = ThreadPoolExecutor(min(self._num_connections, max(1, len(starts))))
        try:
            batches = [
                pool.submit(self._batch, items[start : start + self._batch_items], start, until)
                for start in starts
            ]
            return [score for batch in batches for score in batch.result()]
        finally:
            # Where one batch failed, nobody waits for the others.
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _batch(self, items: Sequence[Item], start: int, until: float) -> list[Score]:
        """Scores of items[0] = `start` in the caller's list, and those that follow."""
        request = ScoreRequest(
            id=uuid.uuid4().hex,
            items=tuple(_outgoing(item, start + i) for i, item in enumerate(items)),
        )
        answer = self._ask("POST", "/v1/score", request.model_dump_json().encode(), until)
        if answer.status_code == 413 and len(items) > 1:
            half = len(items) // 2
            return [
                *self._batch(items[:half], start, until),
                *self._batch(items[half:], start + half, until),
            ]
        if answer.status_code != 200:
            refused = read_form(ErrorResponse, answer, self.url, service=SERVICE).error
            if answer.status_code >= 500:
                raise RuntimeError(f"{self.url}: {refused.message} ({refused.code})")
            return self._without_long(items, start, until, refused)
        found = read_form(ScoreResponse, answer, self.url, service=SERVICE)
        if (found.id, len(found.scores)) != (request.id, len(items)):
            raise RuntimeError(
                f"{self.url}: {len(found.scores)} scores under id {found.id!r} for {len(items)} "
                f"items under {request.id!r}; something between here and the service mixes answers"
            )
        if found.judge.version != self.version:
            raise RuntimeError(
                f"{self.url}: scored by {found.judge.version}, expected {self.version} as at the "
                "start; its scores do not compare, serve that artifact again or begin anew"
            )
        return [one.to_score(self.version) for one in found.scores]

    def _without_long(
        self, items: Sequence[Item], start: int, until: float, refused: ErrorDetail
    ) -> list[Score]:
        """Scores of a batch that was refused for its long items alone, theirs not valid."""
        if refused.code != "too_long":
            first = refused.items[0] if refused.items else None
            where = f"item {start + first.index}: {first.message}" if first else refused.message
            raise ValueError(f"{self.url}: {where} ({refused.code})")
        long = {one.index: one.message for one in refused.items}
        fitting = [item for place, item in enumerate(items) if place not in long]
        rest = iter(self._batch(fitting, start, until) if fitting else [])
        return [
            Score(0.0, valid=False, reason=long[place], version=self.version)
            if place in long
            else next(rest)
            for place in range(len(items))
        ]

    def _ask(self, method: str, path: str, body: bytes, until: float) -> httpx.Response:
        """An answer of the service, however often it takes; only what it refuses comes back."""
        wait, cause = FIRST_WAIT_S, "never asked"
        while (left := until - time.monotonic()) > 0:
            asked_s = 0.0
            try:
                answer = self._client.request(
                    method,
                    path,
                    content=body,
                    headers={"content-type": "application/json"},
                    timeout=httpx.Timeout(left, connect=min(left, CONNECT_S)),
                )
                if answer.status_code not in AGAIN:
                    return answer
                cause = f"status {answer.status_code}"
                told = answer.headers.get("retry-after", "")
                asked_s = float(told) if told.isdigit() else 0.0
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            # Spread, so that clients that were refused together do not come back together.
            pause = max(asked_s, wait) * random.uniform(0.5, 1.0)
            time.sleep(max(0.0, min(pause, until - time.monotonic())))
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise RuntimeError(
            f"{self.url}: no answer within {self._deadline_s:g} s ({cause}); is the service up?"
        )


def trl_reward(scorer: Scorer, name: str = "hybrid_align") -> Callable[..., list[float | None]]:
    """A scorer as one of TRL's `reward_funcs`, for text and for chat rows.

    The columns `answer`, `verifier` and `arguments` of the data set, where it has them, become
    those of the items. An empty completion gets 0, the lowest score, without a judge; where a judge
    failed the reward is None, which TRL leaves out.

    Args:
        name: under which TRL logs it.

    Example:
        >>> from reward.scorer import InProcessScorer
        >>> reward = trl_reward(InProcessScorer())
        >>> reward(prompts=["2+3?"], completions=["5"], answer=["5"], verifier=["math"])
        [1.0]
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        rows = len(prompts)
        kept = {
            key: columns.get(key) or [None] * rows for key in ("answer", "verifier", "arguments")
        }
        items = [
            Item(
                messages=_messages(prompt),
                response=_text(completion),
                answer=answer or "",
                verifier=verifier or "",
                arguments=arguments or {},
            )
            for prompt, completion, answer, verifier, arguments in zip(
                prompts, completions, *kept.values(), strict=True
            )
        ]
        asked = [item for item in items if item.response.strip()]
        scores = iter(scorer.score(asked) if asked else [])
        found = [next(scores) if item.response.strip() else Score(0.0) for item in items]
        return [score.value if score.valid else None for score in found]

    reward.__name__ = name
    return reward


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in prompt)


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ValueError(
            f"a completion of {len(completion)} messages, expected one; scores are of one response"
        )
    return str(completion[0]["content"])


def _outgoing(item: Item, place: int) -> ScoreItem:
    try:
        return ScoreItem.from_item(item)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"item {place}: {where}: {first['msg']}") from error
