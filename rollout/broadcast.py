"""Weights from a trainer to its workers by broadcast: one process group a push, buckets of bytes.

    trainer                                    worker
    opens a TCPStore, POST /v1/weights    ->   looks whether the tensors fit its model
                                               joins the store
    "go" once all have joined             ->   from here on its weights are of two versions
    one broadcast a bucket, NCCL or gloo  ->   copies the bucket's tensors into its model
    checksums into the store              ->   holds its weights to them and answers

The announcement names every tensor in order, so both sides cut the same buckets and nothing but
bytes travels. What breaks off before "go" leaves old weights, later a worker that refuses to sample
until a whole push.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from rollout.sync import Stream, checksums
from rollout.wire import BroadcastRequest, TensorForm

BUCKET_BYTES = 256 << 20
# of a tensor's first byte: every type can be read there
ALIGNMENT = 16
JOIN_S = 30.0
POLL_S = 2e-4
WORD, GO, OFF, SUMS, JOINED = "word", "go", "off", "sums", "joined"


class Group:
    """A process group beside the default one, for one push; its rank 0 sends.

    Args:
        store: where its members meet.
        rank, size: of this member, and of the group.
        backend: "nccl" for tensors on CUDA, or "gloo".
        timeout_s: of one broadcast.
        is_met: whether the others are still there, as far as one knows.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        backend: str,
        timeout_s: float,
        is_met: Callable[[], bool],
    ) -> None:
        limit = timedelta(seconds=timeout_s)
        self._timeout_s, self._is_met = timeout_s, is_met
        self._is_nccl = backend == "nccl"
        if self._is_nccl:
            options = dist.ProcessGroupNCCL.Options()
            # torch's own watch over NCCL ends the process: this one has to be the first
            options._timeout = 2 * limit
            self._backend: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._backend = dist.ProcessGroupGloo(store, rank, size, limit)

    def broadcast(self, flat: Tensor) -> None:
        """Sends `flat` from rank 0 or fills it, and waits until that is done.

        Raises:
            RuntimeError: if a member is gone, or it takes too long.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._backend.broadcast([flat], options).wait()
        if not self._is_nccl:
            return
        done, until = torch.cuda.Event(), time.monotonic() + self._timeout_s
        done.record(torch.cuda.current_stream(flat.device))
        while not done.query():
            if time.monotonic() > until or not self._is_met():
                raise RuntimeError("NCCL: a member of the group is gone or does not go on")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Gives the connections back, whatever state they are in."""
        if self._is_nccl:
            self._backend.abort()
        # gloo's go with the last reference, of which a traceback may hold this object's
        del self._backend


def forms(tensors: Sequence[tuple[str, torch.Size, torch.dtype]]) -> tuple[TensorForm, ...]:
    """What `rollout.sync.outline` gives, for an announcement."""
    return tuple(
        TensorForm.model_validate(
            {
                "name": name,
                "shape": tuple(shape),
                "dtype": str(dtype).removeprefix("torch."),
            }
        )
        for name, shape, dtype in tensors
    )


def buckets(tensors: Sequence[TensorForm], bucket_bytes: int) -> Iterator[list[TensorForm]]:
    """Neighbours that travel together; a larger tensor is a bucket of its own.

    Example:
        >>> one, two = (TensorForm(name=n, shape=(3,), dtype="float32") for n in "ab")
        >>> [len(bucket) for bucket in buckets([one, two, two], 32)]
        [2, 1]
    """
    bucket: list[TensorForm] = []
    size = 0
    for tensor in tensors:
        if bucket and size + _room(tensor) > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += _room(tensor)
    if bucket:
        yield bucket


def _room(tensor: TensorForm) -> int:
    return -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT


def _pieces(flat: Tensor, bucket: Sequence[TensorForm]) -> Iterator[Tensor]:
    """The bytes of each tensor of a bucket."""
    for tensor, (start, _) in zip(bucket, pairwise(accumulate(map(_room, bucket), initial=0)),
                                  strict=True):  # fmt: skip
        yield flat[start : start + tensor.num_bytes]


def send(
    stream: Stream,
    tensors: Sequence[TensorForm],
    group: Group,
    *,
    bucket_bytes: int,
    device: torch.device,
) -> dict[str, str]:
    """Broadcasts a stream; gives the checksums of what was sent.

    Args:
        tensors: what the stream will be, as announced.
        device: of the buckets: CUDA for NCCL, else the CPU.

    Raises:
        RuntimeError: if the stream is another one, or as `Group.broadcast`.
    """
    source = iter(stream)
    sums: dict[str, str] = {}
    for bucket in buckets(tensors, bucket_bytes):
        flat = torch.empty(sum(map(_room, bucket)), dtype=torch.uint8, device=device)
        sent: list[tuple[str, Tensor]] = []
        for wanted, piece in zip(bucket, _pieces(flat, bucket), strict=True):
            name, tensor = next(source, ("", torch.empty(0)))
            if forms([(name, tensor.shape, tensor.dtype)]) != (wanted,):
                raise RuntimeError(f"the stream has {name!r} where {wanted} was announced")
            piece.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
            sent.append((name, tensor.detach()))
        sums |= checksums(sent)
        group.broadcast(flat)
    return sums


def _received(asked: BroadcastRequest, group: Group, device: torch.device) -> Stream:
    for bucket in buckets(asked.tensors, asked.bucket_bytes):
        flat = torch.empty(sum(map(_room, bucket)), dtype=torch.uint8, device=device)
        group.broadcast(flat)
        for tensor, piece in zip(bucket, _pieces(flat, bucket), strict=True):
            yield tensor.name, piece.view(getattr(torch, tensor.dtype)).view(tensor.shape)


@contextmanager
def joined(
    asked: BroadcastRequest, device: torch.device
) -> Iterator[tuple[Stream, Callable[[], Mapping[str, str]]]]:
    """A worker's side of one push: the stream, and after its end the checksums of what was sent.

    Args:
        device: of the model.

    Raises:
        RuntimeError: in one line, if the trainer cannot be reached, calls the push off, or a member
            is gone; before the stream's first tensor nothing has been sent.
    """
    where = f"{asked.host}:{asked.port}"
    limit = timedelta(seconds=asked.timeout_s)
    with _in_one_line(f"the trainer's store at {where} cannot be reached"):
        store = TCPStore(asked.host, asked.port, is_master=False, timeout=timedelta(seconds=JOIN_S))
    store.set_timeout(limit)
    with _in_one_line(f"the push from {where} broke off before its first tensor"):
        store.set(f"{JOINED}-{asked.rank}", "1")
        if store.get(WORD) != GO.encode():
            raise RuntimeError("the trainer called it off")

    def is_met() -> bool:
        # raises where the store, and so the trainer, is gone
        return bool(store.check([WORD]))

    def sums() -> Mapping[str, str]:
        found: Mapping[str, str] = json.loads(store.get(SUMS))
        return found

    place = device if asked.backend == "nccl" else torch.device("cpu")
    with _in_one_line(f"the push from {where} broke off"):
        group = Group(
            store,
            rank=asked.rank,
            size=asked.world_size,
            backend=asked.backend,
            timeout_s=asked.timeout_s,
            is_met=is_met,
        )
        try:
            yield _received(asked, group, place), sums
        finally:
            group.close()


@contextmanager
def _in_one_line(told: str) -> Iterator[None]:
    """Torch's errors of the network, whose texts are pages of C++."""
    try:
        yield
    except dist.DistError as error:
        raise RuntimeError(f"{told}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says first."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
