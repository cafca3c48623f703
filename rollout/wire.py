"""What a rollout worker says over HTTP: one form for service and client.

    POST /v1/generate          GenerateRequest -> GenerateResponse     exact, for trainers
    POST /v1/weights           PushRequest -> WeightsTold              new weights, proven
    POST /v1/weights/broadcast BroadcastRequest -> WeightsTold         the same from a process group
    POST /v1/completions       CompletionRequest                       OpenAI's, for everybody
    POST /v1/chat/completions  ChatRequest                             OpenAI's, for everybody

Unknown keys are refused, never ignored; so are OpenAI's keys that would change the answer and that
the engine does not know, unless they ask for nothing.
"""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rollout.types import Completion, Finish, Request, Sampling, Timings

RequestId = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingForm(_Strict):
    """`rollout.types.Sampling`, which says what each number means and checks its range."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    repetition_tokens: int
    repetition_probability: float


class GenerateRequest(_Strict):
    """One request of a trainer, asked as often as need be and answered once."""

    id: RequestId
    """Of the asking: the same id gets the same answer, without sampling again."""
    policy_version: int | None = None
    """Version that must answer; None takes any."""
    request_id: str
    prompt: tuple[int, ...]
    num_samples: int
    return_experts: bool
    sampling: SamplingForm

    @classmethod
    def of(cls, request: Request, *, key: str, policy_version: int | None) -> GenerateRequest:
        """A request in its form."""
        return cls(
            id=key,
            policy_version=policy_version,
            request_id=request.request_id,
            prompt=request.prompt,
            num_samples=request.num_samples,
            return_experts=request.return_experts,
            sampling=SamplingForm(**vars(request.sampling)),
        )

    def to_request(self) -> Request:
        """The request.

        Raises:
            ValueError: if a number of the sampling is out of its range.
        """
        return Request(
            request_id=self.request_id,
            prompt=self.prompt,
            sampling=Sampling(**vars(self.sampling)),
            num_samples=self.num_samples,
            return_experts=self.return_experts,
        )


class ExpertsForm(_Strict):
    """Integers of two bytes, little endian, in base 64."""

    shape: tuple[int, int, int]
    data: str


class CompletionForm(_Strict):
    """`rollout.types.Completion`; numbers survive to the last bit."""

    request_id: str
    sample: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    filtered_logprobs: tuple[float, ...]
    kept_mass: tuple[float, ...]
    finish: Finish
    policy_version: int
    timings: tuple[float, float, float] | None = None
    """Seconds queued, of prefill and of decoding."""
    experts: ExpertsForm | None = None

    @classmethod
    def of(cls, done: Completion) -> CompletionForm:
        """A completion in its form.

        Example:
            >>> done = Completion("p", 0, (7,), (9,), (-2.0,), (-0.1,), (0.7,), "stop", 3)
            >>> form = CompletionForm.of(done).model_dump_json()
            >>> CompletionForm.model_validate_json(form).to_completion() == done
            True
        """
        values = {name: value for name, value in vars(done).items() if name in cls.model_fields}
        timings = done.timings
        told = timings and (timings.queued_s, timings.prefill_s, timings.decode_s)
        return cls(**values | {"timings": told, "experts": _packed(done.experts)})

    def to_completion(self) -> Completion:
        """The completion."""
        values: dict[str, Any] = dict(vars(self))
        values["timings"] = None if self.timings is None else Timings(*self.timings)
        values["experts"] = None if self.experts is None else _unpacked(self.experts)
        return Completion(**values)


def _packed(experts: Tensor | None) -> ExpertsForm | None:
    if experts is None:
        return None
    data = experts.to(torch.int16).contiguous().numpy().astype("<i2").tobytes()
    first, layers, top_k = experts.shape
    return ExpertsForm(shape=(first, layers, top_k), data=base64.b64encode(data).decode())


def _unpacked(form: ExpertsForm) -> Tensor:
    data = bytearray(base64.b64decode(form.data))
    return torch.frombuffer(data, dtype=torch.int16).view(form.shape)


class GenerateResponse(_Strict):
    """Samples in order."""

    id: str
    completions: tuple[CompletionForm, ...]


class PushRequest(_Strict):
    """New weights, in a folder that the worker reaches."""

    path: str
    """As `rollout.transport.write_weights` gave it."""
    version: int = Field(ge=0)
    """What the folder has to say of itself."""


class TensorForm(_Strict):
    """One tensor of an announced stream."""

    name: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: Literal["float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8"]

    @property
    def num_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


class BroadcastRequest(_Strict):
    """New weights by torch.distributed: where to meet, and what will come, in order."""

    version: int = Field(ge=0)
    host: str
    port: int = Field(ge=1, le=65535)
    """Of the trainer's TCPStore."""
    rank: int = Field(ge=1)
    world_size: int = Field(ge=2)
    """Members of the group, the trainer with them; it is rank 0."""
    backend: Literal["nccl", "gloo"]
    bucket_bytes: int = Field(ge=1)
    """Sent at once, if no tensor is larger."""
    timeout_s: float = Field(gt=0)
    """Longest that a member waits for the others."""
    tensors: tuple[TensorForm, ...] = Field(min_length=1)


class WeightsTold(_Strict):
    """What a worker holds."""

    version: int
    holds: Literal["weights", "adapter"]
    """All weights of one kind, or the base that it opened and an adapter."""
    checksums: dict[str, str]
    """As `rollout.sync.checksums` of the live tensors; with an adapter, of base and adapter."""


class Health(_Strict):
    """Whether the worker takes requests."""

    status: Literal["ok", "broken"]
    model: str
    policy_version: int
    dtype: str
    """Type of the weights, such as float32: what a trainer rounds to before it sends."""
    device: str
    """Kind of device that holds them: cuda or cpu."""
    num_samples: int
    """Queued or live."""
    max_samples: int


class ErrorDetail(BaseModel):
    """Why a request was refused, in OpenAI's form."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorResponse(BaseModel):
    """The one form of every answer that is not 200."""

    error: ErrorDetail


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    """A last event with the numbers of tokens."""


class _Asked(_Strict):
    """What OpenAI's two forms have in common."""

    model: str
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=1024)
    seed: int | None = None
    """None takes a random one."""
    stop: str | tuple[str, ...] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    stop_token_ids: tuple[int, ...] = ()
    """Beside the model's own end of a turn."""
    return_token_ids: bool = False
    """Adds token_ids to every choice, and prompt_token_ids to the answer."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


class CompletionRequest(_Asked):
    """OpenAI's completion of a prompt: text, or token ids."""

    prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: Literal[0] | None = None
    """0 gives the sampled tokens' own; alternatives are not kept."""
    echo: Literal[False] = False
    best_of: None = None
    suffix: None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class ChatRequest(_Asked):
    """OpenAI's answer to a conversation."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Of the two, this one counts; None takes what the worker has room for."""
    logprobs: bool | None = False
    top_logprobs: Literal[0] | None = None
    response_format: None = None
    tools: None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)
