"""The truth ledger: how far the engine's numbers are from the trainer's, before any bound or mask.

With r = pi_trainer / pi_engine per trained token, at the first update after sampling. What is kept
per microbatch is one vector of sums, so microbatches and processes add up exactly and the host
reads them with everything else once a line; ratios of sums are made only then.

    correlation   of the probabilities that both give the sampled tokens; 1 is the same policy
    ess           (sum w)^2 / (n sum w^2): share of tokens, or responses, that importance weights
                  w = r leave in effect
    gap_p50 ...   quantiles of |log r|, rounded up to an eighth of a decade
    gap_over_...  its histogram, as the share of tokens beyond each decade
    outside       share of tokens beyond the bounds of the loss; dropped: beyond drop_ratio
    router        share of the engine's recorded experts that the trainer chose as well
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from align.losses.policy import OBJECTIVES, PolicyLossConfig
from model.kernels.experts.router import route
from model.packed import sent

# |log r| from 1e-7, where fp32 ends, to 10
STEPS, LOWEST, DECADES = 8, -7, 8
EDGES = tuple(10 ** (LOWEST + n / STEPS) for n in range(STEPS * DECADES + 1))
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
LARGEST_LOG = 20.0
FIELDS = (
    *("tokens", "engine", "trainer", "engine_2", "trainer_2", "both"),
    *("log_ratio", "weight", "weight_2", "outside", "dropped"),
    *("sequences", "whole", "whole_2", "shared", "recorded"),
)


@torch.no_grad()
def entries(
    logprobs: Tensor,
    engine: Tensor,
    *,
    advantages: Tensor,
    weights: Tensor,
    lengths: Sequence[int],
    config: PolicyLossConfig,
    experts: Tensor | None = None,
    router_logits: Sequence[Tensor] = (),
) -> Tensor:
    """The sums of one microbatch: [len(FIELDS) + len(EDGES) + 1] fp64.

    Args:
        logprobs, engine: [T] fp32 natural log-probabilities of the targets, trainer's and engine's,
            both at the sampling temperature with nothing filtered.
        advantages, weights: [T] fp32; weights are 1 on trained tokens, else 0.
        lengths: tokens of each sequence, sum T.
        config: of the loss, for its bounds.
        experts: [T, layers, K] integers as recorded, -1 where not; None without.
        router_logits: [T, E] a layer, of the same tokens; used with experts.

    Example:
        >>> found = entries(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]),
        ...     advantages=torch.ones(2), weights=torch.ones(2), lengths=(2,),
        ...     config=PolicyLossConfig())
        >>> line = ledger_line(found.tolist())
        >>> line["ledger/outside"], round(line["ledger/log_ratio"], 3)
        (0.5, 0.25)
    """
    trained = (weights != 0).double()
    here, there = logprobs.detach().double(), engine.double()
    log_ratio = ((here - there) * trained).clamp(-LARGEST_LOG, LARGEST_LOG)
    ratio = log_ratio.exp()
    x, y = there.exp() * trained, here.exp() * trained
    sizes = sent(torch.tensor(tuple(lengths)), weights.device)
    of_sequence = torch.segment_reduce(
        torch.stack([log_ratio, trained], dim=1), "sum", lengths=sizes, unsafe=True, axis=0
    )
    is_there = (of_sequence[:, 1] > 0).double()
    whole = of_sequence[:, 0].clamp(-LARGEST_LOG, LARGEST_LOG).exp() * is_there
    dropped = torch.zeros_like(trained)
    if config.drop_ratio:
        dropped = ((ratio > config.drop_ratio) & (advantages < 0)).double() * trained
    shared, recorded = _shared(experts, router_logits, trained)
    sums = (
        *(trained.sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()),
        *(log_ratio.sum(), (ratio * trained).sum(), (ratio.square() * trained).sum()),
        *((_outside(ratio, config) * trained).sum(), dropped.sum()),
        *(is_there.sum(), whole.sum(), whole.square().sum(), shared, recorded),
    )
    edges = sent(torch.tensor(EDGES, dtype=torch.float64), weights.device)
    places = torch.bucketize(log_ratio.abs(), edges)
    counts = torch.zeros(len(EDGES) + 1, dtype=torch.float64, device=weights.device)
    return torch.cat([torch.stack(sums), counts.index_add_(0, places, trained)])


def _outside(ratio: Tensor, config: PolicyLossConfig) -> Tensor:
    if OBJECTIVES[config.objective][0] == "cispo":
        return (ratio > config.is_max).double()
    return ((ratio < 1 - config.epsilon_low) | (ratio > 1 + config.epsilon_high)).double()


def _shared(
    experts: Tensor | None, router_logits: Sequence[Tensor], trained: Tensor
) -> tuple[Tensor, Tensor]:
    """How many recorded experts of trained tokens the trainer's router chose too, and of how many.

    The token that predicts a trained one is meant: its experts made the log-probability.
    """
    nothing = trained.new_zeros(())
    if experts is None or not router_logits:
        return nothing, nothing
    top_k = experts.shape[-1]
    # [T, layers, K]
    own = torch.stack([route(logits, top_k)[1] for logits in router_logits], dim=1)
    is_shared = (experts.long()[..., None] == own[..., None, :]).any(-1)
    counted = (experts >= 0) * trained[:, None, None]
    return (is_shared * counted).sum(), counted.sum()


def ledger_line(sums: Sequence[float]) -> dict[str, float]:
    """What the sums say, for a line of metrics; a number that nothing was counted for is absent."""
    if not sums or not sums[0]:
        return {}
    at = dict(zip(FIELDS, sums, strict=False))
    counts, n = sums[len(FIELDS) :], at["tokens"]
    line = {
        "log_ratio": at["log_ratio"] / n,
        "ratio": at["weight"] / n,
        "ess_tokens": at["weight"] ** 2 / (n * at["weight_2"]),
        "ess_responses": at["whole"] ** 2 / (at["sequences"] * at["whole_2"]),
        "outside": at["outside"] / n,
        "dropped": at["dropped"] / n,
    }
    spread = (n * at["engine_2"] - at["engine"] ** 2) * (n * at["trainer_2"] - at["trainer"] ** 2)
    if spread > 0:
        moved = n * at["both"] - at["engine"] * at["trainer"]
        line["correlation"] = min(1.0, moved / math.sqrt(spread))
    if at["recorded"]:
        line["router"] = at["shared"] / at["recorded"]
    for name, share in QUANTILES.items():
        line[f"gap_{name}"] = _quantile(counts, share * n)
    for decade in range(LOWEST + 1, 1):
        first = (decade - LOWEST) * STEPS + 1
        line[f"gap_over_1e{decade}"] = sum(counts[first:]) / n
    return {f"ledger/{name}": value for name, value in line.items()}


def _quantile(counts: Sequence[float], wanted: float) -> float:
    seen = 0.0
    for count, edge in zip(counts, (*EDGES, math.inf), strict=True):
        seen += count
        if seen >= wanted:
            return edge
    return math.inf


COLUMNS = {
    "step": "step",
    "ledger/correlation": "correlation",
    "ledger/gap_p50": "gap p50",
    "ledger/gap_p99": "gap p99",
    "engine/gap_max": "gap max",
    "ledger/ratio": "ratio",
    "ledger/ess_tokens": "ess tokens",
    "ledger/ess_responses": "ess responses",
    "ledger/outside": "outside",
    "ledger/dropped": "dropped",
    "rollout/kept_mass": "kept mass",
    "ledger/router": "router",
    "rollout/staleness": "staleness",
}


def ledger_table(folder: Path) -> Table:
    """The ledger of a stage, a line a step, from its metrics.jsonl.

    Raises:
        ValueError: if there is no such file, or no line of it holds a ledger.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: no such file; give the folder of a grpo stage")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if "ledger/ratio" in line]
    if not kept:
        raise ValueError(f"{path}: no line holds a ledger; only grpo stages keep one")
    table = Table()
    shown = [key for key in COLUMNS if any(key in line for line in kept)]
    for key in shown:
        table.add_column(COLUMNS[key], justify="right")
    for line in kept:
        table.add_row(*(f"{line[k]:.6g}" if line.get(k) is not None else "" for k in shown))
    return table
