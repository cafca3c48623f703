"""OpenAI's answers, whole or as events, of an engine's tokens."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rollout.serving.text import TextStream
from rollout.serving.worker import Worker
from rollout.types import Completion, Finish
from rollout.wire import ChatRequest, CompletionRequest

# OpenAI knows two ends; what the engine says stands beside it
FINISH: dict[Finish, str] = {
    "stop": "stop",
    "length": "length",
    "repetition": "length",
    "cancelled": "length",
}


@dataclass
class _Choice:
    """One sample on its way to the asker."""

    index: int
    stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_shown: int = 0
    """Tokens that an event has carried."""
    completion: Completion | None = None


class Answer:
    """The answer to one of OpenAI's requests.

    Args:
        name: of the answer, unique.

    Raises:
        RefusedError: as `Worker.requests`.
    """

    def __init__(self, worker: Worker, asked: CompletionRequest | ChatRequest, name: str) -> None:
        self._worker, self._asked, self._name = worker, asked, name
        self._requests = worker.requests(asked, name)
        self._is_chat = isinstance(asked, ChatRequest)
        self._created = int(time.time())
        self._choices = [
            _Choice(index, TextStream(worker.settings.decode, asked.stops))
            for index in range(len(self._requests) * asked.n)
        ]
        self._ends = {
            *worker.settings.stop_token_ids,
            *asked.stop_token_ids,
        }

    async def whole(self) -> bytes:
        """All choices, when the last has ended."""
        async with aclosing(self._turns()) as turns:
            async for _ in turns:
                pass
        done = [choice.completion for choice in self._choices]
        version = min(one.policy_version for one in done if one is not None)
        choices = [self._choice(choice, choice.text, 0, is_last=True) for choice in self._choices]
        more = {"usage": self._usage(), "policy_version": version} | self._prompt_ids()
        return json.dumps(
            self._envelope("" if self._is_chat else "text_completion")
            | {"choices": choices, **more}
        ).encode()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: pieces of text as they are decided, then [DONE].

        The first thing it gives is empty: the requests are accepted, and no refusal follows.
        """
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        async with aclosing(self._turns()) as turns:
            async for moved in turns:
                pieces = []
                for choice, text in moved:
                    is_last = choice.completion is not None
                    if text or is_last:
                        pieces.append(self._choice(choice, text, choice.num_shown, is_last=is_last))
                        choice.num_shown = len(choice.tokens)
                yield b"".join(self._event(kind, [piece]) for piece in pieces)
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            yield self._event(kind, [], usage=self._usage())
        yield b"data: [DONE]\n\n"

    async def _turns(self) -> AsyncGenerator[list[tuple[_Choice, str]], None]:
        """Choices that moved in a turn, each with the text that was decided."""
        n = self._asked.n
        async with aclosing(self._worker.tokens(self._requests)) as turns:
            async for turn in turns:
                moved: dict[int, str] = {}
                for place, token in turn:
                    choice = self._choices[place * n + token.sample]
                    if token.token >= 0:
                        choice.tokens.append(token.token)
                        choice.logprobs.append(token.logprob)
                    text = "" if self._is_end(token.token) else choice.stream.add(token.token)
                    if token.completion is not None:
                        choice.completion = token.completion
                        text += choice.stream.end()
                    choice.text += text
                    moved[choice.index] = moved.get(choice.index, "") + text
                yield [(self._choices[index], text) for index, text in moved.items()]

    def _is_end(self, token: int) -> bool:
        return token < 0 or token in self._ends

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": kind or "chat.completion",
            "created": self._created,
            "model": self._asked.model,
        }

    def _event(self, kind: str, choices: Sequence[Any], **more: Any) -> bytes:
        version = self._worker.holder.version
        body = self._envelope(kind) | {"choices": choices, "policy_version": version, **more}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def _choice(self, choice: _Choice, text: str, start: int, *, is_last: bool) -> dict[str, Any]:
        """A choice whole, or its part from token `start` on."""
        found: dict[str, Any] = {"index": choice.index, "finish_reason": None, "logprobs": None}
        if is_last and choice.completion is not None:
            found["finish_reason"] = FINISH[choice.completion.finish]
            found["finish"] = choice.completion.finish
        if not self._is_chat:
            found["text"] = text
        elif self._asked.stream:
            found["delta"] = {"content": text} | ({} if start else {"role": "assistant"})
        else:
            found["message"] = {"role": "assistant", "content": text}
        if self._asked.wants_logprobs:
            found["logprobs"] = self._logprobs(choice.tokens[start:], choice.logprobs[start:])
        if self._asked.return_token_ids:
            found["token_ids"] = choice.tokens[start:]
        return found

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
        texts = [self._worker.settings.decode([token]) for token in tokens]
        if not self._is_chat:
            return {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": None}
        return {
            "content": [
                {
                    "token": text,
                    "logprob": logprob,
                    "bytes": list(text.encode()),
                    "top_logprobs": [],
                }
                for text, logprob in zip(texts, logprobs, strict=True)
            ]
        }

    def _prompt_ids(self) -> dict[str, Any]:
        if not self._asked.return_token_ids:
            return {}
        return {"prompt_token_ids": [list(request.prompt) for request in self._requests]}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self._requests)
        response = sum(len(choice.tokens) for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": response,
            "total_tokens": prompt + response,
        }
