"""What goes into an engine and what comes out: plain values, no model and no tensor on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Finish = Literal["stop", "length", "repetition", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled.

    Args:
        max_new_tokens: longest response in tokens; the prompt is not counted.
        temperature: >= 0; 0 takes the most likely token.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        seed: the tokens of a request depend on its seed and sample index, never on its neighbours.
        stop_token_ids: the response ends with the first of these (which is part of it).
        stop_strings: the response ends with the token that completes the first of these in its
            text. That token is kept whole, whatever of its text lies behind the string: a policy
            is trained on tokens that it sampled. Whoever shows text cuts it there.
        repetition_tokens: so many tokens in a row, each more likely than repetition_probability
            under the untouched distribution, end the response (finish "repetition"); 0 never.
        repetition_probability: in [0, 1).

    Source: MiniMax-M1 report, section 4.9: 3,000 tokens above 0.99.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> Sampling(max_new_tokens=8, temperature=0.7).top_p
        1.0
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    repetition_tokens: int = 0
    repetition_probability: float = 0.99

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0; 0 keeps all"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("stop_strings", all(self.stop_strings), "no empty string"),
            ("repetition_tokens", self.repetition_tokens >= 0, ">= 0; 0 never ends a response"),
            ("repetition_probability", 0 <= self.repetition_probability < 1, "in [0, 1)"),
        ):
            if not good:
                raise ValueError(f"Sampling.{name} = {getattr(self, name)}, expected {expected}")


@dataclass(frozen=True)
class Request:
    """One prompt, sampled `num_samples` times from one prefill.

    Args:
        return_experts: whether completions carry the experts that each token chose.

    Example:
        >>> Request(request_id="p7", prompt=(1, 5, 9), num_samples=4).sampling.temperature
        1.0
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    num_samples: int = 1
    return_experts: bool = False


@dataclass(frozen=True)
class Timings:
    """Where the time of one sample went, in seconds.

    Args:
        queued_s: from the request's arrival to the start of its prefill.
        prefill_s: from there to the sample's first token; the group's for all of its samples.
        decode_s: from the first token to the last, pauses for want of memory among them.
    """

    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Args:
        tokens: the response, the stop token included when finish is "stop".
        logprobs: natural log-probability of each token under the model's untouched distribution
            (temperature 1, nothing filtered), same length as tokens.
        filtered_logprobs: the same under the distribution that was sampled from (temperature,
            top-p, top-k, min-p), renormalised.
        kept_mass: probability, at the sampling temperature, of the set that was kept, per token.
        policy_version: version of the weights that sampled it.
        timings: None where the engine does not measure them.
        experts: [P + R - 1, layers, K] int16 on the CPU, the experts that each token of prompt and
            response chose in each layer, in order of their weight, the last token left out (it
            never entered the model); None unless the request asked for them.
    """

    request_id: str
    sample: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    filtered_logprobs: tuple[float, ...]
    kept_mass: tuple[float, ...]
    finish: Finish
    policy_version: int
    timings: Timings | None = None
    experts: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Token:
    """One token as it is sampled; the last one of a sample carries the whole completion.

    A sample that is cancelled ends with token -1 and the completion of what it had.
    """

    request_id: str
    sample: int
    token: int
    logprob: float
    completion: Completion | None = None


class Engine(Protocol):
    """Anything that samples from a policy and takes new weights for it."""

    policy_version: int

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in the order of the requests, then of the samples."""
        ...

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces weights in place by name; every later completion carries `version`."""
        ...

    def close(self) -> None: ...


class StreamingEngine(Engine, Protocol):
    """An engine that takes requests while others run: what a service drives, one turn at a time."""

    def submit(self, request: Request) -> None:
        """Queues a request; its tokens come out of later turns.

        Raises:
            ValueError: if the request can never fit, or its id is already in flight.
        """
        ...

    def step(self) -> list[Token]:
        """One turn: prefill what is admitted, decode one token of every live sample.

        Empty and free of cost when nothing is in flight.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request: its slots and pages are free at once. An unknown id is an error.

        The next turn tells of it, with token -1 for each of its samples.
        """
        ...

    @property
    def num_in_flight(self) -> int:
        """Samples queued or live."""
        ...
