"""Many callers, one model: items of several requests packed into one forward.

Each item takes two roads that end in one score. Its rule, which may block for seconds (a sandbox, a
symbolic comparison), runs in a pool of threads; its tokens wait in a queue from which one thread,
the only one that touches the model, takes as many as fit a forward. Nothing waits for a batch to
fill: while a forward runs, the next batch gathers by itself. Order of arrival is kept, and scores
do not depend on what shares a forward.

    submit -> encode (1 thread) -> rules (N threads)  -> combine (1 thread) -> future
                                -> forward (1 thread) ->
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from reward.hierarchy import rule_key
from reward.scorer import Encoded, Heads, InProcessScorer
from reward.serving.types import (
    BrokenError,
    Judged,
    Limits,
    NeverFitsError,
    QueueFullError,
    Task,
    WrongItemsError,
)
from reward.types import Item, Verdict
from reward.wire import ItemError

LOG = logging.getLogger(__name__)
MAX_RETRY_S = 60
# Weight of the last forward in the running rate, from which the time to wait is told.
RATE_SHARE = 0.2

Rule = Callable[[Item], dict[str, Verdict]]


class BatchWatch(Protocol):
    """Told of every forward."""

    def forward(self, *, num_items: int, num_tokens: int, seconds: float) -> None: ...


@dataclass
class _Ticket:
    """One request on its way; each place is written by one thread."""

    tasks: Sequence[Task]
    encoded: list[Encoded] = field(default_factory=list)
    rules: list[dict[str, Verdict]] = field(default_factory=list)
    heads: list[Heads | str | None] = field(default_factory=list)
    """An item's heads, or why there are none."""
    wrong: list[ItemError] = field(default_factory=list)
    num_tokens: int = 0
    left: int = 0
    """Parts not yet done."""
    failure: str = ""
    """Why the reward model read none of it and never will."""
    done: Future[list[Judged]] = field(default_factory=Future)


class Batcher:
    """Scores the items of concurrent requests.

    Args:
        scorer: its model is used by one thread only, this object's.
        rule: judges by rule in place of the scorer's, in tests.

    Raises: ValueError for a queue that cannot hold the longest item.

    Example:
        >>> batcher = Batcher(InProcessScorer())
        >>> item = Item(({"role": "user", "content": "2+3?"},), "5", "5", "math")
        >>> batcher.submit([Task(item)]).result()[0].score.value
        1.0
        >>> batcher.close()
    """

    def __init__(
        self,
        scorer: InProcessScorer,
        limits: Limits | None = None,
        *,
        watch: BatchWatch | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.scorer = scorer
        self.limits = limits or Limits()
        asked = self.limits.item_tokens
        longest = scorer.max_tokens
        self.max_item_tokens = longest if asked == "model" else min(asked, longest)
        if self.max_item_tokens > self.limits.queue_tokens:
            raise ValueError(
                f"Limits.queue_tokens = {self.limits.queue_tokens}, expected at least the longest "
                f"item's {self.max_item_tokens}; raise it or lower item_tokens"
            )
        self.queue_items = 0
        self.queue_tokens = 0
        self.known_rules = sorted(
            rule
            for dimension in scorer.hierarchy.dimensions.values()
            for signal in dimension.signals.values()
            for rule in signal.verifiers
        )
        self._watch = watch
        self._rule = rule or (lambda item: scorer.rule_signals([item])[0])
        self._tokens_per_s = 0.0
        self._closed = False
        self._failure = ""
        self._waiting: deque[tuple[_Ticket, int]] = deque()
        self._changed = threading.Condition()
        # One thread: a fast tokenizer must not be used by two at once.
        self._encoder = ThreadPoolExecutor(1, "reward-encode")
        self._combiner = ThreadPoolExecutor(1, "reward-combine")
        self._rules = ThreadPoolExecutor(self.limits.rule_threads, "reward-rule")
        self._model = threading.Thread(target=self._run_model, name="reward-model", daemon=True)
        self._model.start()

    @property
    def failure(self) -> str:
        """Why nothing is judged any more: the device is lost, or the thread that reads; "" if not.

        An item that alone cannot be read (for want of memory, say) is none: the next one can.
        """
        if self._failure or self._closed or self._model.is_alive():
            return self._failure
        return "the thread that reads has ended"

    def submit(self, tasks: Sequence[Task]) -> Future[list[Judged]]:
        """Queues items; the future gives one `Judged` an item, in order.

        The future raises WrongItemsError if items cannot be judged, and as this call does once
        their tokens are known.

        Raises: QueueFullError if there is no room now; NeverFitsError if there never is;
            BrokenError after a failure that takes a new process; RuntimeError once closed.
        """
        if self.failure:
            raise BrokenError(self.failure)
        ticket = _Ticket(tasks)
        # Nobody may cancel it: what was queued is finished, whoever still listens.
        ticket.done.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed; start another")
            self._admit(len(tasks), 0)
        self._encoder.submit(self._prepare, ticket)
        return ticket.done

    def close(self) -> None:
        """Answers what is queued, then ends its threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.queue_items)
        self._model.join()
        for pool in (self._encoder, self._rules, self._combiner):
            pool.shutdown()

    def _admit(self, num_items: int, num_tokens: int) -> None:
        most = self.limits
        if num_items > most.queue_items or num_tokens > most.queue_tokens:
            raise NeverFitsError(
                f"{num_items or 'these'} items with {num_tokens} tokens, expected at most "
                f"{most.queue_items} and {most.queue_tokens} at once; send them in parts"
            )
        items, tokens = self.queue_items + num_items, self.queue_tokens + num_tokens
        if items > most.queue_items or tokens > most.queue_tokens:
            raise QueueFullError(
                f"the queue holds {self.queue_items} of {most.queue_items} items and "
                f"{self.queue_tokens} of {most.queue_tokens} tokens; try again later",
                self._retry_s(),
            )
        self.queue_items, self.queue_tokens = items, tokens

    def _retry_s(self) -> int:
        if not self._tokens_per_s:
            return 1
        return min(MAX_RETRY_S, max(1, math.ceil(self.queue_tokens / self._tokens_per_s)))

    def _prepare(self, ticket: _Ticket) -> None:
        """Encodes a ticket's items and sends their parts on their ways."""
        try:
            for index, task in enumerate(ticket.tasks):
                self._encode(ticket, index, task)
            if ticket.wrong:
                raise WrongItemsError(ticket.wrong)
            ruled = [index for index, task in enumerate(ticket.tasks) if task.item.verifier]
            read = range(len(ticket.tasks)) if self.scorer.has_heads else range(0)
            ticket.left = len(ruled) + len(read)
            ticket.rules = [{} for _ in ticket.tasks]
            ticket.heads = [None for _ in ticket.tasks]
            num_tokens = sum(len(one.tokens) for one in ticket.encoded)
            with self._changed:
                self._admit(0, num_tokens)
                ticket.num_tokens = num_tokens
                self._waiting.extend((ticket, index) for index in read)
                self._changed.notify_all()
        except Exception as error:
            self._release(ticket)
            ticket.done.set_exception(error)
            return
        for index in ruled:
            self._rules.submit(self._judge, ticket, index)
        if not ruled and not read:
            self._combiner.submit(self._finish, ticket)

    def _encode(self, ticket: _Ticket, index: int, task: Task) -> None:
        if task.item.verifier and task.item.verifier not in self.known_rules:
            message = (
                f"verifier = {task.item.verifier!r}, but no signal of hierarchy "
                f"{self.scorer.hierarchy.version} is judged by it; expected one of "
                f"{', '.join(self.known_rules) or 'none at all'}"
            )
            ticket.wrong.append(ItemError(index=index, code="unknown_verifier", message=message))
            return
        try:
            encoded = task.encode() if task.encode else self.scorer.encode(task.item)
        except ValueError as error:
            ticket.wrong.append(ItemError(index=index, code="wrong_item", message=str(error)))
            return
        ticket.encoded.append(encoded)
        length, most = len(encoded.tokens), self.max_item_tokens
        if length > most:
            message = f"{length} tokens, longer than the limit of {most}"
            ticket.wrong.append(
                ItemError(
                    index=index,
                    code="too_long",
                    message=message,
                    num_tokens=length,
                    max_tokens=most,
                )
            )

    def _judge(self, ticket: _Ticket, index: int) -> None:
        item = ticket.tasks[index].item
        try:
            ticket.rules[index] = self._rule(item)
        except ValueError as error:
            ticket.wrong.append(ItemError(index=index, code="wrong_item", message=str(error)))
        except Exception as error:
            # A rule that breaks says nothing about the response: unknown, not wrong.
            LOG.exception("rule %s failed", item.verifier)
            reason = f"{type(error).__name__}: {error}"
            ticket.rules[index] = {rule_key(item.verifier): Verdict(0.0, False, reason)}
        self._advance([ticket])

    def _run_model(self) -> None:
        while batch := self._take():
            try:
                if not self._failure:
                    self._forward(batch)
            except BaseException as error:
                # Whatever it was, this thread goes on: who waits is told instead of left waiting.
                LOG.critical(
                    "the reward model reads no more; start the service anew", exc_info=True
                )
                self._failure = f"{type(error).__name__}: {error}"
            for ticket, _ in batch:
                ticket.failure = self._failure
            self._advance([ticket for ticket, _ in batch])

    def _forward(self, batch: Sequence[tuple[_Ticket, int]]) -> None:
        encoded = [ticket.encoded[index] for ticket, index in batch]
        start = time.perf_counter()
        found = self._read(encoded)
        for (ticket, index), heads in zip(batch, found, strict=True):
            ticket.heads[index] = heads
        self._told(len(batch), sum(len(e.tokens) for e in encoded), time.perf_counter() - start)

    def _read(self, encoded: Sequence[Encoded]) -> Sequence[Heads | str]:
        """Heads of each item, or why it has none.

        Raises: whatever the device raises where it is lost.
        """
        try:
            return self.scorer.read_heads(encoded)
        except Exception as error:
            self.scorer.check_device()
            if len(encoded) == 1:
                # Out of memory, say: the item stays without a score, the service goes on.
                LOG.exception("a forward of %d tokens failed", len(encoded[0].tokens))
                return [f"reward model: {type(error).__name__}: {error}"]
        # One item must not spoil its neighbours, which may be another caller's: each alone.
        return [heads for one in encoded for heads in self._read([one])]

    def _take(self) -> list[tuple[_Ticket, int]]:
        """What comes next and fits one forward; empty once closed and done."""
        batch: list[tuple[_Ticket, int]] = []
        size = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or (self._closed and not self.queue_items))
            while self._waiting:
                ticket, index = self._waiting[0]
                size += len(ticket.encoded[index].tokens)
                if batch and size > self.limits.batch_tokens:
                    break
                batch.append(self._waiting.popleft())
        return batch

    def _told(self, num_items: int, num_tokens: int, seconds: float) -> None:
        rate = num_tokens / max(seconds, 1e-9)
        known = self._tokens_per_s or rate
        self._tokens_per_s = (1 - RATE_SHARE) * known + RATE_SHARE * rate
        if self._watch is not None:
            self._watch.forward(num_items=num_items, num_tokens=num_tokens, seconds=seconds)

    def _advance(self, tickets: Sequence[_Ticket]) -> None:
        """One part of each is done; after the last one a ticket can be combined."""
        with self._changed:
            for ticket in tickets:
                ticket.left -= 1
                if not ticket.left:
                    self._combiner.submit(self._finish, ticket)

    def _finish(self, ticket: _Ticket) -> None:
        found: list[Judged] = []
        error: Exception | None = None
        try:
            if ticket.failure:
                error = BrokenError(ticket.failure)
            elif not ticket.wrong:
                found = [self._combined(ticket, index) for index in range(len(ticket.tasks))]
            if ticket.wrong:
                error = WrongItemsError(sorted(ticket.wrong, key=lambda one: one.index))
        except Exception as broken:
            LOG.exception("a request of %d items failed", len(ticket.tasks))
            error = broken
        self._release(ticket)
        if error is None:
            ticket.done.set_result(found)
        else:
            ticket.done.set_exception(error)

    def _combined(self, ticket: _Ticket, index: int) -> Judged:
        heads, item = ticket.heads[index], ticket.tasks[index].item
        rules = ticket.rules[index] | self.scorer.pattern_signals(item)
        num_tokens = len(ticket.encoded[index].tokens)
        if isinstance(heads, str):
            return Judged(self.scorer.unknown(rules, heads), None, num_tokens)
        try:
            score = self.scorer.combine(rules, heads)
        except ValueError as error:
            # A head that is not finite: the judge failed, the response is unknown.
            return Judged(self.scorer.unknown(rules, str(error)), None, num_tokens)
        return Judged(score, heads.overall if heads else None, num_tokens)

    def _release(self, ticket: _Ticket) -> None:
        with self._changed:
            self.queue_items -= len(ticket.tasks)
            self.queue_tokens -= ticket.num_tokens
            self._changed.notify_all()
