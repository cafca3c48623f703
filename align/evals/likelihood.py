"""Log-probabilities that a policy gives to known sequences, in packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from align.data.batch import Batch, Example
from align.losses.dpo import sequence_logprobs
from model import HybridForCausalLM


@torch.no_grad()
def example_logprobs(
    model: HybridForCausalLM, examples: Sequence[Example], *, batch_tokens: int
) -> list[float]:
    """Weighted sum of the log-probabilities of each example's trained tokens, in nats.

    Args:
        model: in any mode; scored in eval mode and put back.
        examples: in any order; a batch holds neighbours.
        batch_tokens: tokens per forward pass; an example longer than this goes alone.
    """
    was_training = model.training
    model.eval()
    sums: list[float] = []
    for group in token_batches(examples, batch_tokens):
        batch = Batch.from_examples(group).to(model.device)
        output = model(packed=batch.packed, targets=batch.targets)
        per_sequence = sequence_logprobs(output.logprobs, batch.weights, batch.packed.lengths)
        sums.extend(per_sequence.tolist())
    model.train(was_training)
    return sums


def token_batches(examples: Sequence[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Neighbouring examples of at most `batch_tokens` tokens together, in order.

    Example:
        >>> example = Example((1, 2, 3), (0.0, 1.0, 1.0), "a:1")
        >>> [len(group) for group in token_batches([example] * 5, 6)]
        [2, 2, 1]
    """
    group: list[Example] = []
    size = 0
    for example in examples:
        if group and size + len(example.tokens) > batch_tokens:
            yield group
            group, size = [], 0
        group.append(example)
        size += len(example.tokens)
    if group:
        yield group
