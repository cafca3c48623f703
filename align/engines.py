"""Where a trainer's samples come from: an engine on its own weights or a copy, vLLM, or workers.

Whoever sends weights proves them: checksums of every tensor, then a canary whose log-probabilities
the trainer's own forward has to give as well, on each worker. What fails stops the run before a
step is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.course import Job
from align.prompts import open_engine
from align.proof import prove, prove_push
from align.vllm_source import VllmSource
from model import HybridForCausalLM
from rollout.canary import Canary, trainer_score
from rollout.client import RemoteEngine
from rollout.native.engine import NativeEngine
from rollout.remote import BrokenPushError
from rollout.sync import adapter_config, adapter_weights, checksums, outline, parts, weights
from rollout.types import Completion, Engine
from serving.keys import key_of

Policy = HybridForCausalLM | PeftModel


class RolloutConfig(BaseModel):
    """Who samples.

    Example:
        >>> RolloutConfig(workers=("http://a:8000",), max_staleness=1).push
        'weights'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["native", "vllm"] = "native"
    """The engine in the trainer; both draw the same tokens under a seed. native reads the trainer's
    own weights; vllm holds a copy, pushed and proved before each rollout, and so does native where
    processes share the weights (FSDP, parallel.expert)."""
    cache_gib: float = Field(default=4.0, gt=0)
    """Memory for keys, values and states of the vllm backend, 2^30 bytes; native needs none."""
    workers: tuple[str, ...] = ()
    """Addresses of rollout workers (`align serve-rollout`); none samples in the trainer itself."""
    folder: str = ""
    """Where weights are written for the workers, under the same path on all machines; empty is
    `weights` in the stage's folder."""
    sync: Literal["files", "broadcast"] = "files"
    """How weights reach the workers: through `folder`, or over a process group that the trainer
    opens for each push, NCCL if all are on CUDA, else gloo (workers started with --broadcast)."""
    push: Literal["weights", "adapter"] = "weights"
    """What workers are sent: all weights, adapters merged, or the adapter to the policy that the
    stage started from, which they have opened."""
    api_key_env: str = ""
    """Environment variable that holds the workers' key; empty sends none."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """Rollouts that sampling may run ahead of training; 1 samples the next while one is trained."""
    canary_bound: float = Field(default=0.0, ge=0)
    """Largest rms of a canary's log-probabilities against the trainer's, the two largest left out,
    in nats; those may be 50 times that. 0 is the precision's own, which a model with distributions
    far sharper than any that was trained may need wider in bf16."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds without any answer of any worker after which the run fails."""

    @model_validator(mode="after")
    def _workers_are_needed(self) -> Self:
        own = {"backend", "cache_gib"} & self.model_fields_set
        if self.workers and own:
            raise ValueError(
                f"rollout.{min(own)} says something of the engine in the trainer, and "
                "rollout.workers sample; remove one of them"
            )
        unused = self.model_fields_set - {"workers", "backend", "cache_gib", "canary_bound"}
        if not self.workers and unused:
            raise ValueError(
                f"rollout.{min(unused)} says something of workers, and rollout.workers is empty; "
                "name them or remove it"
            )
        if self.sync == "broadcast" and (self.folder or self.push == "adapter"):
            key = "folder" if self.folder else "push = adapter"
            raise ValueError(
                f"rollout.{key} is of files, and rollout.sync = broadcast; remove it, or set sync: "
                "files"
            )
        if len({*self.workers}) != len(self.workers):
            raise ValueError(f"rollout.workers = {self.workers}, expected each once")
        return self


class Source(Protocol):
    """An engine, and the way to keep it at the trainer's policy."""

    @property
    def engine(self) -> Engine: ...

    def refresh(self, version: int) -> None:
        """Makes the engine sample from the policy as it is now; every process calls it."""
        ...


class OwnSource:
    """The native engine on the trainer's live weights: nothing is copied.

    Its first samples are proven, for what is computed may differ where the weights cannot.

    Args:
        policy: the live model, possibly with adapters.
        autocast: of the trainer's forward.
    """

    def __init__(
        self,
        engine: NativeEngine,
        policy: Policy,
        *,
        canary: Canary,
        autocast: torch.dtype | None,
    ) -> None:
        self.native = engine
        self._policy, self._autocast = policy, autocast
        self._canary: Canary | None = canary

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.native

    def refresh(self, version: int) -> None:
        """The weights are there already; says so, and proves it the first time.

        Raises:
            ProofError: if the engine does not sample from the trainer's policy.
        """
        self.native.policy_version = version
        canary, self._canary = self._canary, None
        if canary is not None:
            prove(
                self.native,
                self._policy,
                canary,
                version=version,
                autocast=self._autocast,
                sums=lambda: (checksums(parts(self._policy)), checksums(parts(self.native.model))),
            )


class CopySource:
    """The native engine on a whole copy of a policy that processes share, pushed and proved.

    The copy is in the trainer's own type, so that what is sampled is what an unshared trainer
    samples; it is made at the first push, when the policy may have been sharded.

    Args:
        policy: the live model, possibly with adapters, which are merged on the way.
        open_on: makes an engine of the copy.
        canary: asked after every push.
        autocast: of the trainer's forward.
    """

    def __init__(
        self,
        policy: Policy,
        open_on: Callable[[HybridForCausalLM], NativeEngine],
        *,
        canary: Canary,
        autocast: torch.dtype | None,
    ) -> None:
        self._policy, self._open_on = policy, open_on
        self._prove = partial(
            prove_push, policy=policy, canary=canary, autocast=autocast, where="the copy"
        )
        self._version = -1

    @cached_property
    def engine(self) -> NativeEngine:
        """The engine; each process has one."""
        policy = self._policy
        plain = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        with torch.device(policy.device):
            copied = AutoModelForCausalLM.from_config(plain.config, dtype=policy.dtype)
        return self._open_on(copied.eval().requires_grad_(False))

    def refresh(self, version: int) -> None:
        """Pushes the policy as it is now, unless the copy holds this version, and proves it.

        Raises:
            ProofError: as `prove_push`.
        """
        if version == self._version:
            return
        sent: dict[str, str] = {}
        self.engine.update_weights(self._sent(sent), version)
        held = checksums(parts(self.engine.model))
        self._prove(self.engine, version, lambda: (sent, held))
        self._version = version

    @torch.no_grad()
    def _sent(self, sums: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, whose checksums are noted on the way: they are gathered once."""
        for name, tensor in weights(self._policy, dtype=self._policy.dtype):
            sums.update(checksums([(name, tensor)]))
            yield name, tensor


class WorkerSource:
    """Workers that are sent the policy.

    Args:
        policy: the live model, possibly with adapters, possibly sharded.
        autocast: of the trainer's forward.

    Raises:
        ValueError: for a key that is not set, or an adapter to be pushed that is not there.
        RuntimeError: if no worker answers.
    """

    def __init__(
        self, config: RolloutConfig, job: Job, policy: Policy, *, autocast: torch.dtype | None
    ) -> None:
        if config.push == "adapter" and not isinstance(policy, PeftModel):
            raise ValueError(
                "rollout.push = adapter, and the stage trains all weights; set lora, or push: "
                "weights"
            )
        key = key_of(config.api_key_env, "rollout.api_key_env")
        folder = Path(config.folder) if config.folder else job.folder / "weights"
        self.remote = RemoteEngine(
            config.workers, folder.absolute(), api_key=key, deadline_s=config.deadline_s
        )
        self._config, self._job, self._policy = config, job, policy
        self._autocast = autocast
        narrow = torch.bfloat16 in (autocast, self.remote.dtype)
        dtype = torch.bfloat16 if narrow else torch.float32
        vocabulary: int = policy.config.vocab_size
        self._canary = Canary.of(vocabulary, dtype=dtype, bound=config.canary_bound)
        self._version = -1

    @property
    def engine(self) -> Engine:
        """All workers as one engine."""
        return self.remote

    def refresh(self, version: int) -> None:
        """Pushes and proves, unless the workers hold this version.

        Raises:
            ProofError: if a worker does not sample from the trainer's policy.
            RuntimeError: if no worker takes the weights.
        """
        if version == self._version:
            return
        is_alone = self._job.accelerator.num_processes == 1
        # a broadcast that loses a worker on the way is made again for those left
        for tries_left in reversed(range(len(self._config.workers) + 1)):
            try:
                (self._send if is_alone else self._send_together)(version)
                break
            except BrokenPushError:
                if not tries_left:
                    raise
        self._version = version

    def _send(self, version: int) -> None:
        self._push(version)
        score = trainer_score(self._policy, autocast=self._autocast)
        for view in self.remote.views():
            self._canary.check(view, score, version=version, sums=view.sums, where=view.url)

    @torch.no_grad()
    def _push(self, version: int) -> None:
        if self._config.sync == "broadcast":
            tensors = outline(self._policy, dtype=self.remote.dtype)
            device = next(self._policy.parameters()).device
            self.remote.broadcast(self._weights(), version, tensors=tensors, device=device)
            return
        if self._config.push == "weights":
            self.remote.update_weights(self._weights(), version)
            return
        assert isinstance(self._policy, PeftModel), "checked at the beginning"
        self.remote.update_adapter(
            adapter_weights(self._policy).items(),
            version,
            config=adapter_config(self._policy),
            expected=checksums(parts(self._policy, dtype=self.remote.dtype)),
        )

    def _send_together(self, version: int) -> None:
        """The first process pushes, asks and compares; all gather and score, as they train."""
        is_first = self._job.accelerator.is_main_process
        answers: list[tuple[str, list[Completion]]] = []

        def push_and_ask() -> None:
            self._push(version)
            for view in self.remote.views():
                done = self._canary.ask(view, version=version, where=view.url)
                answers.append((view.url, done))

        if not is_first and self._config.push == "weights":
            for _ in self._weights():
                pass
        self._first(push_and_ask)
        told: list[Any] = [answers]
        broadcast_object_list(told)
        score = trainer_score(self._policy, autocast=self._autocast)
        scored = [score(done) for _, done in told[0]]

        def compare() -> None:
            views = {view.url: view for view in self.remote.views()}
            for (url, done), rows in zip(answers, scored, strict=True):
                sums = views[url].sums
                self._canary.compare(done, rows, version=version, sums=sums, where=url)

        self._first(compare)
        if not is_first:
            self.remote.follow(version)

    def _first(self, work: Callable[[], None]) -> None:
        """Runs `work` on the first process; if it fails, every process raises the same line."""
        told: list[Any] = ["", RuntimeError]
        if self._job.accelerator.is_main_process:
            try:
                work()
            except BrokenPushError as error:
                told = [str(error), BrokenPushError]
            except (RuntimeError, OSError, ValueError) as error:
                told = [str(error), RuntimeError]
        broadcast_object_list(told)
        problem, kind = told
        if problem:
            raise kind(problem)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return weights(self._policy, dtype=self.remote.dtype)


def open_source(
    config: RolloutConfig,
    job: Job,
    policy: Policy,
    *,
    max_concurrent: int,
    max_tokens: int,
    autocast: torch.dtype | None,
    is_shared: bool = False,
) -> Source:
    """The source that a config names.

    Args:
        max_concurrent, max_tokens: of the engine in the trainer; workers have their own limits.
        autocast: of the trainer's forward.
        is_shared: whether processes hold parts of the weights, or will once training begins.

    Raises:
        As `WorkerSource`.
    """
    if config.workers:
        return WorkerSource(config, job, policy, autocast=autocast)
    narrow = torch.bfloat16 in (autocast, policy.dtype)
    dtype = torch.bfloat16 if narrow else torch.promote_types(policy.dtype, torch.float32)
    canary = Canary.of(
        policy.config.vocab_size, dtype=dtype, bound=config.canary_bound, max_tokens=max_tokens
    )
    if config.backend == "vllm":
        return VllmSource(
            policy,
            max_concurrent=max_concurrent,
            max_tokens=max_tokens,
            cache_bytes=int(config.cache_gib * 2**30),
            autocast=autocast,
            canary=canary,
        )
    open_on = partial(
        open_engine, max_concurrent=max_concurrent, max_tokens=max_tokens, autocast=autocast
    )
    if is_shared:
        return CopySource(policy, open_on, canary=canary, autocast=autocast)
    return OwnSource(open_on(policy), policy, canary=canary, autocast=autocast)
