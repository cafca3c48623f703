"""The proof that an engine samples from the trainer's policy: the same numbers for the same tokens.

A canary is a few prompts. The engine answers them through its ordinary door, prefill and decode;
the trainer scores the answers with its own packed forward; the log-probabilities must agree. What
disagrees stops the run before a step is made of it, and checksums name the tensor.

    rms of all gaps but the two largest <= bound          largest gap <= 50 bound

A fault of weights moves many tokens, rounding few and seldom: in bf16 it may send a token to
another expert, and then that one log-probability differs by tenths of a nat or more. So two tokens
count for nothing but the second bound.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from model import Packed
from rollout.sync import difference
from rollout.types import Completion, Engine, Request, Sampling

# Nats, by the type that is multiplied in. fp32 engines are within 1e-5 of the packed forward at
# every token. bf16's own rounding gives an rms of 1.5e-2, nothing left out, and 0.23 at most (base
# preset, benchmarks/results/rollout.md); 0.06 is four times that rms. Where planted faults lie:
# benchmarks/results/canary.md.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}
NUM_LEFT_OUT = 2
LARGEST_IN_BOUNDS = 50.0
LENGTHS = (3, 17, 70)

Score = Callable[[Sequence[Completion]], Sequence[Sequence[float]]]
Sums = Callable[[], tuple[Mapping[str, str], Mapping[str, str]]]


class ProofError(RuntimeError):
    """The engine does not hold the policy that the trainer thinks it holds."""


@dataclass(frozen=True)
class Canary:
    """What is asked after every push.

    Args:
        prompts: token ids.
        num_tokens: sampled to each prompt.
        bound: of the rms of all gaps but the two largest, in nats; those are held to 50 of it.

    Example:
        >>> [len(prompt) for prompt in Canary.of(100).prompts]
        [3, 17, 70]
    """

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int = 32
    bound: float = BOUNDS[torch.float32]

    @classmethod
    def of(
        cls,
        vocabulary: int,
        *,
        lengths: Sequence[int] = LENGTHS,
        num_tokens: int = 32,
        dtype: torch.dtype = torch.float32,
        bound: float = 0.0,
        max_tokens: int = 0,
    ) -> Canary:
        """Prompts of random tokens, always the same ones.

        Args:
            dtype: that trainer or engine multiply in, whichever is narrower.
            bound: 0 is the type's own.
            max_tokens: longest prompt and response that the engine holds, at least 2; what is
                longer is cut to fit. 0 cuts nothing.
        """
        rng = random.Random(0)
        if max_tokens:
            num_tokens = min(num_tokens, max_tokens // 2)
            lengths = [min(n, max_tokens - num_tokens) for n in lengths]
        prompts = tuple(tuple(rng.randrange(vocabulary) for _ in range(n)) for n in lengths)
        return cls(prompts, num_tokens, bound or BOUNDS[dtype])

    def check(
        self,
        engine: Engine,
        score: Score,
        *,
        version: int,
        sums: Sums | None = None,
        where: str = "engine",
    ) -> float:
        """Asks the engine and the trainer; gives the rms that is held to the bound, in nats.

        Args:
            score: log-probabilities of the tokens of completions under the trainer's policy, as
                `trainer_score`.
            version: that every completion has to carry.
            sums: `checksums` of what was sent and of what is held, asked only in case of trouble.
            where: names the engine in messages.

        Raises:
            ProofError: if the version is another, or the numbers differ by more than the bounds.
        """
        done = self.ask(engine, version=version, where=where)
        return self.compare(done, score(done), version=version, sums=sums, where=where)

    def ask(self, engine: Engine, *, version: int, where: str = "engine") -> list[Completion]:
        """What the engine answers.

        Raises:
            ProofError: if it answers with another version.
        """
        sampling = Sampling(max_new_tokens=self.num_tokens, seed=version)
        requests = [
            Request(f"canary-{version}-{n}", prompt, sampling)
            for n, prompt in enumerate(self.prompts)
        ]
        done = engine.generate(requests)
        stale = next((c for c in done if c.policy_version != version), None)
        if stale is not None:
            raise ProofError(
                f"{where}: the canary came from version {stale.policy_version}, expected "
                f"{version}; the push did not arrive, so its samples would be stale"
            )
        return done

    def compare(
        self,
        done: Sequence[Completion],
        scored: Sequence[Sequence[float]],
        *,
        version: int,
        sums: Sums | None = None,
        where: str = "engine",
    ) -> float:
        """Holds the engine's numbers against the trainer's; gives the rms, in nats, as `check`.

        Raises:
            ProofError: if it or the largest difference is more than its bound.
        """
        gaps = [
            (_gap(here, there), f"{there:.6f} / {here:.6f} at token {place} of {one.request_id!r}")
            for one, row in zip(done, scored, strict=True)
            for place, (here, there) in enumerate(zip(row, one.logprobs, strict=True))
        ]
        gaps.sort(reverse=True)
        counted = [gap for gap, _ in gaps[NUM_LEFT_OUT:]]
        rms = math.sqrt(math.fsum(gap * gap for gap in counted) / max(len(counted), 1))
        largest, at = gaps[0]
        for value, bound, what in (
            (rms, self.bound, f"nats (rms without the {NUM_LEFT_OUT} largest)"),
            (largest, LARGEST_IN_BOUNDS * self.bound, "nats at one token"),
        ):
            if value > bound:
                raise ProofError(
                    f"{where}: log-probabilities of the canary differ from the trainer's by "
                    f"{value:.3g} {what} at version {version}, expected at most {bound:g} "
                    f"(engine / trainer, the largest: {at}); {_culprit(sums)}"
                )
        return rms


def _gap(here: float, there: float) -> float:
    gap = abs(here - there)
    return math.inf if math.isnan(gap) else gap


def _culprit(sums: Sums | None) -> str:
    if sums is None:
        return "compare the checksums of its weights with the trainer's"
    found = difference(*sums())
    if found:
        return f"first differing tensor: {found}"
    return "all checksums agree, so it holds the weights and computes otherwise"


def check_sums(
    sent: Mapping[str, str],
    held: Mapping[str, str],
    *,
    version: int,
    earlier: Mapping[str, str] | None = None,
    base: Mapping[str, str] | None = None,
    where: str = "engine",
) -> None:
    """Holds an engine to what was sent, tensor by tensor.

    Args:
        sent, held, earlier, base: as for `rollout.sync.difference`.

    Raises:
        ProofError: naming the first tensor that differs.
    """
    found = difference(sent, held, earlier=earlier, base=base)
    if found:
        raise ProofError(
            f"{where}: it does not hold version {version}; first differing tensor: {found}"
        )


def trainer_score(model: nn.Module, *, autocast: torch.dtype | None = None) -> Score:
    """Scores completions with one packed forward at temperature 1, as a trainer's step does.

    Args:
        model: the trainer's policy, adapters on.
        autocast: type of the forward on wider weights; None multiplies them as they are.
    """

    @torch.no_grad()
    def score(completions: Sequence[Completion]) -> list[list[float]]:
        device = next(model.parameters()).device
        rows = [completion.prompt + completion.tokens for completion in completions]
        packed = Packed.from_sequences(rows, device=device)
        targets = torch.tensor([t for row in rows for t in (*row[1:], 0)], device=device)
        was_training = model.training
        model.eval()
        try:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logprobs = model(packed=packed, targets=targets).logprobs.tolist()
        finally:
            model.train(was_training)
        found, start = [], 0
        for row, completion in zip(rows, completions, strict=True):
            end = start + len(row) - 1
            found.append(logprobs[end - len(completion.tokens) : end])
            start += len(row)
        return found

    return score
