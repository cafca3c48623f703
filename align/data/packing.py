"""Examples into sequences of a fixed capacity, in order, none split and none moved."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[range]:
    """Runs of neighbouring items that fit into one sequence each, filled from left to right.

    Order is kept, because curricula and document order are meant; so a sequence ends as soon as the
    next item does not fit.

    Args:
        lengths: tokens of each item, >= 1; a pair counts as one item of both lengths.
        capacity: most tokens of one sequence.

    Raises:
        ValueError: if an item is longer than the capacity.

    Example:
        >>> pack([3, 4, 5, 1], capacity=8)
        [range(0, 2), range(2, 4)]
    """
    runs: list[range] = []
    start = used = 0
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"item {index} has {length} tokens, expected 1 to sequence_tokens = {capacity}; "
                "raise sequence_tokens or set too_long: skip on its source"
            )
        if used + length > capacity:
            runs.append(range(start, index))
            start, used = index, 0
        used += length
    if used:
        runs.append(range(start, len(lengths)))
    return runs
