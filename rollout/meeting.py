"""The trainer's side of a broadcast: workers are called together, and go on once all have come."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
from torch._C._distributed_c10d import Store, TCPStore

from rollout.broadcast import BUCKET_BYTES, GO, JOINED, OFF, SUMS, WORD, Group, one_line, send
from rollout.canary import ProofError
from rollout.remote import BrokenPushError, GoneError, Pushed, RemoteWorker
from rollout.sync import Stream
from rollout.wire import BroadcastRequest, Health, TensorForm, WeightsTold
from serving.client import CONNECT_S, FIRST_WAIT_S

COME_S = 0.02
Answer = Future[WeightsTold]


@dataclass(frozen=True)
class Announced:
    """What will be sent.

    Args:
        device: of the trainer's weights.
        timeout_s: longest that a member waits for the others.
    """

    tensors: tuple[TensorForm, ...]
    version: int
    device: torch.device
    timeout_s: float


def broadcast(
    workers: Sequence[RemoteWorker], stream: Stream, announced: Announced, *, deadline_s: float
) -> Pushed | None:
    """One push to those workers that answer; those that took it are ready then.

    Returns: what they hold; None if none of them answers within the deadline.

    Raises:
        ProofError: if a worker refuses, or holds anything else than what was sent.
        BrokenPushError: if a member is lost on the way; those left refuse to sample.
    """
    until = time.monotonic() + deadline_s
    while True:
        told = [(worker, worker.health()) for worker in workers]
        present = [(worker, health) for worker, health in told if health is not None]
        if present and (pushed := _broadcast(present, stream, announced)):
            return pushed
        if time.monotonic() > until:
            return None
        time.sleep(FIRST_WAIT_S)


def _broadcast(
    workers: Sequence[tuple[RemoteWorker, Health]], stream: Stream, announced: Announced
) -> Pushed | None:
    """One try; None if one of them did not come, and then nothing was sent."""
    store = TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False,
        timeout=timedelta(seconds=announced.timeout_s),
    )  # fmt: skip
    is_nccl = {announced.device.type, *(health.device for _, health in workers)} == {"cuda"}
    backend = "nccl" if is_nccl else "gloo"
    with _asked([worker for worker, _ in workers], store.port, backend, announced) as answers:
        try:
            if not _all_come(store, answers, announced.timeout_s):
                return None
            sums = _sent(store, answers, backend, stream, announced)
        finally:
            # whoever waits for the word goes home; a store keeps the first one that counts
            if not store.check([WORD]):
                store.set(WORD, OFF)
        pushed = Pushed(None, announced.version, sums)
        for (worker, _), answer in zip(workers, answers, strict=True):
            try:
                worker.check(pushed, answer.result())
                worker.is_ready = True
            except GoneError as error:
                worker.trouble = str(error)
    return pushed


@contextmanager
def _asked(
    workers: Sequence[RemoteWorker], port: int, backend: str, announced: Announced
) -> Iterator[list[Answer]]:
    """Each worker's answer to the announcement; all have answered at the end."""
    with ThreadPoolExecutor(len(workers)) as pool:

        def ask(rank: int, worker: RemoteWorker) -> WeightsTold:
            asked = BroadcastRequest(
                version=announced.version,
                host=_own_address(worker.url),
                port=port,
                rank=rank,
                world_size=len(workers) + 1,
                backend="nccl" if backend == "nccl" else "gloo",
                bucket_bytes=BUCKET_BYTES,
                timeout_s=announced.timeout_s,
                tensors=announced.tensors,
            )
            return worker.receive(asked)

        yield [pool.submit(ask, rank, worker) for rank, worker in enumerate(workers, 1)]


def _own_address(url: str) -> str:
    """This machine's address, as the worker can reach it."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), CONNECT_S) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise GoneError(f"{url}: {type(error).__name__}: {error}") from error


def _all_come(store: Store, answers: Sequence[Answer], timeout_s: float) -> bool:
    """Waits until every worker has joined; False if one is gone.

    Raises:
        ProofError: as a worker refuses.
    """
    names = [f"{JOINED}-{rank}" for rank in range(1, len(answers) + 1)]
    until = time.monotonic() + timeout_s
    while not store.check(names):
        over = next((answer for answer in answers if answer.done()), None)
        if over is not None:
            error = over.exception()
            if isinstance(error, GoneError):
                return False
            raise error or RuntimeError("a worker answered a push that had not begun")
        if time.monotonic() > until:
            return False
        time.sleep(COME_S)
    return True


def _sent(
    store: Store, answers: Sequence[Answer], backend: str, stream: Stream, announced: Announced
) -> dict[str, str]:
    """Says go and sends; checksums of what was sent."""
    store.set(WORD, GO)
    try:
        group = Group(
            store,
            rank=0,
            size=len(answers) + 1,
            backend=backend,
            timeout_s=announced.timeout_s,
            is_met=lambda: not any(answer.done() for answer in answers),
        )
        try:
            sums = send(
                stream,
                announced.tensors,
                group,
                bucket_bytes=BUCKET_BYTES,
                device=announced.device if backend == "nccl" else torch.device("cpu"),
            )
        finally:
            group.close()
        store.set(SUMS, json.dumps(sums))
    except RuntimeError as error:
        raise _broken(answers, one_line(error)) from error
    refused = [x for x in (answer.exception() for answer in answers) if isinstance(x, ProofError)]
    if refused:
        raise _broken(answers, "not all of them took it")
    return sums


def _broken(answers: Sequence[Answer], told: str) -> BrokenPushError:
    said = "; ".join(str(x) for x in (a.exception() for a in answers if a.done()) if x)
    return BrokenPushError(f"the broadcast broke off: {told}{f' ({said})' if said else ''}")
