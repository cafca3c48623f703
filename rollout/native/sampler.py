"""From logits to one token a row, with what the token's probability was before and after filtering.

The random number of a token is a hash of (seed, sample, position), not the next number of a stream:

    u = hash(seed, sample, position) in [0, 1)
    token = the first i with cumsum(p)_i > u * cumsum(p)_V

so a token depends on its own logits only, whatever else is in the batch, in whatever order, and a
killed run samples the same text again. What remains is arithmetic: a matrix product may round a
row's logits otherwise in a batch of another size, and on CUDA a kernel sums a row, but torch where
some row of the batch is filtered. That moves a border of the cumulative sum by about 1e-7, so a
token differs only if u falls between the two borders, i.e. if two tokens tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.draw.op import at_temperature, draw_tokens, pick
from model.kernels.draw.splitmix import MASK_63, uniform
from rollout.types import Sampling


@dataclass(frozen=True)
class Knobs:
    """How each of N rows is sampled, as tensors on the logits' device.

    Args:
        temperature, top_p, min_p: [N] fp32, as in `rollout.types.Sampling`.
        top_k: [N] int64; 0 keeps all.
        seed, sample: [N] int64; with a token's position they are its random number.
        greedy: whether any row has temperature 0.
        tempered: whether any row has a temperature other than 0 and 1.
        filtered: whether any row keeps less than the whole vocabulary.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seed: Tensor
    sample: Tensor
    greedy: bool
    tempered: bool
    filtered: bool

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Sampling, int]], *, device: torch.device | str = "cpu"
    ) -> Knobs:
        """One row per (sampling, index of the sample in its group).

        Example:
            >>> Knobs.of([(Sampling(temperature=0.0), 0), (Sampling(top_k=5), 1)]).top_k.tolist()
            [0, 5]
        """

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        samplings = [sampling for sampling, _ in rows]
        greedy, tempered, filtered = cls.flags(samplings)
        return cls(
            temperature=floats([s.temperature for s in samplings]),
            top_p=floats([s.top_p for s in samplings]),
            min_p=floats([s.min_p for s in samplings]),
            top_k=integers([s.top_k for s in samplings]),
            seed=integers([s.seed & MASK_63 for s in samplings]),
            sample=integers([sample for _, sample in rows]),
            greedy=greedy,
            tempered=tempered,
            filtered=filtered,
        )

    @staticmethod
    def flags(samplings: Sequence[Sampling]) -> tuple[bool, bool, bool]:
        """greedy, tempered and filtered of rows with these settings."""
        return (
            any(s.temperature == 0 for s in samplings),
            any(s.temperature not in (0, 1) for s in samplings),
            any(
                s.temperature > 0 and (s.top_p < 1 or s.top_k > 0 or s.min_p > 0) for s in samplings
            ),
        )


@dataclass(frozen=True)
class Drawn:
    """One token a row.

    Args:
        tokens: [N] int64.
        logprobs: [N] in the dtype of the logits, as the next two; natural log-probability at
            temperature 1 with nothing filtered.
        filtered_logprobs: [N], under the distribution that was sampled from; 0 if greedy.
        kept_mass: [N] in (0, 1], probability at the sampling temperature of the kept set.
    """

    tokens: Tensor
    logprobs: Tensor
    filtered_logprobs: Tensor
    kept_mass: Tensor


def kept(probabilities: Tensor, knobs: Knobs) -> Tensor:
    """[N, V] bool: what top-k, then top-p of what is left, then min-p keep; never empty.

    Equal probabilities are kept in order of their token id, so exactly k survive top-k.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    limit = torch.where(knobs.top_k > 0, knobs.top_k, ordered.shape[-1])
    keep = rank < limit[:, None]
    ordered = ordered * keep
    ordered = ordered / ordered.sum(-1, keepdim=True)
    # a token stays while the mass before it has not reached top_p: the smallest sufficient set
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    top_p = knobs.top_p[:, None]
    keep &= (before < top_p) | (top_p >= 1)
    keep &= ordered >= knobs.min_p[:, None] * ordered[:, :1]
    return torch.zeros_like(keep).scatter(-1, order, keep)


def draw(logits: Tensor, knobs: Knobs, positions: Tensor) -> Drawn:
    """One token a row by inverse transform sampling.

    Args:
        logits: [N, V] fp32 or fp64.
        knobs: N rows.
        positions: [N] int64, index of the token in its response, the third counter of its hash.

    A row of nan, or of -inf only, gives a logprob of nan (`refuse_broken`): nothing here waits for
    the device.
    """
    counters = knobs.seed, knobs.sample, positions
    if not knobs.filtered:
        tokens, logprobs, drawn = draw_tokens(
            logits, knobs.temperature, *counters, greedy=knobs.greedy, tempered=knobs.tempered
        )
        return Drawn(tokens, logprobs, drawn, torch.ones_like(logprobs))
    untouched, tempered = at_temperature(logits, knobs.temperature, tempered=knobs.tempered)
    probabilities = tempered.exp()
    tokens, mass = pick(probabilities * kept(probabilities, knobs), uniform(*counters))
    filtered = tempered.gather(-1, tokens[:, None])[:, 0]
    # a row that keeps all has mass 1, not the rounded sum that a neighbour's filter asks for
    keeps_all = (knobs.top_p >= 1) & (knobs.top_k == 0) & (knobs.min_p == 0)
    kept_mass = torch.where(keeps_all, 1.0, mass.to(logits.dtype))
    filtered = torch.where(keeps_all, filtered, (filtered.double() - mass.log()).to(logits.dtype))
    if knobs.greedy:
        is_greedy = knobs.temperature == 0
        tokens = torch.where(is_greedy, logits.argmax(-1), tokens)
        filtered = torch.where(is_greedy, 0.0, filtered)
        kept_mass = torch.where(is_greedy, 1.0, kept_mass)
    logprobs = untouched.gather(-1, tokens[:, None])[:, 0]
    return Drawn(tokens, logprobs, filtered, kept_mass)


def refuse_broken(logprobs: Sequence[float]) -> None:
    """Raises RuntimeError if a drawn token's log-probability is nan: a broken model."""
    for row, logprob in enumerate(logprobs):
        if math.isnan(logprob):
            raise RuntimeError(
                f"sampler: row {row} of the logits has no finite distribution (nan, or all -inf); "
                "the weights are broken: look at the last update's loss and gradient norm"
            )
