"""Tells processes that one of them is gone, whatever they are waiting for.

gloo fails where a neighbour's connection is closed; an NCCL kernel on the same host does not: it
waits for its peer, and the host for it, until a timeout of ten minutes. So each process keeps one
more connection, on which nothing comes but news: the system closes it with the process that held
the other end. Who hears so tells the next one, and ends if nothing else ends it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from accelerate import Accelerator

BYE = -1
# Seconds that a process has to fail by itself, which says more, before it is ended.
GRACE_S = 10.0
# News may not come for as long as a run takes.
PATIENCE = timedelta(days=365)


class Watch:
    """A connection to the neighbours in a ring, watched in a `with` block; every process opens it.

    Args:
        name: of the stage, for messages.
    """

    def __init__(self, accelerator: Accelerator, name: str) -> None:
        self.step = 0
        """Step under way, for messages."""
        self._name = name
        self._rank, self._size = accelerator.process_index, accelerator.num_processes
        self._gone = BYE
        self._known, self._over = threading.Event(), threading.Event()
        self._group = None
        if self._size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._group is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._group is not None and kind is None:
            self._tell(BYE)
            self._thread.join(GRACE_S)

    def who(self) -> str:
        """Which process is gone, once that is known."""
        self._known.wait(GRACE_S / 2)
        return "another process" if self._gone == BYE else f"process {self._gone}"

    def _listen(self) -> None:
        before, news = (self._rank - 1) % self._size, torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(news, src=before, group=self._group)
            gone = int(news)
        except RuntimeError:
            gone = before
        if gone == BYE or self._over.is_set():
            return
        self._tell(gone)
        self._gone = gone
        self._known.set()
        sys.stderr.write(
            f"{self._name}: process {self._rank} stops at step {self.step}: process {gone} is "
            "gone; run again to go on from the last checkpoint\n"
        )
        sys.stderr.flush()
        if not self._over.wait(GRACE_S):
            # it waits for who is gone, and nothing else can wake it
            os._exit(1)

    def _tell(self, news: int) -> None:
        # who comes next may be the one that is gone
        with contextlib.suppress(RuntimeError):
            dist.send(torch.tensor([news]), dst=(self._rank + 1) % self._size, group=self._group)
