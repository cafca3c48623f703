"""An engine with its queue, and what the routes ask of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from rollout.native.engine import NativeEngine
from rollout.serving.driver import RETRY_S, ClosedError, Driver, QueueFullError
from rollout.serving.metrics import Metrics
from rollout.serving.text import Decode
from rollout.serving.weights import Holder
from rollout.types import Completion, Request, Sampling, Token
from rollout.wire import (
    BroadcastRequest,
    ChatMessage,
    ChatRequest,
    CompletionForm,
    CompletionRequest,
    GenerateRequest,
    GenerateResponse,
    Health,
    PushRequest,
    WeightsTold,
)

Encode = Callable[[str], Sequence[int]]
Render = Callable[[Sequence[ChatMessage]], Sequence[int]]


@dataclass(frozen=True)
class Settings:
    """What a worker is told beside its engine.

    Args:
        model: name that clients ask for.
        max_tokens: longest prompt and response together.
        encode, decode: between text and tokens; decode leaves special tokens out.
        render: a conversation as the tokens of a prompt; ValueError for one that is none.
        stop_token_ids: the model's own ends of a turn.
        weights_root: pushes come from folders below it; None refuses them.
        broadcasts: whether pushes come from a trainer's process group too.
        max_samples: queued or live at once.
        max_body_bytes: longest request body.
        api_key: "" lets everybody in.
        kept_bytes: of answers kept for those who ask again.
    """

    model: str
    max_tokens: int
    encode: Encode
    decode: Decode
    render: Render
    stop_token_ids: tuple[int, ...] = ()
    weights_root: Path | None = None
    broadcasts: bool = False
    max_samples: int = 4096
    max_body_bytes: int = 64 << 20
    api_key: str = field(default="", repr=False)
    kept_bytes: int = 256 << 20


class RefusedError(Exception):
    """A request that is not answered."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s


class Worker:
    """An engine with its queue: what the routes call.

    Args:
        engine: used by this worker alone.
    """

    def __init__(self, engine: NativeEngine, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.holder = Holder(engine, settings.weights_root, broadcasts=settings.broadcasts)
        self.driver = Driver(engine, max_samples=settings.max_samples, watch=self.metrics)
        self.metrics.read_state(
            {
                "samples": lambda: self.driver.num_samples,
                "policy_version": lambda: self.holder.version,
                "free_slots": lambda: engine.stats.num_free_slots,
                "free_pages": lambda: engine.stats.num_free_pages,
                "tasks": lambda: len(asyncio.all_tasks()),
            }
        )

    def close(self) -> None:
        """Ends what is in flight, and the engine."""
        self.driver.close()

    def health(self) -> Health:
        """How it is."""
        return Health(
            status="ok" if self.driver.is_running and not self.holder.fault else "broken",
            model=self.settings.model,
            policy_version=self.holder.version,
            dtype=self.holder.dtype,
            device=self.holder.device.type,
            num_samples=self.driver.num_samples,
            max_samples=self.settings.max_samples,
        )

    async def weights(self) -> WeightsTold:
        """What is held, read between requests."""
        return await self._between(self.holder.told)

    async def push(self, asked: PushRequest) -> WeightsTold:
        """Takes new weights between requests.

        Raises:
            RefusedError: if they are not what they should be.
        """
        return await self._between(lambda: self.holder.push(Path(asked.path), asked.version))

    async def receive(self, asked: BroadcastRequest) -> WeightsTold:
        """Takes new weights from a process group, between requests.

        Raises:
            RefusedError: if they do not come, or are not what they should be.
        """
        return await self._between(lambda: self.holder.receive(asked))

    async def _between(self, work: Callable[[], WeightsTold]) -> WeightsTold:
        try:
            return await asyncio.wrap_future(self.driver.between(work))
        except ClosedError as error:
            raise RefusedError(503, "stopping", str(error)) from error
        except (ValueError, RuntimeError) as error:
            raise RefusedError(409, "weights_refused", str(error)) from error

    async def generate(self, asked: GenerateRequest) -> GenerateResponse:
        """All samples of a trainer's request.

        Raises:
            RefusedError: if it cannot be answered, or not by the version that it asks for.
        """
        wanted = asked.policy_version
        try:
            request = asked.to_request()
        except ValueError as error:
            raise RefusedError(400, "bad_sampling", str(error)) from error
        done: list[Completion] = []
        async with aclosing(self.tokens([request], version=wanted)) as turns:
            async for turn in turns:
                done += [token.completion for _, token in turn if token.completion is not None]
        stale = {one.policy_version for one in done} - {wanted}
        if wanted is not None and stale:
            raise RefusedError(
                409, "stale", f"answered by version {min(stale)}, expected {wanted}; push it again"
            )
        done.sort(key=lambda one: one.sample)
        return GenerateResponse(
            id=asked.id, completions=tuple(CompletionForm.of(one) for one in done)
        )

    async def tokens(
        self, requests: Sequence[Request], *, version: int | None = None
    ) -> AsyncGenerator[list[tuple[int, Token]], None]:
        """Tokens of each turn with the place of their request, until all samples have ended.

        Whoever closes it before its end cancels what is in flight.

        Raises:
            RefusedError: before the first tokens if a request is refused, all are then; later if
                the engine breaks off.
        """
        if self.holder.fault:
            raise RefusedError(503, "broken", self.holder.fault)
        if version is not None and version != self.holder.version:
            raise RefusedError(
                409,
                "stale",
                f"this worker holds version {self.holder.version}, expected {version}; push it",
            )
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[int, Sequence[Token] | Exception]] = asyncio.Queue()
        names: list[str] = []
        left = sum(request.num_samples for request in requests)
        try:
            for place, request in enumerate(requests):
                name, accepted = self._submit(place, request, loop, told)
                names.append(name)
                await asyncio.wrap_future(accepted)
            yield []
            while left:
                place, found = await told.get()
                if isinstance(found, Exception):
                    raise found
                left -= sum(token.completion is not None for token in found)
                yield [(place, token) for token in found]
        except QueueFullError as error:
            raise RefusedError(429, "queue_full", str(error), retry_s=RETRY_S) from error
        except ClosedError as error:
            raise RefusedError(503, "stopping", str(error), retry_s=RETRY_S) from error
        except ValueError as error:
            raise RefusedError(400, "bad_request", str(error)) from error
        except RuntimeError as error:
            raise RefusedError(500, "engine_failed", str(error)) from error
        finally:
            if left:
                self.metrics.cancelled()
                for name in names:
                    self.driver.cancel(name)

    def _submit(
        self,
        place: int,
        request: Request,
        loop: asyncio.AbstractEventLoop,
        told: asyncio.Queue[tuple[int, Sequence[Token] | Exception]],
    ) -> tuple[str, asyncio.Future[None]]:
        def listen(found: Sequence[Token] | Exception) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (place, found))

        name, accepted = self.driver.submit(request, listen)
        return name, asyncio.wrap_future(accepted)

    def requests(self, asked: CompletionRequest | ChatRequest, name: str) -> list[Request]:
        """OpenAI's forms as requests, one a prompt.

        Raises:
            RefusedError: for a model that is not served, a prompt that is none or too long, or bad
                numbers.
        """
        if asked.model != self.settings.model:
            raise RefusedError(
                404,
                "model_not_found",
                f"model = {asked.model!r}, expected {self.settings.model!r}, which is served here",
                param="model",
            )
        if asked.stream_options is not None and not asked.stream:
            raise RefusedError(
                400,
                "bad_request",
                "stream_options without stream: true; set it, or leave them out",
                param="stream_options",
            )
        prompts = self._prompts(asked)
        sampling = Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
            stop_token_ids=(*self.settings.stop_token_ids, *asked.stop_token_ids),
            stop_strings=self._stops(asked),
        )
        found = []
        for place, prompt in enumerate(prompts):
            most = self._room(prompt, asked.max_new_tokens)
            own = replace(sampling, max_new_tokens=most)
            found.append(Request(f"{name}-{place}", prompt, own, num_samples=asked.n))
        return found

    def _stops(self, asked: CompletionRequest | ChatRequest) -> tuple[str, ...]:
        if not all(asked.stops):
            raise RefusedError(
                400, "bad_request", "an empty stop string; leave it out", param="stop"
            )
        return asked.stops

    def _prompts(self, asked: CompletionRequest | ChatRequest) -> list[tuple[int, ...]]:
        if isinstance(asked, ChatRequest):
            try:
                return [tuple(self.settings.render(asked.messages))]
            except ValueError as error:
                raise RefusedError(400, "bad_prompt", str(error), param="messages") from error
        given = asked.prompt
        if isinstance(given, str):
            return [tuple(self.settings.encode(given))]
        if not given:
            raise RefusedError(400, "bad_prompt", "an empty list of prompts", param="prompt")
        if isinstance(given[0], int):
            return [tuple(part for part in given if isinstance(part, int))]
        return [
            tuple(self.settings.encode(part)) if isinstance(part, str) else tuple(part)
            for part in given
            if not isinstance(part, int)
        ]

    def _room(self, prompt: Sequence[int], wanted: int | None) -> int:
        most = self.settings.max_tokens
        if not prompt:
            raise RefusedError(400, "bad_prompt", "an empty prompt; say something", param="prompt")
        room = most - len(prompt)
        if room < (wanted or 1):
            raise RefusedError(
                400,
                "context_length_exceeded",
                f"a prompt of {len(prompt)} tokens and a response of {wanted or 1} are more than "
                f"{most} tokens, which this worker holds; shorten the prompt or max_tokens",
                param="prompt",
            )
        return wanted or room
