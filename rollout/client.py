"""An engine that lives elsewhere: `rollout.types.Engine` over several workers.

Requests wait in one queue, from which each worker is given as many as it may have; so a fast one
takes more. What a worker did not answer, because it died, stopped or broke off, goes back to the
front of the queue and to whoever is there; the same worker asked again under the same id gives the
same answer, and only the first answer to a request counts: nothing is lost or taken twice.

A worker takes part once it holds the version that is asked for, checksum by checksum. One that
comes back from the dead is pushed the latest weights first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from rollout.broadcast import forms
from rollout.calls import Call
from rollout.canary import ProofError
from rollout.meeting import Announced, broadcast
from rollout.remote import BusyError, GoneError, Pushed, RemoteWorker
from rollout.sync import Stream
from rollout.transport import read_push, write_weights
from rollout.types import Completion, Request
from serving.client import FIRST_WAIT_S, LONGEST_WAIT_S, connect

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RemoteEngine:
    """Implements `rollout.types.Engine` with rollout workers.

    Args:
        urls: of the workers, such as "http://worker:8000".
        folder: where weights are written; every worker reaches it under the same path, below its
            --weights-root.
        api_key: that the workers ask for; "" sends none.
        num_connections: requests under way at once to each worker; their samples queue there.
        deadline_s: seconds without any answer after which a call fails.
        stall_s: seconds after which a request that a worker sits on goes to another one.
        transport: in place of the network, in tests.

    Raises:
        ValueError: without a worker, or for numbers that are out of their range.
        RuntimeError: if no worker answers within the deadline, or they hold different models.

    Example:
        >>> RemoteEngine(["http://localhost:1"], Path("w"), deadline_s=0.01)
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: no worker answers within 0.01 s: http://localhost:1: ConnectError: ...
    """

    def __init__(
        self,
        urls: Sequence[str],
        folder: Path,
        *,
        api_key: str = "",
        num_connections: int = 64,
        deadline_s: float = 1800.0,
        stall_s: float = 1800.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not urls or len({*urls}) != len(urls):
            raise ValueError(f"RemoteEngine.urls = {list(urls)}, expected one or more, each once")
        for name, value in (("deadline_s", deadline_s), ("stall_s", stall_s)):
            if value <= 0:
                raise ValueError(f"RemoteEngine.{name} = {value:g}, expected more than 0")
        if num_connections < 1:
            raise ValueError(f"RemoteEngine.num_connections = {num_connections}, expected >= 1")
        self.policy_version = 0
        self._folder = folder
        self._num_connections = num_connections
        self._deadline_s, self._stall_s = deadline_s, stall_s
        self._pushed: Pushed | None = None
        self._calls: set[Call] = set()
        self._is_closed = False
        self._workers = [
            RemoteWorker(url, connect(url, api_key=api_key, transport=transport), stall_s)
            for url in (url.rstrip("/") for url in urls)
        ]
        self.dtype = self._open()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in the order of the requests, then of the samples.

        Raises:
            ValueError: if a worker refuses a request for what it is.
            RuntimeError: if no worker answers within the deadline, or the engine is closed.
        """
        return self._generate(requests, self._workers)

    def views(self) -> list[RemoteView]:
        """Each worker that takes part, as an engine of its own."""
        return [RemoteView(self, worker) for worker in self._workers if worker.is_ready]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends every worker new weights, and holds it to their checksums.

        Args:
            stream: in `self.dtype`.

        Raises:
            ProofError: naming the first tensor that a worker does not hold.
            RuntimeError: if no worker takes them within the deadline.
        """
        path = write_weights(self._folder, _in(self.dtype, stream), version=version)
        self.expect(path, version)
        self.admit()

    def update_adapter(
        self,
        stream: Stream,
        version: int,
        *,
        config: Mapping[str, Any],
        expected: Mapping[str, str],
    ) -> None:
        """Sends every worker a new adapter to the base that it opened.

        Args:
            stream: the adapter's tensors, in `self.dtype`.
            config: peft's, as JSON.
            expected: `checksums` of base and adapter, both of which are compared.

        Raises:
            As `update_weights`.
        """
        path = write_weights(
            self._folder,
            _in(self.dtype, stream),
            version=version,
            holds="adapter",
            adapter=config,
        )
        self.expect(path, version, expected)
        self.admit()

    def broadcast(
        self,
        stream: Stream,
        version: int,
        *,
        tensors: Sequence[tuple[str, torch.Size, torch.dtype]],
        device: torch.device,
    ) -> None:
        """Sends every worker that answers new weights over a process group, without a folder.

        A worker that is gone, or comes back, takes part again at the next push.

        Args:
            stream: in `self.dtype`; read to its end whatever happens, for reading it may be a
                collective.
            tensors: what it will be, as `rollout.sync.outline` gives it.
            device: of the stream: where it and all workers are on CUDA, NCCL sends, else gloo.

        Raises:
            ProofError: if a worker refuses them, or holds anything else than what was sent.
            BrokenPushError: if a worker was lost on the way; the others take a whole push again.
            RuntimeError: if no worker answers within the deadline.
        """
        self._pushed, self.policy_version = None, version
        for worker in self._workers:
            worker.is_ready = False
        announced, source = Announced(forms(tensors), version, device, self._stall_s), iter(stream)
        try:
            self._pushed = broadcast(self._workers, source, announced, deadline_s=self._deadline_s)
        finally:
            for _ in source:
                pass
        if self._pushed is None:
            raise self._nobody()

    def follow(self, version: int) -> None:
        """Takes part in what another process pushed and proved.

        Raises:
            RuntimeError: if no worker holds that version within the deadline.
        """
        self._pushed, self.policy_version = None, version
        for worker in self._workers:
            worker.is_ready = False
        self.admit()

    def expect(self, path: Path, version: int, expected: Mapping[str, str] | None = None) -> None:
        """Says what workers have to hold from now on, without sending it.

        Args:
            path: as `write_weights` gave it, here or on another process.
            expected: checksums to compare with; None is those of what was written.
        """
        sums = read_push(path).checksums if expected is None else expected
        self._pushed = Pushed(path.absolute(), version, sums)
        self.policy_version = version
        for worker in self._workers:
            worker.is_ready = False

    def admit(self) -> None:
        """Brings every worker that answers to what it has to hold.

        Raises:
            As `update_weights`.
        """
        until = time.monotonic() + self._deadline_s
        while True:
            with ThreadPoolExecutor(len(self._workers)) as pool:
                found = [*pool.map(self._admit, self._workers)]
            proof = next((error for error in found if isinstance(error, ProofError)), None)
            if proof is not None:
                raise proof
            if any(worker.is_ready for worker in self._workers):
                return
            if time.monotonic() > until:
                raise self._nobody()
            time.sleep(FIRST_WAIT_S)

    def close(self) -> None:
        """Withdraws what is under way, on the workers too, and closes the connections."""
        self._is_closed = True
        for call in list(self._calls):
            call.fail(RuntimeError("the engine is closed"))
            for worker in self._workers:
                for index in range(len(call.requests)):
                    if index not in call.done:
                        worker.withdraw(f"{call.key}-{index}")
        for worker in self._workers:
            worker.http.close()

    def _open(self) -> torch.dtype:
        """Type of the workers' weights, once one of them answers."""
        until = time.monotonic() + self._deadline_s
        while True:
            told = [worker.health() for worker in self._workers]
            found = {health.dtype for health in told if health}
            if len(found) > 1 or not found <= {*DTYPES}:
                raise RuntimeError(
                    f"workers hold weights in {sorted(found)}, expected one of {[*DTYPES]} for all"
                )
            if found:
                return DTYPES[found.pop()]
            if time.monotonic() > until:
                raise self._nobody()
            time.sleep(FIRST_WAIT_S)

    def _generate(
        self, requests: Sequence[Request], workers: Sequence[RemoteWorker]
    ) -> list[Completion]:
        if self._is_closed:
            raise RuntimeError("the engine is closed; make a new one")
        call = Call(requests)
        self._calls.add(call)
        # an even share to each: the first to answer must not take all of a short queue
        share = min(self._num_connections, -(-len(requests) // len(workers)))
        threads = [
            threading.Thread(target=self._serve, args=(call, worker), daemon=True)
            for worker in workers
            for _ in range(share)
        ]
        try:
            for thread in threads:
                thread.start()
            self._watch(call)
            if call.error is not None:
                raise call.error
            return [one for index in range(len(requests)) for one in call.done[index]]
        finally:
            self._calls.discard(call)

    def _watch(self, call: Call) -> None:
        """Waits until all is over; time without any answer is limited."""
        with call.changed:
            count, since = -1, time.monotonic()
            while not call.is_over:
                if len(call.done) > count:
                    count, since = len(call.done), time.monotonic()
                left = since + self._deadline_s - time.monotonic()
                if left <= 0:
                    call.error = self._nobody()
                    call.changed.notify_all()
                    return
                call.changed.wait(min(left, 1.0))

    def _serve(self, call: Call, worker: RemoteWorker) -> None:
        """Asks one worker, one request after the other, as long as there are some."""
        while not self._is_closed and not call.is_over:
            if not worker.is_ready and not self._revive(call, worker):
                continue
            index = call.take()
            if index is None:
                return
            try:
                key = f"{call.key}-{index}"
                version = self.policy_version
                done = worker.samples(call.requests[index], key=key, policy_version=version)
                call.put(index, done)
            except GoneError as error:
                worker.is_ready, worker.trouble = False, str(error)
                call.give_back(index)
            except BusyError:
                call.give_back(index)
                time.sleep(FIRST_WAIT_S)
            except Exception as error:
                call.fail(error)

    def _revive(self, call: Call, worker: RemoteWorker) -> bool:
        """Tries to bring a worker back; one thread at a time does, the others wait."""
        with worker.lock:
            if worker.is_ready or call.is_over:
                return worker.is_ready
            found = self._admit(worker)
            if isinstance(found, ProofError):
                call.fail(found)
            elif found is not None:
                with call.changed:
                    if not call.is_over:
                        call.changed.wait(worker.wait_s)
                worker.wait_s = min(2 * worker.wait_s, LONGEST_WAIT_S)
            return worker.is_ready

    def _admit(self, worker: RemoteWorker) -> Exception | None:
        """Pushes what the worker has to hold and compares; why it takes no part, or None."""
        pushed = self._pushed
        try:
            if pushed is None:
                health = worker.health()
                if health is None or health.policy_version != self.policy_version:
                    told = "no answer" if health is None else f"version {health.policy_version}"
                    raise GoneError(f"{worker.url}: {told}, expected {self.policy_version}")
            else:
                worker.push(pushed)
        except (GoneError, ProofError) as error:
            worker.trouble = str(error)
            return error
        worker.is_ready, worker.wait_s = True, FIRST_WAIT_S
        return None

    def _sums(self, worker: RemoteWorker) -> tuple[Mapping[str, str], Mapping[str, str]]:
        if self._pushed is None:
            raise RuntimeError(f"{worker.url}: nothing was pushed from here; ask who pushed")
        try:
            return self._pushed.expected, worker.told().checksums
        except GoneError as error:
            raise RuntimeError(str(error)) from error

    def _nobody(self) -> RuntimeError:
        told = "; ".join(worker.trouble for worker in self._workers)
        return RuntimeError(f"no worker answers within {self._deadline_s:g} s: {told}")


class RemoteView:
    """One worker of several, as an engine: for the proof of each."""

    def __init__(self, engine: RemoteEngine, worker: RemoteWorker) -> None:
        self._engine, self._worker = engine, worker
        self.url = worker.url
        self.policy_version = engine.policy_version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """As `RemoteEngine.generate`, of this worker alone."""
        return self._engine._generate(requests, [self._worker])

    def sums(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Checksums of what was pushed, and of what the worker holds right now.

        Raises:
            RuntimeError: if the worker does not answer, or nothing was pushed.
        """
        return self._engine._sums(self._worker)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Weights go to all workers together.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a view of one worker takes no weights; update the engine")

    def close(self) -> None:
        """Nothing to do: the engine owns the connection."""


def _in(dtype: torch.dtype, stream: Stream) -> Stream:
    for name, tensor in stream:
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
